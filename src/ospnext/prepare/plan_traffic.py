"""What the processes of a sequence send each other, in bytes, from the same tables that the exchange itself uses.

Figures are of the process that sends most, for one forward pass of one sequence; a backward pass sends as much again.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch

from ospnext.ops.layout import Grid, Layout
from ospnext.parallel.ownership import Ownership, own, share
from ospnext.prepare.plan_trace import Shared


@dataclass(frozen=True)
class Sequence:
    """A video shared among ``ssp * ulysses`` processes.

    Attributes:
        grid: its tokens.
        layouts: of the blocks.
        ratio: P.
        heads: attention heads.
        ssp, ulysses: sub-groups, and processes of each.
    """

    grid: Grid
    layouts: tuple[Layout, ...]
    ratio: int
    heads: int
    ssp: int
    ulysses: int

    @property
    def processes(self) -> int:
        """Processes that share the video."""
        return self.ssp * self.ulysses

    def ownership(self, layout: Layout) -> Ownership:
        """Who owns what in a layout."""
        return _own(self.grid, layout, self.ratio, self.ssp, self.ulysses)

    def busiest(self, layout: Layout) -> Shared:
        """The share of the process with most work in a layout's attention."""
        owned = self.ownership(layout)
        part = max(owned.parts, key=lambda p: (sum(n * n for n in p.segments), max(p.chunks, default=0)))
        processes = len(part.chunks)
        return Shared(part.segments, max(part.chunks), processes, share(self.heads, processes)[0])

    def attend_values(self, layout: Layout, dim: int) -> int:
        """Numbers that self-attention sends: q, k and v out, the result back."""
        shared = self.busiest(layout)
        if shared.processes == 1:
            return 0
        head = dim // self.heads
        others = sum(shared.segments) - shared.own_tokens
        out = 3 * shared.own_tokens * (self.heads - shared.own_heads) * head
        return out + others * shared.own_heads * head

    def switch_values(self, here: Layout, there: Layout, dim: int) -> int:
        """Numbers that a change of layout sends."""
        return 0 if here is there else dim * _most_sent(self.grid, here, there, self.ratio, self.ssp, self.ulysses)

    def switches(self, dim: int) -> int:
        """Numbers that all changes of layout of a forward pass send, the head's final gather not counted."""
        return sum(self.switch_values(here, there, dim) for here, there in pairwise(self.layouts))

    def attends(self, dim: int) -> int:
        """Numbers that self-attention of all blocks sends."""
        return sum(self.attend_values(layout, dim) for layout in self.layouts)


def ulysses_values(tokens: int, dim: int, processes: int) -> int:
    """Numbers that a block of plain Ulysses sends in its four all-to-alls, near-equal shares taken as equal."""
    return 4 * tokens * dim * (processes - 1) // processes**2


def published_values(sequence: Sequence, dim: int) -> int:
    """Numbers that the published sparse sequence parallelism sends between two sparse blocks: one all-to-all among
    ``ssp`` processes, of tokens padded so that every segment is as long."""
    padded = _padded(sequence.grid, sequence.ratio)
    return padded * dim // sequence.processes * (sequence.ssp - 1) // sequence.ssp


def published_edge_values(grid: Grid, dim: int, processes: int) -> int:
    """Numbers that the published scheme sends where a dense block meets a sparse one: its share, to every other."""
    return grid.tokens * dim * (processes - 1) // processes


def _padded(grid: Grid, ratio: int) -> int:
    """Tokens once rows and columns are padded to multiples of P²."""
    unit = ratio * ratio
    return grid.t * (-(-grid.h // unit) * unit) * (-(-grid.w // unit) * unit)


@lru_cache(maxsize=256)
def _own(grid: Grid, layout: Layout, ratio: int, ssp: int, ulysses: int) -> Ownership:
    return own(grid, layout, ratio, ssp, ulysses)


@lru_cache(maxsize=1024)
def _most_sent(grid: Grid, here: Layout, there: Layout, ratio: int, ssp: int, ulysses: int) -> int:
    """Tokens that leave the process that sends most: what ``exchange`` tells each process, for all of them at once."""
    size = ssp * ulysses
    pairs = _own(grid, here, ratio, ssp, ulysses).owners() * size + _own(grid, there, ratio, ssp, ulysses).owners()
    table = torch.bincount(pairs, minlength=size * size).view(size, size)
    return int((table.sum(1) - table.diagonal()).max())
