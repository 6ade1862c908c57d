"""Attention inside segments: one function, several dense kernels, and the masked dense reference they are held to.

Sparse attention here is dense attention on shorter sequences, so any dense kernel serves. Kernels are chosen by name:

========  =====================================================================  ==========================
name      what runs                                                              needs
========  =====================================================================  ==========================
auto      the fastest that this device and dtype can run: see ``choose_kernel``
sdpa      ``torch.nn.functional.scaled_dot_product_attention``                   nothing: any device
cudnn     the same, cuDNN first: the fastest on Hopper                           CUDA, bf16 or fp16
flash2    FlashAttention 2                                                       CUDA, ``flash_attn``
flash3    FlashAttention 3                                                       Hopper, ``flash_attn_interface``
flash4    FlashAttention 4                                                       Hopper or newer, ``flash_attn.cute``
========  =====================================================================  ==========================
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib import import_module
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

KERNEL_NAMES = ("auto", "sdpa", "cudnn", "flash2", "flash3", "flash4")
_FLASH_MODULES = {"flash2": "flash_attn", "flash3": "flash_attn_interface", "flash4": "flash_attn.cute"}
_HALF = (torch.bfloat16, torch.float16)
_ABSENT = "is not installed"
# What importing a build for another torch, CUDA, compiler or chip has been seen to raise.
_BROKEN_BUILD = (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError, NameError, AssertionError)


class Attend:
    """The second of the model's two seams: softmax attention of every token to its segment.

    Sequence parallelism and 8-bit attention put other callables of the same form in its place.
    """

    def __init__(self, kernel: str = "auto") -> None:
        self.kernel = check_kernel(kernel)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        """See ``attend``."""
        return attend(q, k, v, segments, self.kernel)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: tuple[int, ...] | None = None, kernel: str = "auto"
) -> torch.Tensor:
    """Softmax attention, scaled by ``head_dim ** -0.5``, within consecutive segments.

    Args:
        q: ``[B, N, heads, head_dim]``.
        k, v: ``[B, M, heads, head_dim]``; M = N when segments are given.
        segments: lengths that add up to N; None is plain dense attention. Neighbours of equal length share one call.
        kernel: a name of ``KERNEL_NAMES``.

    Returns:
        ``[B, N, heads, head_dim]``.

    Raises:
        ValueError: the segments do not add up, or the kernel cannot run on these tensors.
    """
    run = _KERNELS[choose_kernel(kernel, q.device, q.dtype)]
    if segments is not None and (sum(segments) != q.shape[1] or k.shape[1] != q.shape[1]):
        raise ValueError(f"segments {segments} do not add up to the {q.shape[1]} queries and {k.shape[1]} keys")
    if not q.numel():  # no token or no head: kernels differ in what they make of it
        return q + (k.sum() + v.sum())  # as empty as q; k and v have gradients of zero rather than none
    if segments is None:
        return run(q, k, v)
    out = []
    for start, count, length in _runs(segments):
        rows = slice(start, start + count * length)
        fold = (t[:, rows].unflatten(1, (count, length)).flatten(0, 1) for t in (q, k, v))
        out.append(run(*fold).unflatten(0, (-1, count)).flatten(1, 2))
    return out[0] if len(out) == 1 else torch.cat(out, dim=1)


def masked_dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segment_ids: torch.Tensor
) -> torch.Tensor:
    """The reference: dense attention in which a boolean mask hides every other segment.

    Args:
        q, k, v: ``[B, N, heads, head_dim]`` in any token order.
        segment_ids: ``[N]`` in the same order.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = segment_ids[:, None] == segment_ids[None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _runs(segments: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """(start, count, length) of every run of equal segment lengths."""
    start = 0
    for length, group in groupby(segments):
        count = len(list(group))
        yield start, count, length
        start += count * length


def check_kernel(name: str) -> str:
    """The name itself if it is a kernel's.

    Raises:
        ValueError: it is not.
    """
    if name not in KERNEL_NAMES:
        raise ValueError(f"attention kernel {name!r} is not known: use one of {', '.join(KERNEL_NAMES)}")
    return name


@torch.compiler.assume_constant_result  # settled while a block is traced: the look-up is no part of the graph
def choose_kernel(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The kernel that runs for a name: what ``auto`` means here; any other name is kept.

    Half precision on CUDA takes cuDNN on Hopper (measured 1.7x FlashAttention 2 there) and FlashAttention 2 elsewhere
    if it is installed; all else takes SDPA.

    Raises:
        ValueError: the name is unknown, or that kernel cannot run on this device or dtype.
    """
    check_kernel(name)
    half_on_cuda = device.type == "cuda" and dtype in _HALF
    if name == "auto":
        if not half_on_cuda:
            return "sdpa"
        if torch.cuda.get_device_capability(device)[0] == 9 and not why_not("cudnn"):
            return "cudnn"
        return "sdpa" if why_not("flash2") else "flash2"
    if reason := why_not(name):
        raise ValueError(f"attention kernel {name!r} is unavailable: {reason}; use auto or sdpa")
    if name != "sdpa" and not half_on_cuda:
        raise ValueError(f"attention kernel {name!r} needs bf16 or fp16 on CUDA, not {dtype} on {device}; use auto")
    return name


@lru_cache(maxsize=len(KERNEL_NAMES))
def why_not(name: str) -> str:
    """Why a kernel cannot be used in this process; an empty string if it can."""
    check_kernel(name)
    if name in ("auto", "sdpa"):
        return ""
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    if name == "cudnn":
        return "" if torch.backends.cudnn.is_available() else "this torch was built without cuDNN"
    module = _FLASH_MODULES[name]
    try:
        _KERNELS[name] = _flash_kernel(import_module(module).flash_attn_func)
    except ModuleNotFoundError as error:
        absent = error.name is not None and f"{module}.".startswith(f"{error.name}.")  # itself, not what it imports
        return f"{module} {_ABSENT}" if absent else f"{module} does not import: {error}"
    except _BROKEN_BUILD as error:
        return f"{module} does not import: {error}"
    return ""


def available_kernels() -> dict[str, str]:
    """Every kernel's name with why it is unavailable here (an empty string: it is available)."""
    return {name: why_not(name) for name in KERNEL_NAMES}


def describe_kernel(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """What really runs, for the report: ``cudnn (auto)``, ``sdpa (auto; flash_attn does not import: ...)``, ...

    Raises:
        ValueError: as ``choose_kernel``.
    """
    chosen = choose_kernel(name, device, dtype)
    if name != "auto":
        return chosen
    reasons = [why_not(flash) for flash in _FLASH_MODULES] if device.type == "cuda" else []
    broken = [reason for reason in dict.fromkeys(reasons) if reason and not reason.endswith(_ABSENT)]
    return f"{chosen} ({'; '.join(['auto', *broken])})"


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    # SDPA alone would pick FlashAttention 2; the rest of the list serves head sizes that cuDNN does not have.
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        return _sdpa(q, k, v)


def _flash_kernel(function: Callable[..., Any]) -> Kernel:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = function(q, k, v)
        return out[0] if isinstance(out, tuple) else out  # some releases also return the log-sum-exp

    return run


_KERNELS: dict[str, Kernel] = {"sdpa": _sdpa, "cudnn": _cudnn}  # FlashAttention joins when ``why_not`` imports it
