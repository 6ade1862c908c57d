"""Attention of HiF8 numbers on FP8 tensor cores: cuDNN's kernel through the ``nvidia-cudnn-frontend`` package.

Queries, keys and values are E4M3 with one scale for each sample (``fp8.Held``). Besides them the kernel rounds to E4M3
the softmax's numerators, up to 1, times 256, and its output, which has the scale of the values: a mean of them is never
larger. Sums are float32. ``plain`` is the same arithmetic in plain torch, but that it rounds numerators against the
largest score of a row, the kernel against the largest it has seen so far.

On Hopper the kernel is an eighth faster where the number of keys is a multiple of 256. So long sequences go in two
parts, and their results are weighed by the parts' sums of numerators: exactly attention to both.

For sampling: there is no backward.
"""

import math
from functools import lru_cache
from itertools import groupby
from types import ModuleType
from typing import Any, NamedTuple

import torch

from ospnext.ops import fused
from ospnext.ops.fp8 import E4M3, E4M3_MAX, Held
from ospnext.ops.fused8 import Target

if fused.TRITON:
    from ospnext.ops import triton_kernels
    from ospnext.ops.triton_kernels import Into

NUMERATOR_SCALE = 256.0
SHORTEST = 2048
"""Tokens from which on the kernel is worth it: it is launched for each sample, with that sample's scales."""
_HOPPER = (9, 0)
_MAX_HEAD = 128
_EVEN_KEYS, _WORTH_PARTING = 256, 4096


class Part(NamedTuple):
    """What came of neighbouring segments of equal length in one sample, or of dense attention.

    Attributes:
        sample: which.
        rows: its tokens.
        values: E4M3 ``[segments, length, heads, head_dim]``.
        sums: float32 logarithms of the sums of numerators ``[segments, heads, length]``.
        rest: both of attention to the keys that were left over; None where there were none.
    """

    sample: int
    rows: slice
    values: torch.Tensor
    sums: torch.Tensor | None
    rest: tuple[torch.Tensor, torch.Tensor] | None


class Attended(NamedTuple):
    """The result of attention, not put together yet.

    Attributes:
        parts: which make up the result.
        inverse: what to multiply each sample's numbers by.
        shape: ``[B, N, heads, head_dim]``.
        dtype: what numbers are rounded to when they are put together.
    """

    parts: list[Part]
    inverse: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype

    def whole(self) -> torch.Tensor:
        """The result ``[B, N, heads * head_dim]`` in ``dtype``."""
        device = self.inverse.device
        out = torch.empty(*self.shape[:2], self.shape[2] * self.shape[3], dtype=self.dtype, device=device)
        if fused.TRITON and device.type == "cuda":
            self._put(triton_kernels.as_it_is(out))
            return out
        for part in self.parts:
            out[part.sample, part.rows] = (_merged(part) * self._inverse(part)).to(self.dtype)
        return out

    def hold(self, to: Target) -> Held:
        """The same rounded to HiF8."""
        if not (fused.TRITON and self.inverse.device.type == "cuda" and to.fits_kernels):
            return to.hold(self.whole())
        like = torch.empty(*self.shape[:2], self.shape[2] * self.shape[3], dtype=E4M3, device=self.inverse.device)
        if isinstance(to.by, str) and to.by == "tensor":
            looking = Into.largest_of(like, to.scale_max)
            self._put(looking)
            to = to.found(looking.largest())
        into = Into.of(like, to.scale_max, to.by)
        self._put(into)
        return Held(into.out, into.inverse)

    def _put(self, into: "Into") -> None:
        for part in self.parts:
            triton_kernels.merge(part.values, part.sums, part.rest, self._inverse(part), self.dtype, into.of_part(part))

    def _inverse(self, part: Part) -> torch.Tensor:
        return self.inverse.reshape(-1)[min(part.sample, self.inverse.numel() - 1)]


def _merged(part: Part) -> torch.Tensor:
    """A part's tokens ``[n, heads * head_dim]`` in float32, in the scale of the values."""
    whole = part.values.float()
    if part.rest is not None:
        assert part.sums is not None
        values, sums = part.rest
        share = (sums - part.sums).sigmoid().transpose(1, 2)[..., None]  # of the rest
        whole = whole + (values.float() - whole) * share
    return whole.flatten(0, 1).flatten(1)


def attend(q: Held, k: Held, v: Held, segments: tuple[int, ...] | None, dtype: torch.dtype) -> Attended:
    """Softmax attention within consecutive segments, as ``ops.attention.attend``.

    Args:
        q: values ``[B, N, heads, head_dim]`` in E4M3; ``inverse`` has one element, or one for each sample.
        k, v: the same with M tokens; M = N when segments are given.
        segments: lengths that add up to N; None is dense attention.
        dtype: of the result, where it is not rounded further.

    Raises:
        ValueError: the kernel cannot run here; ``why_not`` says why.
    """
    if reason := why_not(q.values.device, q.values.shape[-1]):
        raise ValueError(f"FP8 attention is unavailable: {reason}; use quant_attn=none")
    parts = []
    for i in range(len(q.values)):  # scales are a sample's own, the kernel's are for all it is given
        scales = [part.inverse.reshape(-1)[min(i, part.inverse.numel() - 1)] for part in (q, k, v)]
        start = 0
        for length, count in [(0, 1)] if segments is None else [(n, len(list(run))) for n, run in groupby(segments)]:
            rows = slice(start, start + count * length or None)
            own_q, own_k, own_v = (t.values[i, rows].unflatten(0, (count, -1)) for t in (q, k, v))
            parts.append(Part(i, rows, *_in_parts(own_q, own_k, own_v, scales)))
            start += count * length
    return Attended(parts, v.inverse, q.values.shape, dtype)


def _in_parts(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scales: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, torch.Tensor] | None]:
    """The last three of ``Part``."""
    keys = k.shape[1]
    even = keys - keys % _EVEN_KEYS
    if even == keys or keys < _WORTH_PARTING:
        return _run(q, k, v, scales, with_sums=False)[0], None, None
    values, sums = _run(q, k[:, :even], v[:, :even], scales, with_sums=True)
    rest, rest_sums = _run(q, k[:, even:], v[:, even:], scales, with_sums=True)
    assert rest_sums is not None
    return values, sums, (rest, rest_sums)


def plain(q: Held, k: Held, v: Held) -> Held:
    """Dense attention as the kernel rounds it, in plain torch; arguments and result as of ``attend``."""
    scores = torch.einsum("bnhd,bmhd->bhnm", _float(q), _float(k)) / math.sqrt(q.values.shape[-1])
    numerators = (scores - scores.amax(-1, keepdim=True)).exp()
    rounded = (numerators * NUMERATOR_SCALE).to(E4M3).float() / NUMERATOR_SCALE
    out = torch.einsum("bhnm,bmhd->bnhd", rounded, v.values.float()) / numerators.sum(-1).transpose(1, 2)[..., None]
    return Held(out.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), v.inverse)


def _float(x: Held) -> torch.Tensor:
    return x.values.float() * x.inverse.reshape(-1, 1, 1, 1)


@lru_cache(maxsize=16)
def why_not(device: torch.device, head_dim: int) -> str:
    """Why the kernel cannot run on a device; an empty string if it can."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _HOPPER:
        return "it needs an NVIDIA GPU of compute capability 9.0 or newer"
    if head_dim > _MAX_HEAD or head_dim % 16:
        return f"it takes heads of 16 to {_MAX_HEAD} in steps of 16, not of {head_dim}"
    try:
        probe = torch.ones(1, 64, 1, head_dim, device=device).to(E4M3)
        _run(probe, probe, probe, [torch.ones(1, device=device)] * 3, with_sums=True)
    except ModuleNotFoundError:
        return "nvidia-cudnn-frontend is not installed (pip install nvidia-cudnn-frontend)"
    except (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError) as error:
        return f"cuDNN refuses it: {str(error).strip().splitlines()[0]}"
    return ""


class _Kernel(NamedTuple):
    """A kernel for one set of sizes."""

    graph: Any
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    workspace: int


def _run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scales: list[torch.Tensor], with_sums: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of ``[b, n, heads, head_dim]``; ``scales`` undo those of q, k and v. ``sums`` as of ``Part``."""
    if q.shape[1] == 1:  # a kernel for one query it has not
        out, sums = _run(q.repeat(1, 2, 1, 1), k, v, scales, with_sums)
        return out[:, :1].contiguous(), None if sums is None else sums[..., :1].contiguous()
    out = torch.empty(q.shape, dtype=E4M3, device=q.device)
    sums = torch.empty(len(q), q.shape[2], q.shape[1], 1, device=q.device) if with_sums else None
    shapes = tuple((tuple(t.shape), t.stride()) for t in (q, k, v, out))
    kernel = _kernel(shapes, q.device.index or 0, with_sums)
    descales = [scale.reshape(1, 1, 1, 1) for scale in scales]
    numerator, undo = _constants(q.device)
    # The output, in v's scale, is what the kernel has found, undone by v's scale and scaled by this.
    values = (q, k, v, *descales, undo, numerator, descales[2].reciprocal())
    outputs = (out, *torch.empty(2, 1, 1, 1, 1, device=q.device), *([sums] if with_sums else []))
    bound = dict(zip(kernel.inputs, values, strict=True)) | dict(zip(kernel.outputs, outputs, strict=True))
    workspace = torch.empty(max(kernel.workspace, 1), dtype=torch.uint8, device=q.device)
    handle = _handle(q.device.index or 0)
    _cudnn().set_stream(handle=handle, stream=torch.cuda.current_stream(q.device).cuda_stream)
    kernel.graph.execute(bound, workspace, handle=handle)
    return out, None if sums is None else sums[..., 0]


@lru_cache(maxsize=1)
def _cudnn() -> ModuleType:
    import cudnn

    return cudnn


@lru_cache(maxsize=16)
def _handle(index: int) -> Any:
    with torch.cuda.device(index):
        return _cudnn().create_handle()


@lru_cache(maxsize=16)
def _constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.full((1, 1, 1, 1), NUMERATOR_SCALE, device=device)
    return scale, scale.reciprocal()


@lru_cache(maxsize=128)
def _kernel(shapes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...], index: int, with_sums: bool) -> _Kernel:
    """Build the kernel for q, k, v and the output, each a shape and strides ``[b, n, heads, head_dim]``."""
    cudnn = _cudnn()
    kinds = cudnn.data_type
    graph = cudnn.pygraph(
        io_data_type=kinds.FP8_E4M3,
        intermediate_data_type=kinds.FLOAT,
        compute_data_type=kinds.FLOAT,
        handle=_handle(index),
    )

    def tensor(name: str, shape: tuple[int, ...], stride: tuple[int, ...]) -> Any:
        order = (0, 2, 1, 3)  # cuDNN names heads before tokens
        return graph.tensor(
            name=name, dim=[shape[i] for i in order], stride=[stride[i] for i in order], data_type=kinds.FP8_E4M3
        )

    q, k, v = (tensor(name, *shape) for name, shape in zip("qkv", shapes[:3], strict=True))
    names = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
    scales = {n: graph.tensor(name=n, dim=[1] * 4, stride=[1] * 4, data_type=kinds.FLOAT) for n in names}
    head_dim = shapes[0][0][3]
    out, sums, amax_s, amax_o = graph.sdpa_fp8(
        q=q,
        k=k,
        v=v,
        **scales,
        is_inference=not with_sums,
        attn_scale=head_dim**-0.5,
        use_causal_mask=False,
        name="attend",
    )
    shape, stride = shapes[3]
    out.set_output(True).set_data_type(kinds.FP8_E4M3)
    out.set_dim([shape[i] for i in (0, 2, 1, 3)]).set_stride([stride[i] for i in (0, 2, 1, 3)])
    for amax in (amax_s, amax_o):
        amax.set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(kinds.FLOAT)
    outputs: tuple[Any, ...] = (out, amax_s, amax_o)
    if with_sums:
        count, tokens, heads, _ = shapes[3][0]
        sums.set_output(True).set_data_type(kinds.FLOAT)
        sums.set_dim([count, heads, tokens, 1]).set_stride([heads * tokens, tokens, 1, 1])
        outputs = (*outputs, sums)
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    return _Kernel(graph, (q, k, v, *scales.values()), outputs, graph.get_workspace_size())
