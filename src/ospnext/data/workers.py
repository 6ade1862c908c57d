"""Run one function over many tasks in processes that may hang or die: that costs the task at hand, never the run."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Failure(NamedTuple):
    """A task that gave no result: ``reason`` is ``timeout`` or ``crash``."""

    reason: str
    detail: str


class Outcome(NamedTuple, Generic[T, R]):
    """One task and what came of it."""

    task: T
    result: R | Failure


def default_workers() -> int:
    """One process for each core that this one may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(function: Callable[[T], R], tasks: Iterable[T], workers: int, timeout: float) -> Iterator[Outcome[T, R]]:
    """Call ``function`` on each task in ``workers`` processes; outcomes come as they are ready, in no order.

    Args:
        function: of a module, so that another process can import it. What it raises counts as a crash.
        tasks: are drawn as processes become free.
        workers: processes at work at once; none is started before there is a task for it.
        timeout: seconds a task may take before its process is ended.
    """
    remaining = iter(tasks)
    idle: list[_Worker] = []
    busy: list[_Worker] = []
    try:
        while True:
            while len(busy) < workers and (task := next(remaining, _END)) is not _END:
                worker = idle.pop() if idle else _Worker(function)
                worker.start(task, timeout)
                busy.append(worker)
            if not busy:
                return
            wait([worker.connection for worker in busy], max(0.0, min(w.deadline for w in busy) - time.monotonic()))
            for worker in list(busy):
                outcome = worker.outcome(timeout)
                if outcome is None:
                    continue
                busy.remove(worker)
                if isinstance(outcome.result, Failure):
                    worker.stop()
                else:
                    idle.append(worker)
                yield outcome
    finally:
        for worker in (*busy, *idle):
            worker.stop()


_END: Any = object()
_START_UP = 120.0  # seconds a process may take to import what it needs
_CONTEXT = multiprocessing.get_context("spawn")  # a fork would inherit threads and open decoders


class _Worker:
    """One process, its connection, and the task it is at."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.connection, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_serve, args=(function, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.task: Any = None
        self.deadline = 0.0
        self.ready = False

    def start(self, task: Any, timeout: float) -> None:
        """Hand over a task. The time it may take counts from when the process is up."""
        self.task, self.deadline = task, time.monotonic() + (timeout if self.ready else _START_UP)
        try:
            self.connection.send(task)
        except BrokenPipeError:
            self.deadline = 0.0  # it died while idle; the next look finds the connection at its end

    def outcome(self, timeout: float) -> Outcome[Any, Any] | None:
        """What came of the task; None while it is being worked on."""
        try:
            if self.connection.poll() and not self.ready:
                self.ready = self.connection.recv()
                self.deadline = time.monotonic() + timeout
            if self.connection.poll():
                return Outcome(self.task, self.connection.recv())
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return Outcome(self.task, Failure("crash", f"its process ended with {how}"))
        if time.monotonic() < self.deadline:
            return None
        return Outcome(self.task, Failure("timeout", f"no result after {timeout:g} s"))

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(function: Callable[[Any], Any], connection: Connection) -> None:
    """Answer tasks until the other side is gone. An interrupt from the keyboard is the parent's affair."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection.send(True)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            answer = function(task)
        except Exception as error:  # of any kind: it is told with the task's name, and the next task comes
            answer = Failure("crash", f"{type(error).__name__}: {error}")
        connection.send(answer)
