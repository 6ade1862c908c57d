"""Grading in processes: the same grades however videos travel, and nothing is left behind."""

from concurrent.futures import BrokenExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from ospnext.shapes import grading
from ospnext.shapes.grade import grade
from ospnext.shapes.grading import Graders
from ospnext.shapes.render import render
from ospnext.shapes.scene import Scene
from ospnext.train.clips import sample_scenes

SHARED = Path("/dev/shm")


@pytest.fixture(autouse=True)
def made(monkeypatch):
    """Names of what this process has shared: others, as another test process, share things of their own."""
    names: set[str] = set()

    class Noted(grading.SharedMemory):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            names.add(self.name)

    monkeypatch.setattr(grading, "SharedMemory", Noted)
    return names


def shared(made: set[str]) -> set[str]:
    """Those that are still there."""
    return {name for name in made if (SHARED / name).exists()}


@pytest.fixture(scope="module")
def clips() -> tuple[list[np.ndarray], list[Scene]]:
    """Videos of two lengths, one of them not contiguous, and what is asked: of the first something else."""
    scenes = sample_scenes("large", 5, seed=1)
    videos = [np.asarray(video) for video in render(scenes, 33, 128, 128)]
    videos[1] = videos[1][:17]
    videos[2] = np.asfortranarray(videos[2])
    return videos, [scenes[1], *scenes[1:]]


@pytest.mark.parametrize("room", [True, False], ids=["shared", "through a pipe"])
def test_processes_grade_as_one_does(clips, room, monkeypatch, made):
    if not room:
        monkeypatch.setattr(grading._Shared, "of", lambda size: None)
    before = shared(made)
    expected = [grade(*pair) for pair in zip(*clips, strict=True)]
    with Graders(2) as graders:
        futures = graders.begin(*clips)
        assert not room or not SHARED.is_dir() or shared(made) > before
        assert [future.result() for future in futures] == expected
        assert graders(*clips) == expected
        assert graders([], []) == []
        tensors = [torch.from_numpy(np.ascontiguousarray(video)) for video in clips[0]]
        assert graders(tensors, clips[1]) == expected
        batches = [graders.begin(*clips) for _ in range(4)]  # more than are kept
        assert [[future.result() for future in batch] for batch in batches] == [expected] * 4
        assert len(shared(made) - before) <= grading._KEPT + 1  # the last one is given back any moment
    assert shared(made) == before


def test_memory_is_given_back_when_a_grader_fails(clips, monkeypatch, made):
    before = shared(made)
    with Graders(2) as graders:
        flat = np.zeros((3, 128, 128), np.uint8)
        good, bad = graders.begin([clips[0][1], flat], clips[1][1:3])
        with pytest.raises(Exception, match=r".+"):
            bad.result()
        assert good.result() == grade(clips[0][1], clips[1][1])
        for process in graders._started()._processes.values():
            process.kill()
        with pytest.raises(BrokenExecutor):
            graders(*clips)
        assert graders(*clips)[3].all_right
    assert shared(made) == before


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["array", "tensor"])
def test_other_numbers_than_bytes_are_refused(clips, kind, made):
    before = shared(made)
    with Graders(2) as graders:
        with pytest.raises(ValueError, match=r"must be uint8, not (torch\.)?float32"):
            graders.begin([kind(clips[0][0].astype(np.float32))], clips[1][:1])
        assert graders([clips[0][3]], [clips[1][3]]) == [grade(clips[0][3], clips[1][3])]
    assert shared(made) == before


def test_little_room_is_not_used(clips, monkeypatch, made):
    monkeypatch.setattr(grading.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert grading._Shared.of(600) is None or not SHARED.is_dir()
