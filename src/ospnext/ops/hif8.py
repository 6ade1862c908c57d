"""HiFloat8, bit for bit: eight bits whose dot field says how many of them are exponent, in plain torch on any device.

After the sign come the dot field, an exponent of that many bits in sign and magnitude, and the mantissa:

=========  =============  =============  ===========  =========================
dot field  exponent bits  exponent E     mantissa     code of 2^E, sign 0
=========  =============  =============  ===========  =========================
0000       (denormal)     -22 .. -16     0 bits       0x01 .. 0x07
0001       0              0              3 bits       0x08
001        1              ±1             3 bits       0x10, 0x18
01         2              ±2, ±3         3 bits       0x20 .. 0x38
10         3              ±4 .. ±7       2 bits       0x40 .. 0x5C
11         4              ±8 .. ±15      1 bit        0x60 .. 0x7E
=========  =============  =============  ===========  =========================

0x00 is zero (there is no other), 0x80 is NaN, 0x6F and 0xEF are infinite; the largest finite number is 32768. Precision
is highest near one, so tensors are scaled before they are rounded. Source: arXiv 2409.16626, sections 2 and 3.

Rounding halves away from zero asks for no more than the first four bits of a mantissa, so that the upper half of a
float32's bits says all: there are 65,536 of them, and a table has their results. A compiler gets the arithmetic that
the table was made by, which it fuses with what is around.
"""

from functools import cache
from typing import Literal

import torch

Rounding = Literal["half_away", "hybrid"]
Overflow = Literal["infinity", "saturate"]

MAX = 32768.0
_MIN_BITS = 0x34800000  # 2^-22 as a float32
_MAX_BITS = 0x47000000  # 32768
_INFINITY_BITS = 0x7F800000
_INFINITY_CODE, _MAX_CODE, _NAN_CODE = 0x6F, 0x6E, 0x80


def _value(code: int) -> float:
    """What a code means, read from its fields."""
    low = code & 0x7F
    if code == _NAN_CODE:
        return float("nan")
    if low == _INFINITY_CODE:
        value = float("inf")
    elif low < 8:
        value = 2.0 ** (low - 23) if low else 0.0
    else:
        width = 3 - (low >= 64) - (low >= 96)  # of the mantissa
        bits = sum(low >= start for start in (16, 32, 64, 96))  # of the exponent
        leading = 1 << bits >> 1  # of its magnitude, not stored
        exponent = leading + (low >> width) % max(leading, 1)
        negative = bits and (low >> width) & leading
        value = (1 + low % (1 << width) / (1 << width)) * 2.0 ** (-exponent if negative else exponent)
    return -value if code & 0x80 else value


VALUES = tuple(_value(code) for code in range(256))
"""Every code's number."""


def decode(codes: torch.Tensor) -> torch.Tensor:
    """The float32 numbers of uint8 ``codes``, in their shape; float16 and bfloat16 hold each of them exactly, too."""
    return torch.tensor(VALUES, device=codes.device)[codes.int()]


def upper_halves() -> torch.Tensor:
    """Float32 numbers by the upper half of their bits, the lower half zero: ``[65536]``, on the CPU."""
    return (torch.arange(65536, dtype=torch.int32, device="cpu") << 16).view(torch.float32)


def look_up(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What a table has for the upper halves of float32 numbers, in their shape.

    Args:
        table: ``[65536]``, in the order of ``upper_halves``, where x is.
        x: float32, contiguous, the result of arithmetic: a NaN as stored may have its marks in the lower half.
    """
    return table.index_select(0, ((x.view(torch.int32) >> 16) & 0xFFFF).flatten()).view(x.shape)


def has_table(x: torch.Tensor) -> bool:
    """Whether a table serves x: what is traced, or stands for another tensor, takes the arithmetic."""
    return type(x) in (torch.Tensor, torch.nn.Parameter) and not x.is_meta and not torch.compiler.is_compiling()


@cache
def _table(what: Literal["number", "code"], overflow: Overflow, device: torch.device) -> torch.Tensor:
    make = _round if what == "number" else _encode
    with torch.inference_mode(False):  # it outlives the one who asks first
        return make(upper_halves(), "half_away", overflow).to(device)


def encode(x: torch.Tensor, rounding: Rounding = "half_away", overflow: Overflow = "infinity") -> torch.Tensor:
    """The uint8 codes of numbers, in their shape.

    Args:
        x: of any floating dtype.
        rounding, overflow: as in ``round``.
    """
    x = x.detach()
    if rounding == "half_away" and has_table(x):
        return look_up(_table("code", overflow, x.device), _to_float32(x) * 1)
    return _encode(x, rounding, overflow)


def _encode(x: torch.Tensor, rounding: Rounding, overflow: Overflow) -> torch.Tensor:
    bits = _rounded_bits(x, rounding, overflow)
    exponent = (bits >> 23) - 127
    size = exponent.abs()
    width = 3 - (size > 3).int() - (size > 7).int()
    # Its dot field and leading bit: 8 for E = 0, 16 for 1, then 32, 64, 96; stored are the bits below the leading one.
    dot = 8 + 8 * (size > 0).int() + 16 * (size > 1).int() + 32 * (size > 3).int() + 32 * (size > 7).int()
    leading = (size > 0).int() + (size > 1).int() + 2 * (size > 3).int() + 4 * (size > 7).int()
    sign = (exponent < 0).int() << (4 - (size == 1).int())
    mantissa = (bits & 0x7FFFFF) >> (23 - width)
    codes = dot + sign + ((size - leading) << width) + mantissa
    codes = torch.where(exponent < -15, (exponent + 23).clamp(min=0), codes)
    codes = torch.where(bits == _INFINITY_BITS, _INFINITY_CODE, codes)
    codes = codes | ((x < 0) & (codes > 0)).int() << 7
    return torch.where(x.isnan(), _NAN_CODE, codes).to(torch.uint8)


def round(x: torch.Tensor, rounding: Rounding = "half_away", overflow: Overflow = "infinity") -> torch.Tensor:
    """The nearest HiF8 numbers, in x's shape and dtype, which holds them exactly; no gradient.

    Args:
        x: of any floating dtype.
        rounding: ``half_away``: to the nearest, halves away from zero. ``hybrid``, meant for gradients: the same where
            the mantissa has three bits, elsewhere up or down depending on the bits that are cut off: more often up the
            more there is, without random numbers. Float32 compares their 14 highest with the 14 lowest of the
            mantissa; narrower dtypes their two highest with a quarter or, where the lowest bit is set, three quarters.
        overflow: what becomes of numbers from 40960 on, infinity included: ``infinity``, or ``saturate``, 32768.

    NaN stays NaN. Below 2^-22 there is that number or zero: the nearest, in both ways of rounding.
    """
    x = x.detach()
    if rounding == "half_away" and has_table(x):
        return look_up(_table("number", overflow, x.device), _to_float32(x) * 1).to(x.dtype)
    return _round(x, rounding, overflow)


def _round(x: torch.Tensor, rounding: Rounding, overflow: Overflow) -> torch.Tensor:
    bits = _rounded_bits(x, rounding, overflow)
    value = bits.view(torch.float32)
    value = torch.where((x < 0) & (bits > 0), -value, value)  # there is no negative zero
    return torch.where(x.isnan(), torch.nan, value).to(x.dtype)


def _rounded_bits(x: torch.Tensor, rounding: Rounding, overflow: Overflow) -> torch.Tensor:
    """|x| rounded, as the int32 bits of a float32; of NaN anything."""
    if rounding not in ("half_away", "hybrid") or overflow not in ("infinity", "saturate"):
        raise ValueError(f"rounding {rounding!r}, overflow {overflow!r}: use half_away or hybrid, infinity or saturate")
    # From 65536 on all is overflow; the bound also keeps the sums below from running over.
    bits = (_to_float32(x).view(torch.int32) & 0x7FFFFFFF).clamp(max=0x47800000)
    exponent = (bits >> 23) - 127
    size = exponent.abs()
    cut = 20 + (size > 3).int() + (size > 7).int() + (size > 15).int()  # mantissa bits that do not fit
    up = (bits >> (cut - 1)) & 1
    if rounding == "hybrid":
        up = torch.where(size > 3, _hybrid_up(x, bits, cut), up)
    rounded = ((bits >> cut) + up) << cut
    rounded = torch.where(exponent < -22, (exponent == -23).int() * _MIN_BITS, rounded)
    return torch.where(rounded > _MAX_BITS, _INFINITY_BITS if overflow == "infinity" else _MAX_BITS, rounded)


def _hybrid_up(x: torch.Tensor, bits: torch.Tensor, cut: torch.Tensor) -> torch.Tensor:
    """1 where the bits that are cut off reach the threshold that the lowest bits of the mantissa give."""
    if x.dtype in (torch.float16, torch.bfloat16):
        return (((bits >> (cut - 2)) & 3) >= 2 * (x.contiguous().view(torch.int16).int() & 1) + 1).int()
    return (((bits >> (cut - 14)) & 0x3FFF) >= (bits & 0x3FFF)).int()


def _to_float32(x: torch.Tensor) -> torch.Tensor:
    """x as contiguous float32, cut towards zero where that is inexact, so that it is not rounded twice."""
    narrow = x.contiguous().float()
    if x.dtype is not torch.float64:
        return narrow
    return torch.where(narrow.abs() > x.abs(), torch.nextafter(narrow, torch.zeros_like(narrow)), narrow)
