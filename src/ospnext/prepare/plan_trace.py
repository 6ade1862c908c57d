"""What one block of the transformer holds and moves, found by running it on meta tensors: no memory, no weights.

The block's own code runs at its real sizes on the meta device while every operation is watched. Attention is replaced
by what a fused kernel leaves behind, its result and a float32 sum for each query, and an exchange between processes by
the buffers it needs. So the figures follow the model's code and cannot drift from it.

Two ways to count:

- **eager**: every tensor that is made counts from its birth to its end, and every operation but products and attention
  reads its inputs from memory and writes its outputs.
- **fused**, what ``torch.compile`` and the kernels of ``ops/fused.py`` come close to: only tensors that a product, an
  attention or an exchange reads or writes, and hidden states that live across one, are in memory at all.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ospnext.models.transformer import Head, TransformerBlock
from ospnext.ops.attention import Attend

_PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm}
_FREE = {torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty, torch.ops.aten.detach}


class Shared(NamedTuple):
    """How a block's self-attention is shared: this process's tokens and heads, and all tokens of its part."""

    segments: tuple[int, ...]  # lengths of its part's segments
    own_tokens: int
    processes: int  # of the part; 1 sends nothing
    own_heads: int


class Held(NamedTuple):
    """Bytes of one block on one process, its weights not counted.

    Attributes:
        peak: most that is alive at a time, the block's input included.
        saved: kept for the backward pass when the forward pass is done, the block's input included.
        backward_peak: most that is alive at a time in the backward pass, gradients of this block's weights included.
        forward_traffic, backward_traffic: read and written by everything but products, attention and exchanges.
    """

    peak: int
    saved: int
    backward_peak: int
    forward_traffic: int
    backward_traffic: int


@dataclass
class _Storage:
    """One piece of memory: when it was there and who touched it."""

    size: int
    stream: bool  # in the dtype of the hidden states
    born: int
    region: int  # how many products came before it
    cast: bool  # a mere change of dtype, which a compiler would repeat
    died: int | None = None
    written: bool = False  # by an operation that moves memory
    anchored: bool = False
    last_region: int = 0
    readers: set[int] = field(default_factory=set)  # regions in which something that moves memory reads it


class Watch(TorchDispatchMode):
    """Records every operation; ``held`` sums up. ``dtype`` is that of the hidden states."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.now = 0
        self.region = 0
        self.moved: list[tuple[int, int]] = []  # (time, bytes) of every operation that moves memory
        self.storages: list[_Storage] = []
        self._live: dict[int, _Storage] = {}
        self._ends: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.record(inputs, outputs, func)
        return out

    def record(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], func: Any = None) -> None:
        """One operation; without ``func`` one that is neither product nor elementwise: attention or an exchange."""
        self.now += 1
        packet = getattr(func, "overloadpacket", None)
        if packet in _FREE or (func is not None and func.is_view):
            for tensor in outputs:
                self.see(tensor)
            return
        anchor = func is None or packet in _PRODUCTS
        self.region += anchor
        read = [self.see(tensor) for tensor in inputs]
        wrote = [self.see(tensor, cast=packet is torch.ops.aten._to_copy) for tensor in outputs]
        for storage in (*read, *wrote):
            storage.anchored |= anchor
            storage.last_region = self.region
        if not anchor:
            for storage in read:
                storage.readers.add(self.region)
            for storage in wrote:
                storage.written = True
            unique = {id(t): t for t in (*inputs, *outputs)}.values()
            self.moved.append((self.now, sum(t.numel() * t.itemsize for t in unique)))

    def see(self, tensor: Tensor, cast: bool = False) -> _Storage:
        """The record of a tensor's memory, made if it is new."""
        memory = tensor.untyped_storage()
        key = memory._cdata
        if key not in self._live:
            stream = tensor.dtype == self.dtype
            storage = _Storage(memory.nbytes(), stream, self.now, self.region, cast)
            storage.last_region = self.region
            self.storages.append(storage)
            self._live[key] = storage
            self._ends.append(weakref.ref(memory, partial(self._end, key)))
        return self._live[key]

    def _end(self, key: int, _: Any) -> None:
        self._live.pop(key).died = self.now

    def peak(self, since: int, until: int, fused: bool) -> int:
        """Most bytes alive at a time between two moments."""
        changes: list[tuple[int, int]] = []
        for s in self.storages:
            if not fused or self._kept(s):
                changes += [(s.born, s.size), (until + 1 if s.died is None else s.died, -s.size)]
        alive = most = 0
        for time, change in sorted(changes, key=lambda c: (c[0], -c[1])):  # a result is there before its input goes
            alive += change
            if since <= time <= until:
                most = max(most, alive)
        return most

    def alive(self, at: int, fused: bool) -> int:
        """Bytes alive at a moment."""
        there = (s for s in self.storages if s.born <= at and (s.died is None or s.died > at))
        return sum(s.size for s in there if not fused or self._kept(s))

    def traffic(self, since: int, until: int, regions: range, fused: bool) -> int:
        """Bytes that operations between two moments read and wrote."""
        if not fused:
            return sum(size for time, size in self.moved if since < time <= until)
        kept = [s for s in self.storages if self._kept(s)]
        written = sum(s.size for s in kept if s.written and since < s.born <= until)
        return written + sum(s.size * len(s.readers & set(regions)) for s in kept)

    def _kept(self, s: _Storage) -> bool:
        across = s.last_region > s.region and s.stream and not s.cast
        return s.anchored or across


class _FusedAttention(torch.autograd.Function):
    """What a fused attention kernel leaves behind: its result, and for the backward pass a sum for every query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, watch: Watch) -> Tensor:
        out, sums = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
        watch.record((q, k, v), (out, sums))
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.watch = watch
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        q, k, v, out, sums = ctx.saved_tensors
        results = tuple(torch.empty_like(t) for t in (q, k, v))
        ctx.watch.record((gradients[0], q, k, v, out, sums), results)
        return (*results, None)


class _FusedNorm(torch.autograd.Function):
    """RMS norm as one kernel, which accelerators have and the meta device has not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, watch: Watch) -> Tensor:
        out, scale = torch.empty_like(x), x.new_empty(x.shape[:-1])
        watch.record((x, weight), (out, scale), torch.ops.aten.native_layer_norm.default)
        ctx.save_for_backward(x, weight, scale)
        ctx.watch = watch
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        results = torch.empty_like(x), torch.empty_like(weight)
        backward = torch.ops.aten.native_layer_norm_backward.default
        ctx.watch.record((gradients[0], x, weight, scale), results, backward)
        return (*results, None)


class _Exchange(torch.autograd.Function):
    """An all-to-all: rows of another number arrive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, watch: Watch) -> Tensor:
        out = x.new_empty(rows, *x.shape[1:])
        watch.record((x,), (out,))
        ctx.rows, ctx.watch = len(x), watch
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        out = gradients[0].new_empty(ctx.rows, *gradients[0].shape[1:])
        ctx.watch.record((gradients[0],), (out,))
        return out, None, None


class _KernelsOnMeta(TorchFunctionMode):
    """Stands in for kernels that the meta device lacks: it would make attention's whole matrix, a norm's every step.

    With ``epilogue`` GELU is part of the product before it, as it is when sampling with fused kernels.
    """

    def __init__(self, watch: Watch, epilogue: bool) -> None:
        super().__init__()
        self.watch, self.epilogue = watch, epilogue

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            return _FusedAttention.apply(given["query"], given["key"], given["value"], self.watch)
        if func is F.rms_norm:
            weight = args[2] if len(args) > 2 else (kwargs or {})["weight"]
            return _FusedNorm.apply(args[0], weight, self.watch)
        if func is F.gelu and self.epilogue:
            return args[0]
        return func(*args, **(kwargs or {}))


class _Ulysses(Attend):
    """The buffers of ``parallel.sequence.ShardedAttend``, copy for copy, on one process."""

    def __init__(self, shared: Shared, watch: Watch) -> None:
        super().__init__("sdpa")
        self.shared, self.watch = shared, watch

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Any = None) -> Tensor:
        shared = self.shared
        if shared.processes == 1 or segments is None:
            return super().__call__(q, k, v, segments)
        batch, own, heads, width = q.shape
        whole = sum(shared.segments)
        rows = torch.stack([x.permute(2, 0, 1, 3) for x in (q, k, v)], dim=1).view(-1, width)
        arrived = _Exchange.apply(rows, shared.own_heads * 3 * batch * whole, self.watch)
        parts = arrived.view(shared.own_heads, 3, batch, whole, width)
        mine = parts.permute(1, 2, 3, 0, 4).contiguous()
        q, k, v = mine.unbind()
        out = super().__call__(q, k, v, shared.segments)
        rows = out.transpose(0, 1).reshape(-1, width)
        arrived = _Exchange.apply(rows, own * batch * heads, self.watch)
        return arrived.view(own, batch, heads, width).transpose(0, 1).contiguous()


def trace_block(
    settings: dict[str, Any], shared: Shared, batch: int, dtype: torch.dtype, training: bool, fused: bool
) -> Held:
    """Run one block on the meta device and say what it holds.

    Args:
        settings: of the transformer; see ``OSPNextTransformer3DModel``.
        shared: its tokens and how self-attention shares them.
        batch: sequences that run together.
        dtype: of weights and hidden states.
        training: keep what the backward pass needs, and run it.
        fused: count as compiled code; see the top of this file.
    """
    names = ("dim", "ffn_dim", "num_heads", "qk_norm", "cross_attn_norm", "eps")
    with torch.device("meta"):
        block = TransformerBlock(*(settings[name] for name in names)).to(dtype)
        dim, tokens = settings["dim"], shared.own_tokens
        x = torch.empty(batch, tokens, dim, dtype=dtype, requires_grad=training)
        time = torch.empty(batch, 6, dim, requires_grad=training)
        text = torch.empty(batch, settings["text_len"], dim, dtype=dtype, requires_grad=training)
        rope = torch.empty(tokens, dim // settings["num_heads"])
    watch = Watch(dtype)
    block.self_attn.attend = _Ulysses(shared, watch)
    block.cross_attn.attend = _Ulysses(shared, watch)
    call, weights = partial(block, x, time, text, rope, shared.segments), [*block.parameters()]
    return watch_call(watch, call, x, weights, fused, epilogue=fused and not training)


def trace_head(
    settings: dict[str, Any], tokens: int, batch: int, dtype: torch.dtype, training: bool, fused: bool
) -> Held:
    """The same for the head, on a process's own tokens; arguments as in ``trace_block``."""
    with torch.device("meta"):
        head = Head(settings["dim"], math.prod(settings["patch_size"]) * settings["out_dim"], settings["eps"]).to(dtype)
        x = torch.empty(batch, tokens, settings["dim"], dtype=dtype, requires_grad=training)
        time = torch.empty(batch, settings["dim"], requires_grad=training)
    return watch_call(Watch(dtype), lambda: head(x, time), x, [*head.parameters()], fused)


def watch_call(
    watch: Watch, call: Callable[[], Tensor], x: Tensor, weights: Sequence[Tensor], fused: bool, epilogue: bool = False
) -> Held:
    """Call a block under a watch, and its backward pass where its input ``x`` wants a gradient."""
    training = x.requires_grad
    with torch.set_grad_enabled(training), watch, _KernelsOnMeta(watch, epilogue):
        for weight in weights:
            watch.see(weight).size = 0  # counted elsewhere
        watch.see(x).anchored = True  # it comes from another block
        out = call()
        watch.see(out).anchored = True
        middle, regions = watch.now, watch.region
        if training:
            out.backward(torch.empty_like(out))
    forward, backward = range(regions + 1), range(regions + 1, watch.region + 1)
    return Held(
        peak=watch.peak(0, middle, fused),
        saved=watch.alive(middle, fused) - watch.see(out).size if training else 0,
        backward_peak=watch.peak(middle + 1, watch.now, fused) if training else 0,
        forward_traffic=watch.traffic(0, middle, forward, fused),
        backward_traffic=watch.traffic(middle, watch.now, backward, fused),
    )
