"""Frames come by number: the ones asked for, as a full decode gives them, from every kind of file."""

import os
import time
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
from corpus import SOUND, Clip, Corpus, frame_number, write

from ospnext.data.frames import decode, frame_numbers, frames_at_rate
from ospnext.data.probe import ProbeError
from ospnext.data.records import ClipRecord


def record(frames: int = 48, fps: float = 24, start: int = 0) -> ClipRecord:
    return ClipRecord("a.mp4", ("a",), 96, 128, fps, frames, start)


def all_frames(path: Path) -> list[np.ndarray]:
    with av.open(str(path), metadata_errors="replace") as file:
        return [np.rot90(f.to_ndarray(format="rgb24"), round(f.rotation / 90)) for f in file.decode(video=0)]


@pytest.mark.parametrize("clip", SOUND, ids=lambda clip: clip.name)
def test_frames_of_every_file_are_the_ones_asked_for(corpus: Corpus, clip: Clip) -> None:
    path, rng = corpus.path(clip.name), np.random.default_rng(0)
    whole = all_frames(path)
    choices = [[0], [clip.frames - 1], [clip.frames - 1, 0], range(clip.frames)]
    choices += [rng.choice(clip.frames, size=rng.integers(1, 6)).tolist() for _ in range(8)]
    for numbers in choices:
        pictures = list(decode(path, numbers, threads=int(rng.integers(1, 3))))
        assert [picture.number for picture in pictures] == sorted(set(numbers))
        for picture in pictures:
            assert np.array_equal(picture.pixels, whole[picture.number])
            assert (picture.height, picture.width) == (clip.height, clip.width)
            if clip.sample_aspect == 1:
                assert frame_number(picture.pixels) == picture.number


@pytest.mark.parametrize(
    "options",
    [{"x264-params": "open-gop=1:keyint=12:bframes=3:b-pyramid=normal"}, {"g": "8", "bf": "0"}, {"g": "1"}],
    ids=["open groups", "no B-frames", "keyframes only"],
)
def test_keyframes_of_every_kind(tmp_path: Path, options: dict[str, str]) -> None:
    path = write(Clip("k.mp4", options={"preset": "veryfast", "crf": "16", **options}), tmp_path / "k.mp4")
    for first in range(48):
        assert [frame_number(p.pixels) for p in decode(path, [first])] == [first]


def test_open_groups_of_h265(tmp_path: Path) -> None:
    options = {"preset": "ultrafast", "x265-params": "log-level=none:pools=1:open-gop=1:keyint=12:bframes=3"}
    path = write(Clip("k.mp4", codec="libx265", options=options), tmp_path / "k.mp4")
    for first in range(48):
        assert [frame_number(p.pixels) for p in decode(path, [first])] == [first]


def test_only_what_is_needed_is_read(tmp_path: Path) -> None:
    path = write(Clip("a.mp4", frames=240, options={"preset": "ultrafast", "g": "12"}), tmp_path / "a.mp4")
    list(decode(path, [0]))
    with av.open(str(path)) as file:
        late = [e.pos for e in file.streams.video[0].index_entries][36]
    data = bytearray(path.read_bytes())
    data[late:] = bytes(len(data) - late)  # its index stands in front
    path.write_bytes(data)
    assert [p.number for p in decode(path, [3, 8])] == [3, 8]
    with pytest.raises(ProbeError, match="undecodable"):
        list(decode(path, [100]))


def test_decoding_starts_at_the_last_keyframe_that_serves(tmp_path: Path) -> None:
    path = write(Clip("a.mp4", frames=96, options={"preset": "veryfast", "g": "12"}), tmp_path / "a.mp4")
    with av.open(str(path)) as file:
        entries = [(entry.pos, entry.is_keyframe) for entry in file.streams.video[0].index_entries]
    whole, data = list(decode(path, [63, 70])), bytearray(path.read_bytes())
    first = max(place for place in range(64) if entries[place][1])
    assert first > 48
    data[entries[1][0] : entries[first][0]] = bytes(entries[first][0] - entries[1][0])
    path.write_bytes(data)
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(decode(path, [63, 70]), whole, strict=True))


def test_damaged_files_say_why(corpus: Corpus) -> None:
    reasons = {}
    for name, path in corpus.damaged.items():
        try:
            reasons[name] = len(list(decode(path, range(40))))
        except ProbeError as error:
            reasons[name] = error.reason
    assert reasons == {
        "truncated.mp4": "undecodable",
        "truncated_index.mp4": "unreadable",
        "truncated.mkv": "truncated",
        "zero_bytes.mp4": "unreadable",
        "text.mp4": "unreadable",
        "holes.mp4": "undecodable",
        "mp4_inside.webm": 40,
        "only_audio.mp4": "no_video",
    }


def test_frames_beyond_the_end_and_before_the_start(corpus: Corpus) -> None:
    with pytest.raises(ProbeError, match="48 are there"):
        list(decode(corpus.path("h264.mp4"), [48]))
    with pytest.raises(ValueError, match="count from 0"):
        list(decode(corpus.path("h264.mp4"), [-1]))
    assert list(decode(corpus.path("h264.mp4"), [])) == []


def test_a_deadline_that_has_passed(corpus: Corpus) -> None:
    with pytest.raises(ProbeError) as caught:
        list(decode(corpus.path("h264.mp4"), [5], deadline=time.monotonic() - 1))
    assert caught.value.reason == "timeout"


def test_numbers_at_the_training_rate() -> None:
    assert frames_at_rate(record(12, 24), 16, None).tolist() == [0, 1, 3, 4, 6, 7, 9, 10]
    assert frames_at_rate(record(4, 16.05, 7), 16, None).tolist() == [7, 8, 9, 10]
    assert frames_at_rate(record(9, 30), None, 3).tolist() == [0, 3, 6]
    for fps in (23.976, 29.97, 59.94, 17.3):
        for frames in range(1, 200, 7):
            assert frames_at_rate(record(frames, fps, 5), 16, None).max() < frames + 5


def test_every_window_is_drawn_also_the_last() -> None:
    rng = np.random.default_rng(0)
    firsts = {int(frame_numbers(record(10, 16, 3), 4, 16, None, rng)[0]) for _ in range(300)}
    assert firsts == set(range(3, 10))
    assert frame_numbers(record(4, 16), 4, 16, None, rng).tolist() == [0, 1, 2, 3]
    with pytest.raises(ProbeError, match="short"):
        frame_numbers(record(3, 16), 4, 16, None, rng)


def _reads(corpus: Corpus, count: int) -> tuple[int, int]:
    """Resident bytes after a tenth of ``count`` reads of all kinds, and after all of them."""
    rng, process = np.random.default_rng(0), psutil.Process()
    paths = [video.path for video in corpus.videos.values()] + list(corpus.damaged.values())
    early = 0
    for i in range(count):
        try:
            for _ in decode(paths[i % len(paths)], rng.choice(40, 2).tolist(), threads=1 + i % 2):
                if i % 5 == 0:
                    break  # a reader that stops half-way
        except ProbeError:
            pass
        if i == count // 10:
            early = process.memory_info().rss
    return early, process.memory_info().rss


def test_memory_and_files_do_not_pile_up(corpus: Corpus) -> None:
    open_files = len(os.listdir("/proc/self/fd"))
    early, late = _reads(corpus, 300)
    assert late - early < 40e6
    assert len(os.listdir("/proc/self/fd")) <= open_files + 2


@pytest.mark.long
def test_memory_is_flat_over_many_reads(corpus: Corpus) -> None:
    early, late = _reads(corpus, 20_000)
    print(f"resident: {early / 1e6:.1f} MB after 2,000 reads, {late / 1e6:.1f} MB after 20,000")
    assert late - early < 20e6
