"""``ospnext train``: from the command to a pipeline that samples, resumed exactly; clear words for what is wrong."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import ByT5Tokenizer

from ospnext.checkpoints import memory
from ospnext.cli import main
from ospnext.config import load_config
from ospnext.flow.path import dynamic_shift
from ospnext.generate.pipeline import OSPNextPipeline
from ospnext.models.text import small_text_encoder
from ospnext.train.settings import NoiseConfig, TrainConfig
from ospnext.train.sft import build, velocity_loss

ARCHITECTURE = {
    "dim": 32,
    "ffn_dim": 64,
    "freq_dim": 16,
    "text_dim": 32,
    "text_len": 128,
    "in_dim": 4,
    "out_dim": 4,
    "num_heads": 2,
    "num_layers": 4,
    "skiparse_model_type": "dual_end",
    "num_full_blocks": 0,
}
SETTINGS = {
    "device": "cpu",
    "weight_dtype": "fp32",
    **{f"model_config.{key}": value for key, value in ARCHITECTURE.items()},
    "train_text_encoder": True,
    "data_config.dataset_name": "shapes",
    "data_config.batch_size": 4,
    "data_config.dataset_config.num_clips": 6,
    "data_config.dataset_config.sample_num_frames": 5,
    "data_config.dataset_config.sample_height": 32,
    "data_config.dataset_config.sample_width": 48,
    "optimizer_config.lr": 0.01,
    "scheduler_config.use_logitnorm_time_sampling": True,
    "training_iteration": 5,
    "warmup_steps": 2,
    "save_interval": 3,
    "ema_decay": 0.9,
    "gradient_accumulation_steps": 2,
}


def words(folder: Path, vae: Path | None, **settings: object) -> list[str]:
    """A command line for a tiny run; settings are by dotted key, with __ for the dot."""
    given = SETTINGS | {key.replace("__", "."): value for key, value in settings.items()}
    if vae is not None:
        given["vae_config.vae_path"] = str(vae)
    return [f"{key}={value}" for key, value in given.items()] + [f"output_dir={folder}"]


def train(folder: Path, vae: Path | None, **settings: object) -> int:
    return main(["train", *words(folder, vae, **settings)])


def read_log(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds_per_step"} for line in lines]


def test_a_run_ends_with_a_pipeline_that_samples(tmp_path, vae_folder, capsys):
    assert train(tmp_path / "run", vae_folder) == 0
    said, complaints = capsys.readouterr()
    assert "Writing model shards" not in complaints
    assert "transformer 0." in said
    assert "text_encoder 0." in said
    assert "one process, 8 clips a step" in said
    assert "float32 weights, float32 arithmetic; latents in float32" in said
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1, 2, 3, 4, 5]
    pipe = OSPNextPipeline.from_pretrained(tmp_path / "run/pipeline")
    assert pipe.config.negative_prompt == ""
    assert dict(pipe.transformer.config).items() >= ARCHITECTURE.items()
    pipe.set_progress_bar_config(disable=True)
    frames = pipe("A red star spins.", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).frames
    assert frames.shape == (1, 5, 32, 48, 3)  # the size it was trained on
    assert pipe.sampling_defaults["guidance_scale"] > 1
    average = load_file(tmp_path / "run/iter_000000005/transformer.ema.safetensors")
    for key, p in pipe.transformer.named_parameters():
        assert torch.equal(p, average[key])
    shipped, trained = pipe.vae.state_dict(), load_file(vae_folder / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(shipped[key], trained[key]) for key in trained)


def test_further_training_starts_from_the_model_and_says_what_it_does_not_read(tmp_path, vae_folder, capsys):
    assert train(tmp_path / "first", vae_folder) == 0
    capsys.readouterr()
    model = tmp_path / "first/pipeline"
    assert train(tmp_path / "second", vae_folder, model=model, optimizer_config__lr=1e-30) == 0
    assert f"every network comes from model={model}; not read: vae_config.vae_path" in capsys.readouterr().out
    before, after = (load_file(tmp_path / f"{run}/iter_000000005/transformer{suffix}.safetensors")
                     for run, suffix in (("first", ".ema"), ("second", "")))  # fmt: skip
    assert all(torch.allclose(before[key], after[key], atol=1e-7) for key in before)


def test_a_killed_run_goes_on_exactly(tmp_path, vae_folder, capsys):
    assert train(tmp_path / "whole", vae_folder) == 0
    # As if it had been killed after step 4: the state of step 3 is there, and the log is one line ahead of it.
    (tmp_path / "killed").mkdir()
    (tmp_path / "whole/iter_000000003").rename(tmp_path / "killed/iter_000000003")
    log = (tmp_path / "whole/train_log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "killed/train_log.jsonl").write_text("".join(log[:4]))
    (tmp_path / "killed/.iter_000000004.tmp").mkdir()
    capsys.readouterr()
    assert train(tmp_path / "killed", vae_folder) == 0
    assert f"resumed from {tmp_path / 'killed/iter_000000003'}: step 3 of 5" in capsys.readouterr().out
    one, other = (tmp_path / name / "iter_000000005" for name in ("whole", "killed"))
    for name in ("transformer", "transformer.ema", "text_encoder", "text_encoder.ema"):
        mine, theirs = (load_file(folder / f"{name}.safetensors") for folder in (one, other))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), name
    mine, theirs = (torch.load(folder / "optimiser.pt", weights_only=True) for folder in (one, other))
    assert torch.equal(mine["generator"], theirs["generator"])
    for i, moments in mine["optimiser"]["state"].items():
        assert all(torch.equal(value, theirs["optimiser"]["state"][i][key]) for key, value in moments.items())
    assert (one / "state.json").read_text() == (other / "state.json").read_text()
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "killed")


def test_a_budget_that_is_spent_leaves_a_pipeline_and_goes_on_exactly(tmp_path, vae_folder, capsys):
    assert train(tmp_path / "whole", vae_folder) == 0
    assert train(tmp_path / "pieces", vae_folder, time_budget_minutes=1e-6) == 0
    assert "stopped at step 0 of 5: start again to go on" in capsys.readouterr().out
    OSPNextPipeline.from_pretrained(tmp_path / "pieces/pipeline")  # half-trained, but whole
    assert train(tmp_path / "pieces", vae_folder) == 0
    for name in ("transformer.ema.safetensors", "text_encoder.safetensors"):
        one, other = (load_file(tmp_path / folder / "iter_000000005" / name) for folder in ("whole", "pieces"))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_frozen_text_encoder_stays_as_it_was(tmp_path, vae_folder):
    torch.manual_seed(1)
    small_text_encoder(32, len(ByT5Tokenizer())).save_pretrained(tmp_path / "text_encoder")
    frozen = {"train_text_encoder": False, "text_encoder_config__checkpoint_path": tmp_path / "text_encoder"}
    assert train(tmp_path / "run", vae_folder, **frozen) == 0
    given = load_file(tmp_path / "text_encoder/model.safetensors")
    kept = load_file(tmp_path / "run/pipeline/text_encoder/model.safetensors")
    assert given.keys() == kept.keys()
    assert all(torch.equal(given[key], kept[key]) for key in given)
    assert not (tmp_path / "run/iter_000000005/text_encoder.safetensors").exists()


@pytest.mark.parametrize("way", ["sections", "model"])
def test_training_starts_from_given_weights(tmp_path, vae_folder, way):
    assert train(tmp_path / "first", vae_folder) == 0
    again = {
        "model_config__pretrained_model_dir_or_checkpoint": tmp_path / "first/pipeline",
        "text_encoder_config__checkpoint_path": tmp_path / "first/pipeline",
        "text_encoder_config__text_tokenizer_path": tmp_path / "first/pipeline/tokenizer",
    }
    if way == "model":
        again = {"model": tmp_path / "first/pipeline"}
    assert train(tmp_path / "second", vae_folder, **again, training_iteration=1, optimizer_config__lr=1e-12) == 0
    for part in ("transformer/diffusion_pytorch_model", "text_encoder/model"):
        one, other = (load_file(tmp_path / run / "pipeline" / f"{part}.safetensors") for run in ("first", "second"))
        for key, tensor in one.items():
            torch.testing.assert_close(tensor, other[key], rtol=0, atol=1e-6)


def test_checkpointed_gradients_are_the_same(tmp_path, vae_folder):
    for name, checkpointing in (("plain", False), ("again", True)):
        assert train(tmp_path / name, vae_folder, gradient_checkpointing=checkpointing) == 0
    one, other = (load_file(tmp_path / name / "iter_000000005/transformer.safetensors") for name in ("plain", "again"))
    for key, tensor in one.items():
        torch.testing.assert_close(tensor, other[key])


class Oracle(torch.nn.Module):
    """Records what it is asked, and answers with a constant."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        self.x, self.t = x, t
        return (torch.full_like(x, 0.5),)


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_loss_is_that_of_the_straight_path(dynamic):
    latents = torch.randn(64, 4, 3, 8, 8)
    oracle = Oracle()
    noise = NoiseConfig(shift=3.0, use_dynamic_shifting=dynamic)
    loss = velocity_loss(oracle, latents, torch.zeros(64, 1, 1), noise, torch.Generator().manual_seed(0))["loss"]
    sigma = (oracle.t / 1000).view(-1, 1, 1, 1, 1)
    assert sigma.min() > 0
    assert sigma.max() <= 1
    epsilon = (oracle.x - (1 - sigma) * latents) / sigma  # what noise must have been
    kept = sigma.flatten() > 0.05
    torch.testing.assert_close(loss, (0.5 - (epsilon - latents)).square().mean(), rtol=0.02, atol=0)
    assert epsilon[kept].std().item() == pytest.approx(1, abs=0.02)
    shift = dynamic_shift(16) if dynamic else 3.0
    level = sigma.flatten() / (shift - (shift - 1) * sigma.flatten())  # the shift undone: uniform
    assert level.mean().item() == pytest.approx(0.5, abs=0.12)


def test_training_teaches(tmp_path, vae_folder):
    longer = {"training_iteration": 40, "log_interval": 10, "gradient_accumulation_steps": 1}
    assert train(tmp_path / "run", vae_folder, **longer) == 0
    losses = [line["loss"] for line in read_log(tmp_path / "run")]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data_config__dataset_name": "videos"}, "dataset_name is 'videos'"),
        ({"data_config__dataset_name": "t2v_random"}, "dataset_name is 't2v_random'"),
        ({"train_text_encoder": False}, "text_encoder_config.checkpoint_path is missing"),
        ({"vae_config__vae_path": "nowhere/vae"}, "nowhere/vae"),
        ({"model_config__in_dim": 16}, "model_config.in_dim is 16, but the VAE's latent channels 4"),
        ({"model_config__out_dim": 8}, "model_config.out_dim is 8"),
        ({"data_config__dataset_config__sample_num_frames": 6}, "sample_num_frames is 6: these networks need 4k + 1"),
        ({"data_config__dataset_config__sample_width": 40}, "sample_width is 40: these networks need a multiple of 16"),
        ({"data_config__dataset_config__num_clips": 10**12}, "num_clips is 1000000000000, but should be"),
        ({"optimizer_config__learning_rate": 1}, "unknown key 'optimizer_config.learning_rate'"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_trained(tmp_path, vae_folder, capsys, settings, said):
    path = None if "vae_config__vae_path" in settings else vae_folder
    assert train(tmp_path / "run", path, **settings) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "run").glob("*"))


def test_clips_that_do_not_fit_in_memory_are_refused_before_they_are_rendered(
    tmp_path, vae_folder, capsys, monkeypatch
):
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**6)
    assert train(tmp_path / "run", vae_folder, data_config__dataset_config__num_clips=10**6) == 2
    assert "a pool of 1000000 clips: needs" in capsys.readouterr().err


def test_a_missing_vae_is_named(tmp_path, capsys):
    assert train(tmp_path / "run", None) == 2
    assert "vae_config.vae_path is missing" in capsys.readouterr().err


def test_a_text_encoder_of_another_width_is_named(tmp_path, vae_folder, capsys):
    small_text_encoder(64, len(ByT5Tokenizer())).save_pretrained(tmp_path / "wide")
    assert train(tmp_path / "run", vae_folder, text_encoder_config__checkpoint_path=tmp_path / "wide") == 2
    assert "text_dim is 32, but the text encoder's width 64" in capsys.readouterr().err


def test_a_folder_of_another_architecture_is_refused_and_kept(tmp_path, vae_folder, capsys):
    assert train(tmp_path / "run", vae_folder) == 0
    before = sorted(str(p.relative_to(tmp_path)) for p in (tmp_path / "run").rglob("*"))
    for other in ({"model_config__dim": 64}, {"model_config__num_layers": 6}, {"training_iteration": 9, "seed": 1}):
        capsys.readouterr()
        code = train(tmp_path / "run", vae_folder, **other)
        if "seed" in other:  # the same network: its random numbers go on
            assert code == 0
            continue
        assert code == 2
        error = capsys.readouterr().err
        assert "iter_000000005 is the state of another run" in error
        assert "output_dir" in error
        assert sorted(str(p.relative_to(tmp_path)) for p in (tmp_path / "run").rglob("*")) == before


def test_output_that_cannot_be_written_is_said_first(tmp_path, vae_folder, capsys):
    (tmp_path / "file").touch()
    assert train(tmp_path / "file", vae_folder) == 2
    assert "output_dir" in capsys.readouterr().err


def test_all_of_a_new_transformer_is_initialised(tmp_path, vae_folder):
    config = load_config(TrainConfig, None, words(tmp_path, vae_folder))
    one, other = (build(config, torch.device("cpu")).transformer for _ in range(2))
    assert all(p.isfinite().all() for p in one.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    torch.manual_seed(config.seed)
    again = build(config, torch.device("cpu")).transformer
    torch.manual_seed(config.seed)
    same = build(config, torch.device("cpu")).transformer
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), same.parameters(), strict=True))


def test_hif8_training_resumes_exactly_and_says_so(tmp_path, vae_folder, capsys):
    quant = {"model_config__quant": "hif8", "model_config__quant_attn": "hif8", "train_text_encoder": "true"}
    assert train(tmp_path / "whole", vae_folder, **quant) == 0
    assert "8 bits: hif8: 40 linears (emulation, scale by tensor), 8 attentions" in capsys.readouterr().out
    assert train(tmp_path / "parts", vae_folder, **quant, training_iteration=3) == 0
    assert train(tmp_path / "parts", vae_folder, **quant) == 0
    assert read_log(tmp_path / "parts") == read_log(tmp_path / "whole")
    assert train(tmp_path / "plain", vae_folder) == 0
    quantised, plain = (read_log(tmp_path / name)[-1]["loss"] for name in ("whole", "plain"))
    assert quantised != plain
    assert abs(quantised - plain) < 0.05 * plain
    config = json.loads((tmp_path / "whole/pipeline/transformer/config.json").read_text())
    assert (config["quant"], config["scale_max_backward"]) == ("hif8", 224.0)
    assert main(["quantize", str(tmp_path / "whole/pipeline"), str(tmp_path / "small")]) == 0
    again = ["vae_config.vae_path=null", "train_text_encoder=false", f"model={tmp_path / 'small'}"]
    assert main(["train", *words(tmp_path / "on", None, training_iteration=1), *again[1:]]) == 0
