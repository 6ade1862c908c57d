"""How much moves in a clip, from optical flow (OpenCV's DIS, Kroeger et al. 2016, arXiv:1603.03590).

The unit: the fraction of the picture's diagonal by which an average pixel moves from one frame of training to the
next. 0 stands still; 0.02 crosses the picture in some fifty frames.
"""

from importlib.util import find_spec
from typing import NamedTuple

import numpy as np

from ospnext.config import ConfigError
from ospnext.data.probe import ProbeError, opened
from ospnext.data.records import ClipRecord
from ospnext.data.workers import Failure

PAIRS = 8  # pairs of frames, spread evenly over a clip
SIDE = 256  # pixels of the longer side at which flow is measured


class MotionTask(NamedTuple):
    """A clip, and the frames of its file from one frame of training to the next."""

    clip: ClipRecord
    interval: float


def require_opencv() -> None:
    """Stop where the library is not installed.

    Raises:
        ConfigError: says how to install it.
    """
    if find_spec("cv2") is None:
        raise ConfigError("measure_motion needs OpenCV: pip install 'ospnext[data]', or set measure_motion=false")


def measure(task: MotionTask) -> float | Failure:
    """Mean length of the optical flow over ``PAIRS`` pairs of frames, in diagonals a frame of training.

    Frames are decoded from the start of the file, so that their numbers are exact.
    """
    import cv2

    cv2.setNumThreads(1)
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    clip, step = task.clip, max(1, round(task.interval))
    starts = np.unique(np.linspace(0, max(0, clip.num_frames - 1 - step), PAIRS).round().astype(int)) + clip.start
    wanted = {int(number) for start in starts for number in (start, start + step)}
    frames: dict[int, np.ndarray] = {}
    try:
        with opened(clip.path) as (container, stream):
            for number, frame in enumerate(container.decode(stream)):
                if number in wanted:
                    frames[number] = _small(frame.to_ndarray(format="gray"))
                if number >= max(wanted):
                    break
    except ProbeError as error:
        return Failure(error.reason, error.detail)
    lengths = [
        np.linalg.norm(
            flow.calc(frames[start], frames[start + step], np.zeros((*frames[start].shape, 2), np.float32)), axis=-1
        ).mean()
        for start in map(int, starts)
        if start in frames and start + step in frames
    ]
    if not lengths:
        return 0.0  # a single frame
    return float(np.mean(lengths) / np.hypot(*next(iter(frames.values())).shape))


def _small(picture: np.ndarray) -> np.ndarray:
    """The whole picture [H, W], its longer side at most ``SIDE`` pixels."""
    import cv2

    scale = min(1.0, SIDE / max(picture.shape))
    size = (max(16, round(picture.shape[1] * scale)), max(16, round(picture.shape[0] * scale)))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
