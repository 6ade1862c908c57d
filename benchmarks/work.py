"""The work of one forward pass: networks, videos, the products and attentions in them, their FLOPs and their floor.

The floor is what a step would take if its products and attentions ran at the rates measured here for those very
shapes and everything else were free. Rates are sustained ones: each operation runs alone for a while before it is
timed, until the device draws the power, and so has the clock, that it settles at.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import groupby
from math import ceil
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from measure import time_calls

from ospnext.ops import attention8, fp8
from ospnext.ops.attention import attend
from ospnext.ops.layout import Grid, Layout, block_layouts, order


class Network(NamedTuple):
    """Sizes of a transformer of the Wan2.1 family and of its Skiparse schedule (``dual_end``, P = 2)."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    num_full_blocks: int = 8
    text_len: int = 512
    text_dim: int = 4096
    latent_dim: int = 16
    sparse_ratio: int = 2

    def depths(self) -> list[int]:
        """Numbers of layers that can have the whole network's share of dense blocks."""
        return [n for n in range(1, self.num_layers + 1) if n * self.num_full_blocks % self.num_layers == 0]

    def layouts(self, layers: int) -> tuple[Layout, ...]:
        """The schedule of the whole network, or of fewer layers with the same share of dense ones.

        Raises:
            ValueError: no whole number of dense blocks has that share.
        """
        whole = block_layouts(self.num_layers, "dual_end", self.sparse_ratio, self.num_full_blocks)
        dense = layers * self.num_full_blocks // self.num_layers
        if layers not in self.depths():
            share = f"{self.num_full_blocks} of {self.num_layers}"
            raise ValueError(f"{layers} layers cannot have {share} dense: use one of {str(self.depths())[1:-1]}")
        first = self.num_full_blocks // 2
        sparse = whole[first : first + layers - dense]
        return (Layout.FULL,) * (dense - dense // 2) + sparse + (Layout.FULL,) * (dense // 2)


NETWORKS = {
    "14b": Network(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
    "1.3b": Network(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "tiny": Network(dim=48, ffn_dim=96, num_heads=2, num_layers=10, num_full_blocks=4, text_len=8, text_dim=32),
}


class Video(NamedTuple):
    """Frames, rows and columns of a video in pixels."""

    num_frames: int
    height: int
    width: int

    @property
    def latents(self) -> tuple[int, int, int]:
        """(T, H, W) after Wan2.1's VAE: 4 x 8 x 8."""
        return (self.num_frames - 1) // 4 + 1, self.height // 8, self.width // 8

    @property
    def grid(self) -> Grid:
        """Tokens after 1 x 2 x 2 patches."""
        frames, rows, columns = self.latents
        return Grid(frames, rows // 2, columns // 2)


VIDEOS = {
    "480p": Video(81, 480, 832),
    "720p": Video(81, 720, 1280),
    "768p": Video(81, 768, 1344),
    "tiny": Video(5, 80, 112),  # 5 x 7 tokens a frame: no equal quarters
}


class Product(NamedTuple):
    """A linear layer: ``[rows, inputs] @ [inputs, outputs] + bias``."""

    rows: int
    inputs: int
    outputs: int

    @property
    def flops(self) -> int:
        """Two for each multiply-add."""
        return 2 * self.rows * self.inputs * self.outputs


class SoftmaxAttention(NamedTuple):
    """``batch`` independent attentions of ``queries`` to ``keys`` tokens."""

    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int

    @property
    def flops(self) -> int:
        """Of the two products."""
        return 4 * self.batch * self.queries * self.keys * self.heads * self.head_dim


Work = Counter[Product | SoftmaxAttention]


def work_of_block(network: Network, grid: Grid, layout: Layout) -> Work:
    """Products and attentions of one transformer block."""
    n, dim, ffn, text = grid.tokens, network.dim, network.ffn_dim, network.text_len
    heads, head_dim = network.num_heads, dim // network.num_heads
    work: Work = Counter({Product(n, dim, dim): 6, Product(text, dim, dim): 2})
    work.update([Product(n, dim, ffn), Product(n, ffn, dim), SoftmaxAttention(1, n, text, heads, head_dim)])
    for length, run in groupby(order(grid, layout, network.sparse_ratio).segments):
        work[SoftmaxAttention(len(list(run)), length, length, heads, head_dim)] += 1
    return work


def work_of(network: Network, grid: Grid, layouts: Iterable[Layout]) -> Work:
    """Products and attentions of a forward pass; the time embedding's single row is left out."""
    n, dim, text, patch = grid.tokens, network.dim, network.text_len, 4 * network.latent_dim
    work: Work = Counter([Product(n, patch, dim), Product(n, dim, patch)])
    work.update([Product(text, network.text_dim, dim), Product(text, dim, dim)])
    for layout in layouts:
        work += work_of_block(network, grid, layout)
    return work


def flops(work: Work) -> int:
    """Model FLOPs: of products and attentions."""
    return sum(count * op.flops for op, count in work.items())


class Floor(NamedTuple):
    """Milliseconds of a pass at the measured rates."""

    attention: float
    linears: float

    @property
    def ms(self) -> float:
        """Of both."""
        return self.attention + self.linears


_SETTLING_MS = 1000.0


class Ceilings:
    """Milliseconds of every product and attention at the rate of this device, measured once each when first asked."""

    def __init__(self, device: torch.device, dtype: torch.dtype, kernel: str, eight_bits: bool = False) -> None:
        self.device, self.dtype, self.kernel, self.eight_bits = device, dtype, kernel, eight_bits
        self._ms: dict[Product | SoftmaxAttention, float] = {}

    def ms(self, op: Product | SoftmaxAttention) -> float:
        """Median milliseconds of one operation on random data, alone on the device."""
        if op not in self._ms:
            self._ms[op] = self._measure(op)
        return self._ms[op]

    def _time(self, call: Callable[[], Any]) -> float:
        if self.device.type == "cpu":
            return time_calls(call, self.device).ms
        once = time_calls(call, self.device, warmup=1, repeats=1).ms
        return time_calls(call, self.device, warmup=ceil(_SETTLING_MS / once), repeats=max(7, ceil(200 / once))).ms

    @torch.no_grad()
    def _measure(self, op: Product | SoftmaxAttention) -> float:
        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=self.device, dtype=self.dtype)

        def held(*shape: int) -> fp8.Held:
            x = random(1, *shape)
            x = fp8.hold(x, fp8.amax(x, 1), 15.0)
            return fp8.Held(x.values[0], x.inverse.reshape(()))

        if self.eight_bits and isinstance(op, Product):
            a, b, bias = held(op.rows, op.inputs), held(op.outputs, op.inputs), random(op.outputs)
            return self._time(
                lambda: fp8.scaled_mm(a.values, b.values, a.inverse, b.inverse, self.dtype, bias, fast=True)
            )
        if self.eight_bits and not attention8.why_not(self.device, op.head_dim):
            parts = [held(op.batch * n, op.heads, op.head_dim) for n in (op.queries, op.keys, op.keys)]
            if op.queries == op.keys:
                q8, k8, v8 = (part._replace(values=part.values[None]) for part in parts)
                return self._time(lambda: attention8.attend(q8, k8, v8, (op.queries,) * op.batch, self.dtype))
            q8, k8, v8 = (part._replace(values=part.values.unflatten(0, (op.batch, -1))) for part in parts)
            return self._time(lambda: attention8.attend(q8, k8, v8, None, self.dtype))
        if isinstance(op, Product):
            x, weight, bias = random(op.rows, op.inputs), random(op.outputs, op.inputs), random(op.outputs)
            return self._time(lambda: F.linear(x, weight, bias))
        q, k, v = (random(op.batch, n, op.heads, op.head_dim) for n in (op.queries, op.keys, op.keys))
        return self._time(lambda: attend(q, k, v, kernel=self.kernel))

    def records(self) -> list[dict[str, Any]]:
        """What has been measured so far."""
        return [
            {"op": type(op).__name__, **op._asdict(), "eight_bits": self.eight_bits, "ms": ms}
            | {"tflops": op.flops / ms / 1e9}
            for op, ms in self._ms.items()
        ]

    def floor(self, work: Work) -> Floor:
        """The least time the work could take here."""
        attention = sum(count * self.ms(op) for op, count in work.items() if isinstance(op, SoftmaxAttention))
        return Floor(attention, sum(count * self.ms(op) for op, count in work.items() if isinstance(op, Product)))
