"""Counted on meta tensors beside what real tensors take: shards, saved activations, the peak of a forward pass."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from ospnext.checkpoints.load import load_transformer
from ospnext.checkpoints.save import save_transformer
from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.ops.layout import Grid, Layout, order
from ospnext.ops.rope import rope_table
from ospnext.parallel.fsdp import Copies, Sharding, copies_mesh, shard_transformer
from ospnext.prepare.plan_devices import find_device
from ospnext.prepare.plan_memory import phases
from ospnext.prepare.plan_mesh import Mesh
from ospnext.prepare.plan_recipe import make_recipe, read_config
from ospnext.prepare.plan_trace import Held, Shared, trace_block
from ospnext.prepare.plan_work import sharded
from ospnext.prepare.quantize import quantize_transformer
from ospnext.quant.config import QuantConfig

SETTINGS = {"dim": 96, "ffn_dim": 256, "num_heads": 4, "text_len": 12, "text_dim": 16, "freq_dim": 16, "num_layers": 2}
GRID = Grid(4, 9, 10)


def real_block(layout: Layout, qk_norm: bool):
    """A block with real weights, and what it is called with."""
    model = OSPNextTransformer3DModel(**SETTINGS, qk_norm=qk_norm)
    plan = model.switch.plan(GRID, (layout,), 2, torch.device("cpu"))
    rope = plan.scatter(rope_table(GRID, 24), layout)
    x = torch.randn(2, GRID.tokens, 96, requires_grad=True)
    return model.blocks[0], (x, torch.randn(2, 6, 96), torch.randn(2, 12, 96), rope, plan.segments(layout))


def traced(layout: Layout, qk_norm: bool, training: bool) -> Held:
    settings = SETTINGS | {"qk_norm": qk_norm, "cross_attn_norm": True, "eps": 1e-6}
    segments = order(GRID, layout, 2).segments
    return trace_block(settings, Shared(segments, GRID.tokens, 1, 4), 2, torch.float32, training, False)


@pytest.mark.parametrize("layout", [Layout.FULL, Layout.TOKEN])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_saved_activations_are_those_autograd_keeps(layout: Layout, qk_norm: bool) -> None:
    block, arguments = real_block(layout, qk_norm)
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        out = block(*arguments)
    kept.pop(out.untyped_storage().data_ptr(), None)
    real = sum(storage.nbytes() for storage in kept.values())
    if qk_norm:  # a CPU's norm is several kernels and keeps one more tensor of q and k, in both attentions
        real -= 3 * arguments[0].nbytes
    assert traced(layout, qk_norm, True).saved == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("layout", [Layout.FULL, Layout.TOKEN])
def test_the_peak_of_a_forward_pass_is_what_the_allocator_saw(layout: Layout) -> None:
    block, arguments = real_block(layout, False)
    with torch.no_grad():
        block(*arguments)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            block(*arguments)
    alive = peak = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    assert traced(layout, False, False).peak - arguments[0].nbytes == pytest.approx(peak, rel=0.1)


TRAIN = """
weight_dtype: fp32
compile: false
model_config: {dim: 96, ffn_dim: 256, num_heads: 4, num_layers: 8, text_dim: 32, text_len: 12, freq_dim: 16,
  qk_norm: false, skiparse_model_type: dual_end, sparse_ratio: 2, num_full_blocks: 4}
data_config: {batch_size: 2, dataset_config: {sample_num_frames: 13, sample_height: 144, sample_width: 160}}
"""


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_whole_model_keeps_what_the_plan_says(checkpointing: bool, tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text(TRAIN)
    recipe = make_recipe(
        read_config(str(tmp_path / "train.yaml"), [f"gradient_checkpointing={str(checkpointing).lower()}"], None),
        find_device("h100"),
    )
    parts = phases(recipe, Mesh(1, 1, 1, 1, 1, 1), find_device("h100"))[0].parts
    model = OSPNextTransformer3DModel(**recipe.settings).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    inputs = torch.randn(2, *recipe.latents), torch.rand(2), torch.randn(2, 12, 32)
    model(*inputs, return_dict=False)  # plans and tables are made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        out = model(*inputs, return_dict=False)[0]
    events = prof.profiler.kineto_results.events()
    alive = sum(event.nbytes() for event in events if event.name() == "[memory]")
    out.sum().backward()
    assert parts["activations"] == pytest.approx(alive, rel=0.1)


@pytest.fixture
def four_ranks() -> Iterator[None]:
    """This process as rank 0 of four, which FSDP believes."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


def test_shards_are_those_of_fsdp(four_ranks: None) -> None:
    sizes = SETTINGS | {"dim": 90, "num_heads": 3, "ffn_dim": 101}  # divides by nothing
    expected = sharded(OSPNextTransformer3DModel(**sizes), 4)
    model = OSPNextTransformer3DModel(**sizes)
    mesh = init_device_mesh("cpu", (4,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert sum(p.to_local().numel() for p in model.parameters()) == expected
    assert sharded(OSPNextTransformer3DModel(**sizes), 1) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", ["generate", "train"])
def test_shards_in_8_bits_are_those_that_are_loaded(
    kind: Literal["generate", "train"], four_ranks: None, tmp_path: Path
) -> None:
    sizes = SETTINGS | {"dim": 90, "num_heads": 3, "ffn_dim": 101}  # divides by nothing
    save_transformer(OSPNextTransformer3DModel(**sizes), tmp_path / "plain")
    quantize_transformer(tmp_path / "plain", tmp_path / "small", QuantConfig())
    (tmp_path / "run.yaml").write_text(
        f"weight_dtype: bf16\nmodel_config: {{pretrained_model_dir_or_checkpoint: {tmp_path / 'small'}}}\n"
    )
    words = [["lora_config.rank=2", "data_config.batch_size=1"], ["encoder_cpu_offload=true"]][kind == "generate"]
    recipe = make_recipe(read_config(str(tmp_path / "run.yaml"), words, kind), find_device("h100"))
    parts = phases(recipe, Mesh(4, 1, 4, 1, 1, 1), find_device("h100"))[1 if kind == "generate" else 0].parts
    mesh = copies_mesh(Copies(1, 4), "cpu")
    model = load_transformer(
        tmp_path / "small", dtype=torch.bfloat16, shard=lambda m: shard_transformer(m, mesh, Sharding(), 4)
    )
    held = sum(p.to_local().nbytes for p in model.parameters())
    assert parts["transformer" if kind == "generate" else "frozen weights"] == held
    block, whole = (sum(p.nbytes for p in m.parameters()) for m in (model.blocks[0], model))  # a DTensor's are all
    gathered = whole - (len(model.blocks) - 2) * block
    if kind == "train":
        gathered += 4 * sum(p.numel() for p in recipe.adapter.parameters()) // len(model.blocks)
    assert parts["gathered weights"] == gathered
