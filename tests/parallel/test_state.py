"""States on disk: whole or not at all, the same on any number of processes, and never more than tensors."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import state_cases as cases
import torch
from processes import Processes

from ospnext.parallel.state import StateError, StateWriter, complete, load, newest, read, read_record, sweep

Group = Callable[[int], Processes]


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"a": torch.randn(3, 4).bfloat16(), "b.c": torch.tensor(2.5), "none": torch.zeros(0, 3)}


def saved(folder: Path, *steps: int, keep: int | None = None) -> StateWriter:
    writer = StateWriter(folder, keep)
    for step in steps:
        writer.save(step, tensors(), {"step": step, "note": "ü"})
    writer.finish()
    return writer


@pytest.mark.parametrize("writers", [1, 3])
def test_a_state_loads_on_any_number_of_processes(writers: int, processes: Group, tmp_path: Path) -> None:
    if writers == 1:
        cases.save(0, 1, tmp_path, 4)
    else:
        processes(writers).run(cases.save, writers, tmp_path, 4)
    assert cases.loads(0, 1, tmp_path, 4) == {"step": 4, "world": writers}
    for readers in (2, 3):
        assert processes(readers).run(cases.loads, readers, tmp_path, 4) == [{"step": 4, "world": writers}] * readers


def test_damage_is_told_by_all_and_changes_nothing(processes: Group, tmp_path: Path) -> None:
    processes(3).run(cases.save, 3, tmp_path, 4)
    state = tmp_path / "iter_000000004"
    part = sorted(state.glob("__1_*"))[0]
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    for messages in (processes(3).run(cases.refused, 3, state), [cases.refused(0, 1, state)]):
        assert all(part.name in message and str(state) in message for message in messages), messages


@pytest.mark.parametrize(
    ("damaged", "said"),
    [
        ("record.json", "record.json is not what"),
        ("__0_0.distcp", "__0_0.distcp is not what"),
        ("", "process 1 of 2: "),
    ],
)
def test_a_run_that_cannot_go_on_says_so_once(damaged: str, said: str, processes: Group, tmp_path: Path) -> None:
    """Also where a single process finds it: its data are others."""
    cases.save_run(tmp_path)
    if damaged:
        (tmp_path / "iter_000000000" / damaged).write_text("{}")
    one, other = processes(2).run(cases.resumed, 2, tmp_path, 0 if damaged else 1)
    assert one == other
    assert one.startswith("RefusalError")
    assert said in one


def test_a_save_that_fails_says_so_everywhere_and_leaves_nothing(processes: Group, tmp_path: Path) -> None:
    processes(2).run(cases.save, 2, tmp_path, 4)
    messages = processes(2).run(cases.blocked, 2, tmp_path)
    assert all("cannot save" in message and "iter_000000007" in message for message in messages), messages
    assert [path.name for path in tmp_path.iterdir()] == ["iter_000000004"]
    assert processes(2).run(cases.loads, 2, tmp_path, 4)


def test_the_newest_stay_and_a_state_that_is_there_is_left_alone(tmp_path: Path) -> None:
    writer = saved(tmp_path, 1, 2, 30, keep=2)
    assert [path.name for path in complete(tmp_path)] == ["iter_000000002", "iter_000000030"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_000000002", "iter_000000030"]
    before = {path: path.stat().st_mtime_ns for path in newest(tmp_path).iterdir()}
    writer.save(30, {"other": torch.zeros(1)}, {})
    writer.finish()
    assert before == {path: path.stat().st_mtime_ns for path in newest(tmp_path).iterdir()}


def test_what_a_killed_run_left_does_not_end_the_next(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / ".iter_000000001.old").mkdir()
    (tmp_path / ".iter_000000001.old" / "x").touch()
    saved(tmp_path, 1, 2, 3, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_000000002", "iter_000000003"]
    (tmp_path / ".iter_000000002.old").touch()  # no folder: nothing of ours, and it stays
    saved(tmp_path, 4, keep=2)
    assert newest(tmp_path) == tmp_path / "iter_000000004"
    assert "iter_000000002 cannot be removed" in caplog.text


def test_only_what_killed_runs_left_is_swept_away(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    kept = ["iter_000000005", ".iter_000000007", ".iter_x.tmp", ".lora-checkpoint-5.tmp"]
    for name in (*kept[1:], ".iter_000000001.old", ".iter_000000009.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_values_come_back_and_drafts_are_none(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    (tmp_path / ".iter_000000009.tmp").mkdir()
    (tmp_path / "iter_latest").mkdir()
    (tmp_path / "iter_²").mkdir()
    found = newest(tmp_path)
    assert found == tmp_path / "iter_000000005"
    target = {name: torch.full_like(tensor, 7) for name, tensor in tensors().items()}
    assert load(found, target) == {"step": 5, "note": "ü"} == read_record(found)
    assert all(torch.equal(target[name], tensor) for name, tensor in tensors().items())
    assert newest(tmp_path / "elsewhere") is None


def test_a_folder_without_its_end_is_refused_by_name(tmp_path: Path) -> None:
    saved(tmp_path, 5, 6)
    (tmp_path / "iter_000000006" / "COMPLETE").unlink()
    with pytest.raises(StateError, match="iter_000000006 is not complete"):
        newest(tmp_path)
    (tmp_path / "iter_000000006").rename(tmp_path / "old")
    assert newest(tmp_path) == tmp_path / "iter_000000005"


def test_two_spellings_of_a_step_are_refused_and_none_is_added(tmp_path: Path) -> None:
    writer = saved(tmp_path, 4)
    (tmp_path / "iter_000000004").rename(tmp_path / "iter_4")
    writer.save(4, tensors(), {})
    writer.finish()
    assert newest(tmp_path) == tmp_path / "iter_4"
    (tmp_path / "iter_000000004").mkdir()
    with pytest.raises(StateError, match="step 4") as caught:
        newest(tmp_path)
    assert {"iter_4", "iter_000000004"} <= set(str(caught.value).replace("/", " ").split())


@pytest.mark.parametrize("name", ["record.json", ".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("how", ["missing", "short", "flipped"])
def test_every_file_is_checked(name: str, how: str, tmp_path: Path) -> None:
    saved(tmp_path, 5)
    path = tmp_path / "iter_000000005" / name
    data = path.read_bytes()
    match how:
        case "missing":
            path.unlink()
        case "short":
            path.write_bytes(data[:-1])
        case "flipped":
            path.write_bytes(data[:-3] + bytes([data[-3] ^ 4]) + data[-2:])
    with pytest.raises(StateError, match=r"iter_000000005 is incomplete or damaged \(.*" + name.replace(".", r"\.")):
        load(tmp_path / "iter_000000005", tensors())


@pytest.mark.parametrize("text", ["[]", "3", "null", "", "{", '{"stop": 5}', "[" * 100_000], ids=lambda text: text[:9])
def test_a_record_is_checked_before_it_is_read(text: str, tmp_path: Path) -> None:
    saved(tmp_path, 5)
    state = tmp_path / "iter_000000005"
    (state / "record.json").write_text(text)
    with pytest.raises(StateError, match=r"iter_000000005 is incomplete or damaged \(record\.json is not what was"):
        read_record(state)


@pytest.mark.parametrize("text", ["[]", "3", "null", "", "{", "{}", "[" * 100_000], ids=lambda text: text[:9])
def test_without_its_hashes_a_state_is_damaged(text: str, tmp_path: Path) -> None:
    saved(tmp_path, 5)
    state = tmp_path / "iter_000000005"
    (state / "COMPLETE").write_text(text)
    for attempt in (lambda: load(state, tensors()), lambda: read(state, ""), lambda: read_record(state)):
        with pytest.raises(StateError, match=r"iter_000000005 is incomplete or damaged \(COMPLETE "):
            attempt()


@pytest.mark.parametrize("name", ["record.json", ".metadata", "__0_0.distcp"])
def test_every_file_has_a_hash(name: str, tmp_path: Path) -> None:
    saved(tmp_path, 5)
    complete = tmp_path / "iter_000000005" / "COMPLETE"
    hashes = json.loads(complete.read_text())
    del hashes[name]
    complete.write_text(json.dumps(hashes))
    with pytest.raises(StateError, match=f"COMPLETE does not name {name}"):
        load(complete.parent, tensors())


def test_other_tensors_are_another_run(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    state = tmp_path / "iter_000000005"
    with pytest.raises(StateError, match=r"2 tensors are in one of them only, such as b\.c, d"):
        load(state, {name.replace("b.c", "d"): tensor for name, tensor in tensors().items()})
    with pytest.raises(StateError, match=r"such as a: \[3, 4\] there, \[4, 3\] in this run"):
        load(state, tensors() | {"a": torch.zeros(4, 3)})


class Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("touch was-here",)


def test_a_state_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path, 5)
    state = tmp_path / "iter_000000005"
    (state / ".metadata").write_bytes(pickle.dumps(Evil()))
    hashes = json.loads((state / "COMPLETE").read_text())
    hashes[".metadata"] = hashlib.sha256((state / ".metadata").read_bytes()).hexdigest()
    (state / "COMPLETE").write_text(json.dumps(hashes))
    with pytest.raises(StateError, match=r"asks for posix\.system"):
        load(state, tensors())
    assert not Path("was-here").exists()


def test_a_full_disk_keeps_what_is_there(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    writer = StateWriter(tmp_path / "iter_000000005" / "record.json")  # no folder can be made in a file
    with pytest.raises(StateError, match="cannot save"):
        writer.save(6, tensors(), {})
    assert load(newest(tmp_path), tensors())["step"] == 5
