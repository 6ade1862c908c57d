"""Call what may never come back: the caller goes on when time is up, whatever the call is stuck in.

A decoder looks at its deadline between packets. A read from a dead network drive, or a loop inside a codec, never
gets there, and a thread cannot be ended from outside. So calls run in a thread of their own, and one that outlives
its deadline is left behind: the next call gets a new thread. FFmpeg's calls hold no lock of Python's, so a stuck one
stops nobody; it costs a thread and what it had allocated. (A child that could be killed would need a copy of each
video, and data loaders' processes may have no children.)
"""

import os
import queue
import threading
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

R = TypeVar("R")

GRACE = 1.0  # seconds past its deadline that a call may take to notice it by itself


class Stuck(ValueError):  # noqa: N818 - what happened, not a mistake of the caller
    """A call that had not come back when time was up."""


class _Answer(NamedTuple, Generic[R]):
    """What a call returned, or raised."""

    value: R | None
    error: BaseException | None


class Guard:
    """Runs calls one after the other in a thread that is replaced when it is stuck.

    Safe to fork, and cheap: about 30 microseconds a call.

    Attributes:
        left_behind: threads that were stuck.
    """

    def __init__(self) -> None:
        self.left_behind = 0
        self._thread: tuple[int, queue.SimpleQueue] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"left_behind": 0, "_thread": None}

    def call(self, function: Callable[[], R], seconds: float) -> R:
        """What ``function()`` returns.

        Raises:
            Stuck: it is not back after ``seconds`` and a second's grace. It may still be running.
        """
        if self._thread is None or self._thread[0] != os.getpid():
            tasks: queue.SimpleQueue = queue.SimpleQueue()
            threading.Thread(target=_serve, args=(tasks,), daemon=True, name="decode").start()
            self._thread = (os.getpid(), tasks)
        answers: queue.SimpleQueue[_Answer[R]] = queue.SimpleQueue()
        self._thread[1].put((function, answers))
        try:
            answer = answers.get(timeout=seconds + GRACE)
        except queue.Empty:
            self._thread[1].put(None)  # should it ever come back
            self._thread = None
            self.left_behind += 1
            raise Stuck(f"no answer after {seconds:g} s") from None
        if answer.error is not None:
            raise answer.error
        return answer.value  # type: ignore[return-value]


def _serve(tasks: queue.SimpleQueue) -> None:
    while (task := tasks.get()) is not None:
        function, answers = task
        try:
            answers.put(_Answer(function(), None))
        except BaseException as error:
            answers.put(_Answer(None, error))
        del task, function, answers  # a video that nobody needs any more
