"""Folders that are whole or not there, and what killed processes left of them."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ospnext.checkpoints.drafts import new_file, new_folder
from ospnext.cli import main


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_half(draft: Path) -> None:
    draft.write_text("half")
    raise KeyboardInterrupt


def start_and_stop(target: Path) -> subprocess.Popen:
    """``ospnext quantize`` in a process that stands still in its midst."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        [sys.executable, "-m", "ospnext", "quantize", "shapes", str(target)], env=environment, stdout=subprocess.DEVNULL
    )
    while running.poll() is None and not any(target.parent.glob(f".{target.name}.*.tmp/*")):
        time.sleep(0.002)
    running.send_signal(signal.SIGSTOP)
    return running


def test_the_next_run_removes_the_draft_of_a_killed_one_but_of_no_living_one(tmp_path: Path) -> None:
    target = tmp_path / "out"
    others = {".out.else.abcdefgh.tmp", ".out.notes.tmp"}  # of another target, and of nobody
    for name in others:
        (tmp_path / name).mkdir()
    running = start_and_stop(target)
    try:
        assert not target.exists()
        (draft,) = set(names(tmp_path)) - others
        words = ["quantize", "shapes", str(target)]
        assert main(words) == 0
        assert set(names(tmp_path)) == {"out", draft, *others}
    finally:
        running.kill()
        running.wait()
    assert main([*words, "overwrite=true"]) == 0
    assert set(names(tmp_path)) == {"out", *others}


@pytest.mark.parametrize("replaced", [False, True])
def test_what_a_killed_run_moved_away_comes_back_or_goes(tmp_path: Path, replaced: bool) -> None:
    target, draft, old = (tmp_path / name for name in ("out", ".out.abcdefgh.tmp", ".out.abcdefgh.old"))
    (target if replaced else draft).mkdir()
    old.mkdir()
    (old / "weights").touch()
    with pytest.raises(KeyboardInterrupt), new_folder(target):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["out"]
    assert names(target) == ([] if replaced else ["weights"])


def test_a_file_is_whole_or_not_there_and_nothing_else_is(tmp_path: Path) -> None:
    target = tmp_path / "some" / "weights.pt"
    (tmp_path / "some/.weights.pt.abcdefgh.tmp").mkdir(parents=True)  # of a killed process
    with pytest.raises(KeyboardInterrupt), new_file(target) as draft:
        write_half(draft)
    assert names(target.parent) == []
    for text in ("old", "new"):
        with new_file(target) as draft:
            draft.write_text(text)
    assert names(target.parent) == ["weights.pt"]
    assert target.read_text() == "new"


def test_sigterm_takes_the_draft_along(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_what_was_there_stays_where_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    rename = Path.rename

    def refuse(path: Path, to: Path) -> Path:
        if path.suffix == ".tmp":
            raise PermissionError(errno.EPERM, "not now", str(path))
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="not now") as raised, new_folder(target):
        pass
    assert raised.value.filename == str(target)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["old", "out"]


def test_a_full_disk_is_said_of_the_folder_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as raised, new_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert raised.value.filename == str(tmp_path / "out")
    assert not list(tmp_path.iterdir())
