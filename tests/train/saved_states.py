"""What the tests of training look at in a run's folder."""

from pathlib import Path

import torch

from ospnext.parallel.state import read


def read_state(folder: Path, prefix: str = "live.transformer.") -> dict[str, torch.Tensor]:
    """Tensors of a run's state by name."""
    return read(folder, prefix)
