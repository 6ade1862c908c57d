"""What a video file really holds: size as displayed, rate and number of frames, found without decoding all of it.

Headers lie, so they are held against the packets. Where an mp4's index and its last packets agree, the header's count
stands; in every other case the packets of the whole file are counted. ``decode_all`` decodes each frame instead: slow,
but it finds damage in the middle of a file too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import av

FAULTS = {
    "missing": "there is no such file",
    "empty": "the file has no bytes",
    "unreadable": "it is no video file, or its header is damaged",
    "no_video": "the file holds no moving picture",
    "undecodable": "frames cannot be decoded",
    "truncated": "the file ends before its header says",
    "timeout": "reading took too long",
    "crash": "the decoder brought its process down",
}
"""Why a file is set aside, and what that means."""

_ENDS_EARLY = 2.5  # frames that may be missing at the end before a file counts as truncated
_OPTIONS = {"protocol_whitelist": "file"}  # a playlist under the name of a video must not reach into the network


class ProbeError(ValueError):
    """A file that cannot be used: ``reason`` is a key of ``FAULTS``, ``detail`` what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class FileFacts:
    """What a file holds.

    Attributes:
        height: of a frame in pixels as displayed, after sample aspect ratio and rotation tag.
        width: the same.
        fps: average rate in frames per second.
        num_frames: frames that a decoder gives.
        codec: FFmpeg's name of it.
        pixels: FFmpeg's name of the pixel format.
    """

    height: int
    width: int
    fps: float
    num_frames: int
    codec: str
    pixels: str


def probe(path: str | os.PathLike[str], decode_all: bool = False) -> FileFacts:
    """Read what the file at ``path`` holds.

    Raises:
        ProbeError: it cannot be used, and why.
    """
    try:
        if os.path.getsize(path) == 0:
            raise ProbeError("empty", "0 bytes")
    except OSError as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
        raise ProbeError(reason, error.strerror or "") from error
    first, header = _first_frame(path)
    extent = _decoded(path) if decode_all else _extent(path, header, first.pts)
    if not decode_all and extent.corrupt_end:
        raise ProbeError("truncated", f"the last packet is incomplete, {extent.frames} frames are there")
    missing = (header.seconds - extent.seconds) * header.fps
    if header.seconds and missing > _ENDS_EARLY:
        raise ProbeError("truncated", f"{extent.seconds:.2f} of {header.seconds:.2f} s are there")
    if not (fps := _rate(header.fps, extent)):
        raise ProbeError("unreadable", "nothing in it says how fast its frames follow each other")
    height, width = display_size(header.height, header.width, header.sample_aspect, first.rotation)
    return FileFacts(height, width, fps, extent.frames, header.codec, header.pixels)


def display_size(height: int, width: int, sample_aspect: Fraction | None, rotation: float) -> tuple[int, int]:
    """Height and width in pixels as a player shows a stored picture.

    Args:
        height, width: as stored.
        sample_aspect: width of a stored pixel by its height; None or 0 for square ones. It stretches the width.
        rotation: degrees by which the picture is turned, to the nearest quarter.
    """
    width = max(1, round(width * (sample_aspect or 1)))
    return (width, height) if round(rotation / 90) % 2 else (height, width)


class _First(NamedTuple):
    """Of the first frame: its time stamp and rotation in degrees."""

    pts: int
    rotation: int


class _Header(NamedTuple):
    """What the header says; ``frames`` and ``seconds`` are 0 where it says nothing."""

    height: int
    width: int
    sample_aspect: Fraction | None
    fps: float
    frames: int
    seconds: float
    indexed: bool
    codec: str
    pixels: str


class _Extent(NamedTuple):
    """How many frames there are, how long they last, and whether the last packet is incomplete."""

    frames: int
    seconds: float
    corrupt_end: bool = False


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The file and its video stream, decoding in this thread alone.

    Raises:
        ProbeError: it is unreadable, or holds no moving picture; also for what FFmpeg says inside the block.
    """
    import av

    try:
        with av.open(os.fspath(path), options=_OPTIONS, metadata_errors="replace") as container:
            attached = av.stream.Disposition.attached_pic
            stream = next((s for s in container.streams.video if not s.disposition & attached), None)
            if stream is None:
                raise ProbeError("no_video", f"streams: {', '.join(s.type for s in container.streams) or 'none'}")
            stream.codec_context.thread_count = 1
            yield container, stream
    except av.error.FileNotFoundError as error:
        raise ProbeError("missing", error.strerror or "") from error
    except av.error.FFmpegError as error:
        stage = "undecodable" if "avcodec" in str(error.log or error) else "unreadable"
        raise ProbeError(stage, error.strerror or str(error)) from error


def _first_frame(path: str | os.PathLike[str]) -> tuple[_First, _Header]:
    with opened(path) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None or stream.time_base is None:
            raise ProbeError("undecodable", "no frame could be decoded")
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        header = _Header(
            frame.height,
            frame.width,
            stream.sample_aspect_ratio,
            fps,
            stream.frames,
            _seconds(container, stream),
            "mp4" in container.format.name,
            stream.codec_context.name,
            frame.format.name,
        )
        return _First(frame.pts or 0, frame.rotation), header


def _seconds(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """How long the header says the pictures last, in seconds; 0 if it does not say."""
    import av

    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if said := re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = map(float, said.groups())  # Matroska: 00:00:02.000000000
        return hours * 3600 + minutes * 60 + seconds
    alone = len(container.streams) == 1
    return container.duration / av.time_base if alone and container.duration else 0.0


def _extent(path: str | os.PathLike[str], header: _Header, first: int) -> _Extent:
    """The header's count where the end of the file bears it out, else that of all packets."""
    if header.indexed and header.frames and header.fps:
        with opened(path) as (container, stream):
            container.seek(stream.duration or 0, stream=stream)
            tail = _count(container, stream, first)
        if not tail.corrupt_end and abs(tail.seconds * header.fps - header.frames) < 1.5:
            return _Extent(header.frames, tail.seconds)
    with opened(path) as (container, stream):
        return _count(container, stream, first)


def _count(container: av.container.InputContainer, stream: av.VideoStream, first: int) -> _Extent:
    """Frames in the packets that are left to read, and seconds from ``first`` to the end of the last."""
    frames, end, corrupt = 0, first, False
    for packet in container.demux(stream):
        pts = packet.pts if packet.pts is not None else packet.dts
        if not packet.size or packet.is_discard or (pts is not None and pts < first):
            continue
        frames += 1
        corrupt = packet.is_corrupt
        if pts is not None:
            end = max(end, pts + (packet.duration or 0))
    return _Extent(frames, float((end - first) * stream.time_base), corrupt)


def _decoded(path: str | os.PathLike[str]) -> _Extent:
    """Frames that decode, and seconds from the first to the end of the last."""
    frames, first, end = 0, None, 0
    with opened(path) as (container, stream):
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise ProbeError("undecodable", f"frame {frames} is damaged")
            frames += 1
            if frame.pts is not None:
                first = frame.pts if first is None else first
                end = max(end, frame.pts + (frame.duration or 0))
        return _Extent(frames, float((end - (first or 0)) * stream.time_base))


def _rate(stated: float, extent: _Extent) -> float:
    """The stated rate where the frames bear it out within 2% and two frames, else frames by seconds."""
    if extent.seconds <= 0:
        return stated
    measured = extent.frames / extent.seconds
    return stated if stated and abs(measured / stated - 1) < 0.02 + 2 / extent.frames else measured
