"""The processes of the tests: a failure is reported at once, and nobody is left waiting."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from processes import SECONDS, Processes


def rank_of(rank: int) -> int:
    """This process's rank, once all are there."""
    dist.barrier()
    return rank


def fail_alone(rank: int) -> None:
    """One process raises while the others wait for it."""
    if rank == 1:
        raise ArithmeticError("raised by process 1")
    dist.barrier()


def die_alone(rank: int) -> None:
    """One process is gone from one moment to the next."""
    if rank == 1:
        os._exit(3)
    dist.barrier()


def wait_alone(rank: int) -> None:
    """One process does not come for a minute: were it waited for, nothing would fail."""
    if rank == 1:
        time.sleep(60)
    dist.barrier()


@pytest.mark.parametrize(
    ("function", "message"),
    [(fail_alone, "raised by process 1"), (die_alone, "it died"), (wait_alone, "no answer from 2 of 2")],
)
def test_a_failure_ends_all_at_once(function: Callable, message: str, tmp_path: Path) -> None:
    group = Processes(2, tmp_path / "rendezvous")
    assert group.run(rank_of) == [0, 1]
    with pytest.raises(RuntimeError, match=message):
        group.run(function, seconds=2 if function is wait_alone else SECONDS)
    assert not group.alive
