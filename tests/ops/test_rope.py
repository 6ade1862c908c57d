"""Rotary positions against diffusers' Wan and against their own definition."""

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from ospnext.ops.layout import Grid, Layout, Switch
from ospnext.ops.rope import apply_rope, rope_table


@pytest.mark.parametrize("head_dim", [12, 32, 64, 128])
def test_table_equals_wan(head_dim: int) -> None:
    grid = Grid(3, 5, 7)
    cos, sin = WanRotaryPosEmbed(head_dim, (1, 2, 2), 1024)(torch.zeros(1, 16, 3, 10, 14))  # each angle twice
    expected = torch.cat([cos[0, :, 0, ::2], sin[0, :, 0, ::2]], dim=-1)
    torch.testing.assert_close(rope_table(grid, head_dim), expected.float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("head_dim", [2, 4, 6, 10])
def test_any_even_head_has_a_table(head_dim: int) -> None:
    table = rope_table(Grid(2, 3, 4), head_dim)
    assert table.shape == (24, head_dim)
    cos, sin = table.chunk(2, dim=-1)
    torch.testing.assert_close(cos**2 + sin**2, torch.ones_like(cos))


def test_rotation_is_of_complex_pairs() -> None:
    grid, head_dim = Grid(2, 3, 4), 16
    table = rope_table(grid, head_dim)
    x = torch.randn(2, grid.tokens, 3, head_dim)
    turn = torch.complex(*table.chunk(2, dim=-1))[:, None]
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)
    torch.testing.assert_close(apply_rope(x, table), expected)


def test_products_depend_on_distance_alone() -> None:
    grid, head_dim = Grid(4, 5, 6), 24
    table = rope_table(grid, head_dim)
    q, k = (torch.randn(1, 1, 1, head_dim).expand(1, grid.tokens, 1, -1) for _ in range(2))
    q, k = (apply_rope(x, table)[0, :, 0].view(*grid, head_dim) for x in (q, k))
    here = (q[2, 3, 4] * k[1, 1, 2]).sum()
    shifted = (q[3, 4, 5] * k[2, 2, 3]).sum()
    torch.testing.assert_close(here, shifted, atol=1e-5, rtol=1e-5)


def test_table_is_reordered_like_the_tokens() -> None:
    grid = Grid(2, 5, 7)
    plan = Switch().plan(grid, [Layout.GROUP], 2, torch.device("cpu"))
    table = rope_table(grid, 8)
    x = torch.randn(1, grid.tokens, 2, 8)
    there = apply_rope(plan.scatter(x.flatten(2), Layout.GROUP).view_as(x), plan.scatter(table, Layout.GROUP))
    assert plan.gather(there.flatten(2), Layout.GROUP).view_as(x).equal(apply_rope(x, table))


def test_half_precision_is_rotated_in_float32() -> None:
    table = rope_table(Grid(1, 4, 4), 8)
    x = torch.randn(1, 16, 2, 8).bfloat16()
    out = apply_rope(x, table)
    assert out.dtype is torch.bfloat16
    assert out.equal(apply_rope(x.float(), table).bfloat16())


def test_table_made_in_inference_mode_serves_training() -> None:
    with torch.inference_mode():
        table = rope_table(Grid(1, 13, 3), 8)  # no other test uses it: not cached yet
    x = torch.randn(1, 39, 1, 8, requires_grad=True)
    apply_rope(x, table).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * x.detach())  # a rotation keeps lengths


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="head_dim is 7"):
        rope_table(Grid(1, 2, 2), 7)
    with pytest.raises(ValueError, match="1024: use a smaller video"):
        rope_table(Grid(1, 2, 1025), 8)
