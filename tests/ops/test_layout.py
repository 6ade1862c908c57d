"""Layouts: what the segments are, that tokens are only reordered, and that a published pattern is met exactly."""

from itertools import pairwise, product

import pytest
import torch

from ospnext.ops.layout import Grid, Layout, Switch, block_layouts, order, segment_ids

AWKWARD = [Grid(2, 5, 7), Grid(3, 9, 10), Grid(1, 45, 80), Grid(2, 1, 1), Grid(1, 1, 1), Grid(3, 2, 1), Grid(1, 4, 3)]
RATIOS = [2, 3]
SPARSE = [Layout.TOKEN, Layout.GROUP, Layout.SINGLE_SKIP, Layout.GROUP_SKIP]
CPU = torch.device("cpu")


def segment_by_definition(layout: Layout, grid: Grid, p: int, t: int, y: int, x: int) -> int:
    n = (t * grid.h + y) * grid.w + x
    return {
        Layout.FULL: 0,
        Layout.TOKEN: (y % p) * p + x % p,
        Layout.GROUP: (y // p % p) * p + x // p % p,
        Layout.SINGLE_SKIP: n % p,
        Layout.GROUP_SKIP: n // p % p,
    }[layout]


@pytest.mark.parametrize("grid", AWKWARD, ids=str)
@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("ratio", [1, *RATIOS])
def test_segments_follow_the_definition(grid: Grid, layout: Layout, ratio: int) -> None:
    coordinates = product(range(grid.t), range(grid.h), range(grid.w))
    expected = [segment_by_definition(layout, grid, ratio, *c) for c in coordinates]
    assert segment_ids(grid, layout, ratio).tolist() == expected


@pytest.mark.parametrize("grid", AWKWARD, ids=str)
@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("ratio", [1, *RATIOS])
def test_order_sorts_tokens_by_segment(grid: Grid, layout: Layout, ratio: int) -> None:
    index, segments = order(grid, layout, ratio)
    assert sorted(index.tolist()) == list(range(grid.tokens))
    assert sum(segments) == grid.tokens
    assert min(segments) > 0
    assert all(a >= b for a, b in pairwise(segments))
    ids = segment_ids(grid, layout, ratio)
    seen = []
    for part in index.split(segments):
        assert len(ids[part].unique()) == 1
        assert part.equal(part.sort().values)  # row-major within a segment
        seen.append(int(ids[part[0]]))
    assert sorted(seen) == ids.unique().tolist()


def test_ratio_one_is_dense() -> None:
    for layout in Layout:
        index, segments = order(Grid(2, 5, 7), layout, 1)
        assert segments == (70,)
        assert index.equal(torch.arange(70))


@pytest.mark.parametrize("grid", AWKWARD, ids=str)
@pytest.mark.parametrize("ratio", RATIOS)
def test_every_switch_there_and_back_is_the_identity(grid: Grid, ratio: int) -> None:
    switch = Switch()
    plan = switch.plan(grid, tuple(Layout), ratio, CPU)
    x = torch.randn(2, grid.tokens, 3)
    for a, b in product(Layout, Layout):
        here = plan.scatter(x, a)
        there = switch(here, plan, a, b)
        assert there.equal(plan.scatter(x, b))
        assert switch(there, plan, b, a).equal(here)
        assert plan.gather(there, b).equal(x)


def test_scatter_also_reorders_tables_without_a_batch() -> None:
    grid = Grid(1, 3, 3)
    plan = Switch().plan(grid, [Layout.TOKEN], 2, CPU)
    ids = segment_ids(grid, Layout.TOKEN, 2)[:, None]
    assert plan.scatter(ids, Layout.TOKEN).flatten().tolist() == [0] * 4 + [1] * 2 + [2] * 2 + [3]


def padded_subsequences(grid: Grid, layout: Layout, p: int) -> list[list[int]]:
    """Row-major indices of every sub-sequence as published: pad to P², rearrange, and mask the padding (left out)."""
    high, wide = (-(-n // p**2) * p**2 for n in (grid.h, grid.w))
    padded = torch.full((grid.t, high, wide), -1)
    padded[:, : grid.h, : grid.w] = torch.arange(grid.tokens).view(grid)
    if layout is Layout.TOKEN:  # b t (h p) (w q) -> (p q) (t h w)
        parts = padded.view(grid.t, high // p, p, wide // p, p).permute(2, 4, 0, 1, 3)
    else:  # b t (h p i) (w q j) -> (p q) (t h i w j): P x P tiles, taken with stride P²
        parts = padded.view(grid.t, high // p**2, p, p, wide // p**2, p, p).permute(2, 5, 0, 1, 3, 4, 6)
    return [[n for n in part.tolist() if n >= 0] for part in parts.reshape(p * p, -1)]


@pytest.mark.parametrize("grid", [*AWKWARD, Grid(2, 8, 4), Grid(1, 36, 18)], ids=str)
@pytest.mark.parametrize("layout", [Layout.TOKEN, Layout.GROUP])
@pytest.mark.parametrize("ratio", RATIOS)
def test_segments_are_the_padded_and_masked_subsequences(grid: Grid, layout: Layout, ratio: int) -> None:
    index, segments = order(grid, layout, ratio)
    published = [part for part in padded_subsequences(grid, layout, ratio) if part]
    ours = [part.tolist() for part in index.split(segments)]
    assert sorted(ours) == sorted(published)
    if grid.h % ratio**2 == grid.w % ratio**2 == 0:
        assert ours == published  # without padding even the order is the same


@pytest.mark.parametrize(("grid", "ratio"), [(Grid(2, 8, 4), 2), (Grid(1, 18, 9), 3)])
def test_token_and_group_swap_by_one_involution(grid: Grid, ratio: int) -> None:
    """On whole P² x P² tiles, y mod P changes places with ⌊y/P⌋ mod P, and x likewise."""
    plan = Switch().plan(grid, [Layout.TOKEN, Layout.GROUP], ratio, CPU)
    places = torch.arange(grid.tokens)[:, None]
    there = plan.switch(places, Layout.TOKEN, Layout.GROUP)
    assert there.equal(plan.switch(places, Layout.GROUP, Layout.TOKEN))
    assert plan.switch(there, Layout.TOKEN, Layout.GROUP).equal(places)


def test_full_video_sizes_need_no_padding() -> None:
    """720P is 45 x 80 tokens a frame, and 45 is no multiple of four."""
    assert order(Grid(21, 45, 80), Layout.TOKEN, 2).segments == (19320, 19320, 18480, 18480)
    assert order(Grid(21, 45, 80), Layout.GROUP, 2).segments == (19320, 19320, 18480, 18480)
    assert order(Grid(21, 48, 84), Layout.TOKEN, 2).segments == (21168,) * 4


def test_plan_made_in_inference_mode_serves_training() -> None:
    grid = Grid(1, 11, 13)  # no other test uses it: nothing is cached yet
    with torch.inference_mode():
        order(grid, Layout.TOKEN, 2)
        plan = Switch().plan(grid, [Layout.TOKEN, Layout.GROUP], 2, CPU)
    x = torch.randn(1, grid.tokens, 2, requires_grad=True)
    plan.gather(plan.switch(plan.scatter(x, Layout.TOKEN), Layout.TOKEN, Layout.GROUP), Layout.GROUP).sum().backward()
    assert x.grad is not None
    assert x.grad.equal(torch.ones_like(x))


def test_plan_is_made_once() -> None:
    switch = Switch()
    grid = Grid(1, 5, 7)
    plan = switch.plan(grid, [Layout.TOKEN], 2, CPU)
    assert Switch().plan(grid, (Layout.TOKEN,), 2, CPU) is plan
    assert switch.plan(grid, [Layout.TOKEN], 3, CPU) is not plan


F, T, G = Layout.FULL, Layout.TOKEN, Layout.GROUP


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((3, "full", 2, 0), (F, F, F)),
        ((12, "dual_end", 2, 4), (F, F, T, G, T, G, T, G, T, G, F, F)),
        ((40, "dual_end", 2, 8), (F,) * 4 + (T, G) * 16 + (F,) * 4),
        ((30, "dual_end", 2, 8), (F,) * 4 + (T, G) * 11 + (F,) * 4),
        ((4, "dual_end", 2, 0), (T, G, T, G)),
        ((3, "uniform", 3, 0), (T, G, T)),
        ((4, "uniform", 2, 0, "1d"), (Layout.SINGLE_SKIP, Layout.GROUP_SKIP) * 2),
        ((4, "dual_end", 1, 0), (F,) * 4),
    ],
)
def test_block_layouts(arguments: tuple, expected: tuple[Layout, ...]) -> None:
    assert block_layouts(*arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "way_out"),
    [
        ((4, "dual", 2, 0), "'dual'.*use 'full', 'dual_end' or 'uniform'"),
        ((4, "full", 2, 0, "3d"), "'3d'.*use '2d' or '1d'"),
        ((4, "full", 0, 0), "sparse_ratio is 0.*at least 1"),
        ((4, "uniform", 2, 4), "num_full_blocks is 4.*use 0 or 'dual_end'"),
        ((5, "dual_end", 2, 0), "num_layers=5.*must be even"),
        ((12, "dual_end", 2, 6), "num_full_blocks=6.*multiple of 4 and at most 6"),
        ((12, "dual_end", 2, 8), "num_full_blocks=8.*at most 6"),
        ((12, "dual_end", 2, -4), "num_full_blocks=-4.*multiple of 4"),
        ((0, "full", 2, 0), "num_layers is 0.*at least 1"),
    ],
)
def test_block_layouts_name_a_way_out(arguments: tuple, way_out: str) -> None:
    with pytest.raises(ValueError, match=way_out):
        block_layouts(*arguments)


def test_segment_ids_refuse_ratio_zero() -> None:
    with pytest.raises(ValueError, match="sparse_ratio is 0"):
        segment_ids(Grid(1, 2, 2), Layout.TOKEN, 0)
