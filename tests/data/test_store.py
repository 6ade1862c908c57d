"""A store is whole, or it is refused in one line: cut short, overwritten, of another version, on a full disk."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import lmdb
import numpy as np
import pytest

from ospnext.cli import main
from ospnext.data.records import ClipRecord, Crop
from ospnext.data.store import ClipStore, StoreError, write_store


def records(count: int) -> list[ClipRecord]:
    return [ClipRecord(f"/v/{i}, 视频.mp4", (f"caption {i}", "二" * 40), 96, 128, 24.0, 48 + i) for i in range(count)]


def raw_store(folder: Path, items: dict[bytes, bytes]) -> Path:
    folder.mkdir()
    with lmdb.open(str(folder), map_size=2**20) as environment, environment.begin(write=True) as transaction:
        for key, value in items.items():
            transaction.put(key, value)
    return folder


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    clips = [*records(20), ClipRecord(os.fsdecode(b"/v/\xff.mp4"), ("a",), 9, 8, 1.5, 1, 7, Crop(0, 1, 2, 3), 0.25)]
    fingerprint = write_store(tmp_path, clips)
    store = ClipStore(tmp_path)
    assert list(store) == clips
    assert store.fingerprint == fingerprint == write_store(tmp_path, clips)
    assert store.is_whole()
    assert os.fsencode(store[-1].path) == b"/v/\xff.mp4"  # a name that is not UTF-8
    with pytest.raises(IndexError):
        store[21]
    write_store(tmp_path / "none", [])
    assert list(ClipStore(tmp_path / "none")) == []


def test_a_store_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path / "whole", records(3000))
    data = (tmp_path / "whole/data.mdb").read_bytes()
    for size in (0, 1, 100, 4096, 8192, 9000, len(data) // 2, len(data) - 1):
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / "data.mdb").write_bytes(data[:size])
        with pytest.raises(StoreError, match=r"no readable LMDB|truncated"):
            ClipStore(folder)


def test_a_store_that_was_written_over_does_not_pass_the_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_store(tmp_path / "whole", records(200))
    data = (tmp_path / "whole/data.mdb").read_bytes()
    (tmp_path / "data.mdb").write_bytes(data.replace(b"caption 117", b"Caption 117"))
    assert main(["data", "check", str(tmp_path)]) == 2
    assert "another fingerprint" in capsys.readouterr().err
    rng = np.random.default_rng(0)
    for i in range(2):
        noisy = np.frombuffer(data, np.uint8).copy()
        noisy[rng.integers(8192, len(noisy), 200)] = rng.integers(0, 256, 200)
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "data.mdb").write_bytes(noisy.tobytes())
        done = subprocess.run([sys.executable, "-m", "ospnext", "data", "check", str(folder)], capture_output=True)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"format": "ospnext clips", "version": 9, "count": 0, "fingerprint": "x"}, "version 9"),
        ({"format": "ospnext clips", "version": 1}, "build it again"),
        ([1], "build it again"),
        (None, "ospnext data import"),
    ],
)
def test_stores_of_other_kinds_are_refused(tmp_path: Path, meta: object, message: str) -> None:
    folder = raw_store(tmp_path / "s", {b"x": b"y"} if meta is None else {b"meta": json.dumps(meta).encode()})
    with pytest.raises(StoreError, match=message):
        ClipStore(folder)


@pytest.mark.parametrize("value", [b"{", b"[]", b"3", b'{"path": "a"}', b'{"path": "a", "captions": 3}'])
def test_a_damaged_clip_is_named(tmp_path: Path, value: bytes) -> None:
    fingerprint = hashlib.sha256(value + b"\n").hexdigest()
    meta = {"format": "ospnext clips", "version": 1, "count": 1, "fingerprint": fingerprint}
    folder = raw_store(tmp_path / "s", {b"meta": json.dumps(meta).encode(), b"000000000000": value})
    with pytest.raises(StoreError, match="clip 0 is damaged"):
        ClipStore(folder)[0]


def test_a_full_disk_leaves_the_old_store(tmp_path: Path) -> None:
    before = write_store(tmp_path, records(10))
    program = f"""
import resource
from ospnext.data.records import ClipRecord
from ospnext.data.store import write_store
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    write_store({str(tmp_path)!r}, [ClipRecord("/v/a.mp4", ("a" * 200,), 96, 128, 24.0, 48)] * 20_000)
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "cannot be written" in done.stdout, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["data.mdb"]
    assert ClipStore(tmp_path).fingerprint == before
