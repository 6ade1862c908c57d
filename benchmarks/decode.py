"""Reading training windows: ours beside decord and torchcodec, whichever import, in one run.

    pip install --no-deps --target /tmp/peers decord torchcodec
    python benchmarks/decode.py --peers /tmp/peers

A read opens a file, takes 81 frames at 16 frames a second from a random start, and gives them as RGB uint8 in the
file's own size. Files are H.264 with B-frames as x264 makes them by default (a keyframe every 250 frames or less), 10
to 30 s long, 480p and 720p, 24 to 60 frames a second. Readers take turns on the same windows, in another order each
time. One JSON line a case, a table last; ``speed`` is the time of the fastest peer over ours, ``cpu_speed`` the same of
the processor time of all threads, which other work on the machine disturbs less.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import av
import numpy as np

from ospnext.data.frames import decode, frame_numbers
from ospnext.data.records import ClipRecord
from ospnext.shapes.render import render
from ospnext.shapes.world import World, sample_scene

Reader = Callable[[str, np.ndarray, int], np.ndarray]


class File(NamedTuple):
    """One file to read."""

    height: int
    width: int
    fps: int
    seconds: int


FILES = (File(480, 832, 24, 10), File(480, 832, 30, 30), File(720, 1280, 24, 20), File(720, 1280, 30, 15),
         File(720, 1280, 60, 12))  # fmt: skip
TINY = (File(96, 128, 24, 10), File(128, 96, 30, 10))


def write(file: File, path: Path) -> ClipRecord:
    """Render a scene that moves to and fro, with grain, and encode it; returns its record."""
    rng = np.random.default_rng(0)
    forth = render([sample_scene(rng, World.full(), None)], 2 * file.fps, file.height, file.width)[0].numpy()
    grain = rng.integers(-6, 7, (8, *forth.shape[1:3], 1), dtype=np.int16)
    count = file.fps * file.seconds
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(file.fps), options={"crf": "20", "preset": "medium"})
        stream.height, stream.width, stream.pix_fmt = file.height, file.width, "yuv420p"
        for i in range(count):
            place = i % (2 * len(forth))
            picture = forth[min(place, 2 * len(forth) - 1 - place)] + grain[i % 8]
            frame = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return ClipRecord(str(path), (), file.height, file.width, file.fps, count)


def ours(path: str, numbers: np.ndarray, threads: int) -> np.ndarray:
    """``ospnext.data.frames``."""
    frames: np.ndarray | None = None
    for place, picture in enumerate(decode(path, numbers.tolist(), threads=threads)):
        frames = np.empty((len(numbers), *picture.pixels.shape), np.uint8) if frames is None else frames
        frames[place] = picture.pixels
    assert frames is not None
    return frames


def with_decord(path: str, numbers: np.ndarray, threads: int) -> np.ndarray:
    """decord, as most training code calls it."""
    decord = import_module("decord")
    return decord.VideoReader(path, ctx=decord.cpu(0), num_threads=threads).get_batch(numbers.tolist()).asnumpy()


def with_torchcodec(path: str, numbers: np.ndarray, threads: int) -> np.ndarray:
    """torchcodec in its approximate mode, the faster of the two, which is exact at a constant rate."""
    decoder = import_module("torchcodec.decoders").VideoDecoder(
        path, dimension_order="NHWC", num_ffmpeg_threads=threads, seek_mode="approximate"
    )
    return decoder.get_frames_at(numbers.tolist()).data.numpy()


def readers(names: Iterable[str]) -> dict[str, Reader]:
    """Ours, and the peers of those names that import; the others are named on stderr."""
    found: dict[str, Reader] = {"ours": ours}
    for name, reader in (("decord", with_decord), ("torchcodec", with_torchcodec)):
        if name not in names:
            continue
        try:
            import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            print(f"{name} does not import: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        else:
            found[name] = reader
    return found


def measure(record: ClipRecord, found: dict[str, Reader], frames: int, reads: int, threads: int) -> dict[str, Any]:
    """Median milliseconds of a read by each reader, of the clock and of the processor, and how far pictures differ from
    ours, in levels of 255.
    """
    rng, order = np.random.default_rng(1), random.Random(1)
    times: dict[str, list[float]] = {name: [] for name in found}
    busy: dict[str, list[float]] = {name: [] for name in found}
    differ: dict[str, float] = dict.fromkeys(found, 0.0)
    for turn in range(reads + 1):
        numbers = frame_numbers(record, frames, 16, None, rng)
        names, pictures = list(found), {}
        order.shuffle(names)
        for name in names:
            start, start_busy = time.perf_counter(), time.process_time()
            pictures[name] = found[name](record.path, numbers, threads)
            if turn:  # the first read warms caches up
                times[name].append(1e3 * (time.perf_counter() - start))
                busy[name].append(1e3 * (time.process_time() - start_busy))
        for name, picture in pictures.items():
            assert picture.shape == pictures["ours"].shape, name
            differ[name] = max(differ[name], float(np.abs(picture.astype(np.int16) - pictures["ours"]).mean()))
    ms = {name: round(statistics.median(values), 1) for name, values in times.items()}
    cpu = {name: round(statistics.median(values), 1) for name, values in busy.items()}
    total = {name: round(sum(values), 1) for name, values in times.items()}
    total_cpu = {name: round(sum(values), 1) for name, values in busy.items()}
    return {
        "file": f"{record.height} x {record.width}, {record.fps:g} fps, {record.num_frames / record.fps:g} s",
        "threads": threads,
        "reads": reads,
        "ms": ms,
        "cpu_ms": cpu,
        "total_ms": total,
        "total_cpu_ms": total_cpu,
        "differs_from_ours": {name: round(value, 3) for name, value in differ.items()},
    }


def speed(times: dict[str, float]) -> float | None:
    """The fastest peer's time over ours; None without a peer."""
    peers = [value for name, value in times.items() if name != "ours"]
    return round(min(peers) / times["ours"], 3) if peers else None


def main() -> None:
    """Measure every file and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="a folder of packages to import peers from")
    parser.add_argument("--with", dest="names", default="decord,torchcodec", help="peers to try")
    parser.add_argument("--reads", type=int, default=12, help="measured reads of each file by each reader")
    parser.add_argument("--threads", default="1", help="decoding threads, a list: 1,2")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--files", help="a folder to keep the files in, and to take them from; default: a passing one")
    parser.add_argument("--tiny", action="store_true", help="small files, to try the script")
    options = parser.parse_args()
    if options.peers:
        sys.path.append(options.peers)
    found = readers(options.names.split(","))
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as passing:
        folder = Path(options.files or passing)
        folder.mkdir(parents=True, exist_ok=True)
        records = [made(file, folder) for file in (TINY if options.tiny else FILES)]
        for threads in map(int, options.threads.split(",")):
            for record in records:
                row = measure(record, found, options.frames, options.reads, threads)
                rows.append(row | {"speed": speed(row["ms"]), "cpu_speed": speed(row["cpu_ms"])})
                print(json.dumps(rows[-1]), flush=True)
            print(json.dumps(summary([row for row in rows if row["threads"] == threads], threads)), flush=True)
    print(f"\n| file | threads | {' | '.join(f'{name}, ms (cpu)' for name in found)} | speed | cpu_speed |")
    print("|---" * (len(found) + 4) + "|")
    for row in rows:
        cells = " | ".join(f"{row['ms'][name]} ({row['cpu_ms'][name]})" for name in found)
        print(f"| {row['file']} | {row['threads']} | {cells} | {row['speed']} | {row['cpu_speed']} |")


def made(file: File, folder: Path) -> ClipRecord:
    """The record of ``file`` in ``folder``, where it is written if it is not there."""
    path = folder / f"{file.height}x{file.width}_{file.fps}fps_{file.seconds}s.mp4"
    if path.exists():
        return ClipRecord(str(path), (), file.height, file.width, file.fps, file.fps * file.seconds)
    partial = path.with_suffix(".part.mp4")
    record = write(file, partial)
    partial.rename(path)
    return replace(record, path=str(path))


def summary(rows: list[dict[str, Any]], threads: int) -> dict[str, Any]:
    """Of all files together, by total time."""
    total, cpu = (
        {name: round(sum(row[key][name] for row in rows), 1) for name in rows[0]["ms"]}
        for key in ("total_ms", "total_cpu_ms")
    )
    return {
        "all": f"{threads} threads",
        "total_ms": total,
        "total_cpu_ms": cpu,
        "speed": speed(total),
        "cpu_speed": speed(cpu),
    }


if __name__ == "__main__":
    main()
