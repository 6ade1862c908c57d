"""Exactly the frames one asks for, by number, decoding no more of a file than that takes.

Frame ``n`` is the n-th that a player shows. Files know frames by time stamp, and with B-frames, variable rates and
edit lists no arithmetic leads from one to the other, so the numbers are counted:

1. The table of packets, in the order of decoding: mp4 and mov bring one; of other files every packet header is read.
2. From the last keyframe that is shown at or before the first frame wanted, packets are read until no later one can be
   shown among the frames wanted. Packets shown before the keyframe (leading pictures of an open group) count too.
3. These packets are decoded. A frame is taken where its time stamp is one that was counted out; of packets that nobody
   wants, those that no other frame refers to are skipped by the decoder, which changes no other picture.

A file without time stamps (some AVI) is decoded from its start and counted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ospnext.data.probe import ProbeError, display_size, opened
from ospnext.data.records import ClipRecord, frame_interval

if TYPE_CHECKING:
    import av

_ATTEMPTS = 2  # keyframes to try before the start of the file: a frame may lead the nearest one
_SKIPS = ("h264", "hevc")  # decoders that settle packet by packet what to skip; others look ahead
_REORDER = 64  # packets at most between a frame's place in the order of decoding and in that of display


class Picture(NamedTuple):
    """One frame: its ``number`` in the file, and ``pixels`` uint8 [H, W, 3] (RGB), turned as a player shows it.

    Pixels are as stored, so an anamorphic picture still has to be stretched to ``height`` x ``width``.
    """

    number: int
    pixels: np.ndarray
    height: int
    width: int


def frame_numbers(
    clip: ClipRecord,
    count: int,
    train_fps: float | None,
    sample_stride: float | None,
    rng: np.random.Generator,
) -> np.ndarray:
    """Numbers of ``count`` frames of the clip at the training rate, int64, from a random start.

    All frames at that rate are ``arange(start, start + num_frames, interval)``, rounded down; every window of
    ``count`` of them is as likely, the last one too.

    Raises:
        ProbeError: the clip is too short (``short``).
    """
    numbers = frames_at_rate(clip, train_fps, sample_stride)
    if len(numbers) < count:
        raise ProbeError("short", f"{len(numbers)} frames at the training rate, {count} are needed")
    first = int(rng.integers(0, len(numbers) - count + 1))
    return numbers[first : first + count]


def frames_at_rate(clip: ClipRecord, train_fps: float | None, sample_stride: float | None) -> np.ndarray:
    """Numbers of all frames of the clip at the training rate, int64."""
    end = clip.start + clip.num_frames
    interval = frame_interval(clip.fps, train_fps or clip.fps, sample_stride)
    # Rounding can give arange one step too many, which lands on ``end`` itself.
    numbers = np.arange(clip.start, end, interval).astype(np.int64)
    return numbers[numbers < end]


def decode(
    path: str | os.PathLike[str], numbers: Sequence[int], *, threads: int = 1, deadline: float = float("inf")
) -> Iterator[Picture]:
    """The frames of those numbers, in rising order, each once.

    Args:
        path: a video file.
        numbers: of frames, in any order.
        threads: that decode; 0 is one for each core.
        deadline: on ``time.monotonic()``'s clock; it is looked at from packet to packet.

    Raises:
        ProbeError: the file is unreadable, ends too early, or time is up; the reason is a key of ``FAULTS``.
        OSError: it cannot be opened.
    """
    wanted = sorted({int(number) for number in numbers})
    if not wanted:
        return
    if wanted[0] < 0:
        raise ValueError(f"frame {wanted[0]} is asked for: frames count from 0")
    with opened(path) as (container, stream):
        stream.codec_context.thread_count = threads
        stream.codec_context.thread_type = "AUTO"
        clock = _Clock(deadline)
        table = _packet_table(path, container, stream, clock)
        if wanted[-1] >= len(table):
            raise ProbeError("truncated", f"frame {wanted[-1]} is wanted, {len(table)} are there")
        run = _read_run(container, stream, table, wanted, clock)
        aspect = stream.sample_aspect_ratio
        found = _decode_stamped(stream, run, wanted, clock) if run.stamps else _decode_counted(stream, run, clock)
        left = iter(wanted)
        expected = next(left)
        for number, frame in found:
            if number < expected:
                continue
            if number > expected:
                break
            pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
            yield Picture(number, pixels, *display_size(frame.height, frame.width, aspect, frame.rotation))
            if (following := next(left, None)) is None:
                return
            expected = following
        raise ProbeError("undecodable", f"frame {expected} does not decode")


class _Clock(NamedTuple):
    """A deadline on ``time.monotonic()``'s clock."""

    deadline: float

    def check(self) -> None:
        """Raise ProbeError when time is up."""
        if time.monotonic() > self.deadline:
            raise ProbeError("timeout", "decoding took too long")


class _Entry(NamedTuple):
    """A packet in the table: where it lies in the file (its identity), when it is decoded, whether it is a keyframe."""

    position: int
    time: int | None
    is_key: bool


class _Run(NamedTuple):
    """Packets to decode; ``stamps`` of the frames wanted, by time, with their numbers; empty where packets have none.

    ``first`` is the number of the first frame that comes out.
    """

    packets: list[av.Packet]
    stamps: dict[int, int]
    first: int


def _packet_table(
    path: str | os.PathLike[str], container: av.container.InputContainer, stream: av.VideoStream, clock: _Clock
) -> list[_Entry]:
    """Every packet that shows a frame, in the order of decoding; ``container`` is left where it was."""
    entries = stream.index_entries
    if "mp4" in container.format.name and stream.frames and len(entries) >= stream.frames:
        return [_Entry(e.pos, e.timestamp, e.is_keyframe) for e in entries if not e.is_discard]
    table = []
    with opened(path) as (whole, packets):  # some files cannot be wound back
        for packet in whole.demux(packets):
            clock.check()
            if packet.size and not packet.is_discard:
                when = packet.dts if packet.dts is not None else packet.pts
                table.append(_Entry(packet.pos, when, packet.is_keyframe))
    return table


def _read_run(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    table: list[_Entry],
    wanted: list[int],
    clock: _Clock,
) -> _Run:
    """The packets from the last keyframe that serves, until all frames wanted are among them."""
    places = {entry.position: place for place, entry in enumerate(table)}
    keys = [place for place in range(1, wanted[0] + 1) if table[place].is_key and table[place].time is not None]
    start = table[0].time or 0
    delay = max(0, (stream.start_time or 0) - start)  # seeking goes by when a frame is shown, the table by its decoding
    if len(places) == len(table):
        for key in keys[: -_ATTEMPTS - 1 : -1]:
            container.seek((table[key].time or 0) + delay, stream=stream, backward=True)
            if (run := _collect(container, stream, wanted, places, clock)) is not None:
                return run
    if keys:
        container.seek(min(0, start), stream=stream, backward=True)
    run = _collect(container, stream, wanted, None, clock)
    if run is None:
        raise ProbeError("undecodable", "no packet can be read")
    return run


def _collect(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    wanted: list[int],
    places: dict[int, int] | None,
    clock: _Clock,
) -> _Run | None:
    """Packets from here on, with the frames wanted counted out; None if this is too late in the file to have them.

    Args:
        places: number of each packet in the order of decoding, by position; None at the start of the file.
    """
    packets: list[av.Packet] = []
    times: list[int] = []
    stamped = True
    first = None if places is not None else 0
    for packet in container.demux(stream):
        clock.check()
        if not packet.size:
            continue
        if first is None:
            first = places.get(packet.pos) if places is not None and packet.is_keyframe else None
            if first is None or first > wanted[0]:
                return None
        packets.append(packet)
        if packet.is_discard:
            continue
        if packet.pts is None:
            stamped = False
            if places is not None:
                return None
        else:
            times.append(packet.pts)
        needed = wanted[-1] - first
        if not stamped:
            if len(packets) > needed + _REORDER:
                break
        elif packet.dts is not None and len(times) > needed + 1 and packet.dts > sorted(times)[needed]:
            break
    if first is None:
        return None
    if not stamped:
        return _Run(packets, {}, first)
    shown = sorted(times)
    if places is not None and wanted[0] < first + sum(time < packets[0].pts for time in shown):
        return None
    return _Run(packets, {shown[n - first]: n for n in wanted if n - first < len(shown)}, first)


def _decode_stamped(
    stream: av.VideoStream, run: _Run, wanted: list[int], clock: _Clock
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Number and frame, of the frames wanted."""
    context = stream.codec_context
    for packet in [*run.packets, None]:
        clock.check()
        if packet is not None and context.name in _SKIPS:
            context.skip_frame = "DEFAULT" if packet.pts in run.stamps else "NONREF"
        for frame in context.decode(packet):
            if frame.pts in run.stamps:
                yield run.stamps[frame.pts], frame


def _decode_counted(stream: av.VideoStream, run: _Run, clock: _Clock) -> Iterator[tuple[int, av.VideoFrame]]:
    """Number and frame, of all frames."""
    number = run.first
    for packet in [*run.packets, None]:
        clock.check()
        for frame in stream.codec_context.decode(packet):
            yield number, frame
            number += 1
