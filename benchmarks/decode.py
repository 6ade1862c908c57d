"""Reading training windows: ours beside decord and torchcodec, whichever import, in one run.

    pip install --no-deps --target /tmp/peers decord torchcodec
    python benchmarks/decode.py --peers /tmp/peers

A read opens a file, takes 81 frames at 16 frames a second from a random start, and gives them as RGB uint8 in the
file's own size. Files are H.264 with B-frames as x264 makes them by default (a keyframe every 250 frames or less), 10
to 30 s long, 480p and 720p, 24 to 60 frames a second. Readers take turns on the same windows, in another order each
time. One JSON line a case, a table last; ``speed`` is the time of the fastest peer over ours.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

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


def measure(record: ClipRecord, found: dict[str, Reader], frames: int, reads: int, threads: int) -> dict[str, object]:
    """Median milliseconds of a read by each reader, and how far pictures differ from ours, in levels of 255."""
    rng, order = np.random.default_rng(1), random.Random(1)
    times: dict[str, list[float]] = {name: [] for name in found}
    differ: dict[str, float] = dict.fromkeys(found, 0.0)
    for turn in range(reads + 1):
        numbers = frame_numbers(record, frames, 16, None, rng)
        names, pictures = list(found), {}
        order.shuffle(names)
        for name in names:
            start = time.perf_counter()
            pictures[name] = found[name](record.path, numbers, threads)
            if turn:  # the first read warms caches up
                times[name].append(1e3 * (time.perf_counter() - start))
        for name, picture in pictures.items():
            assert picture.shape == pictures["ours"].shape, name
            differ[name] = max(differ[name], float(np.abs(picture.astype(np.int16) - pictures["ours"]).mean()))
    ms = {name: round(statistics.median(values), 1) for name, values in times.items()}
    total = {name: round(sum(values), 1) for name, values in times.items()}
    return {
        "file": f"{record.height} x {record.width}, {record.fps:g} fps, {record.num_frames / record.fps:g} s",
        "threads": threads,
        "reads": reads,
        "ms": ms,
        "total_ms": total,
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
    parser.add_argument("--tiny", action="store_true", help="small files, to try the script")
    options = parser.parse_args()
    if options.peers:
        sys.path.append(options.peers)
    found = readers(options.names.split(","))
    rows = []
    with TemporaryDirectory() as folder:
        records = [write(f, Path(folder) / f"{i}.mp4") for i, f in enumerate(TINY if options.tiny else FILES)]
        for threads in map(int, options.threads.split(",")):
            for record in records:
                row = measure(record, found, options.frames, options.reads, threads)
                rows.append(row | {"speed": speed(row["ms"])})  # type: ignore[arg-type]
                print(json.dumps(rows[-1]), flush=True)
            mine = [row for row in rows if row["threads"] == threads]
            total = {name: sum(row["total_ms"][name] for row in mine) for name in found}  # type: ignore[index]
            print(json.dumps({"all": threads, "total_ms": total, "speed": speed(total)}), flush=True)
    print(f"\n| file | threads | {' | '.join(f'{name}, ms' for name in found)} | speed |")
    print("|---" * (len(found) + 3) + "|")
    for row in rows:
        cells = " | ".join(str(row["ms"][name]) for name in found)  # type: ignore[index]
        print(f"| {row['file']} | {row['threads']} | {cells} | {row['speed']} |")


if __name__ == "__main__":
    main()
