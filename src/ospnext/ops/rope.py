"""Rotary position embedding over a (T, H, W) grid, as Wan2.1 defines it.

The table is indexed by token, so it is reordered exactly like the tokens and no layout knows about it.
"""

from functools import lru_cache

import torch

from ospnext.ops.layout import Grid

MAX_POSITIONS = 1024  # Wan's table; longer axes would leave what the weights were trained on
THETA = 10000.0


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # a table first made while sampling must also serve training
def rope_table(grid: Grid, head_dim: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Cosines and sines of every token's rotation angles.

    A head's ``head_dim`` channels are split into pairs for T, H and W: ``2 * (head_dim // 6)`` channels each for H
    and W, the rest for T. Angles are computed in float64. Tables of the last few grids are kept.

    Args:
        grid: token grid; every axis at most 1024.
        head_dim: channels of one attention head, even.

    Returns:
        float32 ``[N, head_dim]``, row-major: the cosines of the ``head_dim / 2`` pairs, then their sines.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}: rotary embedding needs an even number (dim / num_heads)")
    if max(grid) > MAX_POSITIONS:
        raise ValueError(f"token grid {tuple(grid)} has an axis over {MAX_POSITIONS}: use a smaller video")
    spatial = 2 * (head_dim // 6)
    axes = []
    for length, channels in zip(grid, (head_dim - 2 * spatial, spatial, spatial), strict=True):
        exponent = torch.arange(0, channels, 2, dtype=torch.float64) / max(channels, 1)
        axes.append(torch.outer(torch.arange(length, dtype=torch.float64), THETA**-exponent))
    t, h, w = axes
    angles = torch.cat(
        [
            t[:, None, None].expand(*grid, t.shape[-1]),
            h[None, :, None].expand(*grid, h.shape[-1]),
            w[None, None, :].expand(*grid, w.shape[-1]),
        ],
        dim=-1,
    ).reshape(grid.tokens, head_dim // 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(device, torch.float32)


def apply_rope(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate interleaved channel pairs (0, 1), (2, 3), ... in float32.

    Args:
        x: ``[B, N, heads, head_dim]``.
        table: ``[N, head_dim]`` of ``rope_table``, in the same token order.

    Returns:
        Like ``x``.
    """
    cos, sin = table[:, None, :].chunk(2, dim=-1)  # [N, 1, head_dim / 2], broadcast over heads
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)
