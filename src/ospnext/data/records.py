"""What the training set is made of: one ``ClipRecord`` for each clip, as the store keeps it and the loader gets it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

FRAME_RATE_TOLERANCE = 0.1  # frames per second: rates that are this near are the same rate


class Crop(NamedTuple):
    """A part of the picture in pixels of the displayed frame: columns [x0, x1), rows [y0, y1)."""

    x0: int
    x1: int
    y0: int
    y1: int

    def fits(self, height: int, width: int) -> bool:
        """Whether it is a part of a picture of that size, and not an empty one."""
        return 0 <= self.x0 < self.x1 <= width and 0 <= self.y0 < self.y1 <= height


@dataclass(frozen=True)
class ClipRecord:
    """One clip of a video file.

    Attributes:
        path: the video file, absolute.
        captions: of which training takes one at random.
        height: of a frame in pixels as displayed, after rotation tags and sample aspect ratio.
        width: the same.
        fps: average rate of the file, in frames per second.
        num_frames: of the clip, counted from ``start``.
        start: first frame of the file, in display order, that belongs to the clip.
        crop: the part of the displayed picture that is used; None for all of it.
        motion: how much moves, in the unit of whoever measured it; None if nobody did.
    """

    path: str
    captions: tuple[str, ...]
    height: int
    width: int
    fps: float
    num_frames: int
    start: int = 0
    crop: Crop | None = None
    motion: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, without those that are None."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ClipRecord":
        """The record that ``to_json`` described."""
        crop = values.get("crop")
        return cls(**{**values, "captions": tuple(values["captions"]), "crop": None if crop is None else Crop(*crop)})


def frame_interval(fps: float, train_fps: float, sample_stride: float | None = None) -> float:
    """Frames of the file from one frame of training to the next.

    ``sample_stride`` where it is given; else 1 if |fps - train_fps| < 0.1, else fps / train_fps.
    """
    if sample_stride is not None:
        return sample_stride
    return 1.0 if abs(fps - train_fps) < FRAME_RATE_TOLERANCE else fps / train_fps
