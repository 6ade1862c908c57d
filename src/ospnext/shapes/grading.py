"""Grading many videos at once, in processes that keep to one thread each."""

import math
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextlib import suppress
from ctypes import CDLL
from multiprocessing import get_context
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Self

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from ospnext.shapes.grade import Grade, grade
from ospnext.shapes.scene import Scene

Video = np.ndarray | Tensor  # uint8 [T, H, W, 3]

VIDEOS_PER_PROCESS = 32  # fewer take less time than a process does to start
_KEPT = 2  # shared memory of so many batches is used again
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
        self._free: list[_Shared] = []  # memory that no video lies in, to be used again
        self._lock = threading.Lock()

    def __call__(self, videos: Sequence[Video], scenes: Sequence[Scene]) -> list[Grade]:
        """Grade videos uint8 ``[T, H, W, 3]`` against what was asked, in order."""
        if self.workers <= 1:
            with threadpool_limits(1):
                return [grade(video, scene) for video, scene in zip(videos, scenes, strict=True)]
        try:
            return [future.result() for future in self.begin(videos, scenes)]
        except BrokenExecutor:
            self.close()  # the next call starts new ones
            raise

    def begin(self, videos: Sequence[Video], scenes: Sequence[Scene]) -> list[Future[Grade]]:
        """As a call, but while other work goes on; one future for each video. Without processes it is done at once."""
        futures: list[Future[Grade]] = []
        if self.workers <= 1:
            for found in self(videos, scenes):
                futures.append(Future())
                futures[-1].set_result(found)
            return futures
        pool, shared = self._started(), self._room(sum(video.nbytes for video in videos))
        if shared is None:
            return [pool.submit(grade, _array(video), scene) for video, scene in zip(videos, scenes, strict=True)]
        try:
            place = 0
            for video, scene in zip(videos, scenes, strict=True):
                shared.put(place, video)
                futures.append(pool.submit(_grade_shared, shared.name, place, tuple(video.shape), scene))
                place += video.nbytes
        finally:
            _when_done(futures, lambda: self._give_back(shared))
        return futures

    def close(self) -> None:
        """End the processes."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)
        while self._free:
            self._free.pop().release()

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self.workers, get_context("spawn"), _prepared)
        return self._pool

    def _room(self, need: int) -> "_Shared | None":
        """Shared memory for so many bytes, of those that are free if one is large enough; None where it is short."""
        with self._lock:
            for shared in self._free:
                if shared.size >= need:
                    self._free.remove(shared)
                    return shared
        return _Shared.of(need)

    def _give_back(self, shared: "_Shared") -> None:
        with self._lock:
            self._free.append(shared)
            kept = _KEPT if self._pool is not None else 0
            self._free.sort(key=lambda one: one.size, reverse=True)
            too_many, self._free = self._free[kept:], self._free[:kept]
        for one in too_many:
            one.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()


class _Shared:
    """Memory that processes share: through their pipe videos would come one after the other, at 5 ms each.

    It is used again, since fresh memory comes from the system page by page, which takes ten times as long as to copy.
    It is given back when this process ends, however it ends.
    """

    def __init__(self, size: int) -> None:
        self._block = SharedMemory(create=True, size=size)
        self.name, self.size = self._block.name, size

    @classmethod
    def of(cls, size: int) -> Self | None:
        """So many bytes, if there is room for them."""
        if not size or (_SHARED.is_dir() and shutil.disk_usage(_SHARED).free < 2 * size):
            return None
        try:
            return cls(size)
        except OSError:
            return None

    def put(self, place: int, video: Video) -> None:
        """Copy a video here, from wherever it is.

        Raises:
            ValueError: it is not uint8.
        """
        if video.dtype not in (np.uint8, torch.uint8):
            raise ValueError(f"a video to grade must be uint8, not {video.dtype}")
        there = np.ndarray(tuple(video.shape), np.uint8, self._block.buf, place)
        if isinstance(video, Tensor):
            torch.from_numpy(there).copy_(video)
        else:
            np.copyto(there, video)

    def release(self) -> None:
        """Give it back to the system."""
        self._block.close()
        self._block.unlink()


def _array(video: Video) -> np.ndarray:
    return video.cpu().numpy() if isinstance(video, Tensor) else video


def _when_done(futures: Sequence[Future[Grade]], then: Callable[[], None]) -> None:
    """Call ``then`` once all of these are done."""
    waiting, lock = set(futures), threading.Lock()

    def done(future: Future[Grade]) -> None:
        with lock:
            waiting.discard(future)
            if waiting:
                return
        then()

    for future in futures:
        future.add_done_callback(done)
    if not futures:
        then()


_attached: list[SharedMemory] = []  # in a process that grades


def _attach(name: str) -> SharedMemory:
    """Shared memory by its name; the last ones stay attached."""
    for block in _attached:
        if block.name == name:
            return block
    _attached.append(SharedMemory(name))
    for block in _attached[:-_KEPT]:
        with suppress(BufferError):  # an error's traceback still holds a video
            block.close()
    del _attached[:-_KEPT]
    return _attached[-1]


def _grade_shared(name: str, place: int, shape: tuple[int, ...], scene: Scene) -> Grade:
    """Grade a video uint8 that lies in shared memory."""
    return grade(np.ndarray(shape, np.uint8, _attach(name).buf, place), scene)


def grade_all(videos: Sequence[Video], scenes: Sequence[Scene]) -> list[Grade]:
    """Grade videos uint8 ``[T, H, W, 3]`` once, in as many processes as pay off, in order."""
    with Graders(min(cores(), math.ceil(len(videos) / VIDEOS_PER_PROCESS))) as graders:
        return graders(videos, scenes)


def _prepared() -> None:
    """A process that grades."""
    one_thread()
    _keep_memory()


def _keep_memory() -> None:
    """Let this process keep up to 256 MiB of what it has freed, where the C library is glibc.

    A video takes dozens of arrays of some MiB. By default each comes fresh from the system, page by page, and goes
    back: a quarter of the time that grading takes.
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
