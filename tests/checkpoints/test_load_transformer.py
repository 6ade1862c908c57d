"""Loading the transformer: every format exactly, and every kind of damage refused with one clear line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from ospnext.checkpoints.formats import diffusers_name
from ospnext.checkpoints.load import load_transformer
from ospnext.checkpoints.read import CheckpointError
from ospnext.checkpoints.save import save_transformer

SHARD = 40_000


def assert_same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


@pytest.fixture(scope="module")
def release(transformer, tmp_path_factory) -> Path:
    """An OSP-Next release folder in shards. Copy it before damaging it."""
    folder = tmp_path_factory.mktemp("release") / "osp"
    save_transformer(transformer, folder, "osp", max_shard_size=SHARD)
    return folder


@pytest.fixture
def damaged(release: Path, tmp_path: Path) -> Path:
    """A copy of the release folder, free to change."""
    return Path(shutil.copytree(release, tmp_path / "osp"))


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def edit_shard(file: Path, change) -> None:
    state = load_file(file)
    change(state)
    save_file(state, file)


@pytest.mark.parametrize("to", ["osp", "wan", "diffusers"])
@pytest.mark.parametrize("max_shard_size", [SHARD, 10**9])
def test_folders_round_trip(transformer, tmp_path: Path, to: str, max_shard_size: int) -> None:
    save_transformer(transformer, tmp_path / "x", to, max_shard_size)
    assert len(list((tmp_path / "x").glob("*.safetensors"))) > 1 or max_shard_size > SHARD
    loaded = load_transformer(tmp_path / "x")
    assert_same(loaded, transformer)
    assert loaded.layouts == transformer.layouts
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_our_own_folder_and_subfolders(transformer, tmp_path: Path) -> None:
    transformer.save_pretrained(tmp_path / "pipe" / "transformer")
    (tmp_path / "pipe" / "vae").mkdir()
    (tmp_path / "pipe" / "vae" / "config.json").write_text("{}")
    assert_same(load_transformer(tmp_path / "pipe"), transformer)
    (tmp_path / "pipe" / "transformer").rename(tmp_path / "pipe" / "other")
    with pytest.raises(CheckpointError, match="several models below: name one of other, vae"):
        load_transformer(tmp_path / "pipe")
    shutil.rmtree(tmp_path / "pipe" / "vae")
    assert_same(load_transformer(tmp_path / "pipe"), transformer)


def test_diffusers_wan_folder_computes_the_same(dense, tmp_path: Path) -> None:
    theirs = WanTransformer3DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=24, ffn_dim=80, text_dim=24, freq_dim=32
    ).eval()
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    ours = load_transformer(tmp_path)
    latents, text = torch.randn(1, 16, 3, 6, 10), torch.randn(1, 7, 24)
    with torch.no_grad():
        args = (latents, torch.tensor([321.0]), text)
        torch.testing.assert_close(ours(*args).sample, theirs(*args).sample, atol=1e-5, rtol=1e-4)


def test_diffusers_loads_what_is_saved_for_it(dense, tmp_path: Path) -> None:
    save_transformer(dense, tmp_path, "diffusers", max_shard_size=SHARD)
    theirs, info = WanTransformer3DModel.from_pretrained(tmp_path, output_loading_info=True, local_files_only=True)
    assert not any(info.values())
    for name, tensor in dense.state_dict().items():
        assert torch.equal(theirs.state_dict()[diffusers_name(name)], tensor)


@pytest.mark.parametrize("name", ["flat.pt", "flat.pth", "flat.safetensors"])
def test_flat_files_need_only_what_shapes_do_not_tell(transformer, tmp_path: Path, name: str) -> None:
    save_transformer(transformer, tmp_path / name, "pt")
    loaded = load_transformer(tmp_path / name, num_heads=2, skiparse_model_type="dual_end")
    assert_same(loaded, transformer)
    assert loaded.layouts == transformer.layouts
    assert set(load_transformer(tmp_path / name, num_heads=2).layouts) == {transformer.layouts[0].FULL}
    with pytest.raises(CheckpointError, match="give num_heads"):
        load_transformer(tmp_path / name)
    with pytest.raises(CheckpointError, match="ffn_dim is 80 there but 96 was asked for"):
        load_transformer(tmp_path / name, num_heads=2, ffn_dim=96)
    with pytest.raises(CheckpointError, match=r"missing: blocks.4"):
        load_transformer(tmp_path / name, num_heads=2, num_layers=5)


def test_wrappers_and_prefixes(transformer, tmp_path: Path) -> None:
    state = transformer.state_dict()
    variants = {
        "state_dict": {"state_dict": state, "step": 3},
        "model": {"model": state},
        "ddp": {f"module.{name}": tensor for name, tensor in state.items()},
        "comfy": {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()},
        "diffusers": {diffusers_name(name): tensor for name, tensor in state.items()},
    }
    for name, content in variants.items():
        torch.save(content, tmp_path / f"{name}.pt")
        assert_same(load_transformer(tmp_path / f"{name}.pt", num_heads=2), transformer)
    torch.save(state, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    assert_same(load_transformer(tmp_path / "legacy.pth", num_heads=2), transformer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_is_honoured(transformer, release: Path, dtype: torch.dtype) -> None:
    loaded = load_transformer(release, dtype=dtype)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {dtype}
    for name, tensor in transformer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(dtype))


def test_weights_outlive_their_file(transformer, tmp_path: Path) -> None:
    save_transformer(transformer, tmp_path / "x.pt", "pt")
    loaded = load_transformer(tmp_path / "x.pt", num_heads=2)
    size = (tmp_path / "x.pt").stat().st_size
    (tmp_path / "x.pt").write_bytes(bytes(size))
    assert_same(loaded, transformer)


def test_progress_is_told(release: Path) -> None:
    told: list[tuple[str, int, int]] = []
    load_transformer(release, progress=lambda *args: told.append(args), dtype=torch.bfloat16)
    assert told[-1][1] == told[-1][2]
    assert [done for _, done, _ in told] == sorted({done for _, done, _ in told})


def test_sparse_settings_may_be_added_to_wan_but_nothing_contradicted(dense, release: Path, tmp_path: Path) -> None:
    save_transformer(dense, tmp_path / "wan", "wan")
    sparse = load_transformer(tmp_path / "wan", skiparse_model_type="uniform", sparse_ratio=3)
    assert (sparse.config.skiparse_model_type, sparse.config.sparse_ratio) == ("uniform", 3)
    load_transformer(release, dim=48, patch_size=[1, 2, 2], skiparse_model_type="dual_end")
    with pytest.raises(CheckpointError, match=r"config.json: .*skiparse_model_type is 'dual_end' there but 'full' was"):
        load_transformer(release, skiparse_model_type="full")
    with pytest.raises(CheckpointError, match="num_layers is 4 there but 30 was asked for"):
        load_transformer(tmp_path / "wan", num_layers=30)
    with pytest.raises(CheckpointError, match="window: no setting"):
        load_transformer(release, window=3)


def test_config_may_leave_out_what_weights_tell(transformer, damaged: Path) -> None:
    raw = json.loads((damaged / "config.json").read_text())
    for key in ("text_dim", "patch_size", "qk_norm", "cross_attn_norm"):
        raw.pop(key, None)
    raw |= {"quant": "hif8", "scale_max_forward": 15.0, "window_size": [-1, -1]}
    (damaged / "config.json").write_text(json.dumps(raw))
    assert_same(load_transformer(damaged), transformer)


def test_renamed_missing_and_misshaped_weights_are_listed(damaged: Path) -> None:
    (damaged / "diffusion_pytorch_model.safetensors.index.json").unlink()
    name = next(iter(load_file(first_shard(damaged))))

    def rename(state: dict) -> None:
        state["renamed.weight"] = state.pop(name)

    edit_shard(first_shard(damaged), rename)
    with pytest.raises(CheckpointError, match=f"1 missing: {name}; 1 unexpected: renamed.weight"):
        load_transformer(damaged)
    edit_shard(first_shard(damaged), lambda state: state.update({name: torch.zeros(2, 2)}))
    with pytest.raises(CheckpointError, match=rf"1 of another shape: {name} \[2, 2\] for \["):
        load_transformer(damaged)


def test_long_lists_are_cut(transformer, tmp_path: Path) -> None:
    state = {k: v for k, v in transformer.state_dict().items() if "ffn" not in k or k.startswith("blocks.0")}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"12 missing: .* and 2 more$") as error:
        load_transformer(tmp_path / "x.pt", num_heads=2)
    assert "\n" not in str(error.value)


def test_damaged_files_are_named(damaged: Path, transformer, tmp_path: Path) -> None:
    shard = first_shard(damaged)
    whole = shard.read_bytes()
    for cut in (0, 5, 100, len(whole) - 7):
        shard.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=rf"{shard.name}: truncated"):
            load_transformer(damaged)
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"names 1 missing of \d+ shards: {shard.name}"):
        load_transformer(damaged)
    (damaged / "diffusion_pytorch_model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"\d+ of \d+ shards, and no index; missing: \[1\]"):
        load_transformer(damaged)
    torch.save(transformer.state_dict(), tmp_path / "x.pt")
    whole = (tmp_path / "x.pt").read_bytes()
    parts = [whole[:cut] for cut in (0, 10, len(whole) // 2, len(whole) - 9)]
    for content in (*parts, b"abc", b"\x80\x02X", b"(K", b"\x80\x02X\x01\0\0\0\xe9.", b"h\x05."):
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"x.pt: truncated, or not a file of plain weights") as error:
            load_transformer(tmp_path / "x.pt", num_heads=2)
        assert "\n" not in str(error.value)


def test_index_and_shards_must_agree(damaged: Path) -> None:
    index = damaged / "diffusion_pytorch_model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["ghost.weight"] = first_shard(damaged).name
    index.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"says of 1 tensors what the shards do not hold: ghost\.weight"):
        load_transformer(damaged)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map"):
        load_transformer(damaged)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_transformer(damaged)


def test_nothing_but_tensors_is_read(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1), "b": "text"}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="b are no tensors"):
        load_transformer(tmp_path / "x.pt")
    torch.save({"path": Path("x")}, tmp_path / "code.pt")
    with pytest.raises(CheckpointError, match="not a file of plain weights"):
        load_transformer(tmp_path / "code.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="no dict of tensors"):
        load_transformer(tmp_path / "list.pt")


def test_wrong_places_say_the_way_out(tmp_path: Path, dense) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load_transformer(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_transformer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no weights .* it holds config.json"):
        load_transformer(tmp_path)
    (tmp_path / "x.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"end in \.safetensors"):
        load_transformer(tmp_path / "x.ckpt")
    state = dense.state_dict() | {"img_emb.proj.0.weight": torch.zeros(3)}
    torch.save(state, tmp_path / "i2v.pt")
    with pytest.raises(CheckpointError, match="image-to-video weights"):
        load_transformer(tmp_path / "i2v.pt", num_heads=2)
