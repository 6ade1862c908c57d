"""Triton kernels of ``ops/fused.py``, which says what they compute; imported only where Triton is installed.

A program holds one token: it reads its row once, keeps it in registers and writes the result once. Arithmetic is
float32 whatever the dtype in memory. Sizes are compile-time constants, so that rows are known to be aligned and move in
wide loads, also inside a compiled graph.
"""

import torch
import triton
import triton.language as tl

_WARPS = 8


@triton.jit
def _rms_norm(x_at, weight_at, table_at, out_at, eps, DIM: tl.constexpr, BLOCK: tl.constexpr, HEAD: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + token
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
    tl.store(out_at + row * DIM + column, x.to(out_at.dtype.element_ty), mask=inside)


@triton.jit
def _add_norm(
    x_at,
    y_at,
    gate_at,
    scale_at,
    shift_at,
    sum_at,
    out_at,
    gate_step,
    scale_step,
    shift_step,
    eps,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    GATE: tl.constexpr,
    NORM: tl.constexpr,
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
        tl.store(out_at + row * DIM + column, x.to(out_at.dtype.element_ty), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of ``x [B, N, dim]``, contiguous."""
    return _launch_rms_norm(x, weight, weight, 0, eps)


def norm_rope(x: torch.Tensor, weight: torch.Tensor, table: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of ``x [B, N, dim]``, then rotation by ``table [N, head_dim]``, float32; both contiguous."""
    return _launch_rms_norm(x, weight, table, table.shape[-1], eps)


def _launch_rms_norm(x: torch.Tensor, weight: torch.Tensor, table: torch.Tensor, head: int, eps: float) -> torch.Tensor:
    batch, tokens, dim = x.shape
    out = torch.empty_like(x)
    block = triton.next_power_of_2(dim)
    _rms_norm[(tokens, batch)](x, weight, table, out, eps, DIM=dim, BLOCK=block, HEAD=head, num_warps=_WARPS)
    return out


def add_norm(
    x: torch.Tensor,
    y: torch.Tensor | None,
    gate: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``s = x + y · gate`` and ``norm(s) · scale + shift``; what is None is left out, and its result is x itself.

    ``x, y [B, N, dim]`` contiguous; ``gate, scale, shift`` ``[B or 1, 1, dim]`` or ``[dim]``.
    """
    batch, tokens, dim = x.shape
    total = x if y is None else torch.empty_like(x)
    out = x if scale is None else torch.empty_like(x)
    steps = [0 if t is None or t.ndim == 1 or len(t) == 1 else t.stride(0) for t in (gate, scale, shift)]
    _add_norm[(tokens, batch)](
        x,
        *(x if t is None else t for t in (y, gate, scale, shift)),
        total,
        out,
        *steps,
        eps,
        DIM=dim,
        BLOCK=triton.next_power_of_2(dim),
        ADD=y is not None,
        GATE=gate is not None,
        NORM=scale is not None,
        num_warps=_WARPS,
    )
    return total, out
