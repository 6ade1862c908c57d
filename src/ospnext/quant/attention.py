"""The ``attend`` seam with queries, keys and values rounded to HiF8, and their gradients."""

from typing import Any

import torch
from torch import nn

from ospnext.ops import attention8
from ospnext.ops.attention import Attend
from ospnext.ops.fp8 import E4M3, Held
from ospnext.quant import running
from ospnext.quant.config import QuantConfig, ReduceAmax
from ospnext.quant.execution import amax, hold
from ospnext.quant.running import Running


class HiF8Attend(Attend):
    """Attention of rounded queries, keys and values; softmax and its products stay in the kernel's own numbers.

    What the kernel gets is rounded to HiF8, scaled back and, in half precision, rounded to that once more. The scale is
    that of one sample's tensor, or of the owner's running number; gradients have one for each sample in any case. Where
    ``quant.block`` has rounded them already, as bytes of E4M3 with ``scales``, FP8 tensor cores do it all and ``dtype``
    is given back.

    Args:
        attend: what computes attention then.
        config: how to round.
        owner: the module that attends; it gets the running numbers of queries, keys and values if the recipe has any.
    """

    def __init__(self, attend: Attend, config: QuantConfig, owner: nn.Module | None = None) -> None:
        self.attend = attend
        self.quant = config
        self.owner = owner or nn.Module()
        if config.scaling == "running":
            running.start(self.owner, 3, next((p.device for p in self.owner.parameters()), torch.device("cpu")))
        self.reduce_amax: ReduceAmax | None = None
        self.scales: tuple[torch.Tensor, ...] = ()  # of the queries, keys and values that come as bytes
        self.dtype = torch.bfloat16  # of what is given back then

    @property
    def kernel(self) -> str:
        """Name of the attention kernel asked for."""
        return self.attend.kernel

    @kernel.setter
    def kernel(self, name: str) -> None:
        self.attend.kernel = name

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        """See ``ops.attention.attend``."""
        if q.dtype is torch.uint8:
            q8, k8, v8 = (Held(x.view(E4M3), scale) for x, scale in zip((q, k, v), self.scales, strict=True))
            return attention8.attend(q8, k8, v8, segments, self.dtype).whole().unflatten(-1, q.shape[2:])
        numbers, reduce = running.of(self.owner), self.reduce_amax
        q, k, v = (_Round.apply(x, which, *numbers, self.quant, reduce) for which, x in enumerate((q, k, v)))
        return self.attend(q, k, v, segments)


class _Round(torch.autograd.Function):
    """Rounds on the way forward with one recipe's number, and the gradient on the way back with the other."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        which: int,
        largest: torch.Tensor | None,
        seen: torch.Tensor | None,
        config: QuantConfig,
        reduce: ReduceAmax | None,
    ) -> torch.Tensor:
        ctx.config, ctx.reduce = config, reduce
        if largest is None:
            return _rounded(x, amax(x, 1, reduce), config.scale_max_forward)
        by = running.largest(x, which, Running(largest, seen), config, reduce)
        return _rounded(x, by, config.scale_max_forward)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (g,) = gradients
        return _rounded(g, amax(g, 1, ctx.reduce), ctx.config.scale_max_backward), None, None, None, None, None


def _rounded(x: torch.Tensor, largest: torch.Tensor, scale_max: float) -> torch.Tensor:
    """``x [B, N, heads, head_dim]`` rounded and scaled back."""
    return hold(x, largest, scale_max, "emulation").float().to(x.dtype)
