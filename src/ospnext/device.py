"""Where tensors live and in which numbers: the names a user may write, and what they mean on this machine."""

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
    kind = name.split(":")[0]
    if kind not in DEVICE_NAMES:
        raise ValueError(f"device {name!r} is not known: use one of {', '.join(DEVICE_NAMES)}")
    if kind == "npu":
        import_npu()
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind == "auto":
        return torch.device("cpu") if here is None else torch.device(here.type)
    if kind != "cpu" and (here is None or here.type != kind):
        raise ValueError(f"device {name!r} is not available here: this machine has {here or 'no accelerator'}; use auto")
    return torch.device(name)


def import_npu() -> None:
    """Register Ascend's backend with torch; torch does not find it by itself.

    Raises:
        ValueError: torch_npu is not installed or does not import.
    """
    try:
        import torch_npu  # noqa: F401
    except (ImportError, OSError) as error:
        raise ValueError(f"device 'npu' needs torch_npu (pip install 'ospnext[npu]'): {error}") from error


def resolve_dtype(name: str) -> torch.dtype:
    """The torch dtype for ``bf16 | fp16 | fp32`` and their long names.

    Raises:
        ValueError: the name is not one of them.
    """
    if name not in _DTYPES:
        raise ValueError(f"dtype {name!r} is not known: use one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def device_label(device: torch.device) -> str:
    """A readable name of the device for reports, such as ``NVIDIA H100 80GB HBM3`` or ``cpu (2 threads)``."""
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    module = getattr(torch, device.type)
    return str(module.get_device_name(device)) if hasattr(module, "get_device_name") else device.type
