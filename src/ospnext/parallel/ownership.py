"""Who owns which tokens, and what has to travel when the layout changes: integers and index tensors, no process.

In every layout a process owns one run of the layout's token order. Processes are numbered ``sub-group * ulysses +
place in the sub-group``.

- FULL: as many runs as processes, of near-equal length.
- Any sparse layout: each of the ``ssp`` sub-groups owns neighbouring segments, as evenly as whole segments allow, and
  its processes share them in runs of near-equal length.

A process may own no token: a grid smaller than P² has fewer segments than sub-groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch

from ospnext.ops.layout import Grid, Layout, order


class Part(NamedTuple):
    """Processes that attend to the same segments: all of a sequence in FULL, a sub-group in sparse layouts."""

    segments: tuple[int, ...]  # lengths
    chunks: tuple[int, ...]  # tokens of each process; the same sum


@dataclass(frozen=True, eq=False)
class Ownership:
    """How the processes of a sequence share the tokens of one layout."""

    permutation: torch.Tensor  # int64 [N]: row-major index of the token at each place of the layout
    parts: tuple[Part, ...]

    @property
    def chunks(self) -> tuple[int, ...]:
        """Tokens of every process, in order of rank; they add up to N."""
        return tuple(n for part in self.parts for n in part.chunks)

    def part(self, rank: int) -> Part:
        """The part a process belongs to."""
        return self.parts[rank * len(self.parts) // len(self.chunks)]

    def tokens(self, rank: int) -> torch.Tensor:
        """Row-major indices of the tokens of a process, in its order."""
        return self.permutation.split(self.chunks)[rank]

    def owners(self) -> torch.Tensor:
        """The rank that owns each token, by row-major index."""
        ranks = torch.arange(len(self.chunks)).repeat_interleave(torch.tensor(self.chunks))
        return torch.empty_like(self.permutation).scatter_(0, self.permutation, ranks)


class Exchange(NamedTuple):
    """What one process does to bring its tokens from one layout to another; read backwards, the way back."""

    pack: torch.Tensor  # int64: its tokens here, sorted by the process they go to
    send: tuple[int, ...]  # tokens for every process
    receive: tuple[int, ...]  # tokens from every process
    unpack: torch.Tensor  # int64: where each of its tokens there stands among what was received


def own(grid: Grid, layout: Layout, ratio: int, ssp: int, ulysses: int) -> Ownership:
    """Share the tokens of a grid in a layout among ``ssp * ulysses`` processes; see the top of this file."""
    permutation, segments = order(grid, layout, ratio)
    if layout is Layout.FULL:
        return Ownership(permutation, (Part(segments, share(grid.tokens, ssp * ulysses)),))
    runs = share_segments(segments, ssp)
    return Ownership(permutation, tuple(Part(run, share(sum(run), ulysses)) for run in runs))


def exchange(here: Ownership, there: Ownership, rank: int) -> Exchange:
    """What the process of a rank sends and receives when the tokens change from ``here`` to ``there``.

    Tokens travel in the order of the layout they go to, so both ends agree on it without a word.
    """
    size = len(here.chunks)
    leaving, arriving = here.tokens(rank), there.tokens(rank)
    to, source = there.owners()[leaving], here.owners()[arriving]
    place = torch.argsort(there.permutation)
    by_place = torch.argsort(place[leaving])
    return Exchange(
        by_place[torch.argsort(to[by_place], stable=True)],
        tuple(torch.bincount(to, minlength=size).tolist()),
        tuple(torch.bincount(source, minlength=size).tolist()),
        torch.argsort(torch.argsort(source, stable=True)),
    )


class EarlyExchange(NamedTuple):
    """An ``Exchange`` in two parts: each process's first ``first`` tokens travel while it computes the others."""

    first: int
    pack: tuple[torch.Tensor, torch.Tensor]  # of each part: its tokens, sorted by the process they go to
    send: tuple[tuple[int, ...], tuple[int, ...]]
    receive: tuple[tuple[int, ...], tuple[int, ...]]
    unpack: torch.Tensor  # int64: where each token there stands among what both parts brought


def early_exchange(here: Ownership, there: Ownership, rank: int, early: float) -> EarlyExchange:
    """As ``exchange``, with the share ``early`` of every process's tokens, from its first one, in the first part."""
    size = len(here.chunks)
    cuts = [int(early * n) for n in here.chunks]
    late = torch.cat([torch.arange(n) >= cut for n, cut in zip(here.chunks, cuts, strict=True)])
    late = torch.empty_like(late).scatter_(0, here.permutation, late)  # by row-major index
    place, owners = torch.argsort(there.permutation), there.owners()
    pack, send = [], []
    for tokens in here.tokens(rank).tensor_split([cuts[rank]]):
        by_place = torch.argsort(place[tokens])
        pack.append(by_place[torch.argsort(owners[tokens[by_place]], stable=True)])
        send.append(tuple(torch.bincount(owners[tokens], minlength=size).tolist()))
    arriving = there.tokens(rank)
    turn = late[arriving] * size + here.owners()[arriving]  # the order in which they come
    counts = torch.bincount(turn, minlength=2 * size).tolist()
    return EarlyExchange(
        cuts[rank],
        (pack[0], pack[1]),
        (send[0], send[1]),
        (tuple(counts[:size]), tuple(counts[size:])),
        torch.argsort(torch.argsort(turn, stable=True)),
    )


def share(total: int, parts: int) -> tuple[int, ...]:
    """Near-equal whole numbers that add up to ``total``, the larger ones first."""
    return tuple(total // parts + (i < total % parts) for i in range(parts))


def share_segments(segments: Sequence[int], parts: int) -> tuple[tuple[int, ...], ...]:
    """Cut a list of segment lengths into ``parts`` runs, some perhaps empty, whose largest sum is least."""
    ends = list(accumulate(segments, initial=0))
    for limit in sorted({b - a for a in ends for b in ends if b >= a}):
        runs = _fill(segments, limit)
        if len(runs) <= parts:
            return (*runs, *[()] * (parts - len(runs)))
    raise AssertionError("the sum of all segments is among the limits")


def _fill(segments: Sequence[int], limit: int) -> list[tuple[int, ...]]:
    """Runs as long as their sum allows; a segment over the limit has a run to itself."""
    runs: list[tuple[int, ...]] = []
    for length in segments:
        if runs and sum(runs[-1]) + length <= limit:
            runs[-1] += (length,)
        else:
            runs.append((length,))
    return runs


def segment_count(layouts: Sequence[Layout], ratio: int) -> int:
    """Attention segments that can be shared out: P² or P with sparse layouts among ``layouts``, else 1."""
    large = Grid(1, ratio**2, ratio**2)  # the smallest on which no layout has an empty segment
    return max(len(order(large, layout, ratio).segments) for layout in layouts)
