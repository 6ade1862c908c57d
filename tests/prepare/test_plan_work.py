"""FLOPs in closed form beside torch's own count, and traffic beside the exchange's own tables."""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.ops.layout import Grid, Layout
from ospnext.parallel.ownership import exchange, share
from ospnext.prepare.plan_traffic import Sequence, published_values, ulysses_values
from ospnext.prepare.plan_work import block_flops, ends_flops

SMALL = {"dim": 48, "ffn_dim": 80, "num_heads": 4, "num_layers": 8, "text_dim": 24, "text_len": 10, "freq_dim": 16}
SPARSE = {"skiparse_model_type": "dual_end", "sparse_ratio": 2, "num_full_blocks": 4}


@pytest.mark.parametrize("sparse", [{}, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("backward", [False, True])
def test_flops_are_those_torch_counts(sparse: dict, backward: bool) -> None:
    grid, batch = Grid(3, 5, 7), 2
    with torch.device("meta"):  # where attention is two plain products, which torch counts
        model = OSPNextTransformer3DModel(**SMALL, **sparse)
        inputs = torch.randn(batch, 16, 3, 10, 14), torch.rand(batch), torch.randn(batch, 10, 24)
    with FlopCounterMode(display=False) as counter:
        out = model(*inputs, return_dict=False)[0]
        forward = counter.get_total_flops()
        if backward:
            out.sum().backward()
    settings = dict(model.config)
    sequence = Sequence(grid, model.layouts, 2, 4, 1, 1)
    flops = [block_flops(settings, sequence.busiest(layout), batch) for layout in model.layouts]
    linear = sum(f.linear for f in flops) + ends_flops(settings, grid.tokens, grid.tokens, batch)
    attention = sum(f.attention for f in flops)
    assert forward == linear + attention
    if backward:  # the embeddings' inputs want no gradient; a fused kernel would make the scores again
        assert counter.get_total_flops() == pytest.approx(3 * (linear + attention), rel=0.02)


@pytest.mark.parametrize("grid", [Grid(2, 5, 7), Grid(3, 8, 12), Grid(21, 45, 80)], ids=str)
@pytest.mark.parametrize(("ssp", "ulysses"), [(4, 1), (2, 2), (1, 4), (2, 3)])
def test_traffic_is_what_the_exchange_tables_say(grid: Grid, ssp: int, ulysses: int) -> None:
    layouts = (Layout.FULL, Layout.TOKEN, Layout.GROUP, Layout.TOKEN, Layout.FULL)
    sequence, dim, ranks = Sequence(grid, layouts, 2, 6, ssp, ulysses), 12, ssp * ulysses
    for here, there in pairwise(layouts):
        tables = [exchange(sequence.ownership(here), sequence.ownership(there), rank) for rank in range(ranks)]
        most = max(sum(table.send) - table.send[rank] for rank, table in enumerate(tables))
        assert sequence.switch_values(here, there, dim) == most * dim
    for layout in set(layouts):
        owned = sequence.ownership(layout)
        most = 0
        for rank in range(ranks):
            part = owned.part(rank)
            place, heads = rank % len(part.chunks), share(6, len(part.chunks))
            out = 3 * part.chunks[place] * (6 - heads[place])
            most = max(most, out + (sum(part.chunks) - part.chunks[place]) * heads[place])
        assert sequence.attend_values(layout, dim) == pytest.approx(most * 2, rel=0.02)


@pytest.mark.parametrize("grid", [Grid(21, 45, 80), Grid(21, 48, 84)], ids=str)
def test_a_sparse_switch_sends_a_quarter_of_ulysses(grid: Grid) -> None:
    sequence = Sequence(grid, (Layout.FULL, Layout.TOKEN, Layout.GROUP), 2, 40, 4, 1)
    ulysses = ulysses_values(grid.tokens, 5120, 4)
    assert sequence.switch_values(Layout.TOKEN, Layout.GROUP, 5120) <= 0.27 * ulysses
    assert sequence.switch_values(Layout.TOKEN, Layout.GROUP, 5120) <= published_values(sequence, 5120)
    assert sequence.attend_values(Layout.TOKEN, 5120) == 0
    assert sequence.attend_values(Layout.FULL, 5120) == pytest.approx(ulysses, rel=0.01)
    assert Counter(sequence.layouts)[Layout.FULL] == 1
