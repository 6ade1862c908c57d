"""The ``attend`` seam with queries, keys and values rounded to HiF8, and their gradients."""

from typing import Any

import torch

from ospnext.ops import attention8
from ospnext.ops.attention import Attend
from ospnext.ops.fp8 import E4M3, Held
from ospnext.quant.config import QuantConfig, ReduceAmax
from ospnext.quant.execution import amax, hold


class HiF8Attend(Attend):
    """Attention of rounded queries, keys and values; softmax and its products stay in the kernel's own numbers.

    What the kernel gets is rounded to HiF8, scaled back and, in half precision, rounded to that once more. The scale is
    that of one sample's tensor, whatever ``QuantConfig.scaling`` says of linears. Where ``quant.block`` has rounded
    them already, as bytes of E4M3 with ``scales``, FP8 tensor cores do it all and ``dtype`` is given back.

    Args:
        attend: what computes attention then.
        config: how to round.
    """

    def __init__(self, attend: Attend, config: QuantConfig) -> None:
        self.attend = attend
        self.quant = config
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
        q, k, v = (_Round.apply(x, self.quant, self.reduce_amax) for x in (q, k, v))
        return self.attend(q, k, v, segments)


class _Round(torch.autograd.Function):
    """Rounds on the way forward with one recipe's number, and the gradient on the way back with the other."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, config: QuantConfig, reduce: ReduceAmax | None) -> torch.Tensor:
        ctx.config, ctx.reduce = config, reduce
        return _rounded(x, config.scale_max_forward, reduce)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _rounded(gradients[0], ctx.config.scale_max_backward, ctx.reduce), None, None


def _rounded(x: torch.Tensor, scale_max: float, reduce: ReduceAmax | None) -> torch.Tensor:
    """``x [B, N, heads, head_dim]`` rounded and scaled back."""
    return hold(x, amax(x, 1, reduce), scale_max, "emulation").float().to(x.dtype)
