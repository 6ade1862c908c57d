"""Buckets: shapes of samples, and which clip goes to which.

Every clip has one bucket, found from its record alone, so the same store gives the same buckets on every rank and in
every run. A batch is of one bucket (see ``sampler``): its samples have one shape, on all ranks.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ospnext.data.frames import frames_at_rate
from ospnext.data.records import ClipRecord

SAME_ASPECT = 0.1
"""Logarithms of aspect ratios that are this near count as alike: cutting costs a tenth of the picture at most."""


class Bucket(NamedTuple):
    """The shape of a sample: frames, height and width in pixels."""

    num_frames: int
    height: int
    width: int

    @classmethod
    def parse(cls, text: str) -> "Bucket":
        """The bucket that ``81x720x1280`` names: frames, height, width.

        Raises:
            ValueError: it names none.
        """
        parts = text.lower().split("x")
        if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(f"bucket {text!r} is not understood: write FRAMESxHEIGHTxWIDTH, such as 81x720x1280")
        return cls(*map(int, parts))


class Assignment(NamedTuple):
    """The clips of each bucket by index, and how many clips are too short for all of them."""

    groups: list[np.ndarray]
    left_out: int


def assign(
    clips: Iterable[ClipRecord], buckets: Sequence[Bucket], train_fps: float | None, sample_stride: float | None
) -> Assignment:
    """Sort clips into buckets; ``choose_bucket`` says how.

    Raises:
        ValueError: there are no buckets, or one stands twice.
    """
    if not buckets or len(set(buckets)) < len(buckets):
        raise ValueError(f"buckets {[tuple(b) for b in buckets]}: name each shape once, and at least one")
    groups: list[list[int]] = [[] for _ in buckets]
    left_out = 0
    for index, clip in enumerate(clips):
        place = choose_bucket(clip, len(frames_at_rate(clip, train_fps, sample_stride)), buckets)
        if place is None:
            left_out += 1
        else:
            groups[place].append(index)
    return Assignment([np.array(group, dtype=np.int64) for group in groups], left_out)


def choose_bucket(clip: ClipRecord, frames: int, buckets: Sequence[Bucket]) -> int | None:
    """The bucket of a clip that has ``frames`` frames at the training rate; None if it is too short for all.

    Of those it is long enough for: one whose aspect ratio is within a tenth (in logarithms) of the nearest; then the
    largest picture that needs no enlarging, or if all do, the smallest; then the nearest ratio and the most frames.
    """
    height, width = size_of(clip)
    ratio = math.log(height / width)

    distance = [abs(math.log(bucket.height / bucket.width) - ratio) for bucket in buckets]
    fitting = [place for place, bucket in enumerate(buckets) if bucket.num_frames <= frames]
    nearest = min((distance[place] for place in fitting), default=0.0)

    def rank(place: int) -> tuple[bool, int, float, int]:
        bucket = buckets[place]
        enlarged = bucket.height > height or bucket.width > width
        area = bucket.height * bucket.width
        return enlarged, area if enlarged else -area, distance[place], -bucket.num_frames

    alike = [place for place in fitting if distance[place] <= nearest + SAME_ASPECT]
    return min(alike, key=rank, default=None)


def size_of(clip: ClipRecord) -> tuple[int, int]:
    """Height and width in pixels of what is used of a clip's picture."""
    if clip.crop is None:
        return clip.height, clip.width
    return clip.crop.y1 - clip.crop.y0, clip.crop.x1 - clip.crop.x0
