"""What the tests of reinforcement learning run in every process: the command itself on a tiny random pipeline."""

import sys
from pathlib import Path
from typing import Any

import processes
import torch

from ospnext.parallel.launch import Launch
from ospnext.parallel.state import newest, read
from ospnext.train.rl.run import run

sys.path.append(str(Path(__file__).parents[1] / "train"))  # processes are started anew and know this folder alone
from rl_cases import config_of, lines_of


@processes.groups_forgotten()
def train(rank: int, world: int, folder: Path, out: Path, values: dict[str, Any]) -> str:
    """The command's run; how it refuses, if it does."""
    torch.set_num_threads(1)
    config = config_of(folder, out, **values)
    try:
        run(config if world > 1 else config.alone(), Launch(rank, world, rank))
    except ValueError as error:
        return str(error)
    return ""


def outcome(out: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], list[dict[str, Any]]]:
    """Tensors of a run's newest state, its log, and its evaluations."""
    state = newest(out)
    assert state is not None
    return read(state, ""), lines_of(out / "train_log.jsonl"), lines_of(out / "evaluations.jsonl")
