"""Scenes: their vocabulary, their paths, and what is drawn at random."""

import json
from itertools import combinations

import numpy as np
import pytest

from ospnext.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    FRAME,
    MOTIONS,
    PATTERNS,
    RADII,
    REACH,
    Background,
    Scene,
    Thing,
    camera,
    tracks,
)
from ospnext.shapes.world import World, is_held_out, sample_scene

FULL, SIMPLE = World.full(), World.simple()


def scenes(world: World, count: int, held_out: bool | None = False, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, world, held_out) for _ in range(count)]


def test_the_world_is_large_enough() -> None:
    assert len(REACH) >= 6
    assert len(COLOURS) >= 8
    assert len(MOTIONS) >= 10
    assert RADII["small"][0] >= 11


def test_colours_are_far_from_each_other_and_from_every_background() -> None:
    palette = {name: np.array(colour) for name, colour in COLOURS.items()}
    for one, two in combinations(palette.values(), 2):
        assert np.linalg.norm(one - two) > 75
    for background in BACKGROUNDS.values():
        assert min(np.linalg.norm(colour - background) for colour in palette.values()) > 90


def test_drawing_is_deterministic() -> None:
    assert scenes(FULL, 20) == scenes(FULL, 20)


def test_training_shows_every_word_and_nothing_held_out() -> None:
    drawn = scenes(SIMPLE, 3000) + scenes(FULL, 400)
    assert not any(map(is_held_out, drawn))
    things = [thing for scene in drawn for thing in scene.things]
    assert {thing.shape for thing in things} == set(REACH)
    assert {thing.colour for thing in things} == set(COLOURS)
    assert {thing.motion for thing in things} == set(MOTIONS)
    assert {thing.size for thing in things} == set(RADII)
    assert {scene.background.pattern for scene in drawn} == set(PATTERNS)
    assert {scene.pan for scene in drawn} == {"", "left", "right", "up", "down"}
    assert {len(scene.things) for scene in drawn} == {1, 2, 3}
    assert {scene.relation for scene in drawn} == {"", "left of", "above"}


def test_held_out_combinations_are_about_15_percent_and_never_change() -> None:
    assert all(map(is_held_out, scenes(SIMPLE, 300, held_out=True) + scenes(FULL, 100, held_out=True)))
    share = np.mean([is_held_out(scene) for scene in scenes(SIMPLE, 3000, held_out=None)])
    assert 0.12 < share < 0.2
    held = [
        (shape, colour)
        for shape in REACH
        for colour in COLOURS
        if is_held_out(Scene((Thing(shape, colour, "small", "right", 64, 64, 12, 50),)))
    ]
    assert held[:3] == [("circle", "green"), ("circle", "blue"), ("circle", "pink")]


def test_things_stay_in_the_frame_and_apart() -> None:
    for scene in scenes(FULL, 300, held_out=None, seed=1):
        path = tracks(scene.things, 65, [scene.pan] * len(scene.things))
        reach = path.radius * np.array([REACH[thing.shape] for thing in scene.things])[:, None]
        for centre in (path.x, path.y):
            assert (centre - reach).min() > 1
            assert (centre + reach).max() < FRAME - 1
        for i, j in combinations(range(len(scene.things)), 2):
            gap = np.hypot(path.x[i] - path.x[j], path.y[i] - path.y[j]) - reach[i] - reach[j]
            assert gap.min() > 6


def test_relations_hold_throughout() -> None:
    related = [scene for scene in scenes(FULL, 300, seed=2) if scene.relation]
    assert len(related) > 40
    for scene in related:
        path = tracks(scene.things, 33)
        along, across = (path.x, path.y) if scene.relation == "left of" else (path.y, path.x)
        assert np.diff(along, axis=0).min() > 0
        assert (np.diff(along, axis=0).mean(1) > np.abs(np.diff(across, axis=0).mean(1))).all()


def test_several_things_without_a_relation_are_alike() -> None:
    for scene in scenes(FULL, 200, seed=3):
        if len(scene.things) > 1 and not scene.relation:
            assert len({(t.shape, t.colour, t.size, t.motion, t.radius, t.travel) for t in scene.things}) == 1


@pytest.mark.parametrize(
    ("motion", "middle", "end"),
    [
        ("right", (64, 64), (89, 64)),
        ("up", (64, 64), (64, 39)),
        ("clockwise", (64, 89), (64, 39)),
        ("bounce", (64, 89), (64, 89)),
        ("sway", (64, 64), (64, 64)),
        ("still", (64, 64), (64, 64)),
    ],
)
def test_paths(motion: str, middle: tuple[float, float], end: tuple[float, float]) -> None:
    path = tracks([Thing("star", "red", "small", motion, 64, 64, 12, 50)], 5)
    assert (path.x[0, 2], path.y[0, 2]) == pytest.approx(middle)
    assert (path.x[0, 4], path.y[0, 4]) == pytest.approx(end)


def test_paths_depend_on_time_alone_and_the_camera_moves_the_picture() -> None:
    things = [thing for scene in scenes(SIMPLE, 20) for thing in scene.things]
    for short, long in zip(tracks(things, 9), tracks(things, 33), strict=True):
        np.testing.assert_allclose(short, long[:, ::4], atol=1e-9)
    still = Thing("star", "red", "small", "still", 64, 64, 12)
    assert tracks([still], 5, ["right"]).x[0, -1] < 64 < tracks([still], 5, ["left"]).x[0, -1]
    assert camera("down", 5)[-1, 1] > 0
    assert not camera("", 5).any()


def test_turning_quarters_of_a_clip() -> None:
    spin = tracks([Thing("star", "red", "small", "spin", 64, 64, 12)], 5)
    np.testing.assert_allclose(spin.angle[0], np.arange(5) * np.pi / 2)
    assert tracks([Thing("star", "red", "small", "grow", 64, 64, 12)], 2).radius[0, 1] == pytest.approx(21)


def test_scenes_survive_json() -> None:
    for scene in scenes(FULL, 50):
        assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


def test_what_is_not_of_this_world_is_refused() -> None:
    good = scenes(SIMPLE, 1)[0].to_dict()
    with pytest.raises(ValueError, match="not a scene"):
        Scene.from_dict({"things": []})
    with pytest.raises(ValueError, match=r"'mauve'.*red"):
        Scene.from_dict(good | {"things": [good["things"][0] | {"colour": "mauve"}]})
    with pytest.raises(ValueError, match="spin"):
        Thing("ring", "red", "small", "spin", 64, 64, 12)
    with pytest.raises(ValueError, match="cannot be seen"):
        Scene((Thing("ring", "red", "small", "still", 64, 64, 12),), Background("plain", "white"), pan="left")
    with pytest.raises(ValueError, match="1 to 3 things"):
        Scene(())
    with pytest.raises(ValueError, match="motions of a world"):
        World(motions=("fly",))
    with pytest.raises(ValueError, match="counts"):
        World(counts=(0.0, 0.0, 0.0))
    with pytest.raises(ValueError, match="widen it"):
        sample_scene(np.random.default_rng(0), World(shapes=("ring",), motions=("spin",), counts=(1, 0, 0)))
