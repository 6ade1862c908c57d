"""Attention of HiF8 numbers on FP8 tensor cores: cuDNN's kernel through the ``nvidia-cudnn-frontend`` package.

Queries, keys and values are E4M3 with one scale for each sample (``fp8.Held``). Besides them the kernel rounds to E4M3
the softmax's numerators, up to 1, times 256, and its output, which has the scale of the values: a mean of them is never
larger. Sums are float32. ``plain`` is the same arithmetic in plain torch, but that it rounds numerators against the
largest score of a row, the kernel against the largest it has seen so far.

For sampling: there is no backward.
"""

import math
from functools import lru_cache
from itertools import groupby
from types import ModuleType
from typing import Any, NamedTuple

import torch

from ospnext.ops.fp8 import E4M3, E4M3_MAX, Held

NUMERATOR_SCALE = 256.0
_HOPPER = (9, 0)
_MAX_HEAD = 128


def attend(q: Held, k: Held, v: Held, segments: tuple[int, ...] | None = None) -> Held:
    """Softmax attention within consecutive segments, as ``ops.attention.attend``.

    Args:
        q: values ``[B, N, heads, head_dim]`` in E4M3; ``inverse`` has one element, or one for each sample.
        k, v: the same with M tokens; M = N when segments are given.
        segments: lengths that add up to N; None is dense attention.

    Returns:
        Values like q's, with v's ``inverse``.

    Raises:
        ValueError: the kernel cannot run here; ``why_not`` says why.
    """
    if reason := why_not(q.values.device, q.values.shape[-1]):
        raise ValueError(f"FP8 attention is unavailable: {reason}; use quant_attn=none")
    out = torch.empty_like(q.values, memory_format=torch.contiguous_format)
    tensors = out, q.values, k.values, v.values
    for i in range(len(out)):  # scales are a sample's own, the kernel's are for all it is given
        scales = [part.inverse.reshape(-1)[min(i, part.inverse.numel() - 1)] for part in (q, k, v)]
        start = 0
        for length, count in [(0, 1)] if segments is None else [(n, len(list(run))) for n, run in groupby(segments)]:
            rows = slice(start, start + count * length or None)
            _run([t[i, rows].unflatten(0, (count, -1)) for t in tensors], scales)
            start += count * length
    return Held(out, v.inverse)


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
        probe = Held(torch.ones(1, 64, 1, head_dim, device=device).to(E4M3), torch.ones(1, 1, 1, device=device))
        _run([torch.empty_like(probe.values), *[probe.values] * 3], [probe.inverse] * 3)
    except ModuleNotFoundError:
        return "nvidia-cudnn-frontend is not installed (pip install nvidia-cudnn-frontend)"
    except (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError) as error:
        return f"cuDNN refuses it: {str(error).strip().splitlines()[0]}"
    return ""


class _Graph(NamedTuple):
    """A kernel for one set of sizes."""

    graph: Any
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    workspace: int


def _run(tensors: list[torch.Tensor], scales: list[torch.Tensor]) -> None:
    """Attention of the last three of ``[b, n, heads, head_dim]`` into the first; a scale of each undoes its own."""
    cudnn = _cudnn()
    out, q, k, v = tensors
    if q.shape[1] == 1:  # a kernel for one query it has not
        two = torch.empty_like(out).repeat(1, 2, 1, 1)
        _run([two, q.repeat(1, 2, 1, 1), k, v], scales)
        out.copy_(two[:, :1])
        return
    shapes = tuple((tuple(t.shape), t.stride()) for t in (q, k, v, out))
    graph = _graph(shapes, out.device.index or 0)
    descales = [scale.reshape(1, 1, 1, 1) for scale in scales]
    numerator, undo = _constants(out.device)
    # The output, in v's scale, is what the kernel has found, undone by v's scale and scaled by this.
    values = (q, k, v, *descales, undo, numerator, descales[2].reciprocal())
    amax = torch.empty(2, 1, 1, 1, 1, device=out.device)
    bound = dict(zip(graph.inputs, values, strict=True)) | dict(zip(graph.outputs, (out, *amax), strict=True))
    workspace = torch.empty(max(graph.workspace, 1), dtype=torch.uint8, device=out.device)
    handle = _handle(out.device.index or 0)
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(out.device).cuda_stream)
    graph.graph.execute(bound, workspace, handle=handle)


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
def _graph(shapes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...], index: int) -> _Graph:
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
    out, _, amax_s, amax_o = graph.sdpa_fp8(
        q=q, k=k, v=v, **scales, is_inference=True, attn_scale=head_dim**-0.5, use_causal_mask=False, name="attend"
    )
    shape, stride = shapes[3]
    out.set_output(True).set_data_type(kinds.FP8_E4M3)
    out.set_dim([shape[i] for i in (0, 2, 1, 3)]).set_stride([stride[i] for i in (0, 2, 1, 3)])
    for amax in (amax_s, amax_o):
        amax.set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(kinds.FLOAT)
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    return _Graph(graph, (q, k, v, *scales.values()), (out, amax_s, amax_o), graph.get_workspace_size())
