"""Real processes for tests: gloo on the CPU, a deadline for all of them, and none left behind when one fails."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_processes(world: int, function: Callable[..., None], *arguments: Any, folder: Path, seconds: float) -> None:
    """Call ``function(rank, *arguments)`` in ``world`` fresh processes that form a gloo group.

    Args:
        world: number of processes.
        function: of a module, not a closure: it is imported anew.
        arguments: passed to it.
        folder: an empty place for their rendezvous.
        seconds: after which all are killed.

    Raises:
        ProcessRaisedException: one of them raised; the others are ended and the message has its traceback.
        TimeoutError: they were not done in time.
    """
    deadline = time.monotonic() + seconds
    inner = (world, folder / f"rendezvous-{world}", seconds, function, arguments)
    context = mp.start_processes(_member, inner, nprocs=world, join=False, start_method="spawn")
    try:
        while not context.join(timeout=1, grace_period=1):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{world} processes of {function.__name__} were not done after {seconds} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()


def _member(
    rank: int, world: int, rendezvous: Path, seconds: float, function: Callable[..., None], arguments: tuple
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world, timeout=timedelta(seconds=seconds)
    )
    try:
        function(rank, *arguments)
        dist.barrier()  # nobody leaves while others still talk to it
    finally:
        dist.destroy_process_group()
