"""How much memory weights take, and whether there is as much: asked from headers, before anything is loaded."""

import os
from pathlib import Path

import torch

from ospnext.checkpoints.read import open_weights

_GIB = 2**30


class OutOfMemoryError(ValueError):
    """There is not enough memory for what is asked; the message names the need and what is free."""


def checkpoint_bytes(path: str | Path, dtype: torch.dtype | None = None) -> int:
    """Bytes the weights of a file or folder take in memory, read from headers only.

    Args:
        path: a weight file, or a folder that directly holds weights.
        dtype: what floating point is cast to; None for as stored.

    Raises:
        CheckpointError: there are no readable weights.
    """
    return open_weights(Path(path)).nbytes(dtype)


def free_memory(device: torch.device) -> int:
    """Bytes free on a device. Those that share the host's memory (cpu, mps) have what the host has."""
    if device.type not in ("cpu", "mps"):
        return int(getattr(torch, device.type).mem_get_info(device)[0])
    return min(_host_memory(), cgroup_memory())


def require_memory(need: int, device: torch.device, what: str = "the weights") -> None:
    """Stop before loading what does not fit.

    Args:
        need: bytes.
        device: where they shall go.
        what: what they are, for the message.

    Raises:
        OutOfMemoryError: less is free; names both.
    """
    free = free_memory(device)
    if need > free:
        raise OutOfMemoryError(
            f"{what}: needs {need / _GIB:.1f} GiB on {device}, but {free / _GIB:.1f} GiB are free: use a smaller dtype "
            "(bf16), another device, or fewer things loaded at once"
        )


def _host_memory() -> int:
    """Bytes the host can give without swapping."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # not Linux: what is built in


def cgroup_memory(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes left of a container's limit (cgroup v2); page cache counts as free. Without a limit: no bound."""
    limit, used, stat = root / "memory.max", root / "memory.current", root / "memory.stat"
    if not limit.exists() or not used.exists() or (text := limit.read_text().strip()) == "max":
        return 2**63
    counts = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
    cached = int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0))
    return max(0, int(text) - int(used.read_text()) + cached)
