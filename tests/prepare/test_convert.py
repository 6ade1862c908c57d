"""Converting: every format into every other and back is exact."""

import itertools
import resource
from pathlib import Path

import pytest
import torch

from ospnext.checkpoints.load import load_transformer
from ospnext.checkpoints.read import CheckpointError
from ospnext.checkpoints.save import TARGETS, save_transformer
from ospnext.cli import main
from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.prepare.convert import ConvertConfig, convert, run
from ospnext.sections import ModelConfig

SETTINGS = {"num_heads": 2, "skiparse_model_type": "dual_end", "text_len": 64}


@pytest.fixture(scope="module")
def model() -> OSPNextTransformer3DModel:
    """A small sparse transformer in which every weight differs; not to be changed."""
    model = OSPNextTransformer3DModel(dim=24, ffn_dim=40, num_layers=2, text_dim=8, freq_dim=16, **SETTINGS)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def place(folder: Path, to: str, name: str = "") -> Path:
    return folder / (f"{name}{to}.pt" if to == "pt" else f"{name}{to}")


def load(path: Path, dtype: torch.dtype | None = None) -> OSPNextTransformer3DModel:
    return load_transformer(path, dtype=dtype, **(SETTINGS if path.suffix == ".pt" else {}))


@pytest.mark.parametrize(("first", "second"), itertools.product(TARGETS, TARGETS))
def test_every_pair_round_trips(model, tmp_path: Path, first: str, second: str) -> None:
    save_transformer(model, place(tmp_path, first), first, max_shard_size=20_000)
    there, back = place(tmp_path, second, "there_"), place(tmp_path, first, "back_")
    convert(place(tmp_path, first), there, second, max_shard_size=15_000, **(SETTINGS if first == "pt" else {}))
    convert(there, back, first, **(SETTINGS if second == "pt" else {}))
    for path in (there, back):
        loaded = load(path)
        assert {key: loaded.config[key] for key in loaded.config if key[0] != "_"} == {
            key: model.config[key] for key in loaded.config if key[0] != "_"
        }
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_dtype_and_report(model, tmp_path: Path) -> None:
    save_transformer(model, tmp_path / "osp", "osp")
    line = convert(tmp_path / "osp", tmp_path / "d", "diffusers", torch.bfloat16)
    assert "diffusers itself would run these weights dense" in line
    assert {p.dtype for p in load(tmp_path / "d").parameters()} == {torch.bfloat16}
    dense = OSPNextTransformer3DModel(dim=24, ffn_dim=40, num_layers=2, num_heads=2, text_dim=8)
    save_transformer(dense, tmp_path / "dense", "wan")
    assert "dense" not in convert(tmp_path / "dense", tmp_path / "e", "diffusers").removeprefix(str(tmp_path / "dense"))


def test_run_from_a_config(model, tmp_path: Path) -> None:
    save_transformer(model, tmp_path / "x.pt", "pt")
    config = ConvertConfig(
        src=str(tmp_path / "x.pt"),
        dst=str(tmp_path / "osp"),
        to="osp",
        dtype="fp16",
        transformer_config=ModelConfig(**SETTINGS),
    )
    assert run(config).startswith(f"wrote {tmp_path / 'osp'}: 69 tensors")
    assert load(tmp_path / "osp").config.text_len == 64
    assert load(tmp_path / "osp").dtype == torch.float16


def test_bad_weights_and_places_leave_nothing_behind(model, tmp_path: Path) -> None:
    state = model.state_dict()
    state["head.heed.bias"] = state.pop("head.head.bias")
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"1 missing: head\.head\.bias; 1 unexpected: head\.heed\.bias"):
        convert(tmp_path / "x.pt", tmp_path / "y", "wan", **SETTINGS)
    with pytest.raises(CheckpointError, match="exists; choose another name, or set overwrite=true"):
        convert(tmp_path / "x.pt", tmp_path / "x.pt", "pt", **SETTINGS)
    save_transformer(model, tmp_path / "z", "wan")
    with pytest.raises(CheckpointError, match="is the source"):
        convert(tmp_path / "z", tmp_path / "z", "osp", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.pt", "z"]
    load(tmp_path / "z")


@pytest.mark.parametrize(("name", "to"), [("y", "osp"), ("y.bin", "osp"), ("y.pt", "pt"), ("y.safetensors", "pt")])
def test_a_full_disk_is_said_of_what_is_written_and_leaves_nothing(model, tmp_path: Path, name: str, to: str) -> None:
    save_transformer(model, tmp_path / "x", "osp")
    (tmp_path / "out").mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"out.*cannot be written") as caught:
            convert(tmp_path / "x", tmp_path / "out" / name, to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


def test_a_place_that_cannot_be_written_is_one_line(model, tmp_path: Path, capsys) -> None:
    save_transformer(model, tmp_path / "x", "osp")
    for words in (["/proc/x.pt", "--to", "pt"], ["/proc/x", "--to", "osp"]):
        assert main(["convert", str(tmp_path / "x"), *words]) == 2
        assert capsys.readouterr().err.count("\n") == 1
