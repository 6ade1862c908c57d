"""Grading many videos at once, in processes that keep to one thread each."""

import math
import os
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextlib import suppress
from ctypes import CDLL
from itertools import accumulate
from multiprocessing import get_context
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Self

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from ospnext.shapes.grade import Grade, grade
from ospnext.shapes.scene import Scene

VIDEOS_PER_PROCESS = 32  # fewer take less time than a process does to start
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # numbers of glibc's mallopt
_SHARED = Path("/dev/shm")  # where Linux keeps shared memory; containers often have little


class Graders:
    """Processes that grade, started at the first call that needs them and kept until ``close``.

    numpy and torch would otherwise start a thread per core in each process, for matrices far too small for it.

    Args:
        workers: how many; None for one a core. With 1 this process grades by itself.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.workers = cores() if workers is None else workers
        self._pool: ProcessPoolExecutor | None = None

    def __call__(self, videos: Sequence[np.ndarray], scenes: Sequence[Scene]) -> list[Grade]:
        """Grade videos uint8 ``[T, H, W, 3]`` against what was asked, in order."""
        if self.workers <= 1:
            with threadpool_limits(1):
                return [grade(video, scene) for video, scene in zip(videos, scenes, strict=True)]
        try:
            return [future.result() for future in self.begin(videos, scenes)]
        except BrokenExecutor:
            self.close()  # the next call starts new ones
            raise

    def begin(self, videos: Sequence[np.ndarray], scenes: Sequence[Scene]) -> list[Future[Grade]]:
        """As a call, but while other work goes on; one future for each video. Without processes it is done at once."""
        if self.workers > 1:
            pool, shared = self._started(), _Shared.of(videos)
            if shared is None:
                return [pool.submit(grade, video, scene) for video, scene in zip(videos, scenes, strict=True)]
            futures = []
            try:
                for place, video, scene in zip(shared.places, videos, scenes, strict=True):
                    futures.append(pool.submit(_grade_shared, shared.name, place, video.shape, scene))
            finally:
                shared.release_after(futures)
            return futures
        futures = [Future[Grade]() for _ in videos]
        for future, found in zip(futures, self(videos, scenes), strict=True):
            future.set_result(found)
        return futures

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self.workers, get_context("spawn"), _prepared)
        return self._pool

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()


class _Shared:
    """Videos in memory that processes share: through their pipe they would come one after the other, at 5 ms each.

    It is given back when this process ends, however it ends.
    """

    def __init__(self, videos: Sequence[np.ndarray]) -> None:
        ends = list(accumulate(video.nbytes for video in videos))
        self.places = [0, *ends[:-1]]
        self._block = SharedMemory(create=True, size=ends[-1])
        for place, video in zip(self.places, videos, strict=True):
            np.copyto(np.ndarray(video.shape, np.uint8, self._block.buf, place), video)

    @property
    def name(self) -> str:
        """By which other processes find it."""
        return self._block.name

    @classmethod
    def of(cls, videos: Sequence[np.ndarray]) -> Self | None:
        """The videos there, if there is room for them."""
        need = sum(video.nbytes for video in videos)
        if not need or (_SHARED.is_dir() and shutil.disk_usage(_SHARED).free < 2 * need):
            return None
        try:
            return cls(videos)
        except OSError:
            return None

    def release_after(self, futures: Sequence[Future[Grade]]) -> None:
        """Give the memory back when all of these are done."""
        waiting, lock = set(futures), threading.Lock()

        def done(future: Future[Grade]) -> None:
            with lock:
                waiting.discard(future)
                if not waiting:
                    self._release()

        for future in futures:
            future.add_done_callback(done)
        if not futures:
            self._release()

    def _release(self) -> None:
        self._block.close()
        self._block.unlink()


def _grade_shared(name: str, place: int, shape: tuple[int, ...], scene: Scene) -> Grade:
    """Grade a video uint8 that lies in shared memory."""
    block = SharedMemory(name)
    try:
        return grade(np.ndarray(shape, np.uint8, block.buf, place), scene)
    finally:
        with suppress(BufferError):  # an error's traceback still holds the video
            block.close()


def grade_all(videos: Sequence[np.ndarray], scenes: Sequence[Scene]) -> list[Grade]:
    """Grade videos uint8 ``[T, H, W, 3]`` once, in as many processes as pay off, in order."""
    with Graders(min(cores(), math.ceil(len(videos) / VIDEOS_PER_PROCESS))) as graders:
        return graders(videos, scenes)


def _prepared() -> None:
    """A process that grades."""
    one_thread()
    keep_memory()


def keep_memory() -> None:
    """Let this process keep up to 256 MiB of what it has freed, where the C library is glibc.

    A video takes dozens of arrays of some MiB. By default each comes fresh from the system, page by page, and goes
    back: half of the time that grading takes.
    """
    try:
        mallopt = CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(_TRIM_THRESHOLD, 256 * 2**20)
    mallopt(_MMAP_THRESHOLD, 32 * 2**20)  # the most that it takes


def one_thread() -> None:
    """Keep this process to one thread, in BLAS, OpenMP and torch alike."""
    threadpool_limits(1)
    torch.set_num_threads(1)


def cores() -> int:
    """Cores this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
