"""Token layouts: a sequence of video tokens is always in one layout, and a sparse model is a list of layouts.

A layout cuts the (T, H, W) token grid into segments; self-attention runs inside segments and everything else is per
token. Along a sequence ``[B, N, C]`` the tokens of one segment are neighbours, so changing the layout is one gather.
Segments may differ in length (a 5 x 7 plane has no equal quarters): nothing is ever padded or masked.

==============  =====================================================  ============================================
layout          segment of token (t, y, x), with P = ``sparse_ratio``  known as
==============  =====================================================  ============================================
FULL            one segment                                            dense attention
TOKEN           (y mod P, x mod P)                                     Skiparse-2D, token-wise
GROUP           (⌊y/P⌋ mod P, ⌊x/P⌋ mod P)                             Skiparse-2D, group-wise
SINGLE_SKIP     n mod P, n the row-major index                         Skiparse-1D, single skip (Open-Sora Plan 1.3)
GROUP_SKIP      ⌊n/P⌋ mod P                                            Skiparse-1D, group skip
==============  =====================================================  ============================================

A new sparse pattern is a new line in ``segment_ids`` and nothing else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any, NamedTuple

import torch


class Grid(NamedTuple):
    """Size of a video's token grid: frames, rows, columns (after patch embedding)."""

    t: int
    h: int
    w: int

    @property
    def tokens(self) -> int:
        """Number of tokens, T * H * W."""
        return self.t * self.h * self.w


class Layout(Enum):
    """How the token grid is cut into attention segments; see the table above."""

    FULL = "full"
    TOKEN = "token"
    GROUP = "group"
    SINGLE_SKIP = "single_skip"
    GROUP_SKIP = "group_skip"


def segment_ids(grid: Grid, layout: Layout, ratio: int) -> torch.Tensor:
    """The segment every token belongs to.

    Args:
        grid: token grid.
        layout: one of ``Layout``.
        ratio: P, at least 1; with 1 every layout is dense.

    Returns:
        int64 ``[N]`` in row-major (t, y, x) order.
    """
    if ratio < 1:
        raise ValueError(f"sparse_ratio is {ratio}: it must be at least 1")
    n = torch.arange(grid.tokens)
    y, x = n // grid.w % grid.h, n % grid.w
    match layout:
        case Layout.FULL:
            return torch.zeros_like(n)
        case Layout.TOKEN:
            return y % ratio * ratio + x % ratio
        case Layout.GROUP:
            return y // ratio % ratio * ratio + x // ratio % ratio
        case Layout.SINGLE_SKIP:
            return n % ratio
        case Layout.GROUP_SKIP:
            return n // ratio % ratio


class Order(NamedTuple):
    """One layout of one grid: where each token stands, and how long the segments are."""

    permutation: torch.Tensor  # int64 [N]: row-major index of the token at each place
    segments: tuple[int, ...]  # lengths, longest first; they add up to N


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is first made while sampling must also serve training
def order(grid: Grid, layout: Layout, ratio: int) -> Order:
    """Sort the tokens of a grid by segment.

    Longer segments come first, so that equal lengths are neighbours and can share one attention call. Within a
    segment the tokens keep their row-major order. Empty segments (a grid smaller than P) are left out.
    """
    ids = segment_ids(grid, layout, ratio)
    lengths = torch.bincount(ids)
    by_length = torch.argsort(lengths, descending=True, stable=True)
    rank = torch.empty_like(by_length)
    rank[by_length] = torch.arange(len(by_length))
    index = torch.argsort(rank[ids], stable=True)
    return Order(index, tuple(n for n in lengths[by_length].tolist() if n))


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything a forward pass needs to know about layouts, made once for a grid and passed down.

    Index tensors live on the device of the hidden states; segment lengths are plain integers, so a compiled block
    sees constants.
    """

    grid: Grid
    _index: dict[tuple[Layout, Layout], torch.Tensor | None]  # (here, there) -> places; None is the identity
    _segments: dict[Layout, tuple[int, ...]]

    def segments(self, layout: Layout) -> tuple[int, ...]:
        """Lengths of the attention segments of a layout, in sequence order."""
        return self._segments[layout]

    def scatter(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Row-major tokens ``[..., N, C]`` to the tokens this process owns, in the layout's order."""
        return self.switch(x, Layout.FULL, layout)

    def gather(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """The inverse of ``scatter``: ``[..., N, C]`` back in row-major order."""
        return self.switch(x, layout, Layout.FULL)

    def switch(self, x: torch.Tensor, here: Layout, there: Layout) -> torch.Tensor:
        """Reorder tokens ``[..., N, C]`` from one layout to another."""
        index, inverse = self._index[here, there], self._index[there, here]
        return x if index is None or inverse is None else reorder(x, index, inverse)


Rest = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""The last step of a block, each token for itself: the hidden states and what it adds to them."""

Leave = Callable[[Rest, torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes that step, piece by piece, and changes the layout meanwhile."""


class Switch:
    """The first of the model's two seams: how tokens travel between the layouts of consecutive blocks.

    This is the one-device switch, a gather along the sequence. Sequence parallelism puts another object with the
    same two methods in its place.
    """

    def plan(self, grid: Grid, layouts: Sequence[Layout], ratio: int, device: torch.device) -> Plan:
        """The plan for a grid and a list of layouts; made once for each (grid, layouts, ratio, device)."""
        return _plan(grid, tuple(layouts), ratio, device)

    def __call__(self, x: torch.Tensor, plan: Plan, here: Layout, there: Layout) -> torch.Tensor:
        """Tokens ``[B, N, C]`` in the layout ``here`` to the layout ``there``."""
        return plan.switch(x, here, there)

    def leave(self, plan: Plan, here: Layout, there: Layout) -> Leave | None:
        """What lets a block in the layout ``here`` hand over its tokens in the layout ``there``; None: it does not."""
        return None


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _plan(grid: Grid, layouts: tuple[Layout, ...], ratio: int, device: torch.device) -> Plan:
    # FULL is row-major order: through it tokens enter and leave the other layouts.
    orders = {layout: order(grid, layout, ratio) for layout in {Layout.FULL, *layouts}}
    places = {layout: torch.argsort(o.permutation) for layout, o in orders.items()}

    def on_device(index: torch.Tensor) -> torch.Tensor | None:
        return None if torch.equal(index, torch.arange(len(index))) else index.to(device)

    return Plan(
        grid,
        # The token at place i of b is the row-major token permutation[i], which stands at places[a][...] in a.
        {(a, b): on_device(places[a][o.permutation]) for a in orders for b, o in orders.items()},
        {a: o.segments for a, o in orders.items()},
    )


def reorder(x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor, dim: int = -2) -> torch.Tensor:
    """A permutation along one axis, whose gradient is a gather too.

    Autograd's own gradient of a gather adds rows up one atomic operation at a time, for it cannot know that every
    token is taken once.

    Args:
        x: tokens, ``[..., N, C]`` unless ``dim`` says where N stands.
        index: int64 ``[N]``, the place each comes from.
        inverse: the inverse permutation.
        dim: the axis of tokens.
    """
    return _Reorder.apply(x, index, inverse, dim)


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor, dim: int) -> torch.Tensor:
        ctx.save_for_backward(index, inverse)
        ctx.dim = dim
        return x.index_select(dim, index)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        index, inverse = ctx.saved_tensors
        return _Reorder.apply(gradients[0], inverse, index, ctx.dim), None, None, None


def block_layouts(
    num_layers: int, model_type: str, sparse_ratio: int, num_full_blocks: int, pattern: str = "2d"
) -> tuple[Layout, ...]:
    """The layout of every block of a sparse transformer.

    Args:
        num_layers: number of blocks.
        model_type: ``full`` (dense), ``dual_end`` (the first and the last ``num_full_blocks / 2`` blocks are dense)
            or ``uniform`` (every block is sparse).
        sparse_ratio: P; 1 makes every block dense.
        num_full_blocks: number of dense blocks of ``dual_end``.
        pattern: ``2d`` (token-wise and group-wise, P² segments) or ``1d`` (single and group skip, P segments).

    Raises:
        ValueError: the numbers do not go together; the message names a way out.
    """
    if pattern not in ("2d", "1d"):
        raise ValueError(f"skiparse_pattern is {pattern!r}: use '2d' or '1d'")
    if model_type not in ("full", "dual_end", "uniform"):
        raise ValueError(f"skiparse_model_type is {model_type!r}: use 'full', 'dual_end' or 'uniform'")
    if num_layers < 1:
        raise ValueError(f"num_layers is {num_layers}: it must be at least 1")
    if sparse_ratio < 1:
        raise ValueError(f"sparse_ratio is {sparse_ratio}: it must be at least 1")
    if model_type == "full" or sparse_ratio == 1:
        return (Layout.FULL,) * num_layers
    even, odd = (Layout.TOKEN, Layout.GROUP) if pattern == "2d" else (Layout.SINGLE_SKIP, Layout.GROUP_SKIP)
    sparse = tuple(odd if i % 2 else even for i in range(num_layers))
    if model_type == "uniform":
        if num_full_blocks:
            raise ValueError(f"num_full_blocks is {num_full_blocks}, but 'uniform' has none: use 0 or 'dual_end'")
        return sparse
    if num_layers % 2 or num_full_blocks % 4 or not 0 <= num_full_blocks <= num_layers // 2:
        raise ValueError(
            f"dual_end with num_layers={num_layers} and num_full_blocks={num_full_blocks}: num_layers must be even, "
            f"num_full_blocks a multiple of 4 and at most {num_layers // 2}"
        )
    half = num_full_blocks // 2
    return (Layout.FULL,) * half + sparse[half : num_layers - half] + (Layout.FULL,) * half
