"""HiF8 on FP8 tensor cores: HiF8's rounding, an exact cast to E4M3, and torch's scaled product.

E4M3 has three bits of mantissa over 16 binades, HiF8 three or fewer over 38. A tensor whose largest number is scaled to
15 and multiplied by 16, or scaled to 224 and multiplied by 2, therefore casts exactly, but for what is smaller than a
few millionths of it: those numbers fall among E4M3's last denormals and move by at most half of one. E4M3's own way of
rounding acts nowhere else, so the product is HiF8's up to the order in which it is added up.

=============  ==========  =============================  ===========================
scaled to      times       exact from, and zero           error below that, at most
=============  ==========  =============================  ===========================
15 (forward)   16          2^-12 (1.6e-5 of the largest)  2^-14
224 (backward) 2           2^-9  (8.7e-6 of the largest)  2^-11
=============  ==========  =============================  ===========================

These are the plain forms; they run wherever ``torch._scaled_mm`` does, a CPU included.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ospnext.ops import hif8

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
SMALLEST_AMAX = 2.0**-100
"""So that a tensor of zeros has a scale, and every scale an inverse."""
_GRANULE = 16  # sizes of a product must be multiples of it


class Held(NamedTuple):
    """HiF8 numbers in the form that multiplies them, and what they are to be multiplied by (float32, broadcasts)."""

    values: torch.Tensor
    inverse: torch.Tensor

    def numbers(self) -> torch.Tensor:
        """The values in float32, before they are scaled back."""
        return hif8.decode(self.values) if self.values.dtype is torch.uint8 else self.values.float()

    def float(self) -> torch.Tensor:
        """The numbers that are meant, in float32."""
        return self.numbers() * self.inverse


def headroom(scale_max: float) -> float:
    """The largest power of two that keeps HiF8 numbers up to ``scale_max`` within E4M3: 16 for 15, 2 for 224."""
    exponent = math.floor(math.log2(scale_max))  # in plain numbers: it becomes a constant where this is compiled
    step = 2.0 ** (exponent - (3 - (abs(exponent) > 3) - (abs(exponent) > 7)))
    largest = math.floor(scale_max / step + 0.5) * step
    return 2.0 ** math.floor(math.log2(E4M3_MAX / largest))


def amax(x: torch.Tensor, first: int) -> torch.Tensor:
    """The largest absolute number along all axes from ``first`` on, which stay with size 1; float32, NaN if any is.

    Args:
        x: of any floating dtype; where it has no number the result is 0.
        first: axes before it are kept.
    """
    kept = x.shape[:first] + (1,) * (x.ndim - first)
    if not x.numel():
        return torch.zeros(kept, device=x.device)
    return x.detach().abs().flatten(first).amax(-1).float().reshape(kept)


def hold(x: torch.Tensor, largest: torch.Tensor, scale_max: float) -> Held:
    """``x`` scaled so that ``largest`` becomes ``scale_max``, rounded to HiF8, as E4M3; what is larger saturates."""
    scale, inverse = scales(largest, scale_max)
    return Held(to_e4m3(x, scale, scale_max), inverse / headroom(scale_max))


def scales(largest: torch.Tensor, scale_max: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What brings ``largest`` (float32) to ``scale_max``, and what brings it back; the same on every device.

    Divided by a number, torch multiplies by its inverse on CUDA; divided by a tensor, it divides.
    """
    largest = largest.clamp(min=SMALLEST_AMAX)
    limit = torch.full_like(largest, scale_max)
    return limit / largest, largest / limit


def to_e4m3(x: torch.Tensor, scale: torch.Tensor, scale_max: float) -> torch.Tensor:
    """``x · scale`` rounded to HiF8, times ``headroom(scale_max)``, as E4M3; larger numbers saturate, NaN stays.

    Args:
        x: of any floating dtype and shape.
        scale: float32, to be broadcast against x.
        scale_max: what the largest number is scaled to.
    """
    scaled = x.float() * scale
    if hif8.has_table(scaled):
        return hif8.look_up(_e4m3_table(scale_max, x.device), scaled.contiguous()).view(E4M3)
    return _scaled_to_e4m3(scaled, scale_max)


def _scaled_to_e4m3(scaled: torch.Tensor, scale_max: float) -> torch.Tensor:
    factor = headroom(scale_max)
    limit = E4M3_MAX / factor
    return _saturated(hif8.round(scaled.clamp(-limit, limit)) * factor)


def _saturated(x: torch.Tensor) -> torch.Tensor:
    """As E4M3. Before torch 2.13 a cast makes NaN of what is too large, and the limit may be rounded beyond itself."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


@cache
def _e4m3_table(scale_max: float, device: torch.device) -> torch.Tensor:
    """The bytes of E4M3, for ``hif8.look_up``: limits, too, are known by the upper half."""
    with torch.inference_mode(False):
        return _scaled_to_e4m3(hif8.upper_halves(), scale_max).view(torch.uint8).to(device)


def codes_to_e4m3(codes: torch.Tensor, scale_max: float) -> torch.Tensor:
    """HiF8 codes of numbers up to ``scale_max``, times ``headroom(scale_max)``, as E4M3."""
    table = _saturated(torch.tensor(hif8.VALUES, device=codes.device) * headroom(scale_max))
    return table.view(torch.uint8)[codes.int()].view(E4M3)


def scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    fast: bool = False,
) -> torch.Tensor:
    """``(a · scale_a) @ (b · scale_b).T + bias`` of E4M3 matrices, added up in float32.

    Args:
        a: ``[M, K]``.
        b: ``[N, K]``.
        scale_a: float32, one number or ``[M, 1]``.
        scale_b: float32, one number.
        dtype: of the result.
        bias: ``[N]``, added before the result is rounded where it has the result's half precision, else after.
        fast: leave the sum in the tensor cores, which keep about 14 bits of it on Hopper; otherwise it is taken out
            every 128 numbers, and products take longer.

    Returns:
        ``[M, N]``. Sizes that are no multiple of 16 are padded with zeros, which costs a copy.
    """
    rows, columns = len(a), len(b)
    a, b = _padded(a), _padded(b)
    by_row = scale_a.numel() > 1
    # With a scale for every row CUDA gives bfloat16 only and a CPU knows no such scale; CUDA adds half biases only.
    out_dtype = dtype if not by_row else torch.bfloat16 if a.is_cuda else torch.float32
    inside = bias is not None and bias.dtype == out_dtype != torch.float32 and len(b) == columns and a.is_cuda
    left, right = _aligned(scale_a.reshape(-1)[:1].reshape(())), _aligned(scale_b.reshape(()))
    if by_row and a.is_cuda:
        left = F.pad(scale_a, (0, 0, 0, len(a) - rows), value=1.0)
        right = scale_b.expand(1, len(b)).contiguous()
    elif by_row:
        left = torch.ones_like(left)
    out = torch._scaled_mm(
        a, b.t(), left, right, bias if inside else None, out_dtype=out_dtype, use_fast_accum=fast and a.is_cuda
    )
    out = out[:rows, :columns]
    if by_row and not a.is_cuda:
        out = out * scale_a
    return out.to(dtype) if bias is None or inside else (out.float() + bias).to(dtype)


def _aligned(scale: torch.Tensor) -> torch.Tensor:
    """A scale where cuBLAS reads it: at a multiple of 16 bytes."""
    return scale.clone() if scale.data_ptr() % 16 else scale


def _padded(x: torch.Tensor) -> torch.Tensor:
    """A matrix, contiguous, with zeros up to sizes that the product takes."""
    short = [-size % _GRANULE for size in x.shape]
    if not any(short):
        return x.contiguous()
    return F.pad(x.view(torch.uint8), (0, short[1], 0, short[0])).view(x.dtype)  # padding knows no 8-bit floats
