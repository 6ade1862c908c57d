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

import torch
import torch.nn.functional as F

from ospnext.ops import hif8

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
_GRANULE = 16  # sizes of a product must be multiples of it


def headroom(scale_max: float) -> float:
    """The largest power of two that keeps HiF8 numbers up to ``scale_max`` within E4M3: 16 for 15, 2 for 224."""
    exponent = math.floor(math.log2(scale_max))  # in plain numbers: it becomes a constant where this is compiled
    step = 2.0 ** (exponent - (3 - (abs(exponent) > 3) - (abs(exponent) > 7)))
    largest = math.floor(scale_max / step + 0.5) * step
    return 2.0 ** math.floor(math.log2(E4M3_MAX / largest))


def to_e4m3(x: torch.Tensor, scale: torch.Tensor, scale_max: float) -> torch.Tensor:
    """``x · scale`` rounded to HiF8, times ``headroom(scale_max)``, as E4M3; larger numbers saturate, NaN stays.

    Args:
        x: of any floating dtype and shape.
        scale: float32, to be broadcast against x.
        scale_max: what the largest number is scaled to.
    """
    factor = headroom(scale_max)
    limit = E4M3_MAX / factor
    return (hif8.round((x.float() * scale).clamp(-limit, limit)) * factor).to(E4M3)


def codes_to_e4m3(codes: torch.Tensor, scale_max: float) -> torch.Tensor:
    """HiF8 codes of numbers up to ``scale_max``, times ``headroom(scale_max)``, as E4M3."""
    table = (torch.tensor(hif8.VALUES, device=codes.device) * headroom(scale_max)).to(E4M3)
    return table.view(torch.uint8)[codes.int()].view(E4M3)


def scaled_mm(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """``(a · scale_a) @ (b · scale_b).T`` of E4M3 matrices, added up in float32.

    Args:
        a: ``[M, K]``.
        b: ``[N, K]``.
        scale_a: float32, one number or ``[M, 1]``.
        scale_b: float32, one number.
        dtype: of the result.

    Returns:
        ``[M, N]``. Sizes that are no multiple of 16 are padded with zeros, which costs a copy.
    """
    rows, columns = len(a), len(b)
    a, b = _padded(a), _padded(b)
    if scale_a.numel() == 1:
        out = torch._scaled_mm(a, b.t(), scale_a.reshape(()), scale_b.reshape(()), out_dtype=dtype)
    else:
        scale_a = F.pad(scale_a, (0, 0, 0, len(a) - rows), value=1.0)
        # With a scale for every row CUDA gives bfloat16 only.
        out = torch._scaled_mm(a, b.t(), scale_a, scale_b.expand(1, len(b)).contiguous(), out_dtype=torch.bfloat16)
    return out[:rows, :columns].to(dtype)


def _padded(x: torch.Tensor) -> torch.Tensor:
    """A matrix, contiguous, with zeros up to sizes that the product takes."""
    short = [-size % _GRANULE for size in x.shape]
    if not any(short):
        return x.contiguous()
    return F.pad(x.view(torch.uint8), (0, short[1], 0, short[0])).view(x.dtype)  # padding knows no 8-bit floats
