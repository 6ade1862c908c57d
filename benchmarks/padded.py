"""Skiparse the way other implementations do it, for comparison: rows and columns padded, the padding masked out.

The grid is padded to multiples of P² where dense blocks give way to sparse ones, so that all segments have one length;
the padding then goes through every linear layer and is hidden from attention by a boolean key mask. The result is
that of the segments of unequal length which the model uses; only the cost differs. Both come in through the model's
two seams.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.ops.attention import choose_kernel
from ospnext.ops.layout import Grid, Layout, Switch, order


def padded_grid(grid: Grid, ratio: int) -> Grid:
    """Rows and columns rounded up to multiples of P²."""
    h, w = (-(-n // ratio**2) * ratio**2 for n in grid[1:])
    return Grid(grid.t, h, w)


class PaddedPlan:
    """What ``ops.layout.Plan`` is to the model, with padded tokens in every layout but FULL."""

    def __init__(self, grid: Grid, layouts: Sequence[Layout], ratio: int, device: torch.device) -> None:
        self.grid, self.padded = grid, padded_grid(grid, ratio)
        real = F.pad(torch.ones(grid), (0, self.padded.w - grid.w, 0, self.padded.h - grid.h)).flatten().bool()
        self._segments, self._enter, self._leave, self.mask = {Layout.FULL: (grid.tokens,)}, {}, {}, {}
        for layout in set(layouts) - {Layout.FULL}:
            permutation, self._segments[layout] = order(self.padded, layout, ratio)
            count, length = len(self._segments[layout]), self._segments[layout][0]
            self._enter[layout] = permutation.to(device)
            self._leave[layout] = torch.argsort(permutation)[real].to(device)
            self.mask[layout] = real[permutation].view(count, 1, 1, length).to(device)  # True: a token to attend to
        self._between = {
            (here, there): torch.argsort(self._enter[here])[self._enter[there]]
            for here in self._enter
            for there in self._enter
        }

    def segments(self, layout: Layout) -> tuple[int, ...]:
        """Lengths of the attention segments, padding included."""
        return self._segments[layout]

    def scatter(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Row-major tokens ``[..., N, C]`` to a layout."""
        return self.switch(x, Layout.FULL, layout)

    def gather(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """A layout's tokens back in row-major order, without the padding."""
        return self.switch(x, layout, Layout.FULL)

    def switch(self, x: torch.Tensor, here: Layout, there: Layout) -> torch.Tensor:
        """Pad and reorder, reorder, or reorder and crop."""
        if here is there:
            return x
        if there is Layout.FULL:
            return x.index_select(-2, self._leave[here])
        if here is not Layout.FULL:
            return x.index_select(-2, self._between[here, there])
        plane = x.unflatten(-2, self.grid)
        plane = F.pad(plane, (0, 0, 0, self.padded.w - self.grid.w, 0, self.padded.h - self.grid.h))
        return plane.flatten(-4, -2).index_select(-2, self._enter[there])


class PaddedSwitch(Switch):
    """The one-device switch with a padded plan, made once: a benchmark has one grid."""

    def __init__(self, plan: PaddedPlan) -> None:
        self._plan = plan

    def plan(self, grid: Grid, layouts: Sequence[Layout], ratio: int, device: torch.device) -> PaddedPlan:  # type: ignore[override]
        """The plan this switch was made with."""
        assert grid == self._plan.grid
        return self._plan


class MaskedAttend:
    """Attention within segments of one length whose padding a boolean mask ``[segments, 1, 1, length]`` hides."""

    def __init__(self, kernel: str, mask: torch.Tensor) -> None:
        self.kernel, self.mask = kernel, mask

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        """``[1, N, heads, head_dim]``; padded queries give values that are cropped later."""
        count = len(self.mask)
        q, k, v = (t.unflatten(1, (count, -1)).flatten(0, 1).transpose(1, 2) for t in (q, k, v))
        return masked_attention(q, k, v, self.mask, self.kernel).transpose(1, 2).flatten(0, 1).unsqueeze(0)


def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, kernel: str
) -> torch.Tensor:
    """SDPA of ``[B, heads, N, head_dim]`` under a mask; FlashAttention has none, cuDNN and the rest do."""
    if choose_kernel(kernel, q.device, q.dtype) != "cudnn":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION], set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def pad_and_mask(model: OSPNextTransformer3DModel, grid: Grid, device: torch.device) -> None:
    """Let a sparse model run padded and masked on one grid; where nothing needs padding it keeps its own attention."""
    plan = PaddedPlan(grid, model.layouts, model.config.sparse_ratio, device)
    model.switch = PaddedSwitch(plan)
    if plan.padded == grid:
        return
    for block, layout in zip(model.blocks, model.layouts, strict=True):
        if layout is not Layout.FULL:
            block.self_attn.attend = MaskedAttend(block.self_attn.attend.kernel, plan.mask[layout])
