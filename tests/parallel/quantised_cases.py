"""What the test of 8-bit layers on many processes runs in each of them."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from sequence_cases import Setting, mesh_of
from training_cases import weights_of

from ospnext.checkpoints.load import load_transformer
from ospnext.checkpoints.read import CheckpointError
from ospnext.parallel.amax import scaling_layers
from ospnext.parallel.apply import Options, apply_sequence_parallel, parallelise
from ospnext.parallel.fsdp import Copies, Sharding, forget_gathered, shard_of, whole
from ospnext.parallel.mesh import Sizes
from ospnext.quant.apply import quantize
from ospnext.quant.config import QuantConfig
from ospnext.quant.running import advance, buffers, observed, share


def outliers(setting: Setting) -> tuple[torch.Tensor, ...]:
    """Inputs of a setting whose first patch is far larger than all others: one process owns it."""
    latents, timestep, text = (x.float() for x in setting.inputs())
    latents[:, :, 0, :2, :2] *= 30
    return latents, timestep, text


def step(setting: Setting, mesh: Sizes | None, attention: bool, shared: bool = True) -> dict[str, torch.Tensor]:
    """Output and gradients of a quantised model, summed over the processes of the sequence."""
    model = setting.model().float()
    quantize(model, QuantConfig(attention=attention))
    if mesh is not None:
        apply_sequence_parallel(model, mesh_of(mesh))
        if not shared:
            for layer in scaling_layers(model):
                layer.reduce_amax = None
    out = model(*outliers(setting)).sample
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    found = {"output": out.detach()}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None
        if mesh is not None:
            dist.all_reduce(gradient, group=mesh_of(mesh).sequence.get_group())
        found[name] = gradient
    return found


def errors(rank: int, sizes: Sizes, setting: Setting, attention: bool, shared: bool) -> dict[str, float]:
    """How far each result is from one device's, by its norm."""
    ours, theirs = step(setting, sizes, attention, shared), step(setting, None, attention)
    return {name: float((value - theirs[name]).norm() / theirs[name].norm()) for name, value in ours.items()}


def errors_of_shards(rank: int, sizes: Sizes, setting: Setting) -> dict[str, float]:
    """The same of a model whose weights are shared, too, and whose blocks are run again in the backward pass."""
    model = setting.model().float()
    quantize(model, QuantConfig())
    parallelise(model, mesh_of(sizes), weights_of(Copies(1, sizes.world)), Options(checkpointing=True))
    out = model(*outliers(setting)).sample
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    theirs = step(setting, None, attention=True)
    ours = {"output": out.detach()} | {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    return {name: float((value - theirs[name]).norm() / theirs[name].norm()) for name, value in ours.items()}


def measured(setting: Setting) -> Any:
    """A model that scales by running numbers, those of one pass."""
    model = setting.model().float().eval()
    quantize(model, QuantConfig(scaling="running"))
    with torch.no_grad(), observed(model):
        model(*outliers(setting))
    return model


def errors_of_files(rank: int, sizes: Sizes, setting: Setting, path: Path) -> float:
    """How far a model from an 8-bit checkpoint that shares weights and tokens is from one that does not."""
    weights = weights_of(Copies(1, sizes.world))
    shared = load_transformer(path, shard=lambda model: parallelise(model, mesh_of(sizes), weights, Options()))
    with torch.no_grad():
        ours, theirs = (model(*outliers(setting)).sample for model in (shared, load_transformer(path)))
    return float((ours - theirs).norm() / theirs.norm())


class Shards(NamedTuple):
    """What two processes that share 8-bit weights, and not the videos, have of them.

    Attributes:
        equal: output, in two passes, and gathered weights are one process's, bit for bit.
        dtypes: of this process's rows of the quantised weights.
        bytes, whole: of these rows, and of the whole weights in bfloat16.
    """

    equal: bool
    dtypes: set[torch.dtype]
    bytes: int
    whole: int


def shards_of_files(rank: int, setting: Setting, path: Path, dtype: torch.dtype, sharding: Sharding) -> Shards:
    """Sample from an 8-bit checkpoint, each process its own video."""
    mesh, weights = mesh_of(Sizes(2, 1, 1, 1)), weights_of(Copies(1, 2))
    options = Options(sharding)
    shared = load_transformer(path, dtype=dtype, shard=lambda model: parallelise(model, mesh, weights, options))
    alone = load_transformer(path, dtype=dtype)
    latents, timestep, text = (x[rank : rank + 1].to(dtype) for x in outliers(setting))
    with torch.no_grad():
        expected = alone(latents, timestep, text).sample
        equal = all(shared(latents, timestep, text).sample.equal(expected) for _ in range(2))
    forget_gathered(shared)
    held = alone.state_dict()
    equal &= all(whole(value).equal(held[name]) for name, value in shared.state_dict().items())
    names = [name for name, value in held.items() if value.dtype is torch.uint8]
    own = [shard_of(shared.get_parameter(name)).values for name in names]
    return Shards(equal, {x.dtype for x in own}, sum(x.nbytes for x in own), sum(2 * held[n].numel() for n in names))


def refused(rank: int, setting: Setting, path: Path) -> str:
    """What loading in shards says of damage."""
    mesh, weights = mesh_of(Sizes(2, 1, 1, 1)), weights_of(Copies(1, 2))
    try:
        load_transformer(path, shard=lambda model: parallelise(model, mesh, weights, Options()))
    except CheckpointError as error:
        return str(error)
    return ""


def running_numbers(rank: int, sizes: Sizes | None, setting: Setting, scales: list[float]) -> dict[str, torch.Tensor]:
    """Running numbers after two training passes, and what the second one has seen.

    Args:
        rank: of this process.
        sizes: None for one device.
        setting: of model and inputs.
        scales: what the latents of each group of processes are multiplied by.
    """
    model = setting.model().float()
    quantize(model, QuantConfig(scaling="running"))
    group = 0
    if sizes is not None:
        mesh = mesh_of(sizes)
        parallelise(model, mesh, weights_of(Copies(1, sizes.world)), Options(checkpointing=True))
        group = mesh.group
    latents, *rest = outliers(setting)
    for size in (1.0, 0.5):
        model(latents * scales[group] * size, *rest).sample.square().sum().backward()
    share(model)
    found = {name: buffer.clone() for name, buffer in buffers(model).items()}
    advance(model, 0.99)
    return found | {f"later.{name}": buffer.clone() for name, buffer in buffers(model).items()}
