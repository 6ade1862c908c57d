"""Sharded weights: torch's FSDP2 over all processes of a run, whatever else they share.

``fsdp`` neighbouring ranks hold one copy of the weights, ``ddp`` copies follow each other (HSDP where both are more
than 1). Which ranks share a *video* is independent of it (``mesh.py``): gradients are summed over all processes and
divided by the number of sequences, ``dp``. That is the sum over the ranks of a sequence and the mean over data, and so
exactly the gradient of one device whose batch is that of all ``dp`` together. Losses are never scaled.

Mixed precision: the parameters a process keeps and their gradients are in the dtype of the model's weights (float32 to
train), gathered weights in ``param_dtype``; gradients are added up in float32 at least. Inputs are never cast:
timesteps, rotary positions and modulation reach the blocks in float32, and the model's norms and modulation compute in
it, as on one device whose weights are in ``param_dtype``. The weights of norms and the modulation are rounded to
``param_dtype`` on the way: a unit is gathered in one dtype. Whole numbers, such as frozen weights in 8 bits, are kept
and gathered as they are (by torch 2.11 in ``param_dtype``, which has all 256).

A model that also trains is to sample under ``torch.no_grad``: what FSDP2 sets aside under ``torch.inference_mode``
serves no training, and torch says so.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

CopiesMesh: TypeAlias = DeviceMesh  # what ``copies_mesh`` makes


class Copies(NamedTuple):
    """How a run's processes share the weights: ``ddp`` copies, each of them in ``fsdp`` shards."""

    ddp: int
    fsdp: int

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.ddp * self.fsdp


@dataclass(frozen=True)
class Sharding:
    """What FSDP2 can be told.

    Attributes:
        reshard_after_forward: free gathered weights after the forward pass and gather them again for the backward one.
            If false they stay until a backward pass has used them: after sampling, call ``forget_gathered`` before
            weights are changed. None is true, for the root's own weights (embeddings and head) too: FSDP2 alone would
            keep these, and go on with the old ones when an average is swapped in between two samplings.
        explicit_prefetching_num_blocks: how many blocks ahead weights are gathered; 0 leaves it to FSDP2, which
            overlaps with one block.
        model_cpu_offload: keep shards, gradients and the optimiser's state in host memory. No effect on a CPU.
        param_dtype: of the weights that compute; None for that of the model's.
    """

    reshard_after_forward: bool | None = None
    explicit_prefetching_num_blocks: int = 0
    model_cpu_offload: bool = False
    param_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        ahead = self.explicit_prefetching_num_blocks
        if ahead < 0:
            raise ValueError(f"explicit_prefetching_num_blocks is {ahead}: use 0 (FSDP2's own order) or more")


def fit_copies(world: int, fsdp: int, ddp: int | None = None) -> Copies:
    """Copies and shards of a number of processes.

    Args:
        world: processes in all.
        fsdp: processes that share one copy.
        ddp: copies; None for as many as that makes.

    Raises:
        ValueError: the numbers do not go together; the message names all that do.
    """
    if world < 1:
        raise ValueError(f"world size is {world}: it must be at least 1")
    copies = Copies(world // fsdp if ddp is None and fsdp > 0 else ddp or 0, fsdp)
    if min(copies) < 1 or copies.world != world:
        fits = ", ".join(f"{n} x {world // n}" for n in range(1, world + 1) if world % n == 0)
        given = f"fsdp_size {fsdp}" + ("" if ddp is None else f" x ddp_size {ddp}")
        raise ValueError(f"{given} does not fit {world} processes. What fits, as fsdp_size x ddp_size: {fits}")
    return copies


def copies_mesh(copies: Copies, device_type: str) -> DeviceMesh:
    """The processes of this run by the weights they share; every one of them calls it.

    Asked again it gives the same object: DTensor remembers what it did by meshes that are equal, and would go on with
    the process groups of the first of two.
    """
    made = _MESHES.get(dist.group.WORLD, {}) if dist.is_initialized() else {}
    if (copies, device_type) not in made:
        flat = copies.ddp == 1
        shape, names = ((copies.fsdp,), ("fsdp",)) if flat else (copies, Copies._fields)
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=names)
        made = _MESHES.setdefault(dist.group.WORLD, {})  # which there is by now
        made[copies, device_type] = mesh
    return made[copies, device_type]


_MESHES: WeakKeyDictionary[Any, dict[tuple[Copies, str], DeviceMesh]] = WeakKeyDictionary()
"""By the group of all processes, which is another one when processes have parted and met again."""


def shard_transformer(model: Any, mesh: DeviceMesh, sharding: Sharding, sequences: int) -> None:
    """Shard a transformer in place: each of its ``blocks`` is a unit, the rest another.

    Args:
        model: on the mesh's device, or on meta to be filled afterwards (``checkpoints.fill``).
        mesh: of ``copies_mesh``.
        sharding: the options.
        sequences: of the whole run, ``dp``: gradients are summed over all processes and divided by it.

    Raises:
        ValueError: parameters of one unit that need gradients differ in dtype.
    """
    _shard(model, list(model.blocks), mesh, sharding, sequences)


def shard_text_encoder(encoder: Any, mesh: DeviceMesh, sharding: Sharding) -> None:
    """Shard transformers' UMT5 encoder in place, as ``shard_transformer``; afterwards all processes encode together."""
    _shard(encoder, list(encoder.encoder.block), mesh, sharding, mesh.size())


def offload_notice(sharding: Sharding, device_type: str) -> str | None:
    """What there is to say of ``model_cpu_offload`` on this kind of device."""
    if sharding.model_cpu_offload and device_type == "cpu":
        return "model_cpu_offload has no effect: the model runs on the CPU already"
    return None


def storage_device(sharding: Sharding, device: torch.device) -> torch.device:
    """Where the shards of a model that computes on ``device`` are kept, to fill them from files."""
    return torch.device("cpu") if sharding.model_cpu_offload else device


class Shard(NamedTuple):
    """What this process holds of a tensor."""

    rows: slice | None  # along the first axis; None where it is the whole tensor
    values: torch.Tensor


@torch.no_grad()
def shard_of(tensor: torch.Tensor) -> Shard:
    """This process's part of a parameter or buffer, sharded or not; what is written to ``values`` is its value."""
    if not isinstance(tensor, DTensor):
        return Shard(None, tensor)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Shard(slice(offset[0], offset[0] + shape[0]), tensor.to_local())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a parameter, sharded or not; where it is sharded, all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clip_gradients(parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scale gradients down to a total norm of ``max_norm``, that of one device; returns the norm they had.

    Args:
        parameters: plain or sharded; where they are sharded, all processes must call it.
        max_norm: of all gradients together.
    """
    return whole(nn.utils.clip_grad_norm_(parameters, max_norm))


def gradient_norm(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """The total norm of gradients, that of one device; arguments as ``clip_gradients``."""
    return whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


@torch.no_grad()
def scale_gradients(parameters: Iterable[torch.Tensor], scale: float) -> None:
    """Multiply all gradients, plain or sharded, in place."""
    torch._foreach_mul_([shard_of(p.grad).values for p in parameters if p.grad is not None], scale)


def unsound(named: Mapping[str, torch.Tensor]) -> str:
    """The last of the parameters, in order, whose gradient is NaN or infinite on some process; all call it together.

    Gradients spread from the output: in a network whose parameters stand in its order it is where that began. An empty
    string if all are sound.
    """
    own = [p.grad is not None and not shard_of(p.grad).values.isfinite().all() for p in named.values()]
    last = torch.tensor(max((i for i, bad in enumerate(own) if bad), default=-1))
    if dist.is_initialized():
        dist.all_reduce(last, dist.ReduceOp.MAX)
    return "" if last < 0 else list(named)[int(last)]


def synchronise_gradients(modules: Iterable[nn.Module], on: bool) -> None:
    """Whether the next backward pass of sharded modules ends in gradients of all processes, or only adds to its own.

    Without it gradients are kept whole on every process until a pass with it has reduced them.
    """
    for module in modules:
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(on)


def forget_gathered(model: nn.Module) -> None:
    """Free all gathered weights, so that the next forward pass sees what was written to the shards since."""
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def _shard(model: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh, sharding: Sharding, sequences: int) -> None:
    assert not isinstance(model, FSDPModule), "the model is sharded already"
    _check_dtypes(model, blocks)
    offload = sharding.model_cpu_offload and mesh.device_type != "cpu"
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": sharding.reshard_after_forward is not False,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=sharding.param_dtype,
            reduce_dtype=torch.promote_types(next(model.parameters()).dtype, torch.float32),
            cast_forward_inputs=False,
        ),
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }
    for unit in (*blocks, model):
        _divide_gradients(fully_shard(unit, **options), mesh, sequences)
    _prefetch(model, blocks, sharding.explicit_prefetching_num_blocks)


def _divide_gradients(unit: FSDPModule, mesh: DeviceMesh, sequences: int) -> None:
    """Make a unit's gradient the sum over all processes divided by ``sequences``."""
    # A sum, then a division: gloo and Ascend's collectives know no other reduction.
    unit.set_force_sum_reduction_for_comms(True)
    if mesh.ndim == 1 or mesh["fsdp"].size() > 1:
        unit.set_gradient_divide_factor(sequences)
    else:
        # Copies without shards: torch (2.13) applies the divide factor twice there, on copying and after the sum.
        unit.set_gradient_divide_factor(1)
        unit.set_all_reduce_hook(partial(_divide, by=sequences))


def _divide(gradient: torch.Tensor, by: int) -> None:
    gradient.div_(by)


def _check_dtypes(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    inside = {id(p) for block in blocks for p in block.parameters()}
    rest = [p for p in model.parameters() if id(p) not in inside]
    for parameters in (*(list(block.parameters()) for block in blocks), rest):
        # What is frozen below an adapter may be of another.
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters if p.requires_grad})
        if len(dtypes) > 1:
            raise ValueError(
                f"{type(model).__name__} holds {' and '.join(dtypes)} in one block: it cannot be sharded. Load it in "
                "bfloat16 or float32"
            )


def _prefetch(model: Any, blocks: Sequence[Any], ahead: int) -> None:
    """Gather ``ahead`` blocks before they are needed, in both directions; 0 leaves FSDP2's own order."""
    if ahead == 0:
        return
    order = [model, *blocks]  # the root's own parameters are gathered first
    for i, unit in enumerate(order[:-1]):
        unit.set_modules_to_forward_prefetch(order[i + 1 : i + 1 + ahead])
    for i, block in enumerate(blocks):
        block.set_modules_to_backward_prefetch(list(reversed(blocks[max(0, i - ahead) : i])))
