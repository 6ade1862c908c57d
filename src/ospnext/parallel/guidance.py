"""Guidance on two sequences: each computes one half, then they exchange velocities.

``flow.sample.guided`` takes a function that gives both halves; this one calls the model once, with the half of this
process. The way back is exact too: every process keeps the gradient of its own half, so that the sum over the
processes of a video is the gradient, as among the processes of a sequence.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ospnext.flow.sample import ConditionalVelocity, Halves
from ospnext.parallel.mesh import Mesh


class SplitGuidance:
    """Both halves of guidance from the two sequences of a video.

    Args:
        mesh: with ``cfg = 2``. The first of the two sequences computes v(∅), the second v(c).
    """

    def __init__(self, mesh: Mesh) -> None:
        assert mesh.sizes.cfg == 2, "guidance has two halves"
        axis = mesh.devices["cfg"]
        self._group = axis.get_group()
        self._half = axis.get_local_rank()

    def __call__(self, velocity: ConditionalVelocity, x: Tensor, t: Tensor, uncond: Tensor, cond: Tensor) -> Halves:
        """v(∅) and v(c), float32, the same on all processes of the video."""
        own = velocity(x, t, cond if self._half else uncond).float()
        return Halves(*_BothHalves.apply(own, self._half, self._group).unbind())


def gather_halves(own: Tensor, group: Any) -> Tensor:
    """``x [...]`` of each of two processes to ``[2, ...]`` of both."""
    both = own.new_empty(2, *own.shape)
    dist.all_gather(list(both.unbind()), own.contiguous(), group=group)
    return both


class _BothHalves(torch.autograd.Function):
    """``gather_halves`` whose gradient is the own half's."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, half: int, group: Any) -> Tensor:
        ctx.half = half
        return gather_halves(own, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0][ctx.half], None, None
