"""``ospnext merge-lora`` and ``convert-lora``: every kind of base, and what must not be merged or written over."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ospnext.checkpoints.load import load_transformer
from ospnext.checkpoints.lora import NewAdapter, WithAdapter, linear_shapes
from ospnext.checkpoints.lora_files import Adapter, Pair, read_adapter, write_adapter
from ospnext.checkpoints.save import save_transformer
from ospnext.cli import main
from ospnext.generate.pipeline import OSPNextPipeline
from ospnext.models.transformer import OSPNextTransformer3DModel

SIZES = {"dim": 48, "ffn_dim": 80, "num_heads": 2, "num_layers": 4, "text_dim": 24, "freq_dim": 32}


@pytest.fixture(scope="module")
def model() -> OSPNextTransformer3DModel:
    torch.manual_seed(0)
    model = OSPNextTransformer3DModel(**SIZES, skiparse_model_type="dual_end")
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model.eval()


def adapter_for(model: OSPNextTransformer3DModel, std: float = 0.2) -> Adapter:
    """A random adapter of rank 4 with alpha 2 on three linears of each block."""
    generator = torch.Generator().manual_seed(1)
    shapes = linear_shapes(model)
    names = NewAdapter(4, 2.0, ("self_attn.q", "cross_attn.v", "ffn.2"), 0).sizes(shapes)
    return Adapter(
        {
            n: Pair(*(std * torch.randn(s, generator=generator) for s in ((4, shapes[n][1]), (shapes[n][0], 4))), 2.0)
            for n in names
        }
    )


@pytest.fixture
def lora(model: OSPNextTransformer3DModel, tmp_path: Path) -> Path:
    return write_adapter(adapter_for(model), tmp_path / "lora")


def velocity(model: OSPNextTransformer3DModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(1, 16, 2, 8, 12, generator=generator)
    with torch.no_grad():
        return model(latents, torch.tensor([300.0]), torch.randn(1, 5, 24, generator=generator)).sample


@pytest.mark.parametrize("to", ["osp", "diffusers", "wan", "base.pt", "base.safetensors"])
def test_merged_is_the_adapter_loaded(
    to: str, model: OSPNextTransformer3DModel, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / to
    save_transformer(model, base, "pt" if base.suffix else to, max_shard_size=100_000)
    target = tmp_path / f"merged{base.suffix}"
    given = [] if base.is_dir() else ["model_config.num_heads=2", "model_config.skiparse_model_type=dual_end"]
    assert main(["merge-lora", str(base), str(lora), str(target), "max_shard_size=100000", *given]) == 0
    said = capsys.readouterr().out
    assert f"wrote {target}: 12 weights changed by {lora}" in said
    assert "(peft's style, 12 linears, rank 4, alpha 2), scale 1" in said
    options = {} if base.is_dir() else {"num_heads": 2, "skiparse_model_type": "dual_end"}
    merged = load_transformer(target, **options)
    loaded = load_transformer(base, adapters=[WithAdapter(read_adapter(lora))], **options)
    assert torch.allclose(velocity(merged), velocity(loaded), atol=1e-5)
    assert not torch.allclose(velocity(merged), velocity(model), atol=1e-2)
    if base.is_dir():
        assert (target / "config.json").read_text() == (base / "config.json").read_text()
        assert len(list(target.glob("*.safetensors"))) > 2


def test_bfloat16_is_rounded_once(model: OSPNextTransformer3DModel, lora: Path, tmp_path: Path) -> None:
    save_transformer(cast(model, torch.bfloat16, tmp_path), tmp_path / "base")
    assert main(["merge-lora", str(tmp_path / "base"), str(lora), str(tmp_path / "merged"), "scale=0.5"]) == 0
    before, after = (dict(load_transformer(tmp_path / name).named_parameters()) for name in ("base", "merged"))
    for name, pair in read_adapter(lora).pairs.items():
        exact = before[f"{name}.weight"].float() + 0.5 * 2 / 4 * pair.up @ pair.down
        assert torch.equal(after[f"{name}.weight"], exact.bfloat16())
    assert all(p.dtype == torch.bfloat16 for p in after.values())


def cast(model: OSPNextTransformer3DModel, dtype: torch.dtype, folder: Path) -> OSPNextTransformer3DModel:
    save_transformer(model, folder / "plain")
    return load_transformer(folder / "plain", dtype=dtype)


def test_a_pipeline_keeps_its_other_parts(tmp_path: Path) -> None:
    shapes = OSPNextPipeline.from_pretrained("shapes")
    lora = write_adapter(adapter_for(shapes.transformer, std=0.02), tmp_path / "x.safetensors", "comfyui")
    assert main(["merge-lora", "shapes", str(lora), str(tmp_path / "merged")]) == 0
    merged = OSPNextPipeline.from_pretrained(tmp_path / "merged")
    assert merged.config.defaults == shapes.config.defaults
    changed = dict(merged.transformer.named_parameters())
    differing = {name for name, p in shapes.transformer.named_parameters() if not torch.equal(p, changed[name])}
    assert differing == {f"{name}.weight" for name in read_adapter(lora).pairs}
    assert all(torch.equal(p, q) for p, q in zip(merged.vae.parameters(), shapes.vae.parameters(), strict=True))
    assert sorted(os.listdir(tmp_path)) == ["merged", "x.safetensors"]


def test_differences_are_merged_too(model: OSPNextTransformer3DModel, tmp_path: Path) -> None:
    save_transformer(model, tmp_path / "base")
    save_file(
        {
            "diffusion_model.blocks.0.norm3.diff": torch.ones(48),
            "diffusion_model.blocks.1.ffn.0.diff_b": torch.ones(80),
        },
        tmp_path / "x.safetensors",
    )
    assert main(["merge-lora", str(tmp_path / "base"), str(tmp_path / "x.safetensors"), str(tmp_path / "merged")]) == 0
    merged = load_transformer(tmp_path / "merged")
    assert torch.allclose(merged.blocks[0].norm3.weight, model.blocks[0].norm3.weight + 1)
    assert torch.allclose(merged.blocks[1].ffn[0].bias, model.blocks[1].ffn[0].bias + 1)


def test_what_cannot_be_merged(
    model: OSPNextTransformer3DModel, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    save_transformer(model, base)
    assert main(["quantize", str(base), str(tmp_path / "eight")]) == 0
    save_file({"diffusion_model.blocks.0.norm3.diff": torch.ones(3)}, tmp_path / "x.safetensors")
    wide = write_adapter(
        adapter_for(OSPNextTransformer3DModel(**SIZES | {"dim": 64, "num_layers": 6})), tmp_path / "wide"
    )
    there = tmp_path / "there"
    there.mkdir()
    (there / "notes.txt").write_text("mine")
    before = sorted(os.listdir(tmp_path))
    for words, reason in (
        ((tmp_path / "eight", lora, tmp_path / "m"), "holds 8-bit weights, into which an adapter would be lost: merge"),
        (
            (base, wide, tmp_path / "m"),
            "no adapter of this model; 6 for linears it does not have: blocks.4.cross_attn.v",
        ),
        ((base, tmp_path / "x.safetensors", tmp_path / "m"), "differences blocks.0.norm3.weight [3] for [48]"),
        ((base, tmp_path / "none", tmp_path / "m"), "none: no such file or folder"),
        ((base, lora, there), "holds notes.txt"),
        ((base, lora, base), "is the source, or in it"),
        (("shapes", lora, tmp_path / "m"), "no adapter of this model"),
        (("shapes", lora, there), "exists; choose another folder"),
    ):
        capsys.readouterr()
        assert main(["merge-lora", *map(str, words)]) == 2
        said = capsys.readouterr().err.strip()
        assert reason in said
        assert "\n" not in said
        assert sorted(os.listdir(tmp_path)) == before


def test_styles_are_converted(model: OSPNextTransformer3DModel, lora: Path, tmp_path: Path, capsys) -> None:
    expected = read_adapter(lora)
    for to, name in (("comfyui", "x.safetensors"), ("diffusers", "y.safetensors"), ("peft", "z")):
        assert main(["convert-lora", str(lora), str(tmp_path / name), "--to", to]) == 0
        assert f"12 linears, from peft's style to {to}'s" in capsys.readouterr().out
        found = read_adapter(tmp_path / name)
        assert found.style == to
        assert found.pairs.keys() == expected.pairs.keys()
        assert all(torch.allclose(found.pairs[n].delta(), pair.delta()) for n, pair in expected.pairs.items())
        assert main(["convert-lora", str(lora), str(tmp_path / name), "--to", to]) == 2
        assert "exists; choose another name, or set overwrite=true" in capsys.readouterr().err
        assert main(["convert-lora", str(lora), str(tmp_path / name), "--to", to, "overwrite=true"]) == 0
        capsys.readouterr()
