"""The model's two seams where several processes share a video's tokens.

- ``ShardedSwitch`` between blocks: local gather, one all-to-all with uneven splits, local gather, for any pair of
  layouts. Its backward is the same exchange mirrored, so gradients are exact.
- ``ShardedAttend`` inside blocks (Ulysses): one all-to-all brings this process some heads of all its part's tokens, q,
  k and v together; another brings the results back. Neither heads nor tokens need divide by the processes. A part of
  one process, as in sparse blocks with ``ulysses = 1``, sends nothing.

Where ``ShardedSwitch`` overlaps, a block that only samples hands over its tokens itself: its last step, feed-forward
and sum, is each token's own, so most tokens travel while the rest of them are computed (``Leaving``).

Every process has the whole input and the whole output and computes the same loss. The gradient that a process then has
of a parameter is that of its own tokens: the sum over the processes of a sequence is the gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd, wait_tensor

from ospnext.ops.attention import Attend
from ospnext.ops.layout import Grid, Layout, Leave, Rest, Switch, reorder
from ospnext.parallel.mesh import Sharing
from ospnext.parallel.ownership import EarlyExchange, Exchange, Ownership, early_exchange, exchange, own, share

EARLY = 0.8
"""Share of a block's tokens that travel while the others are computed: the feed-forward of a fifth takes longer than
they do (an exchange is 4% of a step on 4 devices, the feed-forward a third of it), and only the others' way is waited
for."""


class SharedSegments(NamedTuple):
    """Segments whose tokens and heads several processes share."""

    lengths: tuple[int, ...]  # of the segments, in order
    chunks: tuple[int, ...]  # tokens of each process; the same sum
    place: int  # this process among them
    group: str  # name of their process group


class _Route(NamedTuple):
    """An ``Exchange`` on the device, with the inverses that its gradient needs."""

    pack: torch.Tensor
    pack_back: torch.Tensor
    send: tuple[int, ...]
    receive: tuple[int, ...]
    unpack: torch.Tensor
    unpack_back: torch.Tensor


@dataclass(frozen=True, eq=False)
class ShardedPlan:
    """What ``ops.layout.Plan`` is to one process, for this process's tokens."""

    grid: Grid
    _group: str
    _tokens: dict[Layout, torch.Tensor]  # row-major indices of this process's tokens
    _everywhere: dict[Layout, torch.Tensor]  # where each row-major token stands among those of all processes
    _chunks: dict[Layout, tuple[int, ...]]
    _routes: dict[tuple[Layout, Layout], _Route]
    _segments: dict[Layout, SharedSegments]
    _leaving: dict[tuple[Layout, Layout], Leave]  # empty where nothing overlaps

    def segments(self, layout: Layout) -> SharedSegments:
        """The attention segments this process takes part in; the model hands them to ``ShardedAttend``."""
        return self._segments[layout]

    def scatter(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Row-major tokens ``[..., N, C]``, the same everywhere, to this process's ``[..., n, C]`` in the layout."""
        return x.index_select(-2, self._tokens[layout])

    def gather(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """The inverse of ``scatter``: every process gets all tokens ``[..., N, C]`` in row-major order.

        In the backward pass every process keeps its own tokens' gradient: right where all compute the same loss.
        """
        return _Gather.apply(x, self, layout)

    def switch(self, x: torch.Tensor, here: Layout, there: Layout) -> torch.Tensor:
        """This process's tokens ``[..., n, C]`` of one layout for those ``[..., m, C]`` of another."""
        if here is there:
            return x
        route = self._routes[here, there]
        rows = reorder(x.movedim(-2, 0), route.pack, route.pack_back, 0)
        rows = all_to_all(rows, route.send, route.receive, self._group)
        return reorder(rows.movedim(0, -2), route.unpack, route.unpack_back)


class ShardedSwitch(Switch):
    """The switch of a process that owns a share of the tokens.

    Args:
        sharing: this process's part in its sequence.
        overlap: exchange while blocks compute, in sampling; not for blocks that are compiled, or whose linears look at
            all tokens together.
    """

    def __init__(self, sharing: Sharing, overlap: bool = False) -> None:
        self.sharing = sharing
        self.overlap = overlap

    def plan(  # type: ignore[override]  # the same methods; segments are richer and go to our own attend
        self, grid: Grid, layouts: Sequence[Layout], ratio: int, device: torch.device
    ) -> ShardedPlan:
        """The plan for a grid and a list of layouts; made once for each (grid, layouts, ratio, device)."""
        return _plan(grid, tuple(layouts), ratio, device, self.sharing, self.overlap)

    def leave(self, plan: ShardedPlan, here: Layout, there: Layout) -> Leave | None:  # type: ignore[override]
        """The early exchange from one layout to another, in sampling and where it is wanted."""
        return None if torch.is_grad_enabled() else plan._leaving.get((here, there))


@dataclass(frozen=True, eq=False)
class Leaving:
    """The last step of a block in two parts, the first of which travels while the second is computed."""

    steps: EarlyExchange
    group: str

    def __call__(self, rest: Rest, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """This process's tokens of one layout, before the step, to those of another, after it."""
        arriving = []
        parts = (slice(0, self.steps.first), slice(self.steps.first, None))
        for tokens, pack, send, receive in zip(parts, *self.steps[1:4], strict=True):
            rows = rest(x[:, tokens], h[:, tokens]).movedim(-2, 0).index_select(0, pack)
            arriving.append(start_all_to_all(rows, send, receive, self.group))
        rows = torch.cat([wait_tensor(part) for part in arriving])
        return rows.movedim(0, -2).index_select(-2, self.steps.unpack)


class ShardedAttend(Attend):
    """Attention of every token to its segment where processes share segments.

    Args:
        attend: what computes attention once this process has some heads of all tokens.
    """

    def __init__(self, attend: Attend) -> None:
        self.attend = attend

    @property
    def kernel(self) -> str:
        """Name of the attention kernel asked for."""
        return self.attend.kernel

    @kernel.setter
    def kernel(self, name: str) -> None:
        self.attend.kernel = name

    def __call__(  # type: ignore[override]
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: SharedSegments
    ) -> torch.Tensor:
        """This process's ``q, k, v [B, n, heads, head_dim]`` to the same of the result."""
        if len(segments.chunks) == 1:
            return self.attend(q, k, v, segments.lengths)
        heads = share(q.shape[2], len(segments.chunks))
        q, k, v = _tokens_for_heads((q, k, v), heads, segments).unbind()
        return _heads_for_tokens(self.attend(q, k, v, segments.lengths), heads, segments)


def all_to_all(rows: torch.Tensor, send: Sequence[int], receive: Sequence[int], group: str) -> torch.Tensor:
    """Exchange rows ``[sum(send), ...]`` for ``[sum(receive), ...]`` with every process of a group, differentiably."""
    return all_to_all_single_autograd(rows.contiguous(), list(receive), list(send), group)  # type: ignore[arg-type]  # names serve too


def start_all_to_all(rows: torch.Tensor, send: Sequence[int], receive: Sequence[int], group: str) -> torch.Tensor:
    """As ``all_to_all``, not differentiable; the result is there once it has been waited for."""
    return all_to_all_single(rows.contiguous(), list(receive), list(send), group)  # type: ignore[arg-type]  # names serve too


def _tokens_for_heads(
    tensors: tuple[torch.Tensor, ...], heads: Sequence[int], segments: SharedSegments
) -> torch.Tensor:
    """q, k and v, each ``[B, n, all heads, D]`` of this process's tokens, to ``[3, B, N, its heads, D]`` of all."""
    rows = torch.stack([x.permute(2, 0, 1, 3) for x in tensors], dim=1)
    _, three, batch, own_tokens, width = rows.shape
    own_heads = heads[segments.place]
    send = [h * three * batch * own_tokens for h in heads]
    receive = [own_heads * three * batch * n for n in segments.chunks]
    parts = all_to_all(rows.view(-1, width), send, receive, segments.group).split(receive)
    shaped = (part.view(own_heads, three, batch, n, width) for part, n in zip(parts, segments.chunks, strict=True))
    return torch.cat([part.permute(1, 2, 3, 0, 4) for part in shaped], dim=2)


def _heads_for_tokens(out: torch.Tensor, heads: Sequence[int], segments: SharedSegments) -> torch.Tensor:
    """``[B, N, its heads, D]`` of all tokens to ``[B, n, all heads, D]`` of this process's tokens."""
    batch, _, own_heads, width = out.shape
    own_tokens = segments.chunks[segments.place]
    send = [n * batch * own_heads for n in segments.chunks]
    receive = [own_tokens * batch * h for h in heads]
    rows = out.transpose(0, 1).reshape(-1, width)
    parts = all_to_all(rows, send, receive, segments.group).split(receive)
    shaped = (part.view(own_tokens, batch, h, width) for part, h in zip(parts, heads, strict=True))
    return torch.cat([part.transpose(0, 1) for part in shaped], dim=2)


class _Gather(torch.autograd.Function):
    """Every process's tokens to every process; the gradient is each one's own share."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, plan: ShardedPlan, layout: Layout) -> torch.Tensor:
        ctx.tokens = plan._tokens[layout]
        chunks = plan._chunks[layout]
        rows = x.movedim(-2, 0)
        copies = rows.repeat(len(chunks), *[1] * (rows.ndim - 1))  # small: the head's few channels
        rows = all_to_all(copies, [len(rows)] * len(chunks), chunks, plan._group)
        return rows.movedim(0, -2).index_select(-2, plan._everywhere[layout])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradients[0].index_select(-2, ctx.tokens), None, None


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is first made while sampling must also serve training
def _plan(
    grid: Grid, layouts: tuple[Layout, ...], ratio: int, device: torch.device, sharing: Sharing, overlap: bool
) -> ShardedPlan:
    owned = {layout: own(grid, layout, ratio, sharing.ssp, sharing.ulysses) for layout in dict.fromkeys(layouts)}
    pairs = [(a, b) for a in owned for b in owned if a is not b]
    return ShardedPlan(
        grid,
        sharing.group,
        {layout: o.tokens(sharing.rank).to(device) for layout, o in owned.items()},
        {layout: torch.argsort(o.permutation).to(device) for layout, o in owned.items()},
        {layout: o.chunks for layout, o in owned.items()},
        {(a, b): _route(exchange(owned[a], owned[b], sharing.rank), device) for a, b in pairs},
        {layout: _shared_segments(o, sharing) for layout, o in owned.items()},
        {(a, b): _leaving(owned[a], owned[b], sharing, device) for a, b in pairs if overlap},
    )


def _leaving(here: Ownership, there: Ownership, sharing: Sharing, device: torch.device) -> Leaving:
    steps = early_exchange(here, there, sharing.rank, EARLY)
    first, second = (pack.to(device) for pack in steps.pack)
    return Leaving(steps._replace(pack=(first, second), unpack=steps.unpack.to(device)), sharing.group)


def _route(steps: Exchange, device: torch.device) -> _Route:
    pack, unpack = steps.pack.to(device), steps.unpack.to(device)
    return _Route(pack, torch.argsort(pack), steps.send, steps.receive, unpack, torch.argsort(unpack))


def _shared_segments(owned: Ownership, sharing: Sharing) -> SharedSegments:
    part = owned.part(sharing.rank)
    group = sharing.group if len(owned.parts) == 1 else sharing.subgroup
    return SharedSegments(part.segments, part.chunks, sharing.rank % len(part.chunks), group)
