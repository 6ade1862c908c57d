"""What stands between a block's products and its attention where those are HiF8 on FP8 tensor cores.

The functions of ``fused.py`` whose results are multiplied next, with results rounded to HiF8 and held as E4M3: one pass
over memory on CUDA where the largest number is known or each token has its own, two where it has to be found first,
the first of which writes nothing. The plain forms are the functions of ``fused.py`` followed by ``fp8.hold``; both
forms round to x's dtype in between, so fusing changes no number (GELU's kernel, with an exponential of its own, hardly
one).
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from ospnext.ops import fp8, fused
from ospnext.ops.fp8 import Held

if fused.TRITON:
    from ospnext.ops import triton_kernels

_LEAST_CHUNK, _CHUNK = 512, 4096  # numbers of a program
_LARGEST_FACTOR = 16.0  # the kernels leave out numbers that are zero in E4M3 up to here


class Target(NamedTuple):
    """How a result is scaled before it is rounded.

    Attributes:
        scale_max: what the largest number is scaled to.
        by: ``tensor``: by the largest of each sample. ``token``: by the largest of each token. Or the largest numbers
            themselves, float32 with one element or one for each sample.
        reduce: of ``tensor``: the largest over the processes that share the result.
    """

    scale_max: float
    by: Literal["tensor", "token"] | torch.Tensor = "tensor"
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None

    def found(self, largest: torch.Tensor) -> "Target":
        """With the largest numbers of this process's part of the result, ``[B]``."""
        return self._replace(by=largest if self.reduce is None else self.reduce(largest))

    @property
    def fits_kernels(self) -> bool:
        """Whether the kernels round so."""
        return fp8.headroom(self.scale_max) <= _LARGEST_FACTOR

    def hold(self, x: torch.Tensor) -> Held:
        """The plain form of everything here: ``x [B, N, dim]``, held."""
        if isinstance(self.by, str) and self.by == "token":
            return fp8.hold(x, fp8.amax(x, 2), self.scale_max)
        by = self.found(fp8.amax(x, 1).flatten()).by if isinstance(self.by, str) else self.by
        assert isinstance(by, torch.Tensor)
        return fp8.hold(x, by.reshape(-1, 1, 1), self.scale_max)


def norm(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float, to: Target) -> Held:
    """``fused.norm`` of ``x [B, N, dim]``, held."""
    if not _kernels(x, to):
        return to.hold(fused.norm(x, scale, shift, eps))
    return _passes(x, to, lambda into: triton_kernels.add_norm(x.contiguous(), None, None, scale, shift, eps, into)[1])


def add_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    to: Target,
) -> tuple[torch.Tensor, Held]:
    """``fused.add_norm``: the sum as it is, its norm held."""
    if not _kernels(x, to):
        total, normed = fused.add_norm(x, y, gate, scale, shift, eps)
        return total, to.hold(normed)
    if isinstance(to.by, str) and to.by == "tensor":  # the sum is written once, while the largest is looked for
        into = triton_kernels.Into.largest_of(x, to.scale_max)
        total, _ = triton_kernels.add_norm(x.contiguous(), y.contiguous(), gate, scale, shift, eps, into)
        return total, norm(total, scale, shift, eps, to.found(into.largest()))
    into = triton_kernels.Into.of(x, to.scale_max, to.by)
    total, values = triton_kernels.add_norm(x.contiguous(), y.contiguous(), gate, scale, shift, eps, into)
    return total, Held(values, into.inverse)


def norm_rope(x: torch.Tensor, weight: torch.Tensor, table: torch.Tensor | None, eps: float, to: Target) -> Held:
    """``fused.norm_rope`` of ``x [B, N, dim]``, or ``fused.rms_norm`` without a table: values ``[B, N, dim]``."""
    if not _kernels(x, to):
        if table is None:
            return to.hold(fused.rms_norm(x, weight, eps))
        return to.hold(fused.norm_rope(x, weight, table, eps).flatten(2))
    table = None if table is None else table.contiguous()
    return _passes(x, to, lambda into: triton_kernels.norm_rope(x.contiguous(), weight, table, eps, into))


def gelu(x: torch.Tensor, to: Target) -> Held:
    """GELU (tanh) of ``x [B, N, dim]``, held."""
    if not _kernels(x, to):
        return to.hold(F.gelu(x, approximate="tanh"))
    return _activated(x, True, to)


def hold(x: torch.Tensor, to: Target) -> Held:
    """``x [B, N, dim]``, held."""
    if not _kernels(x, to):
        return to.hold(x)
    return _activated(x, False, to)


def _activated(x: torch.Tensor, gelu: bool, to: Target) -> Held:
    """An element-wise kernel: rows mean nothing to it where tokens have no scales of their own."""
    flat = x.contiguous()
    chunk = x[0].numel() & -x[0].numel()  # the largest power of two that divides it
    if not (isinstance(to.by, str) and to.by == "token") and chunk >= _LEAST_CHUNK:
        flat = flat.view(len(x), -1, min(chunk, _CHUNK))
    held = _passes(flat, to, lambda into: triton_kernels.activate(flat, gelu, into))
    return Held(held.values.view(x.shape), held.inverse)


def _passes(x: torch.Tensor, to: Target, run: Callable[..., torch.Tensor]) -> Held:
    """One pass that rounds, after one that finds the largest where that has to be."""
    if isinstance(to.by, str) and to.by == "tensor":
        looking = triton_kernels.Into.largest_of(x, to.scale_max)
        run(looking)
        to = to.found(looking.largest())
    into = triton_kernels.Into.of(x, to.scale_max, to.by)
    return Held(run(into), into.inverse)


def _kernels(x: torch.Tensor, to: Target) -> bool:
    """Whether the kernels run: sampling on CUDA, with numbers that fit their rounding."""
    return fused.sampling(x) and to.fits_kernels
