"""Captions: everything asked is said, in many ways, within the text encoder's length."""

from collections.abc import Mapping

import numpy as np

from ospnext.shapes import captions
from ospnext.shapes.captions import MAX_BYTES, caption
from ospnext.shapes.scene import MOTIONS, REACH, Background, Scene, Thing
from ospnext.shapes.world import World, sample_scene


def said(vocabulary: Mapping[str, tuple[str, ...]], key: str, text: str) -> bool:
    return any(word in text for word in vocabulary.get(key, (key,)))


def test_captions_say_all_that_is_graded() -> None:
    rng = np.random.default_rng(0)
    for _ in range(400):
        scene = sample_scene(rng, World.full(), held_out=None)
        text = caption(scene, rng)
        assert text[0].isupper()
        assert text.endswith(".")
        assert len(text.encode()) <= MAX_BYTES[len(scene.things)]
        text = text.lower()
        for thing in scene.things:
            assert said(captions._SHAPES, thing.shape, text), text
            assert said(captions._COLOURS, thing.colour, text), text
            plural = len(scene.things) > 1 and not scene.relation
            assert plural or said(captions._VERBS, thing.motion, text), text
        if len(scene.things) > 1 and not scene.relation:
            assert any(word in text for word in captions._COUNTS[len(scene.things)])
        if scene.pan:
            assert "the camera" in text
            assert f"pans {scene.pan}" in text


def test_wording_varies_and_is_drawn_by_the_generator_alone() -> None:
    scene = sample_scene(np.random.default_rng(0), World.simple())
    texts = {caption(scene, np.random.default_rng(seed)) for seed in range(300)}
    assert len(texts) > 40
    assert caption(scene, np.random.default_rng(7)) == caption(scene, np.random.default_rng(7))


def test_a_verb_means_one_motion() -> None:
    verbs = [verb for ways in captions._VERBS.values() for verb in ways]
    assert len(verbs) == len(set(verbs))
    assert set(captions._VERBS) == set(MOTIONS)
    assert set(captions._SHAPES) == set(REACH)


def test_plurals_are_english() -> None:
    rng = np.random.default_rng(1)
    for motion in MOTIONS:
        things = tuple(Thing("cross", "red", "small", motion, x, 64, 12, 50) for x in (30, 100))
        texts = " ".join(caption(Scene(things), rng) for _ in range(60))
        assert "crosss" not in texts
        for verb in captions._VERBS[motion]:
            first = verb.split()[0]
            assert f"es {first} " not in texts, f"{first} after a plural: {texts}"
            assert f"signs {first} " not in texts


def test_relations_are_said_from_either_side() -> None:
    things = (Thing("ring", "red", "small", "still", 30, 64, 12), Thing("star", "blue", "small", "grow", 90, 64, 12))
    scene = Scene(things, Background("plain", "white"), relation="left of")
    rng = np.random.default_rng(2)
    for _ in range(100):
        text = caption(scene, rng).lower()
        red_first = text.index("red") < text.index("blue")
        leading = text.startswith(("to the left of", "left of", "to the right of", "right of"))
        assert ("left of" in text) == (red_first != leading), text
