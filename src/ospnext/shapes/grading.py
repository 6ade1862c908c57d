"""Grading many videos at once, in processes that keep to one thread each."""

import math
import os
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Self

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from ospnext.shapes.grade import Grade, grade
from ospnext.shapes.scene import Scene

VIDEOS_PER_PROCESS = 32  # fewer take less time than a process does to start


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
            return list(
                self._started().map(grade, videos, scenes, chunksize=max(1, min(4, len(videos) // (2 * self.workers))))
            )
        except BrokenExecutor:
            self.close()  # the next call starts new ones
            raise

    def begin(self, videos: Sequence[np.ndarray], scenes: Sequence[Scene]) -> list[Future[Grade]]:
        """As a call, but while other work goes on; one future for each video. Without processes it is done at once."""
        if self.workers > 1:
            pool = self._started()
            return [pool.submit(grade, video, scene) for video, scene in zip(videos, scenes, strict=True)]
        futures = [Future[Grade]() for _ in videos]
        for future, found in zip(futures, self(videos, scenes), strict=True):
            future.set_result(found)
        return futures

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self.workers, get_context("spawn"), one_thread)
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


def grade_all(videos: Sequence[np.ndarray], scenes: Sequence[Scene]) -> list[Grade]:
    """Grade videos uint8 ``[T, H, W, 3]`` once, in as many processes as pay off, in order."""
    with Graders(min(cores(), math.ceil(len(videos) / VIDEOS_PER_PROCESS))) as graders:
        return graders(videos, scenes)


def one_thread() -> None:
    """Keep this process to one thread, in BLAS, OpenMP and torch alike."""
    threadpool_limits(1)
    torch.set_num_threads(1)


def cores() -> int:
    """Cores this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
