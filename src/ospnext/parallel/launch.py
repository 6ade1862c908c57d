"""Many processes of one command: who they are, how they meet, agree and part.

torchrun starts them and says in its variables who is who (``read_launch``). They meet once (``joined``), before
anything else can go wrong on one of them alone; what may fail is done under ``agree``, so that all stop with the same
message or none; they part together. A process that fails by itself leaves without a word: torchrun ends the others.
"""

import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from ospnext.device import resolve_device

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)  # of one exchange: others may be writing a long video meanwhile
_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


class Launch(NamedTuple):
    """This process among those of a run."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0  # among those of its machine

    @property
    def first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"process {self.rank} of {self.world} on {socket.gethostname()}"


class RefusalError(ValueError):
    """What ``agree`` raises in every process; the cause is the process's own error, if it was not another's."""


def read_launch(environment: Mapping[str, str]) -> Launch:
    """What torchrun's variables say; one process where there is no WORLD_SIZE. RANK alone means nothing.

    Raises:
        ValueError: variables that are missing or no numbers; says how to start.
    """
    if environment.get("WORLD_SIZE", "1") in ("", "1"):
        return Launch()
    if missing := [name for name in _VARIABLES if not environment.get(name)]:
        raise ValueError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']}, but {', '.join(missing)} not set: start with torchrun, or "
            "unset WORLD_SIZE"
        )
    numbers = {name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if odd := [f"{name} is {text!r}" for name, text in numbers.items() if not text.isdecimal()]:
        raise ValueError(f"environment variable {odd[0]}: it should be a whole number; start with torchrun")
    launch = Launch(*(int(text) for text in numbers.values()))
    if launch.rank >= max(1, launch.world):
        raise ValueError(f"environment variables RANK {launch.rank} of WORLD_SIZE {launch.world}: start with torchrun")
    return launch


@contextmanager
def joined(launch: Launch) -> Iterator[None]:
    """A process group of all processes inside the block, and a common farewell after it.

    Tensors of the accelerator travel by the library that belongs to it (NCCL, HCCL, ...), those of the CPU by gloo.
    Where the block raises anything but a ``RefusalError`` the others may be anywhere: there is no farewell then.
    """
    if launch.world == 1:
        yield
        return
    dist.init_process_group(_backends(), timeout=TIMEOUT)
    yield
    part()


def part() -> None:
    """Leave the others once all are here: a process that goes early breaks the connections of those still at work."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))
        dist.destroy_process_group()


def place(launch: Launch, name: str) -> torch.device:
    """The device of this process, made torch's current one: as many processes on a machine as it has of them.

    Args:
        launch: this process.
        name: as ``device.resolve_device`` takes it.

    Raises:
        ValueError: as there, one device for many processes, or more processes than devices.
    """
    device = resolve_device(name)
    if launch.world == 1 or device.type == "cpu":
        return device
    if device.index is not None:
        raise ValueError(f"device {name!r} is one for {launch.world} processes: use device={device.type}")
    count = torch.accelerator.device_count()
    if launch.local_rank >= count:
        raise ValueError(f"{count} devices, but more processes on this machine: use torchrun --nproc-per-node {count}")
    torch.accelerator.set_device_index(launch.local_rank)
    return torch.device(device.type, launch.local_rank)


def agree(launch: Launch, check: Callable[[], T]) -> T:
    """Run ``check`` in every process; if it fails in one, it fails in all, with the same message.

    Raises:
        RefusalError: it failed somewhere. In one process alone errors are what they are.
    """
    if launch.world == 1:
        return check()
    problem: Exception | None = None
    try:
        result = check()
    except (ValueError, OSError, MemoryError) as error:
        problem = error
    said = gather_objects(launch, None if problem is None else str(problem))
    failed = {rank: text for rank, text in enumerate(said) if text is not None}
    if not failed:
        return result
    rank, text = next(iter(failed.items()))
    same = len(failed) == launch.world
    raise RefusalError(text if same else f"process {rank} of {launch.world}: {text}") from (problem if same else None)


def gather_objects(launch: Launch, value: Any) -> list[Any]:
    """What every process gives, in order of rank."""
    if launch.world == 1:
        return [value]
    values: list[Any] = [None] * launch.world
    dist.all_gather_object(values, value)
    return values


def any_of(launch: Launch, wish: bool) -> bool:
    """Whether any process wishes something; all of them ask together."""
    if launch.world == 1:
        return wish
    flag = torch.tensor(int(wish))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def from_first(launch: Launch, make: Callable[[], T]) -> T:
    """What ``make`` gives in the first process, in all of them; if it fails there, it fails everywhere."""
    return gather_objects(launch, agree(launch, lambda: make() if launch.first else None))[0]


def is_lost(error: BaseException) -> bool:
    """Whether an error only says that another process is gone."""
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _LOST)


def _backends() -> str:
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "gloo" if here is None else f"cpu:gloo,{here.type}:{dist.get_default_backend_for_device(here)}"
