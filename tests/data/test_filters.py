"""Each filter at both sides of its edge, by hand-made numbers."""

from dataclasses import replace

import numpy as np
import pytest

from ospnext.data.filters import FilterConfig, first_failure
from ospnext.data.records import ClipRecord, Crop

CLIP = ClipRecord("/a.mp4", ("a",), 720, 1280, 24.0, 200)
CONFIG = FilterConfig(sample_height=720, sample_width=1280, sample_num_frames=81, min_hxw=921600, max_motion_value=0.5)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({}, None),
        ({"captions": ()}, "caption"),
        ({"height": 1280, "width": 600}, "aspect"),
        ({"height": 639, "width": 1279}, "aspect"),
        ({"height": 718}, "area"),
        ({"height": 960, "width": 960}, "area"),  # r / r0 = 16 / 9: 1,638,400 pixels are asked for
        ({"height": 1280, "width": 1280}, None),
        ({"crop": Crop(0, 1279, 0, 720)}, "area"),
        ({"num_frames": 607}, None),  # 5 * 81 * 24 / 16 = 607.5
        ({"num_frames": 608}, "too_long"),
        ({"fps": 15.95}, None),
        ({"fps": 15.89}, "too_slow"),
        ({"motion": 0.51}, "motion"),
        ({"num_frames": 121}, None),  # ceil(121 / 1.5) = 81
        ({"num_frames": 120}, "too_short"),
    ],
)
def test_edges(change: dict, rule: str | None) -> None:
    failure = first_failure(replace(CLIP, **change), CONFIG)
    assert (failure and failure[0]) == rule


def test_stride_replaces_the_rate() -> None:
    config = CONFIG.model_copy(update={"sample_stride": 2, "train_fps": None})
    assert first_failure(replace(CLIP, fps=8.0, num_frames=161), config) is None
    assert first_failure(replace(CLIP, num_frames=160), config)[0] == "too_short"
    assert first_failure(replace(CLIP, num_frames=811), config)[0] == "too_long"


def test_length_is_that_of_arange() -> None:
    for fps in (16.0, 23.976, 24.0, 25.0, 30.0, 59.94):
        for frames in range(80, 400, 7):
            expected = len(np.arange(0, frames, CONFIG.interval(fps))) >= 81
            failure = first_failure(replace(CLIP, fps=fps, num_frames=frames), CONFIG)
            assert (failure is None) == expected
