"""The grader reads every attribute from pixels, through compression, blur and noise, and believes no garbage."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ospnext.media import read_video, write_video
from ospnext.shapes.grade import Grade, grade, read
from ospnext.shapes.render import render
from ospnext.shapes.scene import Background, Scene, Thing
from ospnext.shapes.world import World, sample_scene

STAR = Scene((Thing("star", "red", "large", "right", 64, 64, 19, 50),), Background("plain", "white"))


def draw(world: World, count: int, seed: int) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, world, held_out=None) for _ in range(count)]


def video(scene: Scene, **size: int) -> np.ndarray:
    return render([scene], **size)[0].numpy()


def compressed(clip: np.ndarray, folder: Path) -> np.ndarray:
    write_video(folder / "clip.mp4", clip, crf=23)
    return read_video(folder / "clip.mp4").frames


def spoilt(clip: np.ndarray, blur: float, noise: float, seed: int = 0) -> np.ndarray:
    """The clip blurred by a Gaussian of ``blur`` pixels and with Gaussian noise of ``noise`` of 255."""
    taps = torch.exp(-(torch.arange(-5, 6) ** 2) / (2 * blur**2))
    taps = taps / taps.sum()
    planes = torch.from_numpy(clip).permute(0, 3, 1, 2).float().flatten(0, 1)[:, None]
    planes = F.conv2d(F.pad(planes, (5, 5, 5, 5), mode="replicate"), taps.view(1, 1, 1, -1))
    soft = F.conv2d(planes, taps.view(1, 1, -1, 1)).view(len(clip), 3, *clip.shape[1:3]).permute(0, 2, 3, 1).numpy()
    noisy = soft + noise * np.random.default_rng(seed).standard_normal(soft.shape, np.float32)
    return noisy.clip(0, 255).astype(np.uint8)


def right(grades: list[Grade]) -> float:
    return float(np.mean([mark.all_right for mark in grades]))


def test_rendered_and_compressed_clips_are_read_right(tmp_path: Path) -> None:
    grades: list[Grade] = []
    for scene in draw(World.full(), 50, seed=0):
        clip = video(scene)
        grades += [grade(clip, scene), grade(compressed(clip, tmp_path), scene)]
    assert right(grades) >= 0.98
    assert {mark.relation for mark in grades} == {True, None}
    assert {mark.pan for mark in grades} == {True, None}


@pytest.mark.long
@pytest.mark.parametrize("crf", [None, 23])
def test_512_clips_are_read_right(tmp_path: Path, crf: int | None) -> None:
    clips = [(video(scene), scene) for scene in draw(World.full(), 512, seed=1)]
    grades = [grade(compressed(clip, tmp_path) if crf else clip, scene) for clip, scene in clips]
    assert right(grades) >= 0.98


def test_blur_and_noise_do_little() -> None:
    grades = [grade(spoilt(video(scene), 1, 8), scene) for scene in draw(World.simple(), 40, seed=2)]
    assert right(grades) >= 0.97


@pytest.mark.parametrize(
    ("frames", "height", "width"), [(17, 128, 128), (49, 128, 128), (33, 64, 64), (33, 256, 256), (33, 128, 208)]
)
def test_any_length_and_size_is_read(frames: int, height: int, width: int) -> None:
    chosen = draw(World.simple(), 8, seed=3)
    clips = [video(scene, frames=frames, height=height, width=width) for scene in chosen]
    assert right([grade(clip, scene) for clip, scene in zip(clips, chosen, strict=True)]) == 1


@pytest.mark.parametrize(("name", "other"), [("shape", "cross"), ("colour", "blue"), ("motion", "left")])
def test_what_was_not_asked_for_is_wrong_and_nothing_else(name: str, other: str) -> None:
    asked = replace(STAR, things=(replace(STAR.things[0], **{name: other}),))
    marks = grade(video(STAR), asked)
    assert not marks.all_right
    assert [attribute for attribute in ("count", "shape", "colour", "motion") if not getattr(marks, attribute)] == [
        name
    ]


def test_a_clip_of_another_prompt_is_right_only_by_chance() -> None:
    for scene, other in zip(draw(World.simple(), 30, seed=4), draw(World.simple(), 30, seed=5), strict=True):
        thing, asked = scene.things[0], other.things[0]
        same = [getattr(thing, name) == getattr(asked, name) for name in ("shape", "colour", "motion")]
        assert grade(video(scene), other) == Grade(True, *same)


def pair(relation: str = "left of", second: str = "blue") -> Scene:
    things = (
        Thing("star", "red", "small", "still", 32, 50, 12),
        Thing("ring", second, "small", "bounce", 92, 64, 12, 50),
    )
    return Scene(things, Background("plain", "grey"), relation=relation)


def test_relations_and_counts_are_graded() -> None:
    scene, clip = pair(), video(pair())
    assert grade(clip, scene) == Grade(True, True, True, True, relation=True)
    swapped = replace(scene, things=scene.things[::-1])
    assert grade(clip, swapped) == Grade(True, True, True, True, relation=False)
    assert grade(clip, pair("above")).relation is False
    alone = Scene(scene.things[:1], scene.background)
    assert grade(clip, alone) == Grade(False, True, True, True)
    assert grade(video(alone), scene) == Grade(False, False, False, False, relation=False)
    assert grade(clip, pair(second="green")).colour is False


def test_a_pan_is_read_and_taken_off_the_motion() -> None:
    for pan in ("left", "right", "up", "down"):
        scene = Scene((Thing("star", "red", "small", "still", 64, 64, 12),), Background("checks", "brown"), pan)
        assert grade(video(scene), scene) == Grade(True, True, True, True, pan=True)
        assert grade(video(replace(scene, pan="")), scene).pan is False


def test_garbage_is_graded_wrong() -> None:
    rng = np.random.default_rng(6)
    noise = rng.integers(0, 256, (33, 128, 128, 3), dtype=np.uint8)
    blank = np.full((33, 128, 128, 3), 245, np.uint8)
    clip = video(STAR)
    half = np.concatenate([clip[:16], np.broadcast_to(clip[-1, :1, :1], (17, 128, 128, 3))])
    for garbage in (noise, blank, half, clip[rng.permutation(33)]):
        assert not grade(garbage, STAR).all_right
    assert read(blank).count == 0
    assert read(noise).things == ()


@pytest.mark.parametrize("shape", ["star", "triangle", "square"])
def test_the_margin_of_a_shape_falls_as_it_blurs_and_says_whether_it_is_right(shape: str) -> None:
    scene = replace(STAR, things=(replace(STAR.things[0], shape=shape),))
    clip = video(scene)
    grades = [grade(one, scene) for one in (clip, *(spoilt(clip, blur, 0.0) for blur in (2.0, 3.0, 4.0, 5.0)))]
    margins = [mark.shape_margin for mark in grades]
    assert margins[0] > 0.05
    assert margins[0] > margins[-1]
    for other in ("circle", "triangle", "star", "cross"):
        grades.append(grade(clip, replace(STAR, things=(replace(STAR.things[0], shape=other),))))
    assert {mark.shape for mark in grades} == {True, False}
    assert [mark.shape for mark in grades] == [mark.shape_margin > 0 for mark in grades]


def test_the_margin_is_that_of_the_worst_thing() -> None:
    two = (replace(STAR.things[0], x=38, motion="still"), Thing("square", "blue", "large", "still", 94, 64, 19, 0))
    clip = video(replace(STAR, things=two))

    def margin(*things: Thing) -> float:
        return grade(clip, replace(STAR, things=things)).shape_margin

    both = margin(*two)
    assert both == min(margin(two[0]), margin(two[1])) > 0
    assert margin(two[0], replace(two[1], shape="cross")) < 0
    assert margin(*two, replace(two[0], x=64)) == -1


@pytest.mark.parametrize("stretch", [1.7, 2.2])
def test_blobs_have_no_shape(stretch: float) -> None:
    y, x = np.mgrid[:128, :128] - 63.5
    angle = np.arctan2(y, x)
    lumpy = 17 * (1 + 0.22 * np.cos(2 * angle + 1) + 0.2 * np.cos(3 * angle + 0.4))
    for inside in (np.hypot(x / stretch, y * stretch**0.5) < 14, np.hypot(x, y) < lumpy):
        clip = np.full((33, 128, 128, 3), 245, np.uint8)
        clip[:, inside] = (220, 40, 40)
        reading = read(clip)
        assert [thing.colour for thing in reading.things] == ["red"]
        assert [thing.shape for thing in reading.things] == [""]


def test_what_changes_on_the_way_has_no_name() -> None:
    def halves(**change: str) -> np.ndarray:
        other = replace(STAR, things=(replace(STAR.things[0], **change),))
        return np.concatenate([video(STAR)[:17], video(other)[17:]])

    assert read(halves(shape="triangle")).things[0].shape == ""
    assert read(halves(colour="blue")).things[0].colour == ""
    assert read(halves(motion="left")).things[0].motion == ""


def test_other_clips_are_refused() -> None:
    for clip in (np.zeros((4, 8, 8)), np.zeros((4, 8, 8, 3)), np.zeros((1, 8, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            read(clip)
