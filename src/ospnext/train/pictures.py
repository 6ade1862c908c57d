"""Videos in the trackers: moving where a tracker is known to show that, else four frames side by side.

TensorBoard gets an animated GIF, in its image tab, and wandb the mp4 that was written. Every other tracker that takes
pictures gets the strip, and so does wandb where its process finds no file.
"""

from collections.abc import Collection, Sequence
from io import BytesIO
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ospnext.media import animated_gif

FRAMES_SHOWN = 4  # in a strip


class Shown(NamedTuple):
    """A video as trackers get it; small enough to be handed from process to process.

    ``gif`` has at most 24 frames of at most 256 pixels on the longer side, None where TensorBoard is no tracker;
    ``path`` is the written mp4, None if there is none.
    """

    number: int
    strip: np.ndarray  # uint8 [H, FRAMES_SHOWN * W, 3]
    gif: bytes | None
    path: Path | None


def shown(number: int, frames: np.ndarray, fps: float, path: Path | None, trackers: Collection[str]) -> Shown | None:
    """Make a video, uint8 ``[T, H, W, 3]``, ready for the trackers of these names; None where there are none."""
    if not trackers:
        return None
    places = np.linspace(0, len(frames) - 1, FRAMES_SHOWN).round().astype(int)
    strip = np.concatenate(list(frames[places]), axis=1)
    return Shown(number, strip, animated_gif(frames, fps) if "tensorboard" in trackers else None, path)


def show(tracker: Any, name: str, videos: Sequence[Shown], step: int) -> None:
    """Hand videos to one of accelerate's trackers, as ``name/video_0`` and so on; strips all together as ``name``."""
    kind = getattr(tracker, "name", "")
    if kind == "tensorboard":
        _to_tensorboard(tracker.writer, name, videos, step)
        return
    if kind == "wandb":
        there = [one.path is not None and one.path.is_file() for one in videos]
        _to_wandb(tracker.run, name, list(compress(videos, there)), step)
        videos = [one for one, found in zip(videos, there, strict=True) if not found]
    if videos and hasattr(tracker, "log_images"):
        tracker.log_images({name: np.stack([one.strip for one in videos])}, step=step)


def _to_tensorboard(writer: Any, name: str, videos: Sequence[Shown], step: int) -> None:
    """As pictures, whose bytes TensorBoard hands to the browser as they are.

    Relied on: ``writer`` is torch's SummaryWriter, and its ``file_writer.add_summary(summary, step)`` takes protobufs
    (SummaryWriter's own ``add_video`` needs moviepy).
    """
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = []
    for one in videos:
        assert one.gif is not None, "made for TensorBoard"
        width, height = Image.open(BytesIO(one.gif)).size
        picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=one.gif)  # 3: RGB
        values.append(Summary.Value(tag=f"{name}/video_{one.number}", image=picture))
    writer.file_writer.add_summary(Summary(value=values), step)


def _to_wandb(run: Any, name: str, videos: Sequence[Shown], step: int) -> None:
    """As files, which wandb copies.

    Relied on: ``run`` is what ``wandb.init`` returned, kept by accelerate's WandBTracker as ``run``: its
    ``log(values, step=)`` takes ``wandb.Video(path, format="mp4")``.
    """
    if not videos:
        return
    import wandb

    run.log({f"{name}/video_{v.number}": wandb.Video(str(v.path), format="mp4") for v in videos}, step=step)
