"""Saving: whole or not at all, and never over something else."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from ospnext.checkpoints.read import CheckpointError, TensorInfo
from ospnext.checkpoints.save import TARGETS, Source, plan_shards, save_transformer, write_checkpoint
from ospnext.models.transformer import OSPNextTransformer3DModel


def test_release_config_holds_the_release_keys(tmp_path: Path) -> None:
    model = OSPNextTransformer3DModel(dim=16, ffn_dim=16, num_heads=1, num_layers=2, skiparse_model_type="dual_end")
    save_transformer(model, tmp_path, "osp")
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["_class_name"] == "OSPNextModel"
    assert raw["model_type"] == "t2v"
    assert not raw.keys() & {"patch_size", "cross_attn_norm", "qk_norm", "text_dim", "skiparse_pattern"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize("to", TARGETS)
def test_others_may_read_what_is_written(dense, tmp_path: Path, to: str) -> None:
    save_transformer(dense, tmp_path / ("x.pt" if to == "pt" else "x"), to)
    (tmp_path / "new").touch()  # with the mode that new files have here
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.stat().st_mode for p in files} == {(tmp_path / "new").stat().st_mode}


def test_adapters_are_refused(tmp_path: Path) -> None:
    model = OSPNextTransformer3DModel(dim=16, ffn_dim=16, num_heads=1, num_layers=2)
    model.add_adapter(LoraConfig(r=2, target_modules=["self_attn.q"]))
    with pytest.raises(CheckpointError, match=r"LoRA adapter .* merge and unload it"):
        save_transformer(model, tmp_path / "x", "osp")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", TARGETS)
def test_nothing_is_overwritten_unasked(dense, transformer, tmp_path: Path, to: str) -> None:
    path = tmp_path / ("x.pt" if to == "pt" else "x")
    save_transformer(dense, path, to)
    with pytest.raises(CheckpointError, match="overwrite"):
        save_transformer(transformer, path, to)
    save_transformer(transformer, path, to, max_shard_size=50_000, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_foreign_places_are_never_replaced(dense, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    save_transformer(dense, tmp_path / "x", "osp")  # an empty folder is free
    (tmp_path / "x" / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"holds thesis\.tex"):
        save_transformer(dense, tmp_path / "x", "osp", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file; wan needs a folder"):
        save_transformer(dense, tmp_path / "file", "wan", overwrite=True)
    with pytest.raises(CheckpointError, match=r"must end in \.safetensors"):
        save_transformer(dense, tmp_path / "file", "pt")
    with pytest.raises(CheckpointError, match="'gguf' is not known: use diffusers"):
        save_transformer(dense, tmp_path / "y", "gguf")


@pytest.mark.parametrize("to", ["osp", "pt"])
def test_an_interrupted_save_leaves_what_was_there(dense, tmp_path: Path, to: str) -> None:
    path = tmp_path / ("x.pt" if to == "pt" else "x")
    save_transformer(dense, path, to)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def fail(name: str) -> torch.Tensor:
        raise KeyboardInterrupt

    tensors = {"head.modulation": TensorInfo((1, 2, 48), torch.float32)}
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(Source(dict(dense.config), tensors, fail), path, to, overwrite=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_shards_hold_at_most_their_size_in_order() -> None:
    tensors = {name: TensorInfo((size,), torch.uint8) for name, size in zip("abcde", (4, 5, 20, 1, 9), strict=True)}
    assert plan_shards(tensors, 10) == [["a", "b"], ["c"], ["d", "e"]]
    assert plan_shards(tensors, 100) == [list("abcde")]
