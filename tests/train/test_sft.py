"""``ospnext train``: from the command to a pipeline that samples, resumed exactly; clear words for what is wrong."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from saved_states import read_state
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode
from transformers import ByT5Tokenizer

from ospnext.checkpoints import memory
from ospnext.checkpoints.load import load_transformer
from ospnext.cli import main
from ospnext.config import load_config
from ospnext.flow.path import dynamic_shift
from ospnext.generate.pipeline import OSPNextPipeline
from ospnext.models.text import small_text_encoder
from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.parallel.launch import Launch
from ospnext.quant.running import AMAX, buffers
from ospnext.train.flops import training_flops
from ospnext.train.folder import changed_settings
from ospnext.train.job import settle
from ospnext.train.networks import arrange, build
from ospnext.train.noise import add_noise
from ospnext.train.settings import NoiseConfig, TrainConfig
from ospnext.train.sft import velocity_loss

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


DYNAMIC = {"scheduler_config__use_dynamic_shifting": True}
MEASURED = ("seconds_per_step", "memory_gib", "tokens_per_second", "tflops_per_second", "flops_utilisation")


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
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def test_a_run_ends_with_a_pipeline_that_samples(tmp_path, vae_folder, capsys):
    assert train(tmp_path / "run", vae_folder) == 0
    said, complaints = capsys.readouterr()
    assert "Writing model shards" not in complaints
    assert "transformer 0." in said
    assert "text_encoder 0." in said
    assert "one process; blocks not checkpointed, not compiled; 8 clips a step" in said
    assert "float32 weights, float32 arithmetic; latents in float32" in said
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1, 2, 3, 4, 5]
    pipe = OSPNextPipeline.from_pretrained(tmp_path / "run/pipeline")
    assert pipe.config.negative_prompt == ""
    assert dict(pipe.transformer.config).items() >= ARCHITECTURE.items()
    pipe.set_progress_bar_config(disable=True)
    frames = pipe("A red star spins.", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).frames
    assert frames.shape == (1, 5, 32, 48, 3)  # the size it was trained on
    assert pipe.sampling_defaults["guidance_scale"] > 1
    average = read_state(tmp_path / "run/iter_000000005", "average.transformer.")
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
    before, after = (
        read_state(tmp_path / f"{run}/iter_000000005", f"{kind}.transformer.")
        for run, kind in (("first", "average"), ("second", "live"))
    )
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
    mine, theirs = read_state(one, ""), read_state(other, "")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert (one / "record.json").read_text() == (other / "record.json").read_text()
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "killed")


def test_a_budget_that_is_spent_leaves_a_pipeline_and_goes_on_exactly(tmp_path, vae_folder, capsys):
    assert train(tmp_path / "whole", vae_folder) == 0
    assert train(tmp_path / "pieces", vae_folder, time_budget_minutes=1e-6) == 0
    assert "stopped at step 0 of 5: start again to go on" in capsys.readouterr().out
    OSPNextPipeline.from_pretrained(tmp_path / "pieces/pipeline")  # half-trained, but whole
    assert train(tmp_path / "pieces", vae_folder) == 0
    one, other = (read_state(tmp_path / folder / "iter_000000005", "") for folder in ("whole", "pieces"))
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
    assert not read_state(tmp_path / "run/iter_000000005", "live.text_encoder.")


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


def test_checkpointed_gradients_are_the_same(tmp_path, vae_folder, capsys):
    ways = {"plain": {}, "all": {"gradient_checkpointing": True}}
    ways["some"] = ways["all"] | {"selective_checkpointing": 0.5}
    for name, settings in ways.items():
        assert train(tmp_path / name, vae_folder, **settings) == 0
    said = capsys.readouterr().out
    assert "blocks checkpointed, not compiled" in said
    assert "blocks 50% of them checkpointed, not compiled" in said
    one, *others = (read_state(tmp_path / name / "iter_000000005") for name in ways)
    for key, tensor in one.items():
        for other in others:
            torch.testing.assert_close(tensor, other[key])
    assert train(tmp_path / "run", vae_folder, selective_checkpointing=0.5) == 2
    assert "gradient_checkpointing is off" in capsys.readouterr().err


@pytest.mark.parametrize(("share", "blocks"), [(1, 8), (0.5, 4), (0.25, 2), (0.7, 5), (0.01, 0)])
def test_a_share_of_the_blocks_is_run_again(share, blocks):
    model = OSPNextTransformer3DModel(**ARCHITECTURE | {"num_layers": 8}).train()
    torch.nn.init.normal_(model.head.head.weight)
    runs = [0] * 8
    for i, block in enumerate(model.blocks):
        block.ffn.register_forward_pre_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    model.checkpoint_blocks(share)
    model(torch.randn(1, 4, 2, 8, 8), torch.rand(1), torch.randn(1, 128, 32))[0].sum().backward()
    assert sum(runs) == 8 + blocks
    again = [i for i in range(8) if runs[i] == 2]
    gaps = [b - a for a, b in pairwise(again)]
    assert max(gaps, default=0) - min(gaps, default=0) <= 1


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
    losses = velocity_loss(oracle, add_noise(latents, range(64), noise), torch.zeros(64, 1, 1))
    loss = losses["loss"]
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
    pairs = [value for name, value in losses.items() if name.startswith("loss_sigma")]
    assert len(pairs) == 4
    assert sum(pairs)[1] == 64
    torch.testing.assert_close(sum(pairs)[0] / 64, loss)
    low = losses["loss_sigma_0.25_0.50"]
    within = (sigma.flatten() > 0.25) & (sigma.flatten() <= 0.5)
    assert low[1] == within.sum()


def test_noise_is_the_samples_own():
    """Whatever it is batched with, and in whatever place."""
    latents = torch.randn(5, 4, 3, 8, 8)
    for noise in (NoiseConfig(), NoiseConfig(use_logitnorm_time_sampling=True, shift=2.0)):
        whole = add_noise(latents, [7, 1, 9, 2, 4], noise)
        for i, seed in ((3, 2), (0, 7)):
            for one, all_of_them in zip(add_noise(latents[i : i + 1], [seed], noise), whole, strict=True):
                assert torch.equal(one[0], all_of_them[i])
        assert whole.sigma.unique().numel() == 5
        assert not torch.equal(add_noise(latents[:1], [8], noise).x_t[0], whole.x_t[0])
        other = latents.to(memory_format=torch.channels_last_3d)  # as some encoders give them on some machines
        assert torch.equal(add_noise(other, [7, 1, 9, 2, 4], noise).x_t, whole.x_t)


def test_training_teaches(tmp_path, vae_folder):
    longer = {"training_iteration": 40, "log_interval": 10, "gradient_accumulation_steps": 1}
    assert train(tmp_path / "run", vae_folder, **longer) == 0
    losses = [line["loss"] for line in read_log(tmp_path / "run")]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data_config__dataset_name": "videos"}, "dataset_name is 'videos'"),
        ({"data_config__dataset_name": "t2v_random"}, "train_text_encoder is for rendered shapes"),
        ({"data_config__dataset_name": "wan_t2v"}, "metafile_or_dir_path is missing"),
        (
            {"data_config__dataset_config__metafile_or_dir_path": "clips"},
            "dataset_name is shapes, which reads no files",
        ),
        ({"weight_dtype": "fp16"}, "weight_dtype is fp16"),
        ({"trackers": "[tensorbord]"}, "trackers names 'tensorbord'"),
        ({"train_text_encoder": False}, "text_encoder_config.checkpoint_path is missing"),
        ({"vae_config__vae_path": "nowhere/vae"}, "nowhere/vae"),
        ({"model_config__in_dim": 16}, "model_config.in_dim is 16, but the VAE's latent channels 4"),
        ({"model_config__out_dim": 8}, "model_config.out_dim is 8"),
        ({"data_config__dataset_config__sample_num_frames": 6}, "sample_num_frames is 6: these networks need 4k + 1"),
        ({"data_config__dataset_config__sample_width": 40}, "sample_width is 40: these networks need a multiple of 16"),
        ({"data_config__dataset_config__num_clips": 10**12}, "num_clips is 1000000000000, but should be"),
        ({"optimizer_config__learning_rate": 1}, "unknown key 'optimizer_config.learning_rate'"),
        (DYNAMIC | {"scheduler_config__base_image_seq": 4096}, "base_image_seq and max_image_seq are both 4096"),
        (
            DYNAMIC | {"scheduler_config__base_image_seq": 4095},
            "use_dynamic_shifting shifts by 0 for the 6 tokens of a frame here",
        ),
        (
            DYNAMIC | {"scheduler_config__base_image_seq": 4095, "scheduler_config__base_shift": 2},
            "use_dynamic_shifting shifts by inf for the 6 tokens of a frame here",
        ),
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
    for other in ({"model_config__dim": 64}, {"model_config__num_layers": 6}, {"seed": 1}):
        capsys.readouterr()
        assert train(tmp_path / "run", vae_folder, **other) == 2
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
    job = settle(config, Launch())
    one, same = (build(config, job, arrange(config, job)).transformer for _ in range(2))
    assert all(p.isfinite().all() for p in one.parameters())
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), same.parameters(), strict=True))
    other = build(config.model_copy(update={"seed": 5}), job, arrange(config, job)).transformer
    assert any(not torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_the_flops_are_those_torch_counts():
    with torch.device("meta"):  # where attention is two plain products, which torch counts
        model = OSPNextTransformer3DModel(**ARCHITECTURE)
        inputs = torch.randn(1, 4, 2, 16, 24), torch.rand(1), torch.randn(1, 128, 32)
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    tokens, flops = training_flops(model.config, model.layouts, inputs[0].shape[1:], 128)
    assert tokens == 2 * 8 * 12
    assert flops == 3 * counter.get_total_flops()


def test_what_has_changed_since_the_state_is_said(tmp_path, vae_folder, capsys):
    assert train(tmp_path, vae_folder) == 0
    assert train(tmp_path, vae_folder) == 0
    assert "goes on with another" not in capsys.readouterr().out
    assert train(tmp_path, vae_folder, training_iteration=6, optimizer_config__lr=0.02) == 0
    said = capsys.readouterr().out
    assert "goes on with another training_iteration than before: 6, not 5" in said
    assert "goes on with another optimizer_config.lr than before: 0.02, not 0.01" in said
    assert said.count("goes on with another") == 2
    for text in ("no_key_of_ours: 1\n", ""):
        (tmp_path / "config.yaml").write_text(text)
        assert train(tmp_path, vae_folder, training_iteration=6) == 0
        assert "goes on, but not known with which settings before: " in capsys.readouterr().out


def test_the_same_settings_otherwise_written_are_no_change(tmp_path, vae_folder, monkeypatch, capsys):
    assert train(tmp_path, vae_folder) == 0
    monkeypatch.chdir(tmp_path)
    many = load_config(TrainConfig, None, [*words(Path("."), vae_folder), "ddp_size=2"])
    assert changed_settings(tmp_path / "config.yaml", many, "train") == []


def test_a_refused_start_leaves_the_configuration_of_the_states(tmp_path, vae_folder, capsys):
    assert train(tmp_path, vae_folder) == 0
    before = (tmp_path / "config.yaml").read_bytes()
    assert train(tmp_path, vae_folder, training_iteration=6, seed=7) == 2
    assert "saved with seed 42, but this run has 7" in capsys.readouterr().err
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_profiling_writes_a_trace_and_goes_on(tmp_path, vae_folder):
    assert train(tmp_path / "run", vae_folder, profiling=True, trackers="[]") == 0
    trace = json.loads((tmp_path / "run/trace_0.json").read_text())
    assert any("AdamW" in str(event.get("name")) for event in trace["traceEvents"])
    assert read_log(tmp_path / "run")[-1]["step"] == 5


def test_the_configuration_and_the_curves_lie_beside_the_states(tmp_path, vae_folder):
    assert train(tmp_path / "run", vae_folder) == 0
    again = load_config(TrainConfig, tmp_path / "run/config.yaml", [])
    given = load_config(TrainConfig, None, words(tmp_path / "run", vae_folder)).alone()
    assert again.model_dump() == given.model_dump()
    curves = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [event.step for event in curves.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    assert {"train/grad_norm", "train/lr", "train/tokens_per_second"} <= set(curves.Tags()["scalars"])
    assert train(tmp_path / "run", vae_folder, training_iteration=7) == 0
    curves = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [event.step for event in curves.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("weights", ["average", "live"])
def test_a_state_is_exported(tmp_path, vae_folder, capsys, weights):
    assert train(tmp_path / "run", vae_folder) == 0
    state, to = tmp_path / "run/iter_000000003", tmp_path / "exported"
    capsys.readouterr()
    assert main(["export", str(state), str(to), f"weights={weights}"]) == 0
    assert f"the {weights} weights of {state}" in capsys.readouterr().out
    pipe = OSPNextPipeline.from_pretrained(to)
    for part in ("transformer", "text_encoder"):
        saved = read_state(state, f"{weights}.{part}.")
        assert all(torch.equal(p, saved[key]) for key, p in getattr(pipe, part).named_parameters())
    assert main(["export", str(state), str(to)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run/pipeline"), str(tmp_path / "other")]) == 2
    assert "no state of a training run" in capsys.readouterr().err
    (state / "record.json").write_text("[]")
    assert main(["export", str(state), str(tmp_path / "other")]) == 2
    said = capsys.readouterr().err
    assert f"ospnext: error: {state} is incomplete or damaged (record.json is not what was written)" in said
    assert "resume" not in said


def test_running_scales_are_part_of_a_run_and_of_its_pipeline(tmp_path, vae_folder, capsys):
    quant = {
        "model_config__quant": "hif8",
        "model_config__quant_attn": "hif8",
        "model_config__quant_scaling": "running",
    }
    assert train(tmp_path / "whole", vae_folder, **quant) == 0
    assert train(tmp_path / "parts", vae_folder, **quant, training_iteration=3) == 0
    assert train(tmp_path / "parts", vae_folder, **quant) == 0
    assert read_log(tmp_path / "parts") == read_log(tmp_path / "whole")
    transformers = [load_transformer(tmp_path / name / "pipeline/transformer") for name in ("whole", "parts")]
    first, second = (buffers(transformer) for transformer in transformers)
    assert len(first) == 2 * (40 + 8)
    assert all(numbers.equal(second[name]) for name, numbers in first.items())
    assert all(numbers[0] > 0 for name, numbers in first.items() if name.endswith(AMAX))
    pipe = OSPNextPipeline.from_pretrained(tmp_path / "whole/pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert np.isfinite(pipe("A red star spins.", num_inference_steps=2).frames).all()


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
