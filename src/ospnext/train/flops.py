"""What a training step computes, in closed form, for the log's utilisation.

A multiplication and an addition are two FLOPs; a backward pass counts twice its forward pass, and once where weights
are frozen below an adapter, whose own products are left out; what activation checkpointing computes again does not
count. The tests hold the form to torch's own count.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch

from ospnext.device import device_label
from ospnext.ops.layout import Grid, Layout, order

# Dense bfloat16 FLOP/s of one device, from the makers' data sheets.
_PEAKS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s a device could do in this arithmetic; None where it is not known here."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = device_label(device)
    return next((peak for key, peak in _PEAKS.items() if key in name), None)


def training_flops(
    settings: Mapping[str, Any],
    layouts: Sequence[Layout],
    latents: Sequence[int],
    text_len: int,
    frozen: bool = False,
) -> tuple[int, int]:
    """Tokens of one sample, and FLOPs of its forward and backward pass.

    Args:
        settings: of the transformer.
        layouts: of its blocks.
        latents: shape ``[C, t, h, w]``.
        text_len: tokens of text.
        frozen: whether an adapter is trained in place of the weights.
    """
    dim, ffn = settings["dim"], settings["ffn_dim"]
    grid = Grid(*(n // p for n, p in zip(latents[1:], settings["patch_size"], strict=True)))
    tokens, patch = prod(grid), prod(settings["patch_size"])
    ends = tokens * patch * (settings["in_dim"] + settings["out_dim"]) * dim
    ends += text_len * (settings["text_dim"] + dim) * dim + (settings["freq_dim"] + 7 * dim) * dim
    blocks = 0
    passes = 2 if frozen else 3  # of a linear: forward, to its input and, if it learns, to its weight
    for layout, count in {layout: layouts.count(layout) for layout in layouts}.items():
        squares = sum(n * n for n in order(grid, layout, settings["sparse_ratio"]).segments)
        linear = tokens * (6 * dim * dim + 2 * dim * ffn) + text_len * 2 * dim * dim
        attention = 2 * squares * dim + 2 * tokens * text_len * dim
        blocks += count * (passes * linear + 3 * attention)
    return tokens, 2 * ((1 if frozen else 3) * ends + blocks)
