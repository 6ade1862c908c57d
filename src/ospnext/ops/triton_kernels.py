"""Triton kernels of ``ops/fused.py`` and ``ops/fused8.py``, which say what they compute; imported where Triton is.

A program holds one token: it reads its row once, keeps it in registers and writes the result once. Arithmetic is
float32 whatever the dtype in memory. Sizes are compile-time constants, so that rows are known to be aligned and move in
wide loads, also inside a compiled graph. Every kernel ends in ``_put``, which writes the result as it is or rounded to
HiF8, or only its largest number.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ospnext.ops import fp8

_WARPS = 8

_AS_IS, _LARGEST, _ROUNDED, _ROUNDED_BY_TOKEN = range(4)  # what ``_put`` does


class Into(NamedTuple):
    """Where and how a kernel puts its result.

    Attributes:
        mode: of ``_put``.
        out: E4M3 like the result, or the largest number of every token ``[B, N]``.
        scale: ``[B]``, what is multiplied before rounding; unused where every token has its own.
        inverse: what to multiply the held numbers by, ``[B or 1, 1, 1]`` or ``[B, N, 1]``.
        scale_max: what the largest number is scaled to.
        factor: ``fp8.headroom(scale_max)``.
    """

    mode: int
    out: torch.Tensor
    scale: torch.Tensor
    inverse: torch.Tensor
    scale_max: float
    factor: float

    @classmethod
    def largest_of(cls, x: torch.Tensor, scale_max: float) -> "Into":
        """Only find the largest numbers of ``x [B, N, dim]``."""
        rows = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
        return cls(_LARGEST, rows, rows, rows, scale_max, 1.0)

    @classmethod
    def of(cls, x: torch.Tensor, scale_max: float, by: torch.Tensor | str) -> "Into":
        """Round ``x [B, N, dim]`` by its tokens' largest numbers, or by given ones."""
        out = torch.empty(x.shape, dtype=fp8.E4M3, device=x.device)
        factor = fp8.headroom(scale_max)
        if isinstance(by, str):
            inverse = torch.empty((*x.shape[:2], 1), dtype=torch.float32, device=x.device)
            return cls(_ROUNDED_BY_TOKEN, out, inverse, inverse, scale_max, factor)
        largest = by.reshape(-1).clamp(min=fp8.SMALLEST_AMAX)
        inverse = (largest / scale_max / factor).view(-1, 1, 1)
        return cls(_ROUNDED, out, (scale_max / largest).expand(len(x)).contiguous(), inverse, scale_max, factor)

    def largest(self) -> torch.Tensor:
        """What was found, ``[B]``."""
        return self.out.amax(1)


@triton.jit
def _hif8(x, scale, FACTOR: tl.constexpr):
    """``x · scale`` rounded to HiF8, halves away from zero, times FACTOR, as E4M3: ``fp8.to_e4m3``."""
    limit: tl.constexpr = 448.0 / FACTOR
    x = tl.clamp(x * scale, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    size = tl.abs(x)
    # Half of the last place: three bits of mantissa from 1/8 to 16, then two, one below 1/128 and above 256. What has
    # fewer still is zero in E4M3.
    half = tl.where(size < 0.125, tl.where(size < 0.0078125, 1 << 21, 1 << 20), tl.where(size < 16.0, 1 << 19, 1 << 20))
    bits = (x.to(tl.int32, bitcast=True) + half) & -(half + half)
    rounded = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return (rounded * FACTOR).to(tl.float8e4nv)


@triton.jit
def _put(
    x,
    row,
    batch,
    column,
    inside,
    out_at,
    scale_at,
    DIM: tl.constexpr,
    DTYPE: tl.constexpr,
    MODE: tl.constexpr,
    MAX: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """Write a token's result, rounded to DTYPE: 0 as it is, 1 its largest, 2 rounded, 3 rounded by its largest."""
    x = x.to(DTYPE)
    if MODE == 0:
        tl.store(out_at + row * DIM + column, x, mask=inside)
    else:
        x = x.to(tl.float32)
        if MODE == 2:
            scale = tl.load(scale_at + batch)
        else:
            largest = tl.max(tl.where(inside, tl.abs(x), 0.0), axis=0)
            if MODE == 1:
                tl.store(out_at + row, largest)
            else:
                largest = tl.maximum(largest, 7.888609052210118e-31)  # fp8.SMALLEST_AMAX
                scale = tl.div_rn(MAX, largest)
                tl.store(scale_at + row, tl.div_rn(largest, MAX) / FACTOR)
        if MODE != 1:
            tl.store(out_at + row * DIM + column, _hif8(x, scale, FACTOR), mask=inside)


@triton.jit
def _rms_norm(
    x_at,
    weight_at,
    table_at,
    out_at,
    put_scale_at,
    eps,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD: tl.constexpr,
    MODE: tl.constexpr,
    MAX: tl.constexpr,
    FACTOR: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    row = batch * tl.num_programs(0) + token
    column = tl.arange(0, BLOCK)
    inside = column < DIM
    x = tl.load(x_at + row * DIM + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_at + column, mask=inside, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=0) / DIM + eps) * weight
    if HEAD > 0:  # rotate the pairs of every head
        even, odd = tl.split(tl.reshape(x, (BLOCK // 2, 2)))
        pair = tl.arange(0, BLOCK // 2) % (HEAD // 2)
        cos = tl.load(table_at + token * HEAD + pair)
        sin = tl.load(table_at + token * HEAD + HEAD // 2 + pair)
        x = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (BLOCK,))
    _put(x, row, batch, column, inside, out_at, put_scale_at, DIM, x_at.dtype.element_ty, MODE, MAX, FACTOR)


@triton.jit
def _add_norm(
    x_at,
    y_at,
    gate_at,
    scale_at,
    shift_at,
    sum_at,
    out_at,
    put_scale_at,
    gate_step,
    scale_step,
    shift_step,
    eps,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    GATE: tl.constexpr,
    NORM: tl.constexpr,
    MODE: tl.constexpr,
    MAX: tl.constexpr,
    FACTOR: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    row = batch * tl.num_programs(0) + tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < DIM
    x = tl.load(x_at + row * DIM + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        y = tl.load(y_at + row * DIM + column, mask=inside, other=0.0).to(tl.float32)
        if GATE:
            y *= tl.load(gate_at + batch * gate_step + column, mask=inside, other=0.0).to(tl.float32)
        rounded = (x + y).to(sum_at.dtype.element_ty)
        tl.store(sum_at + row * DIM + column, rounded, mask=inside)
        x = rounded.to(tl.float32)
    if NORM:
        x = tl.where(inside, x - tl.sum(x, axis=0) / DIM, 0.0)
        scale = tl.load(scale_at + batch * scale_step + column, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(shift_at + batch * shift_step + column, mask=inside, other=0.0).to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x, axis=0) / DIM + eps) * scale + shift
        _put(x, row, batch, column, inside, out_at, put_scale_at, DIM, x_at.dtype.element_ty, MODE, MAX, FACTOR)


@triton.jit
def _activate(
    x_at,
    in_scale_at,
    out_at,
    put_scale_at,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALED: tl.constexpr,
    GELU: tl.constexpr,
    DTYPE: tl.constexpr,
    MODE: tl.constexpr,
    MAX: tl.constexpr,
    FACTOR: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    row = batch * tl.num_programs(0) + tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < DIM
    x = tl.load(x_at + row * DIM + column, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        x *= tl.load(in_scale_at + batch)
    if GELU:  # tanh(u) = 1 - 2 / (exp(2u) + 1)
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x - x / (tl.exp(2 * u) + 1)
    _put(x, row, batch, column, inside, out_at, put_scale_at, DIM, DTYPE, MODE, MAX, FACTOR)


def norm_rope(
    x: torch.Tensor, weight: torch.Tensor, table: torch.Tensor | None, eps: float, into: Into | None = None
) -> torch.Tensor:
    """RMS norm of ``x [B, N, dim]``, then rotation by ``table [N, head_dim]``, float32; all contiguous."""
    batch, tokens, dim = x.shape
    out, put = _place(x, into)
    _rms_norm[(tokens, batch)](
        x,
        weight,
        weight if table is None else table,
        out,
        put.scale,
        eps,
        DIM=dim,
        BLOCK=triton.next_power_of_2(dim),
        HEAD=0 if table is None else table.shape[-1],
        MODE=put.mode,
        MAX=put.scale_max,
        FACTOR=put.factor,
        num_warps=_WARPS,
    )
    return out


def add_norm(
    x: torch.Tensor,
    y: torch.Tensor | None,
    gate: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    eps: float,
    into: Into | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``s = x + y · gate`` and ``norm(s) · scale + shift``; what is None is left out, and its result is x itself.

    ``x, y [B, N, dim]`` contiguous; ``gate, scale, shift`` ``[B or 1, 1, dim]`` or ``[dim]``.
    """
    batch, tokens, dim = x.shape
    total = x if y is None else torch.empty_like(x)
    out, put = (x, _unused(x)) if scale is None else _place(x, into)
    steps = [0 if t is None or t.ndim == 1 or len(t) == 1 else t.stride(0) for t in (gate, scale, shift)]
    _add_norm[(tokens, batch)](
        x,
        *(x if t is None else t for t in (y, gate, scale, shift)),
        total,
        out,
        put.scale,
        *steps,
        eps,
        DIM=dim,
        BLOCK=triton.next_power_of_2(dim),
        ADD=y is not None,
        GATE=gate is not None,
        NORM=scale is not None,
        MODE=put.mode,
        MAX=put.scale_max,
        FACTOR=put.factor,
        num_warps=_WARPS,
    )
    return total, out


_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def activate(
    x: torch.Tensor, in_scale: torch.Tensor | None, gelu: bool, dtype: torch.dtype, into: Into
) -> torch.Tensor:
    """``x [B, N, dim]`` contiguous, times ``in_scale [B or 1]``, GELU of it, rounded to ``dtype`` on the way."""
    batch, tokens, dim = x.shape
    block = triton.next_power_of_2(dim)
    scale = x if in_scale is None else in_scale.expand(batch).contiguous()
    _activate[(tokens, batch)](
        x,
        scale,
        into.out,
        into.scale,
        DIM=dim,
        BLOCK=block,
        SCALED=in_scale is not None,
        GELU=gelu,
        DTYPE=_DTYPES[dtype],
        MODE=into.mode,
        MAX=into.scale_max,
        FACTOR=into.factor,
        num_warps=_WARPS if block <= 8192 else 2 * _WARPS,
    )
    return into.out


def _place(x: torch.Tensor, into: Into | None) -> tuple[torch.Tensor, Into]:
    """Where a kernel's result goes, and how; None: as it is, like x."""
    if into is not None:
        return into.out, into
    return torch.empty_like(x), _unused(x)


def _unused(x: torch.Tensor) -> Into:
    return Into(_AS_IS, x, x, x, 1.0, 1.0)
