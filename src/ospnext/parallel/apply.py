"""Put what many processes need on a finished model, from outside and in the one order that works.

    mesh = build_mesh(sizes, "cuda")
    weights = copies_mesh(copies, "cuda")
    report = parallelise(model, mesh, weights, Options(checkpointing=1.0))

Sizes are held to each other by ``fit``, before there is a process group or a model.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh

from ospnext.parallel.amax import share_amax, share_running
from ospnext.parallel.fsdp import Copies, Sharding, fit_copies, offload_notice, shard_transformer
from ospnext.parallel.mesh import Mesh, Sizes, check_segments, fit_sizes
from ospnext.parallel.ownership import segment_count
from ospnext.parallel.sequence import ShardedAttend, ShardedSwitch


@dataclass(frozen=True)
class Options:
    """What ``parallelise`` can be told besides the sizes.

    Attributes:
        sharding: of the weights.
        checkpointing: share of the blocks that are recomputed in the backward pass instead of keeping what is inside
            them, evenly spread.
        compile_backend: compile every block with it (``inductor``, ``aot_eager``); None runs them as written.
        overlap: exchange tokens while blocks compute, in sampling; see ``ShardedSwitch``.
    """

    sharding: Sharding = field(default_factory=Sharding)
    checkpointing: float = 0.0
    compile_backend: str | None = None
    overlap: bool = False

    def __post_init__(self) -> None:
        assert not (self.overlap and self.compile_backend), "compiled blocks keep their tokens to the end"


class Fit(NamedTuple):
    """Sizes that go together."""

    sizes: Sizes
    copies: Copies


def fit(
    world: int, segments: int, ssp: int = 1, ulysses: int = 1, fsdp: int = 1, ddp: int | None = None, cfg: int = 1
) -> Fit:
    """All sizes of a run, checked against each other; needs no process group and no model.

    Args:
        world: processes in all.
        segments: attention segments of the model's sparse blocks, see ``ownership.segment_count``.
        ssp, ulysses, cfg: as in ``fit_sizes``.
        fsdp, ddp: as in ``fit_copies``.

    Raises:
        ValueError: they do not go together; the message names all that do.
    """
    return Fit(fit_sizes(world, ssp, ulysses, segments, cfg), fit_copies(world, fsdp, ddp))


def parallelise(model: Any, mesh: Mesh, weights: DeviceMesh | None, options: Options) -> list[str]:
    """Make one of many processes' models out of a model, in place.

    The model takes and gives what it did before, the same on all processes of a sequence; after a backward pass the
    gradient of every parameter is that of one device for all ``dp`` videos' mean loss. Every process must then run
    every forward and backward pass.

    Args:
        model: a transformer on its device or on meta, to be filled afterwards.
        mesh: who shares a video, of ``build_mesh``.
        weights: who shares the weights, of ``copies_mesh``; None to sample with whole weights everywhere.
        options: the rest.

    Returns:
        What was done, a line each, to be printed.

    Raises:
        ValueError: the meshes do not fit each other or the model.
    """
    if weights is not None and mesh.sizes.world != weights.size():
        raise ValueError(f"{mesh.sizes.world} processes share the videos, but {weights.size()} the weights: use all")
    apply_sequence_parallel(model, mesh, options.overlap)
    share_running(model)
    if options.checkpointing:
        model.checkpoint_blocks(options.checkpointing)
    if options.compile_backend is not None:
        compile_blocks(model, options.compile_backend)
    if weights is not None:
        shard_transformer(model, weights, options.sharding, mesh.sizes.dp)
    return _report(mesh, weights, options)


def apply_sequence_parallel(model: Any, mesh: Mesh, overlap: bool = False) -> None:
    """Share every video's tokens among the processes of a sequence, in place.

    The model takes and gives what it did before, the same on all processes of a sequence. The gradient of a parameter
    becomes the sum over them.

    Args:
        model: a transformer with ``layouts``, ``config.sparse_ratio`` and the seams ``switch`` and, in each of its
            ``blocks``, ``self_attn.attend``. Cross-attention stays: every process has the whole text.
        mesh: of ``build_mesh``.
        overlap: as in ``Options``.

    Raises:
        ValueError: ``ssp`` does not divide the attention segments of the model. A dense one fits any: it has none that
            would have to be whole on a process.
    """
    assert not isinstance(model.switch, ShardedSwitch), "the model's tokens are shared already"
    if (segments := segment_count(model.layouts, model.config.sparse_ratio)) > 1:
        check_segments(mesh.sizes, segments)
    if mesh.sizes.ssp * mesh.sizes.ulysses == 1:
        return
    model.switch = ShardedSwitch(mesh.sharing, overlap)
    for block in model.blocks:
        block.self_attn.attend = ShardedAttend(block.self_attn.attend)
    share_amax(model, mesh.sharing.group)


def compile_blocks(model: Any, backend: str) -> None:
    """Compile every block as one graph, in place.

    What is compiled is the block's ``forward``, not its call: the hooks by which FSDP2 gathers weights stay outside.
    """
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend=backend, fullgraph=True)


def describe_checkpointing(share: float) -> str:
    """Which blocks are recomputed, in words."""
    if 0 < share < 1:
        return f"{share:.0%} of them checkpointed"
    return "checkpointed" if share else "not checkpointed"


def describe(sizes: Sizes, copies: Copies) -> str:
    """Who shares what, in a line."""
    world = f"{sizes.world} processes" if sizes.world > 1 else "one process"
    if sizes.world == 1:
        return world
    videos = f"{sizes.dp} videos at a time, each" if sizes.dp > 1 else "one video at a time,"
    shards = f"in {copies.fsdp} shards" if copies.fsdp > 1 else "whole"
    times = f", {copies.ddp} copies" if copies.ddp > 1 else ""
    return f"{world}: {videos} on cfg {sizes.cfg} x ssp {sizes.ssp} x ulysses {sizes.ulysses}; weights {shards}{times}"


def _report(mesh: Mesh, weights: DeviceMesh | None, options: Options) -> list[str]:
    world = mesh.sizes.world
    shards = 1 if weights is None else weights["fsdp"].size()
    lines = [
        describe(mesh.sizes, Copies(world // shards, shards)),
        f"blocks: {describe_checkpointing(options.checkpointing)}, "
        f"{'not compiled' if options.compile_backend is None else f'compiled by {options.compile_backend}'}",
    ]
    notice = offload_notice(options.sharding, mesh.devices.device_type)
    return lines if notice is None else [*lines, notice]
