"""LoRA files of every style: the same adapter out of all of them, and one clear line for what is none."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin
from peft import LoraConfig as PeftConfig
from peft import PeftModel
from safetensors.torch import load_file, save_file

from ospnext.checkpoints.formats import diffusers_name
from ospnext.checkpoints.load import load_transformer
from ospnext.checkpoints.lora import WithAdapter
from ospnext.checkpoints.lora_files import Adapter, Pair, peft_config, read_adapter, write_adapter
from ospnext.checkpoints.read import CheckpointError
from ospnext.checkpoints.save import save_transformer
from ospnext.models.transformer import OSPNextTransformer3DModel

SHAPES = {f"{attention}.{layer}": (48, 48) for attention in ("self_attn", "cross_attn") for layer in "qkvo"}
SHAPES |= {"ffn.0": (80, 48), "ffn.2": (48, 80)}
Tensors = dict[str, torch.Tensor]


def random_adapter(rank: int = 4, alpha: float = 2.0, blocks: int = 2) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    pairs = {}
    for block in range(blocks):
        for linear, (rows, columns) in SHAPES.items():
            down = torch.randn(rank, columns, generator=generator)
            pairs[f"blocks.{block}.{linear}"] = Pair(down, torch.randn(rows, rank, generator=generator), alpha)
    return Adapter(pairs)


ADAPTER = random_adapter()
CUSTOM = random_adapter(alpha=4.0)  # where alpha is the rank by custom


def theirs(name: str) -> str:
    return diffusers_name(f"{name}.weight").removesuffix(".weight")


def named(adapter: Adapter, down: str, up: str, alpha: str = "", flat: bool = False, foreign: bool = False) -> Tensors:
    """The tensors of an adapter; patterns with {} for the linear."""
    tensors = {}
    for name, pair in adapter.pairs.items():
        module = theirs(name) if foreign else name
        module = module.replace(".", "_") if flat else module
        tensors |= {down.format(module): pair.down.clone(), up.format(module): pair.up.clone()}
        if alpha:
            tensors[alpha.format(module)] = torch.tensor(pair.alpha)
    return tensors


def ab(prefix: str, adapter: str = "") -> tuple[str, str]:
    return f"{prefix}{{}}.lora_A{adapter}.weight", f"{prefix}{{}}.lora_B{adapter}.weight"


def updown(prefix: str) -> tuple[str, str]:
    return f"{prefix}{{}}.lora_down.weight", f"{prefix}{{}}.lora_up.weight"


STYLES: dict[str, tuple[Adapter, Tensors, str]] = {
    "diffusers": (CUSTOM, named(CUSTOM, *ab("transformer."), foreign=True), "diffusers"),
    "diffusers, without a prefix": (CUSTOM, named(CUSTOM, *ab(""), foreign=True), "diffusers"),
    "ComfyUI": (ADAPTER, named(ADAPTER, *ab("diffusion_model."), "diffusion_model.{}.alpha"), "comfyui"),
    "diffusion-pipe": (CUSTOM, named(CUSTOM, *ab("diffusion_model.")), "comfyui"),
    "kohya": (ADAPTER, named(ADAPTER, *updown("lora_unet_"), "lora_unet_{}.alpha", flat=True), "kohya"),
    "kohya of diffusers' names": (
        ADAPTER,
        named(ADAPTER, *updown("lora_transformer_"), "lora_transformer_{}.alpha", flat=True, foreign=True),
        "kohya",
    ),
    "DiffSynth": (CUSTOM, named(CUSTOM, *ab("", ".default")), "plain"),
    "LightX2V": (ADAPTER, named(ADAPTER, *updown("diffusion_model."), "diffusion_model.{}.alpha"), "comfyui"),
    "original names": (ADAPTER, named(ADAPTER, *updown(""), "{}.alpha"), "plain"),
    "model.diffusion_model.": (CUSTOM, named(CUSTOM, *ab("model.diffusion_model.")), "comfyui"),
}


def hold(found: Adapter, expected: Adapter) -> None:
    assert found.pairs.keys() == expected.pairs.keys()
    for name, pair in found.pairs.items():
        assert torch.equal(pair.down, expected.pairs[name].down), name
        assert torch.equal(pair.up, expected.pairs[name].up), name
        assert pair.alpha == expected.pairs[name].alpha, name


@pytest.mark.parametrize("style", STYLES)
def test_every_style_is_read(style: str, tmp_path: Path) -> None:
    expected, tensors, name = STYLES[style]
    save_file(tensors, tmp_path / "lora.safetensors")
    found = read_adapter(tmp_path / "lora.safetensors")
    hold(found, expected)
    assert found.style == name
    hold(read_adapter(tmp_path), expected)  # the only file of a folder


def osp_next(folder: Path, adapter: Adapter, config: dict | None) -> Path:
    """What OSP-Next's RL saves, its config that PEFT cannot read included."""
    folder.mkdir(exist_ok=True)
    torch.save(named(adapter, *ab("base_model.model.", ".default")), folder / "adapter_model.bin")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_osp_next_s_own_folder_is_read(tmp_path: Path) -> None:
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "target_modules": "{'self_attn.q', 'ffn.0'}"}
    folder = osp_next(tmp_path / "lora-checkpoint-10-ema", ADAPTER, said)
    for path in (folder, folder / "adapter_model.bin"):
        found = read_adapter(path)
        hold(found, ADAPTER)
        assert found.style == "peft"


def test_peft_s_config_decides(tmp_path: Path) -> None:
    said = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"ffn.0": 1, r"blocks\.1\..*\.q": 3}, "use_rslora": True}
    found = read_adapter(osp_next(tmp_path / "lora", ADAPTER, said)).pairs
    assert found["blocks.0.cross_attn.o"].alpha == 8 * 2  # alpha / sqrt(rank) is alpha sqrt(rank) / rank
    assert found["blocks.0.ffn.0"].alpha == 1 * 2
    assert found["blocks.1.self_attn.q"].alpha == 3 * 2
    assert found["blocks.0.self_attn.q"].alpha == 8 * 2


def test_diffusers_header_decides(tmp_path: Path) -> None:
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 2})}
    save_file(named(ADAPTER, *ab("transformer."), foreign=True), tmp_path / "x.safetensors", metadata=header)
    hold(read_adapter(tmp_path), ADAPTER)


def test_alpha_may_be_said(tmp_path: Path) -> None:
    hold(read_adapter(osp_next(tmp_path / "lora", ADAPTER, None), alpha=2.0), ADAPTER)
    _, tensors, _ = STYLES["diffusion-pipe"]
    save_file(tensors, tmp_path / "x.safetensors")
    assert {pair.alpha for pair in read_adapter(tmp_path / "x.safetensors", alpha=7.0).pairs.values()} == {7.0}


def test_differences_are_read_and_kept_apart(tmp_path: Path) -> None:
    _, tensors, _ = STYLES["LightX2V"]
    diffs = {
        "diffusion_model.blocks.0.norm3.diff": torch.ones(48),
        "diffusion_model.blocks.1.ffn.0.diff_b": torch.ones(80),
    }
    save_file(tensors | diffs, tmp_path / "x.safetensors")
    found = read_adapter(tmp_path / "x.safetensors")
    hold(found, ADAPTER)
    assert found.diffs.keys() == {"blocks.0.norm3.weight", "blocks.1.ffn.0.bias"}
    with pytest.raises(CheckpointError, match=r"2 differences beside A and B, such as blocks.0.norm3.weight"):
        write_adapter(found, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
    write_adapter(found, tmp_path / "again.safetensors", "comfyui")
    again = read_adapter(tmp_path / "again.safetensors")
    assert {name: x.tolist() for name, x in again.diffs.items()} == {n: x.tolist() for n, x in found.diffs.items()}


# ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_peft_loads_what_is_written(tmp_path: Path, transformer: OSPNextTransformer3DModel) -> None:
    save_transformer(transformer, tmp_path / "base")
    mixed = Adapter({**ADAPTER.pairs, "blocks.3.cross_attn.k": Pair(torch.randn(2, 48), torch.randn(48, 2), 5.0)})
    write_adapter(mixed, tmp_path / "lora", base="base", torch_file=True)
    assert sorted(os.listdir(tmp_path / "lora")) == [
        "adapter_config.json",
        "adapter_model.bin",
        "adapter_model.safetensors",
    ]
    assert (tmp_path / "lora/adapter_model.safetensors").stat().st_mode & 0o777 == 0o644
    config = PeftConfig.from_pretrained(str(tmp_path / "lora"))
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (4, 2, "base")
    by_peft = PeftModel.from_pretrained(load_transformer(tmp_path / "base"), str(tmp_path / "lora"))
    ours = load_transformer(tmp_path / "base", adapters=[WithAdapter(read_adapter(tmp_path / "lora"))])
    inputs = torch.randn(1, 16, 1, 4, 6), torch.tensor([500.0]), torch.randn(1, 3, 24)
    with torch.no_grad():
        assert torch.equal(by_peft(*inputs).sample, ours(*inputs).sample)
        assert not torch.allclose(ours(*inputs).sample, load_transformer(tmp_path / "base")(*inputs).sample, atol=1e-2)
    old = torch.load(tmp_path / "lora/adapter_model.bin", weights_only=True)
    assert "base_model.model.blocks.0.self_attn.q.lora_A.default.weight" in old


def test_diffusers_loads_what_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    assert write_adapter(ADAPTER, folder, "diffusers") == folder / "pytorch_lora_weights.safetensors"
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=8, freq_dim=8, ffn_dim=80,
        num_layers=2,
    )  # fmt: skip
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.load_lora_adapter(str(folder), prefix="transformer", use_safetensors=True, adapter_name="x")
    model.fuse_lora()
    model.unload_lora()
    after = dict(model.named_parameters())
    assert sum(not torch.equal(after[name], p) for name, p in before.items()) == len(ADAPTER.pairs)
    for name, pair in ADAPTER.pairs.items():
        key = f"{theirs(name)}.weight"
        assert torch.allclose(after[key] - before[key], pair.delta(), atol=1e-5), name
    again = read_adapter(folder)
    for name, pair in again.pairs.items():
        assert torch.equal(pair.delta(), ADAPTER.pairs[name].delta())


@pytest.mark.parametrize("style", ["ComfyUI", "kohya", "LightX2V"])
def test_diffusers_understands_the_others_as_we_do(style: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    if style == "ComfyUI":
        write_adapter(ADAPTER, file, "comfyui")
        assert load_file(file)["diffusion_model.blocks.0.ffn.0.alpha"] == 2
        hold(read_adapter(file), ADAPTER)
    else:
        save_file(STYLES[style][1], file)
    state = WanLoraLoaderMixin.lora_state_dict(str(file), use_safetensors=True)
    for name, pair in ADAPTER.pairs.items():
        down, up = (state[f"transformer.{theirs(name)}.lora_{part}.weight"] for part in "AB")
        assert torch.allclose(up @ down, pair.delta(), atol=1e-5), name


def test_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds notes.txt, no adapter's: name another folder"):
        write_adapter(ADAPTER, tmp_path)
    with pytest.raises(CheckpointError, match=r"must end in .safetensors"):
        write_adapter(ADAPTER, tmp_path / "x", "comfyui")
    with pytest.raises(CheckpointError, match="style 'kohya' is not written: use peft, diffusers, comfyui"):
        write_adapter(ADAPTER, tmp_path / "x", "kohya")
    assert os.listdir(tmp_path) == ["notes.txt"]
    assert peft_config(ADAPTER)["target_modules"] == list(ADAPTER.pairs)


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────────────


class Bomb:
    """Unpickled, it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (str(self.path), "w")


def without(tensors: Tensors, *keys: str) -> Tensors:
    return {key: x for key, x in tensors.items() if key not in keys}


COMFY = STYLES["ComfyUI"][1]
Q = "diffusion_model.blocks.0.self_attn.q"
BAD: dict[str, tuple[Callable[[], Tensors], str]] = {
    "another model's keys": (
        lambda: COMFY | {f"double_blocks.{i}.img_attn.lora_A.weight": torch.ones(4, 3) for i in range(12)},
        r"12 of 72 keys name nothing this model has: double_blocks.0.img_attn.lora_A.weight, .* and 2 more; it is an "
        "adapter of another model",
    ),
    "an image-to-video model's": (
        lambda: COMFY | {"diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight": torch.ones(4, 48)},
        r"1 of 61 keys name nothing this model has: diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight",
    ),
    "a text encoder's beside": (
        lambda: STYLES["kohya"][1] | {"lora_te1_text_model_q.lora_up.weight": torch.ones(3, 3)},
        "1 of 61 keys name nothing this model has: lora_te1_text_model_q.lora_up.weight",
    ),
    "whole weights": (
        lambda: {"blocks.0.self_attn.q.weight": torch.ones(3, 3)},
        "no LoRA: none of its 1 keys is one's, such as blocks.0.self_attn.q.weight",
    ),
    "nothing": (dict, "no LoRA: none of its 0 keys is one's"),
    "A alone": (
        lambda: without(COMFY, f"{Q}.lora_B.weight"),
        "blocks.0.self_attn.q has alpha and down only: A and B belong together",
    ),
    "ranks that differ": (
        lambda: COMFY | {f"{Q}.lora_B.weight": torch.ones(48, 3)},
        r"A and B of blocks.0.self_attn.q are \[4, 48\] and \[48, 3\]: they do not make a product",
    ),
    "alphas that are gone": (
        lambda: without(COMFY, f"{Q}.alpha"),
        r"no alpha for 1 of 20 linears, such as blocks.0.self_attn.q: put its adapter_config.json beside it, or say "
        "it: ospnext convert-lora SRC DST --to peft alpha=N",
    ),
    "kohya's without alpha": (
        lambda: {k: x for k, x in STYLES["kohya"][1].items() if "alpha" not in k},
        "no alpha for 20 of 20 linears",
    ),
    "alpha that is zero": (lambda: COMFY | {f"{Q}.alpha": torch.tensor(0.0)}, "alpha of blocks.0.self_attn.q is 0: it"),
    "alpha that is a list": (lambda: COMFY | {f"{Q}.alpha": torch.ones(2)}, "is no single number"),
    "NaN": (
        lambda: COMFY | {f"{Q}.lora_A.weight": torch.full((4, 48), float("nan"))},
        "blocks.0.self_attn.q holds NaN or infinity",
    ),
    "whole numbers": (lambda: COMFY | {f"{Q}.lora_A.weight": torch.ones(4, 48, dtype=torch.int8)}, "holds torch.int8"),
    "DoRA": (lambda: COMFY | {f"{Q}.dora_scale": torch.ones(48)}, "is of DoRA, which is not supported"),
    "LoHa": (lambda: {f"{Q}.hada_w1_a": torch.ones(4, 48)}, "is of LoHa, which is not supported"),
    "two adapters": (
        lambda: named(ADAPTER, *ab("", ".one")) | named(ADAPTER, *ab("", ".other")),
        r"is there twice: it holds several adapters",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_in_a_line(name: str, tmp_path: Path) -> None:
    make, words = BAD[name]
    save_file(make(), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=words) as caught:
        read_adapter(tmp_path / "x.safetensors")
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "no alpha for 20 of 20 linears, such as blocks.0.self_attn.q: put its adapter_config.json beside it"),
        ({"r": 8, "lora_alpha": 2}, "A of blocks.0.self_attn.q has rank 4, but r is 8 in its config"),
        ({"r": 4, "lora_alpha": "2"}, "lora_alpha is '2' in its config: it should be a number"),
        ({"peft_type": "IA3"}, "adapter_config.json: peft_type is IA3: only LORA"),
        ({"r": 4, "lora_alpha": 2, "use_dora": True}, "use_dora is True, which is not supported"),
        ({"r": 4, "lora_alpha": 2, "modules_to_save": ["head"]}, "modules_to_save is"),
    ],
)
def test_a_bad_folder_is_refused_in_a_line(config: dict | None, words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words):
        read_adapter(osp_next(tmp_path / "lora", ADAPTER, config))


def test_files_that_are_none(tmp_path: Path) -> None:
    for name in ("empty.safetensors", "empty.bin"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(CheckpointError, match=rf"{name}: truncated"):
            read_adapter(tmp_path / name)
    with pytest.raises(CheckpointError, match="none: no such file or folder"):
        read_adapter(tmp_path / "none")
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        CheckpointError, match=r"no adapter_model.safetensors in it, but nothing: name the adapter's file"
    ):
        read_adapter(tmp_path / "folder")
    (tmp_path / "x.ckpt").write_bytes(b"1")
    with pytest.raises(CheckpointError, match="weights end in"):
        read_adapter(tmp_path / "x.ckpt")


def test_a_pickle_with_code_does_not_run(tmp_path: Path) -> None:
    torch.save({"base_model.model.blocks.0.self_attn.q.lora_A.weight": Bomb(tmp_path / "ran")}, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=r"x.bin: truncated, or not a file of plain weights"):
        read_adapter(tmp_path / "x.bin")
    assert not (tmp_path / "ran").exists()
