"""Videos in each kind of tracker: a GIF that moves, the file itself, or a strip."""

import sys
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
from accelerate import PartialState
from accelerate.tracking import TensorBoardTracker, WandBTracker
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import img_mime_type_detector

from ospnext.media import write_video
from ospnext.train.pictures import Shown, show, shown


class Film(NamedTuple):
    """wandb.Video."""

    path: str
    format: str


class Wandb(ModuleType):
    """The part of wandb that is relied on, and what it was given."""

    Video, Image = Film, staticmethod(np.asarray)

    def __init__(self) -> None:
        super().__init__("wandb")
        self.logged: list[tuple[dict, int | None]] = []

    def init(self, **options: Any) -> "Wandb":
        return self

    def log(self, values: dict, step: int | None = None) -> None:
        self.logged.append((values, step))


class Plain:
    """A tracker of another kind."""

    name = "another"

    def __init__(self) -> None:
        self.logged: list[tuple[dict, int | None]] = []

    def log_images(self, values: dict, step: int | None = None) -> None:
        self.logged.append((values, step))


@pytest.fixture
def videos(tmp_path: Path) -> list[Shown]:
    """Two of 30 frames of 320 x 64; only the first is on disk."""
    PartialState(cpu=True)
    made = []
    for number in range(2):
        frames = np.random.default_rng(number).integers(0, 256, (30, 64, 320, 3), np.uint8)
        path = tmp_path / f"video_{number}.mp4"
        if number == 0:
            write_video(path, frames)
        made.append(shown(number, frames, 16, path, ["tensorboard", "wandb"]))
    assert None not in made
    return made


def test_tensorboard_shows_them_moving(tmp_path: Path, videos: list[Shown]) -> None:
    tracker = TensorBoardTracker("tensorboard", tmp_path)
    tracker.start()
    show(tracker, "validation", videos, 7)
    tracker.finish()
    curves = EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0}).Reload()
    assert curves.Tags()["images"] == ["validation/video_0", "validation/video_1"]
    for number, one in enumerate(videos):
        (event,) = curves.Images(f"validation/video_{number}")
        assert (event.step, event.width, event.height) == (7, 256, 51)
        assert event.encoded_image_string == one.gif
        assert img_mime_type_detector.from_bytes(event.encoded_image_string) == "image/gif"  # as the image tab asks
        with Image.open(BytesIO(event.encoded_image_string)) as file:
            assert (file.size, file.n_frames) == ((256, 51), 24)


def test_wandb_gets_files_and_strips_of_what_it_does_not_find(
    videos: list[Shown], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb())
    tracker = WandBTracker("project")
    tracker.start()
    show(tracker, "validation", videos, 7)
    (film, when), (strips, then) = wandb.logged
    assert film == {"validation/video_0": Film(str(videos[0].path), "mp4")}
    assert when == then == 7
    assert list(strips) == ["validation"]
    assert np.array_equal(strips["validation"], [videos[1].strip])


def test_others_get_strips(videos: list[Shown]) -> None:
    tracker = Plain()
    show(tracker, "validation", videos, 7)
    ((values, step),) = tracker.logged
    assert step == 7
    assert values["validation"].shape == (2, 64, 4 * 320, 3)
    show(object(), "validation", videos, 7)  # which take no pictures: nothing


def test_nothing_is_made_that_no_tracker_takes() -> None:
    frames = np.zeros((5, 16, 16, 3), np.uint8)
    assert shown(0, frames, 16, None, []) is None
    (strip,) = [one for one in [shown(0, frames, 16, None, ["wandb"])] if one is not None]
    assert strip.gif is None


def test_no_videos_are_no_pictures(tmp_path: Path) -> None:
    show(tracker := Plain(), "eval", [], 0)
    assert tracker.logged == []
