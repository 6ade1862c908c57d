"""Real processes for tests: gloo on the CPU, a deadline for every call, and none left behind when one fails."""

import multiprocessing as mp
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # they lost one that failed first

SECONDS = 600  # to start, and for any one call: far more than is needed, for the day the machine is busy


class Processes:
    """A gloo group of processes that call functions until they are stopped or one of them fails.

    Args:
        world: number of processes.
        rendezvous: a file that does not exist yet.
    """

    def __init__(self, world: int, rendezvous: Path) -> None:
        self.world = world
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(
            ["ospnext.generate.run", "ospnext.parallel.apply"]
        )  # imported once, not once a process
        self._pipes, self._members = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            member = context.Process(target=_serve, args=(rank, world, rendezvous, theirs), daemon=True)
            member.start()
            theirs.close()  # so that ours ends when the process does
            self._pipes.append(ours)
            self._members.append(member)

    @property
    def alive(self) -> bool:
        """Whether all processes are there."""
        return all(member.is_alive() for member in self._members)

    def run(self, function: Callable[..., Any], *arguments: Any, seconds: float = SECONDS) -> list[Any]:
        """Call ``function(rank, *arguments)`` in all processes.

        Args:
            function: of a module, not a closure: it is imported anew.
            arguments: passed to it.
            seconds: after which all processes are killed.

        Returns:
            The results in order of rank.

        Raises:
            RuntimeError: a process failed or died, or time ran out. All are gone then.
        """
        for pipe in self._pipes:
            pipe.send((function, arguments))
        deadline = time.monotonic() + seconds
        results: dict[int, Any] = {}
        while len(results) < self.world:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            problems = [] if ready else [f"no answer from {len(waiting)} of {self.world} processes in {seconds} s"]
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    results[rank], problem = pipe.recv()
                except (EOFError, ConnectionResetError):
                    problem = "it died"
                if problem:
                    problems.append(f"process {rank}: {problem}")
            if problems:
                self.kill()
                raise RuntimeError(min(problems, key=lambda text: any(lost in text for lost in _LOST)))
        return [results[rank] for rank in range(self.world)]

    def stop(self) -> None:
        """Let the processes take leave of each other and end."""
        if self.alive:
            self.run(_leave)
        self.kill()

    def kill(self) -> None:
        """End the processes whatever they do."""
        for member in self._members:
            member.kill()
            member.join()


@contextmanager
def groups_forgotten() -> Iterator[None]:
    """End the process groups that are made inside: each keeps a thread awake, and a test process makes many.

    Those of ``copies_mesh`` stay: it makes them once.
    """
    known = set(distributed_c10d._world.pg_map)
    yield
    if not dist.is_initialized():
        return
    dist.barrier()
    for group in [group for group in distributed_c10d._world.pg_map if group not in known]:
        if group.group_desc not in ("mesh_ddp", "mesh_fsdp"):
            dist.destroy_process_group(group)


def _serve(rank: int, world: int, rendezvous: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world, timeout=timeout)
    while dist.is_initialized():
        function, arguments = pipe.recv()
        try:
            pipe.send((function(rank, *arguments), ""))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
            return


def _leave(rank: int) -> None:
    dist.barrier()  # nobody leaves while others still talk to it
    dist.destroy_process_group()
