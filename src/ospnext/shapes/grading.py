"""Grading many videos at once, in processes that keep to one thread each."""

import math
import os
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from ospnext.shapes.grade import Grade, grade
from ospnext.shapes.world import Scene

VIDEOS_PER_PROCESS = 32  # fewer take less time than a process does to start


def grade_all(videos: Sequence[np.ndarray], scenes: Sequence[Scene]) -> list[Grade]:
    """Grade videos uint8 ``[T, H, W, 3]`` against what was asked, in as many processes as pay off, in order."""
    with Grader(len(videos)) as grader:
        return [grading.result() for grading in grader.submit(videos, scenes)]


class Grader:
    """Processes that grade while others generate; a context.

    numpy and torch would otherwise start a thread per core in each process, for matrices far too small for it.

    Args:
        expected: videos there will be: as many processes as pay off. One grades in this process, at once.
    """

    def __init__(self, expected: int) -> None:
        workers = min(_cores(), math.ceil(expected / VIDEOS_PER_PROCESS))
        self._pool = ProcessPoolExecutor(workers, get_context("spawn"), one_thread) if workers > 1 else None

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *problem: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=problem[0] is not None)

    def submit(self, videos: Sequence[np.ndarray], scenes: Sequence[Scene]) -> list[Future[Grade]]:
        """Begin to grade videos uint8 ``[T, H, W, 3]`` against what was asked, in order."""
        pairs = zip(videos, scenes, strict=True)
        if self._pool is not None:
            return [self._pool.submit(grade, video, scene) for video, scene in pairs]
        done = []
        with threadpool_limits(1):
            for video, scene in pairs:
                done.append(Future[Grade]())
                done[-1].set_result(grade(video, scene))
        return done


def one_thread() -> None:
    """Keep this process to one thread, in BLAS, OpenMP and torch alike."""
    threadpool_limits(1)
    torch.set_num_threads(1)


def _cores() -> int:
    """Cores this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
