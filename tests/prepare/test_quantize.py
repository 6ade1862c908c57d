"""8-bit checkpoints: half the size, the same results, readable everywhere, refused when damaged."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ospnext.checkpoints.components import pipeline_folder
from ospnext.checkpoints.load import load_transformer
from ospnext.checkpoints.lora_files import Adapter, Pair
from ospnext.checkpoints.merge import merge_transformer
from ospnext.checkpoints.read import CheckpointError
from ospnext.checkpoints.save import save_transformer
from ospnext.cli import main
from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.prepare.convert import convert
from ospnext.quant.apply import describe, matching, quantize
from ospnext.quant.config import QuantConfig
from ospnext.quant.linear import HiF8Linear, HiF8StoredLinear
from ospnext.quant.running import AMAX, advance, buffers, holders

SIZES = {
    "dim": 96,
    "ffn_dim": 256,
    "num_heads": 2,
    "num_layers": 4,
    "text_dim": 24,
    "freq_dim": 32,
    "num_full_blocks": 0,
}
HIF8 = {"quant": "hif8", "quant_attn": "hif8"}
FILE = "diffusion_pytorch_model.safetensors"
LINEAR = "blocks.1.ffn.0"
RUNNING = "model_config.quant_scaling=running"
FEWER = (({"quant": "none"}, 24), ({"quant_attn": "none"}, 120), ({"quant_keep": ("blocks.1.*",)}, 132))


@pytest.fixture(scope="module")
def model() -> OSPNextTransformer3DModel:
    torch.manual_seed(0)
    model = OSPNextTransformer3DModel(**SIZES, skiparse_model_type="dual_end")
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    return model.eval().bfloat16()


@pytest.fixture(scope="module")
def plain(model: OSPNextTransformer3DModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "plain"
    save_transformer(model, folder, to="osp")
    return folder


@pytest.fixture(scope="module")
def small(plain: Path) -> Path:
    """In 8 bits, in several shards, so that some scales stand in another file than their codes."""
    folder = plain.parent / "small"
    assert main(["quantize", str(plain), str(folder), "max_shard_size=100000"]) == 0
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def sample(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(1, 16, 2, 8, 12, generator=generator), torch.randn(1, 6, 24, generator=generator)
    with torch.no_grad():
        return model(latents, torch.tensor([500.0]), text).sample


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_half_the_size_and_the_same_results(plain: Path, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        ours = load_transformer(small, dtype=dtype)
        theirs = load_transformer(plain, dtype=dtype, quant=HIF8)
        assert sample(ours).equal(sample(theirs))
        stored = [module for module in ours.modules() if isinstance(module, HiF8StoredLinear)]
        assert len(stored) == 40
        assert not any(isinstance(module, HiF8StoredLinear) for module in theirs.modules())
    quantised, all_bytes = (sum(m.weight.numel() for m in stored), sum(p.numel() for p in theirs.parameters()) * 2)
    assert abs(size(small) - (all_bytes - quantised)) < 0.1 * all_bytes
    in_memory = sum(t.nbytes for t in load_transformer(small).state_dict().values())
    assert in_memory < all_bytes - quantised + 1000


def test_it_reads_as_plain_numbers_too(model: OSPNextTransformer3DModel, small: Path, tmp_path: Path) -> None:
    off = {"quant": "none", "quant_attn": "none"}
    decoded = load_transformer(small, quant=off)
    assert describe(decoded) == "none"
    error = (sample(decoded) - sample(model)).norm() / sample(model).norm()
    assert 1e-3 < error < 0.1
    expected = decoded.state_dict()
    for name, value in model.state_dict().items():
        assert expected[name].dtype is value.dtype
        if not any(name == f"{linear}.weight" for linear in matching(model, QuantConfig())):
            assert expected[name].equal(value)
    trainable = load_transformer(small, dtype=torch.float32, trainable=True)
    assert all(p.requires_grad and p.dtype is torch.float32 for p in trainable.parameters())
    assert describe(trainable).startswith("hif8: 40 linears")
    kept = load_transformer(small, quant={"quant_keep": ("blocks.0.*",)})
    assert kept.blocks[0].ffn[0].weight.equal(decoded.blocks[0].ffn[0].weight)
    assert isinstance(kept.blocks[1].ffn[0], HiF8StoredLinear)
    other = load_transformer(small, quant={"scale_max_forward": 7.5})
    assert type(other.blocks[1].ffn[0]) is HiF8Linear
    for to in ("diffusers", "wan", "osp"):
        convert(small, tmp_path / to, to)
        back = load_transformer(tmp_path / to, quant=off)
        assert all(value.equal(expected[name]) for name, value in back.state_dict().items())
    assert json.loads((tmp_path / "osp" / "config.json").read_text())["quant"] == "hif8"


def test_quantising_again_changes_nothing(small: Path, tmp_path: Path) -> None:
    assert main(["quantize", str(small), str(tmp_path / "again")]) == 0
    ours, theirs = load_transformer(tmp_path / "again").state_dict(), load_transformer(small).state_dict()
    assert all(ours[name].equal(value) for name, value in theirs.items() if name.endswith("weight"))


def test_a_loaded_model_saves_as_it_is(small: Path, tmp_path: Path) -> None:
    model = load_transformer(small)
    save_transformer(model, tmp_path / "copy", to="osp")
    assert sample(load_transformer(tmp_path / "copy")).equal(sample(model))
    with pytest.raises(CheckpointError, match="8-bit weights are written in the osp format only"):
        save_transformer(model, tmp_path / "other", to="diffusers")


def test_what_was_trained_in_hif8_says_so_and_runs_either_way(plain: Path, tmp_path: Path) -> None:
    model = load_transformer(plain, dtype=torch.float32)
    quantize(model, QuantConfig(keep=("blocks.0.*",), scaling="running"))
    model.train()
    model(torch.randn(1, 16, 2, 8, 12), torch.tensor([500.0]), torch.randn(1, 6, 24)).sample.sum().backward()
    advance(model, 1.0)
    save_transformer(model.eval(), tmp_path / "running", to="osp")
    again = load_transformer(tmp_path / "running")
    assert again.blocks[1].ffn[0].get_buffer(AMAX).equal(model.blocks[1].ffn[0].get_buffer(AMAX))
    assert sample(again).equal(sample(model))
    off = load_transformer(tmp_path / "running", quant={"quant": "none", "quant_attn": "none"})
    assert sample(off).equal(sample(load_transformer(plain, dtype=torch.float32)))
    save_transformer(model, tmp_path / "wan", to="wan")
    assert describe(load_transformer(tmp_path / "wan")) == "none"
    with pytest.raises(CheckpointError, match="trained with it"):
        load_transformer(plain, quant=HIF8 | {"quant_scaling": "running"})
    fresh = load_transformer(plain, quant=HIF8 | {"quant_scaling": "running"}, trainable=True)
    assert fresh.blocks[0].ffn[0].get_buffer(AMAX).equal(torch.zeros(2))


def damaged(small: Path, plain: Path, tmp_path: Path, kind: str) -> Path:
    """A copy of the checkpoint in one file, with one thing wrong."""
    folder = tmp_path / kind
    folder.mkdir()
    state = {name: t for file in small.glob("*.safetensors") for name, t in load_file(file).items()}
    config = json.loads((small / "config.json").read_text())
    if kind == "no scale":
        del state[f"{LINEAR}.weight_scale"]
    elif kind == "no codes":
        state[f"{LINEAR}.weight"] = state[f"{LINEAR}.weight"].float()
    elif kind == "scale":
        state[f"{LINEAR}.weight_scale"] = torch.tensor(torch.inf)
    elif kind == "half a scale":
        state[f"{LINEAR}.weight_scale"] = state[f"{LINEAR}.weight_scale"].bfloat16()
    elif kind == "code":
        state[f"{LINEAR}.weight"][3, 4] = 0x80
    elif kind == "shape":
        state[f"{LINEAR}.weight"] = state[f"{LINEAR}.weight"][:-1].clone()
    elif kind == "whole numbers":
        state["blocks.1.ffn.0.bias"] = state["blocks.1.ffn.0.bias"].to(torch.int16)
    elif kind == "key":
        config["quant_scaling"] = "rows"
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / FILE)
    if kind == "cut":
        (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-5])
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no scale", rf"without their weight_scale: {LINEAR}\.weight"),
        ("no codes", rf"{LINEAR}\.weight is not in 8 bits"),
        ("scale", rf"the scale of {LINEAR}\.weight is inf"),
        ("half a scale", rf"{LINEAR}\.weight_scale is no single float32"),
        ("code", rf"{LINEAR}\.weight holds codes that are no finite number"),
        ("shape", rf"of another shape: {LINEAR}\.weight"),
        ("whole numbers", r"another kind than the model's: blocks\.1\.ffn\.0\.bias int16"),
        ("key", r"quant_scaling"),
        ("cut", r"truncated"),
    ],
)
@pytest.mark.parametrize("trainable", [False, True])
def test_damage_is_refused_by_name(
    small: Path, plain: Path, tmp_path: Path, kind: str, message: str, trainable: bool
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_transformer(damaged(small, plain, tmp_path, kind), trainable=trainable)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model_config.quant=none"], "nothing to quantise"),
        (["model_config.quant_keep=[blocks.9.*]"], "blocks.9.*"),
        (["model_config.scale_max_forward=0"], "scale_max_forward"),
    ],
)
def test_a_recipe_that_cannot_be_is_one_line(
    plain: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(plain), str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_nan_weights_and_the_source_itself_are_refused(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_file(plain / FILE)
    state[f"{LINEAR}.weight"][0, 0] = torch.nan
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "config.json").write_bytes((plain / "config.json").read_bytes())
    save_file(state, bad / FILE)
    assert main(["quantize", str(bad), str(tmp_path / "out")]) == 2
    assert f"{LINEAR}.weight holds NaN" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["quantize", str(plain), str(plain)]) == 2
    assert "is the source" in capsys.readouterr().err


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in 8 bits, with running numbers measured on two small videos."""
    folder = tmp_path_factory.mktemp("calibrated") / "pipeline"
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("A large red star bounces.\nA large blue ring spins.\nA third one.\n")
    words = [RUNNING, f"calibration.prompts={prompts}", "calibration.num_prompts=2"]
    words += [f"calibration.{key}={n}" for key, n in (("num_inference_steps", 2), ("num_frames", 5))]
    assert main(["quantize", "shapes", str(folder), *words, "calibration.height=64", "calibration.width=64"]) == 0
    return folder


def test_calibrated_running_numbers(calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_transformer(calibrated / "transformer", dtype=torch.float32)
    assert len(holders(model)) == 12 * 12  # ten linears and two attentions of each block
    for module in holders(model):
        numbers = module.get_buffer(AMAX)
        assert (numbers[: 1 if isinstance(module, HiF8Linear) else 3] > 0).all()
    plain = load_transformer(pipeline_folder("shapes") / "transformer", dtype=torch.float32)
    tensor = load_transformer(pipeline_folder("shapes") / "transformer", dtype=torch.float32, quant=HIF8)
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 16, 3, 16, 16, generator=generator), torch.randn(1, 20, 128, generator=generator)
    with torch.no_grad():
        ours, theirs, exact = (m(x, torch.tensor([700.0]), text).sample for m in (model, tensor, plain))
    assert not ours.equal(theirs)
    assert (ours - exact).norm() < 2 * (theirs - exact).norm()
    # Once measured, they stay: 8 bits again, and saved again.
    assert main(["quantize", str(calibrated), str(tmp_path / "again")]) == 0
    again = load_transformer(tmp_path / "again" / "transformer")
    assert all(numbers.equal(again.state_dict()[name]) for name, numbers in buffers(model).items())


def test_running_numbers_serve_fewer_layers_than_were_measured_and_no_others(
    calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = calibrated / "transformer"
    for fewer, count in FEWER:
        assert len(holders(load_transformer(place, quant=fewer))) == count
    kept = tmp_path / "kept"
    assert main(["quantize", str(calibrated), str(kept), "model_config.quant_keep=[blocks.1.*]"]) == 0
    assert len(holders(load_transformer(kept / "transformer"))) == 132
    with pytest.raises(CheckpointError, match=r"no blocks\.1.*hif8_amax.* knows only the layers that were quantised"):
        load_transformer(kept / "transformer", quant={"quant_keep": ()})
    capsys.readouterr()
    assert main(["quantize", str(kept), str(tmp_path / "all"), "model_config.quant_keep=[]"]) == 2
    assert "nothing is known of its layers' numbers (no blocks.1" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_running_numbers_go_along_into_the_osp_format(calibrated: Path, tmp_path: Path) -> None:
    place = calibrated / "transformer"
    convert(place, tmp_path / "plain", "osp", torch.bfloat16)
    known = buffers(load_transformer(place))
    base = load_transformer(tmp_path / "plain")
    pair = Pair(torch.ones(2, 192), torch.ones(192, 2), 2.0)
    merge_transformer(tmp_path / "plain", Adapter({"blocks.1.self_attn.q": pair}), tmp_path / "merged")
    for numbers in (buffers(base), buffers(load_transformer(tmp_path / "merged"))):
        assert numbers.keys() == known.keys()
        assert all(numbers[name].equal(value) for name, value in known.items())


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_damaged_running_numbers_are_refused_by_name(
    calibrated: Path, tmp_path: Path, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    state = load_file(calibrated / "transformer" / FILE)
    state[f"{LINEAR}.{AMAX}"][0] = value
    save_file(state, bad / FILE)
    (bad / "config.json").write_bytes((calibrated / "transformer" / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=rf"{LINEAR}\.{AMAX} holds .*damaged"):
        load_transformer(bad)
    assert main(["quantize", str(bad), str(tmp_path / "out")]) == 2
    assert f"{LINEAR}.{AMAX} holds" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([RUNNING], "nothing is known of its layers' numbers (no"),
        ([RUNNING, "calibration.prompts=nowhere/prompts.txt"], "nowhere/prompts.txt: No such file"),
        ([RUNNING, "calibration.prompts=."], "prompt file . is a folder"),
        ([RUNNING, "calibration.prompts=' '"], "calibration.prompts is empty"),
        (["calibration.height=64"], "height without prompts: give calibration.prompts"),
        (
            ["model_config.quant_keep=['blocks.*.ffn.*', '*_attn.?']"],
            "keeps every linear: there is nothing",
        ),
        (["calibration.prompts=a star"], "is of model_config.quant_scaling=running: name both"),
        (
            ["model_config.quant_scaling=running", "calibration.prompts=a star", "src={plain}"],
            "needs a pipeline folder",
        ),
    ],
)
def test_what_cannot_be_calibrated_is_said_first(
    words: list[str], said: str, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(plain=plain) for word in words]
    source = [word.removeprefix("src=") for word in words if word.startswith("src=")] or ["shapes"]
    words = [word for word in words if not word.startswith("src=")]
    assert main(["quantize", *source, str(tmp_path / "out"), *words]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
