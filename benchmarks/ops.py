"""The single operations of a block at a network's sizes, each beside its ceiling and a float64 reference.

    python benchmarks/ops.py --model 14b --size 720p --compile

The ceiling of what moves memory is a device-to-device copy of as many bytes (each input read once, each output written
once), that of the rest a large square product. Every operation is the model's own expression, run eagerly and, with
``--compile``, compiled alone. Prints one JSON line a variant and a table last. (dit_step.py prints the rates of all
linear layers.)
"""

import argparse
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import measure
import torch
import torch.nn.functional as F
import work
from dit_step import one_of
from padded import PaddedPlan, masked_attention, padded_grid
from torch import nn

from ospnext.device import resolve_device, resolve_dtype
from ospnext.ops import attention8, fp8, fused8
from ospnext.ops.attention import attend, describe_kernel
from ospnext.ops.fp8 import Held
from ospnext.ops.fused import add, add_norm, embed_patches, linear_gelu, norm, norm_rope, rms_norm
from ospnext.ops.fused8 import Target
from ospnext.ops.layout import Grid, Layout, Switch
from ospnext.ops.rope import rope_table

EPS = 1e-6
_COLUMNS = {
    "op": "operation",
    "variant": "variant",
    "ms": "ms",
    "ceiling_ms": "ceiling ms",
    "share": "share of ceiling",
    "gb_per_s": "GB/s",
    "tflops": "TFLOP/s",
    "max_error": "max error",
    "relative_error": "relative error",
    "error": "error",
}


class Op(NamedTuple):
    """One operation with what it costs at least and how to know that it is right."""

    name: str
    run: Callable[..., torch.Tensor]
    arguments: tuple[torch.Tensor, ...]
    reference: Callable[[torch.Tensor], torch.Tensor]  # rows -> float64 values of the output's rows
    bytes: int = 0
    flops: int = 0


class Shapes(NamedTuple):
    """Sizes and where the tensors live."""

    network: work.Network
    grid: Grid
    device: torch.device
    dtype: torch.dtype
    kernel: str

    def random(self, *shape: int) -> torch.Tensor:
        """Normal values in the working dtype."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def switches(s: Shapes) -> Iterator[Op]:
    """The reordering of tokens between blocks."""
    plan = Switch().plan(s.grid, (Layout.TOKEN, Layout.GROUP), s.network.sparse_ratio, s.device)
    places = torch.arange(s.grid.tokens, device=s.device)[:, None]
    x = s.random(1, s.grid.tokens, s.network.dim)
    for here, there in ((Layout.FULL, Layout.TOKEN), (Layout.TOKEN, Layout.GROUP)):
        # The row-major numbers of the tokens, sent the same way, say which token must stand where.
        where = torch.argsort(plan.scatter(places, here)[:, 0])[plan.scatter(places, there)[:, 0]]
        yield Op(
            f"switch {here.value} to {there.value}",
            lambda x, here=here, there=there: plan.switch(x, here, there),
            (x,),
            lambda rows, where=where: x[:, where[rows]].double(),
            bytes=2 * _bytes(x),
        )


def pointwise(s: Shapes) -> Iterator[Op]:
    """What stands between products and attention: norm and modulation, rotation, gate, activation."""
    n, dim = s.grid.tokens, s.network.dim
    x, y = s.random(1, n, dim), s.random(1, n, dim)
    scale, shift, gate = (torch.randn(1, 1, dim, device=s.device) for _ in range(3))
    weight = 1 + 0.1 * s.random(dim)
    rope, heads = rope_table(s.grid, dim // s.network.num_heads, s.device), s.network.num_heads

    def normed(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x.double(), (dim,), eps=EPS) * scale.double() + shift.double()

    def rotated(r: torch.Tensor) -> torch.Tensor:
        normed = F.rms_norm(x[:, r].double(), (dim,), weight.double(), EPS).unflatten(-1, (heads, -1))
        cos, sin = rope[r, None].double().chunk(2, dim=-1)
        turned = torch.view_as_complex(normed.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(cos, sin)
        return torch.view_as_real(turned).flatten(-2)

    def residual(r: torch.Tensor) -> torch.Tensor:
        return x[:, r].double() + y[:, r].double() * gate.double()

    once = _bytes(x)
    yield Op("norm + modulation", partial(norm, eps=EPS), (x, scale, shift), lambda r: normed(x[:, r]), 2 * once)
    yield Op(
        "gate + residual + norm + modulation",
        lambda *tensors: add_norm(*tensors, EPS)[1],
        (x, y, gate, scale, shift),
        lambda r: normed(residual(r).to(x.dtype)),
        bytes=4 * once,
    )
    yield Op("gate + residual", add, (x, y, gate), residual, bytes=3 * once)
    yield Op(
        "RMS norm",
        partial(rms_norm, eps=EPS),
        (x, weight),
        lambda r: F.rms_norm(x[:, r].double(), (dim,), weight.double(), EPS),
        bytes=2 * once,
    )
    yield Op(
        "qk-norm + RoPE, q alone", partial(norm_rope, eps=EPS), (x, weight, rope), rotated, 2 * once + _bytes(rope)
    )
    wide = s.random(1, n, s.network.ffn_dim)
    yield Op(
        "GELU",
        lambda x: F.gelu(x, approximate="tanh"),
        (wide,),
        lambda r: F.gelu(wide[:, r].double(), approximate="tanh"),
        bytes=2 * _bytes(wide),
    )


def patches(s: Shapes) -> Iterator[Op]:
    """From latents to tokens: as the convolution of Wan's weights, and as the product that it is."""
    (t, h, w), channels, dim = s.grid, s.network.latent_dim, s.network.dim
    latents = s.random(1, channels, t, 2 * h, 2 * w)
    layer = nn.Conv3d(channels, dim, (1, 2, 2), (1, 2, 2), device=s.device, dtype=s.dtype)
    exact = deepcopy(layer).double()
    moved = _bytes(latents) + s.grid.tokens * dim * latents.element_size()

    def reference(r: torch.Tensor) -> torch.Tensor:
        return embed_patches(latents.double(), exact)[:, r]

    yield Op("patch embedding, product", lambda x: embed_patches(x, layer), (latents,), reference, bytes=moved)
    yield Op(
        "patch embedding, convolution",
        lambda x: layer(x).flatten(2).transpose(1, 2).contiguous(),
        (latents,),
        reference,
        bytes=moved,
    )


def feed_forward(s: Shapes) -> Iterator[Op]:
    """The feed-forward's first product with its activation: one after the other, and as the library's one kernel."""
    n, dim, ffn = s.grid.tokens, s.network.dim, s.network.ffn_dim
    x, weight, bias = s.random(1, n, dim), s.random(ffn, dim) * dim**-0.5, s.random(ffn)

    def reference(r: torch.Tensor) -> torch.Tensor:
        return F.gelu(F.linear(x[:, r].double(), weight.double(), bias.double()), approximate="tanh")

    def apart(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")

    layer = nn.Linear(dim, ffn, device="meta")
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)

    def fused(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return linear_gelu(x, layer)

    product = work.Product(n, dim, ffn)
    yield Op("linear, then GELU", apart, (x, weight, bias), reference, flops=product.flops)
    if s.device.type == "cuda":  # elsewhere its GELU is the exact one
        yield Op("linear with GELU in its epilogue", fused, (x, weight, bias), reference, flops=product.flops)


def quantisers(s: Shapes) -> Iterator[Op]:
    """What makes the inputs of 8-bit products, with a known scale in one pass or a found one in two; FP8 attention."""
    n, dim, ffn = s.grid.tokens, s.network.dim, s.network.ffn_dim
    x, y, wide = s.random(1, n, dim), s.random(1, n, dim), s.random(1, n, ffn)
    scale, shift, gate = (torch.randn(1, 1, dim, device=s.device) for _ in range(3))
    weight, rope = 1 + 0.1 * s.random(dim), rope_table(s.grid, dim // s.network.num_heads, s.device)
    largest = torch.full((1,), 32.0, device=s.device)
    factor = 15 / 32 * 16  # what E4M3 holds of a number then
    known = Target(15.0, largest)

    def normed(x: torch.Tensor) -> torch.Tensor:
        return factor * (F.layer_norm(x.double(), (dim,), eps=EPS) * scale.double() + shift.double())

    def residual(r: torch.Tensor) -> torch.Tensor:
        return (x[:, r].double() + y[:, r].double() * gate.double()).to(x.dtype)

    def rotated(r: torch.Tensor) -> torch.Tensor:
        return factor * norm_rope(x[:, r].double(), weight.double(), rope[r].double(), EPS).flatten(2)

    def found(run: Callable[..., Held], *arguments: torch.Tensor) -> torch.Tensor:
        held = run(*arguments, Target(15.0))
        return held.values.float() * (held.inverse * factor)

    half, once = _bytes(x) // x.element_size(), _bytes(x)
    each: list[tuple[str, Callable[..., Held], tuple[torch.Tensor, ...], Callable[..., torch.Tensor], int]] = [
        (
            "norm + modulation",
            lambda *t: fused8.norm(*t[:3], EPS, t[3]),
            (x, scale, shift),
            lambda r: normed(x[:, r]),
            1,
        ),
        (
            "gate + residual + norm + modulation",
            lambda *t: fused8.add_norm(*t[:5], EPS, t[5])[1],
            (x, y, gate, scale, shift),
            lambda r: normed(residual(r)),
            3,
        ),
        ("qk-norm + RoPE, q alone", lambda *t: fused8.norm_rope(*t[:3], EPS, t[3]), (x, weight, rope), rotated, 1),
        ("rounding alone", lambda *t: fused8.hold(*t), (x,), lambda r: factor * x[:, r].double(), 1),
        (
            "GELU",
            lambda *t: fused8.gelu(*t),
            (wide,),
            lambda r: factor * F.gelu(wide[:, r].double(), approximate="tanh"),
            0,
        ),
    ]
    for name, run, arguments, reference, tensors in each:
        moved = tensors * once + half if tensors else _bytes(wide) + _bytes(wide) // wide.element_size()

        def at_once(*t: torch.Tensor, run: Callable[..., Held] = run) -> torch.Tensor:
            return run(*t, known).values

        yield Op(f"HiF8: {name}, scale known", at_once, arguments, reference, moved)
        yield Op(f"HiF8: {name}, scale found and undone", partial(found, run), arguments, reference, moved)


def attentions(s: Shapes) -> Iterator[Op]:
    """Dense, in segments, and in padded segments under a mask; all counted with the FLOPs of real tokens."""
    heads, head_dim = s.network.num_heads, s.network.dim // s.network.num_heads

    def qkv(tokens: int) -> tuple[torch.Tensor, ...]:
        return tuple(s.random(1, tokens, heads, head_dim) for _ in range(3))

    def flops(layout: Layout) -> int:
        block = work.work_of_block(s.network, s.grid, layout)
        self_attention = (op for op in block.elements() if isinstance(op, work.SoftmaxAttention))
        return sum(op.flops for op in self_attention if op.keys == op.queries)

    plan = Switch().plan(s.grid, (Layout.TOKEN,), s.network.sparse_ratio, s.device)
    for name, layout in (("attention, dense", Layout.FULL), ("attention, segments", Layout.TOKEN)):
        segments, tensors = plan.segments(layout), qkv(s.grid.tokens)
        yield Op(
            name,
            lambda q, k, v, segments=segments: attend(q, k, v, segments, s.kernel),
            tensors,
            lambda r, segments=segments, tensors=tensors: exact_attention(*tensors, r, segments),
            flops=flops(layout),
        )
    padded = PaddedPlan(s.grid, (Layout.TOKEN,), s.network.sparse_ratio, s.device)
    mask, segments = padded.mask[Layout.TOKEN], padded.segments(Layout.TOKEN)
    tensors = qkv(padded_grid(s.grid, s.network.sparse_ratio).tokens)

    def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        folded = (t.unflatten(1, (len(segments), -1)).squeeze(0).transpose(1, 2) for t in (q, k, v))
        return masked_attention(*folded, mask, s.kernel).transpose(1, 2).flatten(0, 1)[None]

    yield Op(
        "attention, padded and masked",
        masked,
        tensors,
        lambda r: exact_attention(*tensors, r, segments, mask.flatten()),
        flops=flops(Layout.TOKEN),
    )


def attentions_in_eight_bits(s: Shapes) -> Iterator[Op]:
    """FP8 attention, dense and in segments; with all keys, and with as many as its kernel likes."""
    heads, head_dim, n = s.network.num_heads, s.network.dim // s.network.num_heads, s.grid.tokens
    if attention8.why_not(s.device, head_dim):
        return

    def held(tokens: int) -> Held:
        x = s.random(1, tokens, heads, head_dim)
        return fp8.hold(x, fp8.amax(x, 1), 15.0)

    plan = Switch().plan(s.grid, (Layout.TOKEN,), s.network.sparse_ratio, s.device)
    even = n - n % 256
    for name, keys, segments in (
        ("dense", n, (n,)),
        (f"dense, {even} keys", even, None),
        ("segments", n, plan.segments(Layout.TOKEN)),
    ):
        q, k, v = held(n), held(keys), held(keys)

        def run(
            a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, segments: Any = segments, q=q, k=k, v=v
        ) -> torch.Tensor:
            return attention8.attend(q, k, v, segments, s.dtype).whole().unflatten(-1, (heads, head_dim))

        arguments = (q.float(), k.float(), v.float())
        pairs = sum(length**2 for length in segments) if segments else n * keys
        yield Op(
            f"attention, HiF8: {name}",
            run,
            arguments,
            lambda r, arguments=arguments, segments=segments: exact_attention(*arguments, r, segments or (n,)),
            flops=4 * pairs * heads * head_dim,
        )


def exact_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    segments: tuple[int, ...],
    real: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows of the attention of ``[1, N, heads, head_dim]`` inside segments in float64; ``real`` hides padded keys."""
    out, ends = [], torch.tensor(segments).cumsum(0).tolist()
    for row in rows.tolist():
        i = next(i for i, end in enumerate(ends) if row < end)
        keys = slice(ends[i] - segments[i], ends[i])
        scores = torch.einsum("hd,nhd->hn", q[0, row].double(), k[0, keys].double()) * q.shape[-1] ** -0.5
        if real is not None:
            scores = scores.masked_fill(~real[keys], -torch.inf)
        out.append(torch.einsum("hn,nhd->hd", scores.softmax(-1), v[0, keys].double()))
    return torch.stack(out)[None]


class Rates(NamedTuple):
    """What the device can do, measured here."""

    copy: float  # bytes a ms, read plus written
    product: float  # FLOPs a ms

    def ceiling_ms(self, op: Op) -> float:
        """The least time of an operation."""
        return max(op.bytes / self.copy, op.flops / self.product)


def measure_rates(s: Shapes) -> Rates:
    """Copy a tensor of hidden states, multiply large square matrices."""
    x = s.random(s.grid.tokens, s.network.dim)
    y = torch.empty_like(x)
    copy = measure.time_calls(lambda: y.copy_(x), s.device, repeats=15).ms
    side = 256 if s.device.type == "cpu" else 8192
    a, b = s.random(side, side), s.random(side, side)
    product = measure.time_calls(lambda: a @ b, s.device, repeats=15).ms
    return Rates(2 * _bytes(x) / copy, 2 * side**3 / product)


def bench(op: Op, variant: str, s: Shapes, rates: Rates) -> dict[str, Any]:
    """Time one variant and compare some of its rows with float64."""
    run = torch.compile(op.run, fullgraph=True, dynamic=False) if variant == "compiled" else op.run
    out = run(*op.arguments)
    count = 16 if op.name.startswith("attention") else 4096  # attention's reference reads all keys for every row
    rows = torch.randperm(out.shape[1], device=s.device)[:count]
    reference = op.reference(rows)
    # A row is compared as what it holds: channels, or heads of channels.
    difference = out[:, rows].double() - reference.reshape(out[:, rows].shape)
    timing = measure.time_calls(lambda: run(*op.arguments), s.device, repeats=15)
    ceiling = rates.ceiling_ms(op)
    return {
        **timing._asdict(),
        "ceiling_ms": ceiling,
        "share": ceiling / timing.ms,
        "bytes": op.bytes or None,
        "gb_per_s": op.bytes / timing.ms / 1e6 if op.bytes else None,
        "flops": op.flops or None,
        "tflops": op.flops / timing.ms / 1e9 if op.flops else None,
        "max_error": difference.abs().max().item(),
        "relative_error": (difference.norm() / reference.norm()).item(),
    }


@torch.no_grad()
def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All operations of all sizes."""
    device = resolve_device(arguments.device)
    dtype = resolve_dtype(arguments.dtype or ("fp32" if device.type == "cpu" else "bf16"))
    facts = {**measure.machine(device), "dtype": str(dtype).removeprefix("torch.")}
    facts["attention"] = describe_kernel(arguments.attention, device, dtype)
    records = []
    for model in arguments.model:
        for size in arguments.size:
            grid = work.VIDEOS[size].grid
            s = Shapes(work.NETWORKS[model], grid, device, dtype, arguments.attention)
            measure.free_all(device)
            rates = measure_rates(s)
            facts |= {"copy_gb_per_s": rates.copy / 1e6, "product_tflops": rates.product / 1e9}
            for group in (patches, switches, pointwise, quantisers, feed_forward, attentions, attentions_in_eight_bits):
                for op in group(s):
                    compiled = arguments.compile and "HiF8" not in op.name
                    for variant in ("eager", "compiled") if compiled else ("eager",):
                        about = {"benchmark": "ops", "op": op.name, "variant": variant, "model": model, "size": size}
                        try:
                            result = bench(op, variant, s, rates)
                        except RuntimeError as error:  # out of memory, or a kernel that this machine does not take
                            result = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"}
                        records.append(measure.emit(about | {"tokens": grid.tokens} | result | facts))
                measure.free_all(device)
    return records


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=one_of(work.NETWORKS), default=["14b"], help=", ".join(work.NETWORKS))
    parser.add_argument("--size", type=one_of(work.VIDEOS), default=["720p"], help=", ".join(work.VIDEOS))
    parser.add_argument("--attention", default="auto", help="attention kernel, by the model's names")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", help="default: bf16, on the CPU fp32")
    parser.add_argument("--compile", action="store_true", help="also compile every operation alone")
    return parser.parse_args()


if __name__ == "__main__":
    print(measure.table(run(parse_arguments()), _COLUMNS))
