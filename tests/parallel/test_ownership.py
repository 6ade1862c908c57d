"""Who owns what: whole segments, near-equal shares, and exchanges that agree at both ends; no process is started."""

from itertools import product

import pytest
import torch

from ospnext.ops.layout import Grid, Layout, Switch, order
from ospnext.parallel.ownership import early_exchange, exchange, own, segment_count, share, share_segments

AWKWARD = [Grid(2, 5, 7), Grid(1, 9, 10), Grid(3, 2, 1), Grid(1, 1, 1), Grid(1, 45, 80)]
SHAPES = [(1, 1), (1, 3), (2, 1), (4, 1), (2, 2), (2, 4)]  # (ssp, ulysses)


@pytest.mark.parametrize("grid", AWKWARD, ids=str)
@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize(("ssp", "ulysses"), SHAPES)
def test_every_token_has_one_owner(grid: Grid, layout: Layout, ssp: int, ulysses: int) -> None:
    owned = own(grid, layout, 2, ssp, ulysses)
    world = ssp * ulysses
    assert len(owned.chunks) == world
    tokens = [owned.tokens(rank) for rank in range(world)]
    assert torch.cat(tokens).equal(order(grid, layout, 2).permutation)
    for rank in range(world):
        assert owned.owners()[tokens[rank]].eq(rank).all()


@pytest.mark.parametrize("grid", AWKWARD, ids=str)
@pytest.mark.parametrize("layout", [Layout.TOKEN, Layout.GROUP])
@pytest.mark.parametrize(("ssp", "ulysses"), SHAPES)
def test_sub_groups_own_whole_segments(grid: Grid, layout: Layout, ssp: int, ulysses: int) -> None:
    owned = own(grid, layout, 2, ssp, ulysses)
    assert len(owned.parts) == ssp
    assert sum((part.segments for part in owned.parts), ()) == order(grid, layout, 2).segments
    for number, part in enumerate(owned.parts):
        assert sum(part.segments) == sum(part.chunks)
        assert max(part.chunks) - min(part.chunks) <= 1
        assert all(owned.part(number * ulysses + place) == part for place in range(ulysses))


@pytest.mark.parametrize(("ssp", "ulysses"), SHAPES)
def test_full_is_shared_by_all(ssp: int, ulysses: int) -> None:
    owned = own(Grid(2, 5, 7), Layout.FULL, 2, ssp, ulysses)
    assert owned.chunks == share(70, ssp * ulysses)
    assert owned.part(0).segments == (70,)
    assert owned.permutation.equal(torch.arange(70))


@pytest.mark.parametrize("grid", AWKWARD[:4], ids=str)
@pytest.mark.parametrize("ratio", [2, 3])
@pytest.mark.parametrize(("ssp", "ulysses"), SHAPES)
def test_exchanges_are_the_switch(grid: Grid, ratio: int, ssp: int, ulysses: int) -> None:
    """All ranks' parcels, carried by hand, give every rank its tokens of the other layout; back again, its own."""
    plan = Switch().plan(grid, tuple(Layout), ratio, torch.device("cpu"))
    world = range(ssp * ulysses)
    for here, there in product(Layout, Layout):
        a, b = (own(grid, layout, ratio, ssp, ulysses) for layout in (here, there))
        steps = [exchange(a, b, rank) for rank in world]
        held = plan.scatter(torch.arange(grid.tokens)[:, None], here).split(a.chunks)
        parcels = [held[rank][steps[rank].pack].split(steps[rank].send) for rank in world]
        wanted = plan.scatter(torch.arange(grid.tokens)[:, None], there).split(b.chunks)
        for rank in world:
            received = torch.cat([parcels[source][rank] for source in world])
            assert steps[rank].receive == tuple(len(parcels[source][rank]) for source in world)
            assert received[steps[rank].unpack].equal(wanted[rank])


@pytest.mark.parametrize(
    ("total", "parts", "expected"), [(10, 4, (3, 3, 2, 2)), (2, 3, (1, 1, 0)), (0, 2, (0, 0)), (6, 1, (6,))]
)
def test_share(total: int, parts: int, expected: tuple[int, ...]) -> None:
    assert share(total, parts) == expected


@pytest.mark.parametrize(
    ("segments", "parts", "expected"),
    [
        ((5, 5, 4, 4), 2, ((5, 5), (4, 4))),
        ((5, 5, 4, 4), 4, ((5,), (5,), (4,), (4,))),
        ((9, 3, 3, 3), 2, ((9,), (3, 3, 3))),  # by tokens, not by number of segments
        ((4, 4, 4, 3, 3, 3, 2, 2, 2), 3, ((4, 4), (4, 3, 3), (3, 2, 2, 2))),
        ((7,), 4, ((7,), (), (), ())),
        ((7, 2), 1, ((7, 2),)),
    ],
)
def test_share_segments(segments: tuple[int, ...], parts: int, expected: tuple) -> None:
    assert share_segments(segments, parts) == expected


@pytest.mark.parametrize(
    ("layouts", "ratio", "expected"),
    [
        ((Layout.FULL,), 2, 1),
        ((Layout.FULL, Layout.TOKEN, Layout.GROUP), 2, 4),
        ((Layout.TOKEN, Layout.GROUP), 3, 9),
        ((Layout.SINGLE_SKIP, Layout.GROUP_SKIP), 3, 3),
        ((Layout.TOKEN,), 1, 1),
    ],
)
def test_segment_count(layouts: tuple[Layout, ...], ratio: int, expected: int) -> None:
    assert segment_count(layouts, ratio) == expected


@pytest.mark.parametrize("grid", AWKWARD, ids=str)
@pytest.mark.parametrize(("here", "there"), [(Layout.TOKEN, Layout.GROUP), (Layout.FULL, Layout.TOKEN)])
@pytest.mark.parametrize(("ssp", "ulysses"), SHAPES)
@pytest.mark.parametrize("early", [0.0, 0.5, 0.8, 1.0])
def test_an_exchange_in_two_parts_brings_what_one_does(
    grid: Grid, here: Layout, there: Layout, ssp: int, ulysses: int, early: float
) -> None:
    before, after = own(grid, here, 2, ssp, ulysses), own(grid, there, 2, ssp, ulysses)
    world = ssp * ulysses
    steps = [early_exchange(before, after, rank, early) for rank in range(world)]
    sent = []  # [part][source][destination]: tokens
    for part in (0, 1):
        split = (before.tokens(r).tensor_split([steps[r].first])[part][steps[r].pack[part]] for r in range(world))
        sent.append([rows.split(steps[r].send[part]) for r, rows in enumerate(split)])
    for rank in range(world):
        assert steps[rank].first == int(early * before.chunks[rank])
        for part in (0, 1):
            assert steps[rank].receive[part] == tuple(len(sent[part][source][rank]) for source in range(world))
        received = torch.cat([sent[part][source][rank] for part in (0, 1) for source in range(world)])
        assert received[steps[rank].unpack].equal(after.tokens(rank))
