"""``ospnext train`` with lora_config: only the adapter learns, is kept, and comes out, alone or merged."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from safetensors.torch import load_file, save_file
from saved_states import read_state
from torch.utils.flop_counter import FlopCounterMode
from transformers import ByT5Tokenizer

from ospnext.checkpoints.lora import NewAdapter, put_adapter
from ospnext.checkpoints.lora_files import read_adapter
from ospnext.checkpoints.save import save_transformer
from ospnext.cli import main
from ospnext.generate.pipeline import OSPNextPipeline
from ospnext.models.text import small_text_encoder
from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.train.flops import training_flops

ARCHITECTURE = {
    "dim": 32,
    "ffn_dim": 48,
    "freq_dim": 16,
    "text_dim": 32,
    "text_len": 12,
    "in_dim": 4,
    "out_dim": 4,
    "num_heads": 4,
    "num_layers": 4,
    "skiparse_model_type": "dual_end",
}
SETTINGS = {
    "device": "cpu",
    "weight_dtype": "fp32",
    "data_config.num_workers": 0,
    "data_config.batch_size": 2,
    "data_config.dataset_config.sample_num_frames": 5,
    "data_config.dataset_config.sample_height": 32,
    "data_config.dataset_config.sample_width": 48,
    "optimizer_config.lr": 0.05,
    "training_iteration": 4,
    "save_interval": 2,
    "ema_decay": 0.5,
    "trackers": "[]",
    "lora_config.rank": 3,
    "lora_config.alpha": 6,
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A random model in files."""
    torch.manual_seed(1)
    model = OSPNextTransformer3DModel(**ARCHITECTURE)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    save_transformer(model, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def paths(base: Path, vae_folder: Path, tmp_path: Path) -> dict[str, object]:
    """The keys that name all networks."""
    small_text_encoder(32, len(ByT5Tokenizer())).save_pretrained(tmp_path / "text_encoder")
    return {
        "model_config.pretrained_model_dir_or_checkpoint": base,
        "vae_config.vae_path": vae_folder,
        "text_encoder_config.checkpoint_path": tmp_path / "text_encoder",
    }


def train(folder: Path, paths: dict[str, object], **more: object) -> int:
    given = SETTINGS | paths | {key.replace("__", "."): value for key, value in more.items()}
    return main(["train", *(f"{key}={value}" for key, value in given.items() if value != ""), f"output_dir={folder}"])


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "train_log.jsonl").read_text().splitlines()]


def test_only_the_adapter_learns_and_is_kept(tmp_path: Path, paths: dict[str, object], capsys) -> None:
    assert train(tmp_path / "run", paths) == 0
    said = capsys.readouterr().out
    assert "training lora on 32 linears: rank 3, alpha 6, 0.01M numbers, in transformer " in said
    assert "frozen in float32, on cpu" in said
    assert "; float32 adapter, float32 arithmetic; " in said
    state = read_state(tmp_path / "run/iter_000000004", "")
    assert all("optimiser" in name or ".lora_" in name for name in state)
    assert {name.split(".")[0] for name in state} == {"live", "average", "exp_avg", "exp_avg_sq", "optimiser"}
    start = read_state(tmp_path / "run/iter_000000002", "live.")
    assert all(not torch.equal(start[name.removeprefix("live.")], x) for name, x in state.items() if "live." in name)
    folder = tmp_path / "run/adapter"
    assert f"saved {folder}" in said
    assert PeftConfig.from_pretrained(str(folder)).r == 3
    average = read_state(tmp_path / "run/iter_000000004", "average.transformer.")
    for name, pair in read_adapter(folder).pairs.items():
        assert pair.alpha == 6
        assert torch.equal(pair.down, average[f"{name}.lora_A.default.weight"])
        assert torch.equal(pair.up, average[f"{name}.lora_B.default.weight"])


def test_resumed_it_is_the_run_that_was_never_interrupted(tmp_path: Path, paths: dict[str, object]) -> None:
    assert train(tmp_path / "whole", paths) == 0
    assert train(tmp_path / "cut", paths, training_iteration=2) == 0
    assert train(tmp_path / "cut", paths) == 0
    whole, cut = (read_state(tmp_path / f"{run}/iter_000000004", "") for run in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_config.rank": 4}, "tensors differ in shape, such as average.transformer.blocks.0.cross_attn.k.lora_A"),
        ({"lora_config.alpha": 3}, "lora_config.alpha is 3 here, but 6 there"),
        ({"lora_config.target_modules": "[ffn.0]"}, "tensors are in one of them only, such as"),
        ({"lora_config.rank": "", "lora_config.alpha": ""}, "it trained an adapter .* and this run trains the whole"),
    ],
    ids=["rank", "alpha", "linears", "the whole network"],
)
def test_another_run_s_state_is_refused(
    change: dict, words: str, tmp_path: Path, paths: dict[str, object], capsys
) -> None:
    assert train(tmp_path / "run", paths, training_iteration=1) == 0
    capsys.readouterr()
    assert train(tmp_path / "run", paths | change) == 2
    said = capsys.readouterr().err
    assert "is the state of another run: " in said
    assert re.search(words, said), said


def test_exported_merged_it_is_the_base_with_the_adapter(tmp_path: Path, paths: dict[str, object], base: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    ByT5Tokenizer().save_pretrained(tokenizer)
    paths = paths | {"text_encoder_config.text_tokenizer_path": tokenizer}
    assert train(tmp_path / "run", paths) == 0
    state = tmp_path / "run/iter_000000004"
    assert main(["export", str(state), str(tmp_path / "live"), "weights=live"]) == 0
    assert main(["export", str(state), str(tmp_path / "pipeline"), "merge=true", "weights=live"]) == 0
    adapter = read_adapter(tmp_path / "live")
    before = load_file(base / "diffusion_pytorch_model.safetensors")
    after = OSPNextPipeline.from_pretrained(tmp_path / "pipeline").transformer.state_dict()
    assert before.keys() == after.keys()
    for name, x in before.items():
        pair = adapter.pairs.get(name.removesuffix(".weight"))
        expected = x if pair is None or name.endswith("bias") else x + 2 * pair.up @ pair.down
        assert torch.allclose(after[name], expected, atol=1e-6), name
    assert sum(not torch.equal(after[name], x) for name, x in before.items()) == 32


def test_eight_bits_stay_below_it_and_are_not_merged_into(
    tmp_path: Path, paths: dict[str, object], base: Path, capsys
) -> None:
    assert main(["quantize", str(base), str(tmp_path / "eight")]) == 0
    paths = paths | {"model_config.pretrained_model_dir_or_checkpoint": tmp_path / "eight", "weight_dtype": "bf16"}
    paths["text_encoder_config.text_tokenizer_path"] = tmp_path / "tokenizer"
    ByT5Tokenizer().save_pretrained(tmp_path / "tokenizer")
    capsys.readouterr()
    assert train(tmp_path / "run", paths) == 0
    assert "40 linears (emulation, scale by tensor, weights stored in 8 bits)" in capsys.readouterr().out
    adapter = read_adapter(tmp_path / "run/adapter")
    assert all(pair.up.abs().max() > 0 for pair in adapter.pairs.values())
    assert main(["export", str(tmp_path / "run/iter_000000004"), str(tmp_path / "m"), "merge=true"]) == 2
    assert "holds 8-bit weights, into which an adapter would be lost: merge it into" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_it_starts_from_an_adapter(tmp_path: Path, paths: dict[str, object], capsys) -> None:
    assert train(tmp_path / "first", paths, lora_config__target_modules="[self_attn.q]") == 0
    given = {"lora_config.rank": "", "lora_config.alpha": "", "lora_config.lora_path": tmp_path / "first/adapter"}
    assert train(tmp_path / "second", paths | given, optimizer_config__lr=1e-30) == 0
    one, two = (read_adapter(tmp_path / f"{run}/adapter").pairs for run in ("first", "second"))
    assert one.keys() == two.keys() == {f"blocks.{i}.self_attn.q" for i in range(4)}
    assert all(torch.equal(one[name].up, two[name].up) for name in one)
    capsys.readouterr()
    for change, words in (
        (
            {"lora_config.rank": 5},
            f"lora_config.rank is 5, but {tmp_path}/first/adapter/adapter_model.safetensors has 3",
        ),
        ({"lora_config.target_modules": "[ffn.0]"}, "lora_config.target_modules are not those of"),
    ):
        assert train(tmp_path / "third", paths | given | change) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "third").exists()
    # A file that says no alpha has its rank, as its readers take it, and never the default of a new adapter.
    bare = {f"diffusion_model.{n}.lora_{x}.weight": t for n, p in one.items() for x, t in (("A", p.down), ("B", p.up))}
    save_file(bare, tmp_path / "bare.safetensors")
    given["lora_config.lora_path"] = tmp_path / "bare.safetensors"
    assert train(tmp_path / "fourth", paths | given, training_iteration=1) == 0
    assert {pair.alpha for pair in read_adapter(tmp_path / "fourth/adapter").pairs.values()} == {3}
    assert main(["train", str(tmp_path / "fourth/config.yaml"), "training_iteration=2"]) == 0


def test_what_cannot_be_adapted(tmp_path: Path, paths: dict[str, object], capsys) -> None:
    other = tmp_path / "other.safetensors"
    save_file({f"blocks.0.self_attn.q.lora_{x}.weight": torch.zeros(3, 3) for x in "AB"}, other)
    sizes = {f"model_config.{key}": value for key, value in ARCHITECTURE.items()}
    for change, words in (
        ({"model_config.pretrained_model_dir_or_checkpoint": ""} | sizes, "trains an adapter of a model, but none is"),
        (
            {"lora_config.target_modules": "[to_q]"},
            "no linear of this model is called to_q; its blocks have self_attn.q",
        ),
        ({"lora_config.lora_path": tmp_path / "none"}, f"{tmp_path}/none: no such file or folder"),
        ({"lora_config.lora_path": other}, "of another shape: blocks.0.self_attn.q [3, 3] for [32, 32]"),
        ({"lora_config.ranks": 3}, "did you mean 'lora_config.rank'?"),
        ({"model_config.quant": "hif8", "model_config.quant_scaling": "running"}, "quant_scaling"),
    ):
        assert train(tmp_path / "run", paths | change) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_it_teaches(tmp_path: Path, paths: dict[str, object]) -> None:
    given = paths | {
        "data_config.dataset_name": "shapes",
        "data_config.dataset_config.num_clips": 4,
        "scheduler_config.use_logitnorm_time_sampling": "true",
        "optimizer_config.lr": 0.02,
        "optimizer_config.eps": 1e-8,
        "lora_config.target_modules": "[self_attn.v, self_attn.o, cross_attn.v, cross_attn.o, ffn.0, ffn.2]",
    }
    assert train(tmp_path / "run", given, training_iteration=80, save_interval=80) == 0
    found = losses(tmp_path / "run")
    assert sum(found[-10:]) < 0.8 * sum(found[:10])


def test_the_work_is_about_what_torch_counts() -> None:
    settings = ARCHITECTURE | {"dim": 192, "ffn_dim": 512, "text_len": 16}
    with torch.device("meta"):
        model = OSPNextTransformer3DModel(**settings)
        inputs = torch.randn(1, 4, 3, 32, 32), torch.rand(1), torch.randn(1, 16, 32)
    put_adapter(model, NewAdapter(1, 1.0, ("self_attn.q", "ffn.0"), 0))
    with FlopCounterMode(display=False) as counter:
        model.train()(*inputs).sample.sum().backward()
    _, flops = training_flops(model.config, model.layouts, inputs[0].shape[1:], 16, frozen=True)
    # An adapter's own products are left out; the first block's gradients of what is frozen are not needed.
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.06)
