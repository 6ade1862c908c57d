"""The one order in which models are put together, written once.

    meta -> HiF8 -> LoRA -> sequence -> activation checkpointing -> compile -> FSDP2 -> strict load

A model is built without memory and held to its files by name and shape; what many processes need is put on it from
outside (``parallel.apply``); only then every process reads its own part. ``fit_run`` checks all sizes before there is a
model, ``join`` arranges the processes.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import UMT5EncoderModel

from ospnext.checkpoints.fill import ProgressCallback
from ospnext.checkpoints.load import Shard, load_text_encoder, load_transformer
from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.parallel.apply import Fit, Options, fit, parallelise
from ospnext.parallel.fsdp import CopiesMesh, Sharding, copies_mesh, shard_text_encoder, storage_device
from ospnext.parallel.mesh import Mesh, build_mesh
from ospnext.quant.apply import is_quantised
from ospnext.sections import ParallelConfig


@dataclass(frozen=True)
class Crew:
    """The processes of a run, arranged.

    Attributes:
        device: of this process.
        mesh: who shares a video; None in one process.
        weights: who shares the weights; None where everyone has them whole.
        sharding: of the transformer's weights.
        overlap: exchange tokens while blocks compute, in sampling.
    """

    device: torch.device
    mesh: Mesh | None = None
    weights: CopiesMesh | None = None
    sharding: Sharding = field(default_factory=Sharding)
    overlap: bool = False


def fit_run(config: ParallelConfig, world: int, segments: int, guided: bool) -> Fit:
    """The sizes a configuration asks for on so many processes, held to the model.

    Args:
        config: what is asked for.
        world: processes in all.
        segments: of the model's sparse blocks, see ``parallel.ownership.segment_count``.
        guided: whether the model is asked twice a step.

    Raises:
        ValueError: they do not fit; the message names sizes that do.
    """
    if config.cfg_parallel_size > 1 and not guided:
        raise ValueError(
            f"cfg_parallel_size is {config.cfg_parallel_size}, but guidance is off and has no halves to share: use "
            "cfg_parallel_size=1, or a guidance_scale above 1"
        )
    ssp, ulysses = config.sequence
    return fit(world, segments, ssp, ulysses, config.shards(world), config.ddp_size, config.cfg_parallel_size)


def join(config: ParallelConfig, sizes: Fit, device: torch.device, offload: bool = False) -> Crew:
    """Arrange the processes; every one of them calls it, once.

    Args:
        config: what is asked for.
        sizes: of ``fit_run``.
        device: of this process.
        offload: keep the transformer's shards in host memory.
    """
    if sizes.sizes.world == 1:
        return Crew(device)
    mesh = build_mesh(sizes.sizes, device.type)
    if sizes.copies.fsdp == 1:
        return Crew(device, mesh)
    sharding = Sharding(config.reshard_after_forward, config.explicit_prefetching_num_blocks, offload)
    return Crew(device, mesh, copies_mesh(sizes.copies, device.type), sharding)


def assemble_transformer(
    path: Path,
    crew: Crew,
    dtype: torch.dtype | None,
    home: torch.device | None = None,
    options: Options | None = None,
    progress: ProgressCallback | None = None,
    **overrides: Any,
) -> OSPNextTransformer3DModel:
    """A transformer for this process, in eval mode; arguments as ``checkpoints.load.load_transformer``.

    Args:
        path: of the weights.
        crew: who shares videos and weights.
        dtype: of the weights that are kept.
        home: where weights go that are not sharded; None for the crew's device.
        options: checkpointing and compilation; the sharding is the crew's.
        progress: as there.
        **overrides: as there.

    Raises:
        CheckpointError, OutOfMemoryError: as there.
    """
    chosen = replace(options or Options(), sharding=crew.sharding)

    shard: Shard | None = None
    if (mesh := crew.mesh) is not None:

        def shard(model: Any) -> None:
            # 8-bit linears scale by all tokens at once, so these cannot go in two parts.
            assert not (crew.overlap and is_quantised(model))
            parallelise(model, mesh, crew.weights, replace(chosen, overlap=crew.overlap))

    if crew.weights is not None:
        home = storage_device(crew.sharding, crew.device)
    return load_transformer(path, dtype=dtype, device=home or crew.device, progress=progress, shard=shard, **overrides)


def assemble_text_encoder(
    path: Path,
    crew: Crew,
    dtype: torch.dtype | None,
    home: torch.device | None = None,
    offload: bool = False,
    progress: ProgressCallback | None = None,
) -> UMT5EncoderModel:
    """A text encoder for this process, in shards where the crew shares weights; then all encode together.

    Args:
        path, dtype, home, progress: as ``assemble_transformer``.
        crew: who shares weights.
        offload: keep shards in host memory.

    Raises:
        CheckpointError, OutOfMemoryError: as ``checkpoints.load.load_text_encoder``.
    """
    weights = crew.weights
    if weights is None:
        return load_text_encoder(path, dtype, home or crew.device, progress)
    sharding = replace(crew.sharding, explicit_prefetching_num_blocks=0, model_cpu_offload=offload)
    return load_text_encoder(
        path,
        dtype,
        storage_device(sharding, crew.device),
        progress,
        lambda encoder: shard_text_encoder(encoder, weights, sharding),
    )
