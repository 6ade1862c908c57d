"""How things are measured: medians of event timings, where the time went by kernel, memory, JSON lines and tables.

All milliseconds are of the device's own clock where it has events, of the host's on the CPU.
"""

import gc
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ospnext.device import device_label


class Timing(NamedTuple):
    """Milliseconds of one call: the median of the repeats, the fastest and the slowest."""

    ms: float
    fastest: float
    slowest: float


def time_calls(call: Callable[[], Any], device: torch.device, warmup: int = 3, repeats: int = 7) -> Timing:
    """Time a call after ``warmup`` unmeasured ones, each repeat on its own."""
    for _ in range(warmup):
        call()
    times = _host_times(call, device, repeats) if device.type == "cpu" else _device_times(call, device, repeats)
    return Timing(statistics.median(times), min(times), max(times))


def _host_times(call: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    return [host_ms(call, device) for _ in range(repeats)]


def _device_times(call: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    event = torch.get_device_module(device).Event
    pairs = [(event(enable_timing=True), event(enable_timing=True)) for _ in range(repeats)]
    for start, end in pairs:  # no waiting in between: an idle device would count the launch of its first kernel
        start.record()
        call()
        end.record()
    synchronize(device)
    return [start.elapsed_time(end) for start, end in pairs]


def host_ms(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call on the host's clock, until the device has finished it."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


class Parts(NamedTuple):
    """Milliseconds of one call by the kind of kernel, and the names behind them (longest first)."""

    attention: float
    linears: float
    rest: float
    attention_kernels: dict[str, float]
    rest_kernels: dict[str, float]


# Compiled kernels are named after all they fuse, so theirs come first; attention kernels may carry a library's name.
_KINDS = (
    ("linears", ("triton_mm", "triton_tem", "extern_kernels.mm", "extern_kernels.addmm")),
    ("rest", ("triton_", "cpp_fused", "memcpy", "memset")),
    ("attention", ("sdpa", "flash", "fmha", "attention")),
    ("linears", ("nvjet", "gemm", "cutlass", "cublas", "aten::addmm", "aten::mm", "aten::bmm", "mkldnn_linear")),
)


def kind_of(kernel: str) -> str:
    """``attention``, ``linears`` or ``rest``, from a kernel's name (an operator's on the CPU)."""
    name = kernel.lower()
    return next((kind for kind, marks in _KINDS if any(mark in name for mark in marks)), "rest")


def split_by_kernel(call: Callable[[], Any], device: torch.device) -> Parts | None:
    """Where one call's time goes, by torch.profiler; None where it sees no kernels of this device."""
    on_cpu = device.type == "cpu"
    activity = ProfilerActivity.CPU if on_cpu else getattr(ProfilerActivity, device.type.upper(), ProfilerActivity.CUDA)
    synchronize(device)
    with profile(activities=[activity]) as profiler:
        call()
        synchronize(device)
    ms: dict[str, float] = {}
    for event in profiler.events() or ():
        if (event.device_type == DeviceType.CPU) == on_cpu and not event.is_user_annotation:
            elapsed = event.self_cpu_time_total if on_cpu else event.time_range.elapsed_us()
            ms[event.name] = ms.get(event.name, 0.0) + elapsed / 1e3
    if not ms:
        return None
    longest = dict(sorted(ms.items(), key=lambda item: -item[1]))
    kinds: dict[str, dict[str, float]] = {"attention": {}, "linears": {}, "rest": {}}
    for name, elapsed in longest.items():
        kinds[kind_of(name)][name] = elapsed
    total = {kind: sum(kernels.values()) for kind, kernels in kinds.items()}
    return Parts(**total, attention_kernels=_head(kinds["attention"], 3), rest_kernels=_head(kinds["rest"], 10))


def _head(kernels: dict[str, float], count: int) -> dict[str, float]:
    return {name[:100]: round(ms, 3) for name, ms in list(kernels.items())[:count]}


def free_all(device: torch.device) -> None:
    """Forget compiled code and give unused memory back, so that the next case starts bare."""
    torch.compiler.reset()
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(device)


def peak_gb(device: torch.device) -> float | None:
    """Largest GB of tensors since ``free_all``; None on the CPU, where torch does not count them."""
    return None if device.type == "cpu" else torch.accelerator.max_memory_allocated(device) / 1e9


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure depends on beside the code: device and versions."""
    return {
        "device": device_label(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "diffusers": importlib.metadata.version("diffusers"),
    }


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """``|out - reference| / |reference|`` in float64; NaN stays NaN."""
    reference = reference.double()
    return ((out.double() - reference).norm() / reference.norm()).item()


def emit(record: dict[str, Any]) -> dict[str, Any]:
    """Print a record as one JSON line at once, floats to 5 digits; returns what was printed."""
    record = {key: _rounded(value) for key, value in record.items()}
    print(json.dumps(record), flush=True)
    return record


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def table(records: Iterable[dict[str, Any]], columns: dict[str, str]) -> str:
    """A Markdown table of records.

    Args:
        records: one row each; a missing or None value shows as a dash.
        columns: key of a record -> heading.
    """
    rows = [[_cell(record.get(key)) for key in columns] for record in records]
    lines = [list(columns.values()), ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return (
        f"{value:.4g}"
        if isinstance(value, float) and abs(value) < 1e4
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )
