"""Grading many videos at once, in processes that keep to one thread each."""

import math
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from ospnext.shapes.grade import Grade, grade
from ospnext.shapes.world import Scene

VIDEOS_PER_PROCESS = 32  # fewer take less time than a process does to start


def grade_all(videos: Sequence[np.ndarray], scenes: Sequence[Scene]) -> list[Grade]:
    """Grade videos uint8 ``[T, H, W, 3]`` against what was asked, in as many processes as pay off, in order.

    numpy and torch would otherwise start a thread per core in each process, for matrices far too small for it.
    """
    workers = min(_cores(), math.ceil(len(videos) / VIDEOS_PER_PROCESS))
    if workers <= 1:
        with threadpool_limits(1):
            return [grade(video, scene) for video, scene in zip(videos, scenes, strict=True)]
    with ProcessPoolExecutor(workers, get_context("spawn"), one_thread) as pool:
        return list(pool.map(grade, videos, scenes, chunksize=4))


def one_thread() -> None:
    """Keep this process to one thread, in BLAS, OpenMP and torch alike."""
    threadpool_limits(1)
    torch.set_num_threads(1)


def _cores() -> int:
    """Cores this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
