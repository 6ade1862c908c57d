"""8-bit layers where several processes share a tensor's tokens: they scale and round what one device would.

Layers that scale by a largest number have an attribute ``reduce_amax``. It is set here, so that they know nothing of
processes; a model without such layers is left as it is.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_reduce, wait_tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from ospnext.parallel.sequence import ShardedAttend


class SharedAmax:
    """The element-wise largest over a process group.

    Args:
        group: its name, so that what holds this can be copied.
    """

    def __init__(self, group: str) -> None:
        self.group = group

    def __call__(self, largest: torch.Tensor) -> torch.Tensor:
        """One small collective; the same on all processes of the group."""
        return wait_tensor(all_reduce(largest, "max", self.group))  # type: ignore[arg-type]  # names serve too


class SharedTextAttend(ShardedAttend):
    """Attention of this process's tokens to a text that all have: gives keys and values the whole sequence's gradient.

    Each process has a part of that gradient, and rounding a part is not rounding the whole. So the parts are summed
    first and every process goes on with an equal share of the sum: what is added up later is the same.
    """

    def __init__(self, attend: Any, group: str) -> None:
        super().__init__(attend)
        self.group = group

    def __call__(  # type: ignore[override]
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        """See ``ops.attention.attend``."""
        return self.attend(q, _Whole.apply(k, self.group), _Whole.apply(v, self.group), segments)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        size = dist.get_world_size(_resolve_process_group(ctx.group))
        return wait_tensor(all_reduce(gradients[0].contiguous(), "sum", ctx.group)) / size, None


def share_amax(model: Any, group: str) -> None:
    """Have the 8-bit layers of a model round as one device would, in place.

    Args:
        model: with ``blocks`` that have ``cross_attn.attend``.
        group: name of the process group that shares every video's tokens.
    """
    for block in model.blocks:
        layers = list(scaling_layers(block))
        for layer in layers:
            layer.reduce_amax = SharedAmax(group)
        if layers:
            holder: Any = block.cross_attn
            holder = holder.attend if hasattr(holder.attend, "reduce_amax") else holder
            holder.attend = SharedTextAttend(holder.attend, group)


def share_running(model: Any) -> None:
    """Have running largest numbers be those of all processes of the run, whatever they share; in place."""
    group = dist.group.WORLD
    assert group is not None
    model.reduce_running = SharedAmax(group.group_name)


def scaling_layers(block: Any) -> Iterator[Any]:
    """Every layer of a block, and every attention however it is wrapped, that scales by a largest number."""
    for module in block.modules():
        layer: Any = module
        while layer is not None:
            if hasattr(layer, "reduce_amax"):
                yield layer
            layer = getattr(layer, "attend", None)
