"""Triton kernels of ``ops/fused.py`` and ``ops/fused8.py``, which say what they compute; imported where Triton is.

Here they are launched; ``triton_device`` has what runs. Sizes are compile-time constants, so that rows are known to be
aligned and move in wide loads, also inside a compiled graph.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ospnext.ops import fp8
from ospnext.ops import triton_device as device

_WARPS = 4

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
        scale, inverse = fp8.scales(by.reshape(-1), scale_max)
        scale = (scale * factor).expand(len(x)).contiguous()
        return cls(_ROUNDED, out, scale, (inverse / factor).view(-1, 1, 1), scale_max, factor)

    def largest(self) -> torch.Tensor:
        """What was found, ``[B]``."""
        return self.out.amax(1)

    def of_part(self, part: Any) -> "Into":
        """Of some tokens of one sample: ``part.rows`` of ``part.sample``."""
        out = self.out[part.sample, part.rows]
        scale = self.scale[part.sample]
        return self._replace(out=out, scale=scale[part.rows] if self.mode == _ROUNDED_BY_TOKEN else scale)


def _split(dim: int) -> dict[str, int]:
    """A row in two parts whose lengths are powers of two, as Triton wants them; only the second may be too long."""
    block = 1 << (dim.bit_length() - 1)
    return {"DIM": dim, "BLOCK": block, "REST": triton.next_power_of_2(dim - block) if dim > block else 0}


def norm_rope(
    x: torch.Tensor, weight: torch.Tensor, table: torch.Tensor | None, eps: float, into: Into | None = None
) -> torch.Tensor:
    """RMS norm of ``x [B, N, dim]``, then rotation by ``table [N, head_dim]``, float32; all contiguous."""
    batch, tokens, dim = x.shape
    out, put = _place(x, into)
    device.rms_norm[(tokens, batch)](
        x,
        weight,
        weight if table is None else table,
        out,
        put.scale,
        eps,
        **_split(dim),
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
    out, put = (x, as_it_is(x)) if scale is None else _place(x, into)
    steps = [0 if t is None or t.ndim == 1 or len(t) == 1 else t.stride(0) for t in (gate, scale, shift)]
    device.add_norm[(tokens, batch)](
        x,
        *(x if t is None else t for t in (y, gate, scale, shift)),
        total,
        out,
        put.scale,
        *steps,
        eps,
        **_split(dim),
        ADD=y is not None,
        GATE=gate is not None,
        NORM=scale is not None,
        MODE=put.mode,
        MAX=put.scale_max,
        FACTOR=put.factor,
        num_warps=_WARPS,
    )
    return total, out


def activate(x: torch.Tensor, gelu: bool, into: Into) -> torch.Tensor:
    """``x [B, N, dim]`` contiguous, or GELU of it."""
    batch, tokens, dim = x.shape
    device.activate[(tokens, batch)](
        x,
        into.out,
        into.scale,
        **_split(dim),
        GELU=gelu,
        MODE=into.mode,
        MAX=into.scale_max,
        FACTOR=into.factor,
        num_warps=16 if gelu else 8,
    )
    return into.out


_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def merge(
    values: torch.Tensor,
    sums: torch.Tensor | None,
    rest: tuple[torch.Tensor, torch.Tensor] | None,
    scale: torch.Tensor,
    dtype: torch.dtype,
    into: Into,
) -> None:
    """Attention's ``values [b, n, heads, head_dim]``, with a rest or none, times a number, rounded to ``dtype``."""
    count, length, heads, head_dim = values.shape
    device.merge[(count * length,)](
        values,
        values if sums is None else sums,
        *((values, values) if rest is None else rest),
        scale,
        into.out,
        into.scale,
        length,
        PARTS=1 if rest is None else 2,
        HEAD=head_dim,
        **_split(heads * head_dim),
        DTYPE=_DTYPES[dtype],
        MODE=into.mode,
        MAX=into.scale_max,
        FACTOR=into.factor,
        num_warps=_WARPS,
    )


def _place(x: torch.Tensor, into: Into | None) -> tuple[torch.Tensor, Into]:
    """Where a kernel's result goes, and how; None: as it is, like x."""
    if into is not None:
        return into.out, into
    return torch.empty_like(x), as_it_is(x)


def as_it_is(out: torch.Tensor) -> Into:
    """Put the result into ``out`` without more."""
    return Into(_AS_IS, out, out, out, 1.0, 1.0)
