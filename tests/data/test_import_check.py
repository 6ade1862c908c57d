"""Older, pickled stores are read without running them; a check decodes and fails where it must."""

import json
import os
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import lmdb
import pytest
from corpus import Corpus
from PIL import Image, ImageFont

from ospnext.cli import main
from ospnext.data.check import _font, _lines
from ospnext.data.importing import ImportConfig, run
from ospnext.data.records import ClipRecord
from ospnext.data.store import ClipStore, StoreError, write_store
from ospnext.data.workers import Failure, run_tasks

META = {"path": "/v/a.mp4", "cap": ["a", "b"], "resolution": {"height": 96, "width": 128}, "fps": 24, "num_frames": 48}


def pickled(folder: Path, values: list[Any]) -> Path:
    """A store as the older filter writes it."""
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=2**20) as environment, environment.begin(write=True) as transaction:
        for i, value in enumerate(values):
            raw = value if isinstance(value, bytes) else pickle.dumps(value)
            transaction.put(f"{i:012d}".encode(), raw)
    return folder


class Evil:
    """Runs a command when it is unpickled by a reader that allows it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_several_old_stores_become_one(tmp_path: Path) -> None:
    cut = {**META, "cut": [10, 30], "start_frame_idx": 10, "crop": [0, 64, 0, 48], "motion": 0.5}
    pickled(tmp_path / "old/filtered_samples_1.lmdb", [META])
    pickled(tmp_path / "old/filtered_samples_2.lmdb", [cut, {**META, "path": "/v/b.mp4"}])
    assert "3 clips of 2 stores" in run(ImportConfig(src=str(tmp_path / "old"), save_path=str(tmp_path / "new")))
    first, second, third = ClipStore(tmp_path / "new")
    assert first == ClipRecord("/v/a.mp4", ("a", "b"), 96, 128, 24.0, 48)
    assert (second.start, second.num_frames, second.crop, second.motion) == (10, 20, (0, 64, 0, 48), 0.5)
    assert third.path == "/v/b.mp4"
    with pytest.raises(StoreError, match="holds 2 stores"):
        ClipStore(tmp_path / "old")
    with pytest.raises(StoreError, match="data import"):
        ClipStore(tmp_path / "old/filtered_samples_1.lmdb")


@pytest.mark.parametrize("value", [b"", b"junk", b"\x28\xb5\x2f\xfd...", {**META, "num_frames": None}, [1], "relative"])
def test_what_is_no_clip_is_refused(tmp_path: Path, value: Any) -> None:
    if value == "relative":
        value = {**META, "path": "a.mp4"}
    folder = pickled(tmp_path / "old.lmdb", [META, value or b"\x80"])
    with pytest.raises(StoreError, match="000000000001"):
        run(ImportConfig(src=str(folder), save_path=str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "was run"
    folder = pickled(tmp_path / "old.lmdb", [{**META, "cap": Evil(mark)}])
    with pytest.raises(StoreError, match="holds the instruction STACK_GLOBAL"):
        run(ImportConfig(src=str(folder), save_path=str(tmp_path / "new")))
    assert not mark.exists()


@pytest.mark.parametrize(
    "value",
    [
        pickle.dumps({**META, "cap": Evil(Path("x"))}, 0),
        b"(S'x'\nios\nmkdir\n.",
        b"\x82\x01.",  # the registry of extensions
        b"Pabc\n.",  # an object from outside
        b"\x80\x02}(U\x01aK\x01ub}b.",  # set the state of an object
        b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"x.",  # so many bytes
        b"\x80\x02\x8b" + (2**31 - 1).to_bytes(4, "little") + b"x.",  # so many digits
        b"\x80\x02}r" + (2**28).to_bytes(4, "little") + b".",  # a memory of gigabytes
        b"\x80\x02}K\x01" + b"2\x86" * 60 + b"K\x01s.",  # a key whose hash takes for ever
        b"\x80\x02]" + b"2\x86" * 60 + b".",  # a list whose text takes for ever
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        b"\x80\x04\x95" + (2**40).to_bytes(8, "little") + b"}.",
        b"}" * 1000,
        pickle.dumps({**META, "num_frames": 10**400}),
        pickle.dumps({**META, "num_frames": -4}),
        pickle.dumps({**META, "start_frame_idx": [1]}),
        pickle.dumps({**META, "start_frame_idx": float("nan")}),
        pickle.dumps({**META, "fps": -24}),
        pickle.dumps({**META, "crop": [0, 9999, 0, 1]}),
        pickle.dumps({**META, "path": b"/v/a.mp4"}),
        pickle.dumps({**META, "cap": "half \ud83d"}),
    ],
)
def test_hostile_pickles_end_in_one_line(tmp_path: Path, value: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pickled(tmp_path / "old.lmdb", [META, value])
    assert main(["data", "import", str(folder), str(tmp_path / "new")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "000000000001" in line
    assert len(line) < 500
    assert not (tmp_path / "new").exists()


def test_import_never_writes_over_what_it_reads(tmp_path: Path) -> None:
    folder = pickled(tmp_path / "old.lmdb", [META])
    before = (folder / "data.mdb").read_bytes()
    with pytest.raises(StoreError, match="name another folder"):
        run(ImportConfig(src=str(folder), save_path=str(folder)))
    assert (folder / "data.mdb").read_bytes() == before
    run(ImportConfig(src=str(folder), save_path=str(tmp_path / "new")))
    with pytest.raises(StoreError, match="already"):
        run(ImportConfig(src=str(tmp_path / "new"), save_path=str(tmp_path / "newer")))


def test_check_draws_the_sound_and_names_the_damaged(
    tmp_path: Path, corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = [
        ClipRecord(str(corpus.path(name)), ("a caption " * 40,), *size, 24.0, 48)
        for name, size in {"h264.mp4": (96, 128), "rotated_90.mp4": (128, 96), "anamorphic.mp4": (96, 128)}.items()
    ]
    write_store(tmp_path / "clips", sound)
    assert main(["data", "check", str(tmp_path / "clips")]) == 0
    assert "all are sound" in capsys.readouterr().out
    with Image.open(tmp_path / "clips/check.png") as sheet:
        assert sheet.width > 3 * 240
        assert sheet.height > 3 * 160
    write_store(tmp_path / "clips", [*sound, ClipRecord(str(corpus.path("truncated.mp4")), ("b",), 96, 128, 24.0, 48)])
    assert main(["data", "check", str(tmp_path / "clips")]) == 2
    assert "1 of 4 clips do not decode" in capsys.readouterr().err


def test_chinese_without_a_font_is_said(tmp_path: Path, corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    write_store(tmp_path, [ClipRecord(str(corpus.path("h264.mp4")), ("一只猫",), 96, 128, 24.0, 48)])
    assert main(["data", "check", str(tmp_path)]) == 0
    installed = isinstance(getattr(_font(11), "path", None), str)
    assert ("drawn as boxes" in capsys.readouterr().out) != installed


def test_captions_break_where_they_must() -> None:
    font = ImageFont.load_default(11)
    for text in ("word " * 300, "一只猫在跑步" * 100, "x" * 3000):
        lines = _lines(text, font, 300, 4)
        assert len(lines) == 4
        assert lines[-1].endswith(" ...")
        assert all(font.getlength(line) <= 300 for line in lines)
    assert _lines("a  short\none", font, 300) == ["a short one"]
    assert _lines("", font, 300) == []


def moody(task: str) -> str:
    """Hangs, dies or answers, in another process."""
    if task == "hang":
        time.sleep(60)
    if task == "die":
        os.abort()
    if task == "exit":
        sys.exit(3)
    if task == "raise":
        raise KeyError("lost")
    return task.upper()


def test_a_worker_that_hangs_or_dies_costs_one_task() -> None:
    tasks = ["a", "hang", "b", "die", "c", "exit", "raise", "d"]
    results = dict(run_tasks(moody, tasks, 2, 6.0))
    assert {task: result.reason for task, result in results.items() if isinstance(result, Failure)} == {
        "hang": "timeout",
        "die": "crash",
        "exit": "crash",
        "raise": "crash",
    }
    assert results["raise"] == Failure("crash", "KeyError: 'lost'")
    assert [results[task] for task in "abcd"] == ["A", "B", "C", "D"]


def test_shipped_example_is_of_the_form(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    from ospnext.data.annotations import Annotation, read_index

    first, second = read_index(root / "configs/data/all_videos.txt")
    assert isinstance(first, Annotation)
    assert isinstance(second, Annotation)
    assert (first.start, first.end, len(first.captions), second.end) == (120, 300, 2, None)
    assert json.loads((root / "configs/data/example_meta.json").read_text())
