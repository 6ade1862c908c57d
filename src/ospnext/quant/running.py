"""Running largest numbers, which ``scaling="running"`` scales by: buffers of the modules whose tensors they measure.

A training pass notes the largest number of every tensor it rounds; when the next pass begins, ``advance`` takes these
over into the running ones. ``observed`` does it once, for a model that is only sampled. They are part of a checkpoint
and of a training run's state.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from ospnext.quant.config import QuantConfig, ReduceAmax
from ospnext.quant.execution import amax

AMAX, SEEN = "hif8_amax", "hif8_seen"
"""Names of the buffers: the running largest numbers, and the largest since they were last taken over."""


class Running(NamedTuple):
    """A module's numbers; None, None where nothing runs, and nowhere to note anything outside training."""

    amax: torch.Tensor | None
    seen: torch.Tensor | None


def start(module: nn.Module, count: int, device: torch.device) -> None:
    """Give a module ``count`` running numbers; 0 is one that nothing is known of yet."""
    for name in (AMAX, SEEN):
        module.register_buffer(name, torch.zeros(count, device=device))


def of(module: nn.Module) -> Running:
    """The numbers of a module as its pass needs them."""
    return Running(module._buffers.get(AMAX), module._buffers.get(SEEN) if module.training else None)


def largest(
    x: torch.Tensor, which: int, running: Running, config: QuantConfig, reduce: ReduceAmax | None
) -> torch.Tensor:
    """What ``x`` is scaled by, no axes: the running number with headroom, or x's own before there is one.

    Args:
        x: of any shape; noted in training.
        which: of the module's numbers.
        running: of the module, running.
        config: headroom.
        reduce: the largest over the processes that share x.
    """
    assert running.amax is not None
    own = amax(x, 0).reshape(())
    if running.seen is not None:
        running.seen[which] = torch.maximum(running.seen[which], own)
    known = running.amax[which]
    return torch.where(known > 0, known * config.headroom, own if reduce is None else reduce(own))


def holders(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that have running numbers."""
    return [module for module in model.modules() if AMAX in module._buffers]


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """All running numbers of a model, and what was seen, by name."""
    return {name: t for name, t in model.named_buffers() if name.rpartition(".")[2] in (AMAX, SEEN)}


@torch.no_grad()
def share(model: Any) -> None:
    """Have every process know what all have seen; all call it. In one process nothing changes.

    Args:
        model: with ``reduce_running``, the largest over all processes, where there are many (``parallel.amax``).
    """
    reduce: ReduceAmax | None = getattr(model, "reduce_running", None)
    if reduce is None or not (found := holders(model)):
        return
    seen = [module.get_buffer(SEEN) for module in found]
    for own, everyones in zip(seen, reduce(torch.cat(seen)).split([len(s) for s in seen]), strict=True):
        own.copy_(everyones)


@torch.no_grad()
def advance(model: nn.Module, decay: float) -> None:
    """A pass is over: running numbers take in what was seen, on all processes alike."""
    share(model)
    for module in holders(model):
        running, seen = module.get_buffer(AMAX), module.get_buffer(SEEN)
        running.copy_(torch.maximum(running * decay, seen))
        seen.zero_()


@contextmanager
def observed(model: nn.Module) -> Iterator[None]:
    """Inside, passes note the largest numbers they meet; afterwards the model scales by the largest of all.

    Args:
        model: quantised with ``scaling="running"``, in eval mode.
    """
    found = holders(model)
    for module in found:
        module.training = True  # it alone: the model's own pass would take over after every step
    try:
        yield
    finally:
        for module in found:
            module.training = False
    advance(model, decay=1.0)
