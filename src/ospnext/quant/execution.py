"""HiF8 tensors in the form that multiplies them, and their products: emulated, on FP8 tensor cores, or on Ascend.

A tensor is held as numbers of eight bits' worth and a scale to multiply them by. Emulation holds bfloat16, which has
every HiF8 number, and multiplies in float32; the others hold eight bits.
"""

from typing import NamedTuple

import torch

from ospnext.ops import fp8, hif8
from ospnext.quant import ascend
from ospnext.quant.config import Execution, QuantConfig, ReduceAmax

_SMALLEST_AMAX = 2.0**-100  # so that a tensor of zeros has a scale, and every scale an inverse


class Held(NamedTuple):
    """HiF8 numbers as the products take them, and what they are to be multiplied by (float32, broadcasts)."""

    values: torch.Tensor
    inverse: torch.Tensor

    def float(self) -> torch.Tensor:
        """The numbers that are meant, in float32."""
        return self.values.float() * self.inverse


def amax(x: torch.Tensor, first: int, reduce: ReduceAmax | None = None) -> torch.Tensor:
    """The largest absolute number along all axes from ``first`` on, which stay with size 1; float32, NaN if any is.

    Args:
        x: of any floating dtype; where it has no number the result is 0.
        first: axes before it are kept.
        reduce: the largest over the processes that share x.
    """
    kept = x.shape[:first] + (1,) * (x.ndim - first)
    if x.numel():
        largest = x.detach().abs().flatten(first).amax(-1).float().reshape(kept)
    else:
        largest = torch.zeros(kept, device=x.device)
    return largest if reduce is None else reduce(largest)


def hold(x: torch.Tensor, largest: torch.Tensor, scale_max: float, execution: Execution) -> Held:
    """``x`` scaled so that ``largest`` becomes ``scale_max``, and rounded to HiF8.

    What is larger still (a running largest number may be out of date) saturates where E4M3 does, in every execution.
    """
    largest = largest.clamp(min=_SMALLEST_AMAX)
    scale, inverse = scale_max / largest, largest / scale_max
    if execution == "fp8":
        return Held(fp8.to_e4m3(x, scale, scale_max), inverse / fp8.headroom(scale_max))
    limit = fp8.E4M3_MAX / fp8.headroom(scale_max)
    scaled = (x.detach().float() * scale).clamp(-limit, limit)
    if execution == "ascend":
        return Held(ascend.cast(scaled), inverse)
    return Held(hif8.round(scaled).bfloat16(), inverse)


def hold_codes(codes: torch.Tensor, inverse: torch.Tensor, config: QuantConfig) -> Held:
    """The same of HiF8 codes that were made with ``scale_max_forward``."""
    if config.execution == "fp8":
        factor = fp8.headroom(config.scale_max_forward)
        return Held(fp8.codes_to_e4m3(codes, config.scale_max_forward), inverse / factor)
    if config.execution == "ascend":
        return Held(codes, inverse)
    return Held(hif8.decode(codes).bfloat16(), inverse)


def matmul(a: Held, b: Held, execution: Execution, dtype: torch.dtype) -> torch.Tensor:
    """``a @ b.T`` of what is meant by ``a [M, K]``, one scale or ``[M, 1]``, and ``b [N, K]``, one scale."""
    if execution == "fp8":
        return fp8.scaled_mm(a.values, b.values, a.inverse, b.inverse, dtype)
    if execution == "ascend":
        return ascend.matmul(a.values, b.values, a.inverse, b.inverse, dtype)
    with torch.autocast(a.values.device.type, enabled=False):  # it would multiply in half precision
        return (a.values.float() @ b.values.float().t() * (a.inverse * b.inverse)).to(dtype)
