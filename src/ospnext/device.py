"""Where tensors live and in which numbers: the names a user may write, and what they mean on this machine."""

from pathlib import Path

import psutil
import torch

DEVICE_NAMES = ("auto", "cpu", "cuda", "npu", "mps")

_DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
    "float": torch.float32,
}


def resolve_device(name: str = "auto") -> torch.device:
    """The torch device for a name of ``DEVICE_NAMES``, or any ``type:index`` torch knows.

    ``auto`` takes torch's current accelerator and falls back to the CPU.

    Raises:
        ValueError: the name is unknown, or this machine has no such device.
    """
    kind, colon, index = name.partition(":")
    if kind not in DEVICE_NAMES:
        raise ValueError(f"device {name!r} is not known: use one of {', '.join(DEVICE_NAMES)}")
    if colon and (kind == "auto" or not index.isdecimal()):
        raise ValueError(f"device {name!r} has no such index: write auto, cpu, cuda, cuda:0, cuda:1, ...")
    if kind == "npu":
        import_npu()
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind == "auto":
        return torch.device("cpu") if here is None else torch.device(here.type)
    if kind != "cpu" and (here is None or here.type != kind):
        have = "no accelerator" if here is None else here.type
        raise ValueError(f"device {name!r} is not available here: this machine has {have}; use auto")
    if here is not None and kind == here.type and colon and int(index) >= torch.accelerator.device_count():
        last = f"{kind}:{torch.accelerator.device_count() - 1}"
        raise ValueError(f"device {name!r} is not available here: the last one is {last}")
    return torch.device(name)


def import_npu() -> None:
    """Register Ascend's backend with torch, also where torch does not load backends by itself.

    Raises:
        ValueError: torch_npu is not installed or does not import.
    """
    try:
        import torch_npu  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(f"device 'npu' needs torch_npu (pip install 'ospnext[npu]'): {error}") from error


def resolve_dtype(name: str) -> torch.dtype:
    """The torch dtype for ``bf16 | fp16 | fp32`` and their long names.

    Raises:
        ValueError: the name is not one of them.
    """
    if name not in _DTYPES:
        raise ValueError(f"dtype {name!r} is not known: use one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def working_dtype(name: str, device: torch.device, asked: bool) -> torch.dtype:
    """The dtype to compute in: the one named, but float32 on a CPU that was not asked for it, where half is slow.

    Raises:
        ValueError: as ``resolve_dtype``.
    """
    dtype = resolve_dtype(name)
    return dtype if asked or device.type != "cpu" else torch.float32


def dtype_label(dtype: torch.dtype) -> str:
    """The dtype's name for reports, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def device_label(device: torch.device) -> str:
    """A readable name of the device for reports, such as ``NVIDIA H100 80GB HBM3`` or ``cpu (2 threads)``."""
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    module = getattr(torch, device.type)
    return str(module.get_device_name(device)) if hasattr(module, "get_device_name") else device.type


def free_memory(device: torch.device) -> int:
    """Bytes that new tensors can take on ``device``, with what torch has set aside and does not use."""
    if device.type == "cpu":
        return min(psutil.virtual_memory().available, _container_memory())
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    free, _ = torch.accelerator.get_memory_info(device)
    return free + torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)


def _container_memory() -> int:
    """Bytes left under the control group's limit: a container's own memory, which the machine's figures ignore."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cache = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines()).get("inactive_file", 0)
    except OSError:
        return 2**63
    return 2**63 if limit == "max" else int(limit) - int(used) + int(cache)
