"""How much memory weights take, and whether there is as much: asked from headers, before anything is loaded."""

from pathlib import Path

import torch

from ospnext.checkpoints.read import open_weights
from ospnext.device import free_memory

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


_SMALLER = "use a smaller dtype (bf16), another device, or fewer things loaded at once"


def require_memory(need: int, device: torch.device, what: str = "the weights", way_out: str = _SMALLER) -> None:
    """Stop before loading what does not fit.

    Args:
        need: bytes.
        device: where they shall go.
        what: what they are, for the message.
        way_out: what to do about it, for the message.

    Raises:
        OutOfMemoryError: less is free; names both.
    """
    free = free_memory(device)
    if need > free:
        raise OutOfMemoryError(
            f"{what}: needs {need / _GIB:.1f} GiB on {device}, but {free / _GIB:.1f} GiB are free: {way_out}"
        )
