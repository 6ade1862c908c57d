"""Read and write video files with PyAV: whole clips, grids of clips; with Pillow contact sheets and animated GIFs.

Frames are RGB uint8 [T, H, W, 3] everywhere. Files are H.264 in mp4, yuv420p with BT.709 colours, tagged as such, which
every browser and player shows alike. A file appears under its name only when it is complete.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image

if TYPE_CHECKING:  # PyAV is imported when a file is read or written: what only computes does without it
    import av

Frames = np.ndarray | torch.Tensor


class Video(NamedTuple):
    """A decoded clip: ``frames`` uint8 [T, H, W, 3] and its ``fps`` in frames per second."""

    frames: np.ndarray
    fps: float


def read_video(path: str | Path) -> Video:
    """Decode a whole video file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be decoded, or holds no video.
    """
    with _opened(path) as container:
        stream = container.streams.video[0]
        fps = float(stream.average_rate or 0) or 1.0
        frames = [_rgb(frame) for frame in container.decode(stream)]
    if not frames:
        raise ValueError(f"{path} holds no video frames: is the file complete?")
    return Video(np.stack(frames), fps)


def write_video(path: str | Path, frames: Frames, fps: float = 16, crf: int = 18) -> None:
    """Encode ``frames`` uint8 [T, H, W, 3] to an mp4; ``crf`` is x264's quality, 0 (lossless) to 51.

    4:2:0 video has even sides, so an odd side is repeated by one pixel.

    Raises:
        ValueError: ``frames`` is not uint8 [T, H, W, 3], or is empty.
        OSError: the file cannot be written.
    """
    clip = _as_clip(frames)
    with video_writer(path, clip.shape[1], clip.shape[2], fps, crf) as writer:
        for frame in clip:
            writer.add(frame)


class VideoWriter:
    """An open mp4 that takes one frame at a time; made by ``video_writer``."""

    def __init__(
        self, container: "av.container.OutputContainer", height: int, width: int, fps: float, crf: int
    ) -> None:
        from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

        self._container = container
        self._padding = ((0, height % 2), (0, width % 2), (0, 0))
        self._stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(60_000))
        self._stream.height, self._stream.width = height + height % 2, width + width % 2
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"crf": str(crf), "preset": "medium"}
        context = self._stream.codec_context
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709

    def add(self, frame: np.ndarray) -> None:
        """Append one frame uint8 [H, W, 3]."""
        import av
        from av.video.reformatter import ColorRange, Colorspace

        picture = av.VideoFrame.from_ndarray(np.pad(frame, self._padding, mode="edge"), format="rgb24")
        picture = picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
        self._container.mux(self._stream.encode(picture))

    def finish(self) -> None:
        """Write out what the encoder still holds."""
        self._container.mux(self._stream.encode())


@contextmanager
def video_writer(path: str | Path, height: int, width: int, fps: float = 16, crf: int = 18) -> Iterator[VideoWriter]:
    """A ``VideoWriter`` whose file appears at ``path`` when the block ends, and not at all when it fails.

    Raises:
        OSError: the file cannot be written.
    """
    import av

    with (
        _appearing(path) as partial,
        av.open(str(partial), "w", format="mp4", options={"movflags": "faststart"}) as container,
    ):
        writer = VideoWriter(container, height, width, fps, crf)
        yield writer
        writer.finish()


def video_grid(
    paths: Sequence[str | Path],
    out: str | Path,
    fps: float = 16,
    *,
    limit: int = 64,
    longest_side: int = 3840,
    columns: int | None = None,
) -> None:
    """Tile videos into one, a pixel apart, in rows from the top left. One frame of each is in memory at a time.

    Args:
        paths: the videos; beyond ``limit`` they are left out. A clip that ends early holds its last frame.
        out: the mp4 to write.
        fps: of the result; every frame of a clip is shown, whatever its own rate.
        limit: the most tiles.
        longest_side: of the result in pixels; the tiles are scaled down to it together.
        columns: None for about as many as rows.

    Raises:
        ValueError: there is no video, or one cannot be decoded.
        OSError: one is not there, or the result cannot be written.
    """
    from av.video.reformatter import VideoReformatter

    if not paths:
        raise ValueError("a grid needs at least one video")
    shown = min(len(paths), limit)
    columns = columns or math.ceil(shown / math.ceil(math.sqrt(shown)))
    rows = math.ceil(shown / columns)
    with ExitStack() as stack:
        containers = [stack.enter_context(_opened(path)) for path in paths[:limit]]
        for container in containers:  # of their own accord decoders start a thread for every core, each
            container.streams.video[0].codec_context.thread_count = 1
        sizes = [(c.streams.video[0].height, c.streams.video[0].width) for c in containers]
        height, width = (max(side) for side in zip(*sizes, strict=True))
        scale = min(1.0, longest_side / max(rows * (height + 1), columns * (width + 1)))
        height, width = int(height * scale), int(width * scale)
        canvas = np.zeros((rows * (height + 1) - 1, columns * (width + 1) - 1, 3), np.uint8)
        writer = stack.enter_context(video_writer(out, *canvas.shape[:2], fps))
        shrink = VideoReformatter()  # one for all: each has threads of its own
        for frames in zip_longest(*(c.decode(c.streams.video[0]) for c in containers)):
            for i, (frame, size) in enumerate(zip(frames, sizes, strict=True)):
                if frame is not None:
                    tile = shrink.reformat(frame, int(size[1] * scale), int(size[0] * scale), "rgb24").to_ndarray()
                    y, x = i // columns * (height + 1), i % columns * (width + 1)
                    canvas[y : y + tile.shape[0], x : x + tile.shape[1]] = tile
            writer.add(canvas)


def contact_sheet(frames: Frames, path: str | Path, columns: int = 8) -> None:
    """Write frames uint8 [T, H, W, 3] as one PNG picture: row by row, two pixels apart, on white.

    Raises:
        ValueError: ``frames`` is not uint8 [T, H, W, 3], or is empty; ``columns`` is not positive.
        OSError: the file cannot be written.
    """
    clip = _as_clip(frames)
    if columns < 1:
        raise ValueError(f"a contact sheet needs at least one column, not {columns}")
    columns = min(columns, len(clip))
    blank = np.full((-len(clip) % columns, *clip.shape[1:]), 255, np.uint8)
    spaced = np.pad(np.concatenate([clip, blank]), ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    count, height, width, _ = spaced.shape
    rows = spaced.reshape(count // columns, columns, height, width, 3).swapaxes(1, 2)
    with _appearing(path) as partial:
        Image.fromarray(rows.reshape(-1, columns * width, 3)).save(partial, format="PNG")


def animated_gif(frames: Frames, fps: float = 16, *, longest_side: int = 256, limit: int = 24) -> bytes:
    """The file of a GIF that moves for as long as the clip and repeats; a preview: 256 colours a frame, and small.

    Args:
        frames: uint8 [T, H, W, 3].
        fps: of the clip.
        longest_side: in pixels; larger frames are scaled down to it, smaller ones stay as they are.
        limit: the most frames; a longer clip gives as many, evenly spaced from first to last, and each stays longer.

    Raises:
        ValueError: ``frames`` is not uint8 [T, H, W, 3], or is empty.
    """
    clip = _as_clip(frames)
    count, height, width, _ = clip.shape
    scale = min(1.0, longest_side / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    shown = np.linspace(0, count - 1, min(count, limit)).round().astype(int)
    pictures = [Image.fromarray(clip[i]).resize(size) for i in shown]
    hundredths = max(2, round(100 * count / fps / len(shown)))  # GIF's unit; browsers slow down what is faster than 2
    file = BytesIO()
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=10 * hundredths, loop=0)
    return file.getvalue()


@contextmanager
def _appearing(path: str | Path) -> Iterator[Path]:
    """A name to write to, whose file appears at ``path`` when the block ends, and vanishes when it fails."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk does not say of which file
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _opened(path: str | Path) -> Iterator["av.container.InputContainer"]:
    """The container at ``path``, with what FFmpeg says about a broken one as a ValueError."""
    import av

    try:
        with av.open(str(path), metadata_errors="replace") as container:
            if not container.streams.video:
                raise ValueError(f"{path} holds no video stream: give a video file")
            yield container
    except av.error.InvalidDataError as error:
        raise ValueError(f"{path} is not a readable video ({error.strerror}): is the file complete?") from error


def _rgb(frame: "av.VideoFrame") -> np.ndarray:
    return frame.to_ndarray(format="rgb24")


def _as_clip(frames: Frames) -> np.ndarray:
    clip = frames.cpu().numpy() if isinstance(frames, torch.Tensor) else np.asarray(frames)
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or 0 in clip.shape:
        raise ValueError(f"frames must be uint8 [T, H, W, 3] with T >= 1, not {clip.dtype} {list(clip.shape)}")
    return clip
