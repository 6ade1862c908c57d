"""Say in words what a scene shows: natural, varied, and always everything the grader asks for.

Every caption names each thing's shape, colour and motion, how many there are and how they stand to each other; size,
background and camera come in sometimes. Each word means one thing of the world only.
"""

from collections.abc import Sequence

import numpy as np

from ospnext.shapes.scene import Background, Scene, Thing

MAX_BYTES = {1: 120, 2: 250, 3: 250}
"""The longest caption, for each number of things."""

_SHAPES = {
    "circle": ("circle", "circle", "disc"),
    "square": ("square",),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "cross", "plus sign"),
    "ring": ("ring",),
    "crescent": ("crescent", "crescent", "crescent moon"),
}

_COLOURS = {"purple": ("purple", "purple", "violet"), "cyan": ("cyan", "cyan", "turquoise")}  # the others have one name

_SIZES = {"small": ("small", "little"), "large": ("large", "big")}

_VERBS = {
    "right": (
        "moves to the right",
        "glides to the right",
        "slides right",
        "drifts from left to right",
        "travels right",
    ),
    "left": ("moves to the left", "glides to the left", "slides left", "drifts from right to left", "travels left"),
    "up": ("moves up", "rises", "glides upwards", "floats upwards", "drifts up"),
    "down": ("moves down", "sinks", "glides downwards", "falls slowly", "drifts down"),
    "clockwise": ("circles clockwise", "goes round in a clockwise circle", "moves clockwise in a circle"),
    "anticlockwise": ("circles anticlockwise", "goes round in an anticlockwise circle", "circles counterclockwise"),
    "bounce": ("bounces", "bounces up and down", "hops up and down"),
    "sway": ("sways from side to side", "swings left and right", "sways left and right"),
    "grow": ("grows", "grows steadily", "gets bigger and bigger", "becomes larger"),
    "shrink": ("shrinks", "shrinks steadily", "gets smaller and smaller", "becomes smaller"),
    "spin": ("spins", "spins around", "rotates in place", "turns on the spot"),
    "still": ("stays still", "does not move", "stays where it is", "rests motionless"),
}

_PLURAL_VERBS = {"does not move": "do not move", "stays where it is": "stay where they are"}

_COUNTS = {2: ("two", "two", "a pair of"), 3: ("three",)}

_BACKGROUNDS = {
    "white": ("white", "plain white"),
    "black": ("black", "plain black"),
    "grey": ("grey", "plain grey", "gray"),
    "dark blue": ("dark blue", "navy"),
    "beige": ("beige", "plain beige"),
    "brown": ("brown", "dark brown"),
}

_PATTERNS = {
    "vertical stripes": ("{} background with vertical stripes", "vertically striped {} background"),
    "horizontal stripes": ("{} background with horizontal stripes", "horizontally striped {} background"),
    "dots": ("dotted {} background", "{} background with dots"),
    "checks": ("checked {} background", "checkered {} background"),
}

_PANS = ("while the camera pans {}", "while the camera slowly pans {}", "as the camera pans {}")

_RELATIONS = {  # each way of saying it, and whether the second thing is named first
    "left of": (("to the left of", False), ("left of", False), ("to the right of", True), ("right of", True)),
    "above": (("above", False), ("over", False), ("below", True), ("under", True)),
}

_ROWS = {"left of": ("From left to right", "In a row from left to right"), "above": ("From top to bottom",)}


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One wording of the scene, drawn by ``rng``; at most ``MAX_BYTES`` ASCII bytes."""
    while True:
        sentence = _sentence(scene, rng)
        if len(sentence) <= MAX_BYTES[len(scene.things)]:
            return sentence


def _sentence(scene: Scene, rng: np.random.Generator) -> str:
    actors = _actors(scene, rng)
    where = _background(scene.background, rng)
    if scene.pan:
        pan = _pick(_PANS, rng).format(scene.pan)
        return _closed(f"{actors} on {where} {pan}" if rng.random() < 0.5 else f"{actors} {pan}")
    chance = rng.random()
    if chance < 0.45:
        across = scene.things[0].motion in ("left", "right") and len(scene.things) == 1
        return _closed(f"{actors} {'across' if across and chance < 0.2 else 'on'} {where}")
    if chance < 0.7 and not scene.relation:
        return _closed(f"on {where}, {actors}")
    return _closed(actors)


def _actors(scene: Scene, rng: np.random.Generator) -> str:
    """Who does what, without a capital or a full stop."""
    first, others = scene.things[0], scene.things[1:]
    if not others:
        return f"{_noun(first, rng)} {_pick(_VERBS[first.motion], rng)}"
    if not scene.relation:
        number = _pick(_COUNTS[len(scene.things)], rng)
        return f"{number} {_noun(first, rng, plural=True)} {_plural_verb(first.motion, rng)}"
    if len(scene.things) == 2:
        words, swapped = _RELATIONS[scene.relation][rng.integers(4)]
        one, two = scene.things[::-1] if swapped else scene.things
        other = f"{_noun(two, rng)} that {_pick(_VERBS[two.motion], rng)}"
        if rng.random() < 0.6:
            return f"{_noun(one, rng)} that {_pick(_VERBS[one.motion], rng)} is {words} {other}"
        return f"{words} {other}, {_clause(one, rng)}"
    listed = ", ".join(_clause(thing, rng) for thing in scene.things[:-1])
    return f"{_pick(_ROWS[scene.relation], rng)}: {listed} and {_clause(scene.things[-1], rng)}"


def _clause(thing: Thing, rng: np.random.Generator) -> str:
    return f"{_noun(thing, rng)} {_pick(_VERBS[thing.motion], rng)}"


def _noun(thing: Thing, rng: np.random.Generator, plural: bool = False) -> str:
    """ "a large red star", or "large red stars"."""
    size = [_pick(_SIZES[thing.size], rng)] if rng.random() < 0.5 else []
    words = [*size, _pick(_COLOURS.get(thing.colour, (thing.colour,)), rng), _pick(_SHAPES[thing.shape], rng)]
    if plural:
        return " ".join(words) + ("es" if words[-1] == "cross" else "s")
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def _plural_verb(motion: str, rng: np.random.Generator) -> str:
    verb = _pick(_VERBS[motion], rng)
    first, _, rest = verb.partition(" ")
    if verb in _PLURAL_VERBS:
        return _PLURAL_VERBS[verb]
    stem = first[:-2] if first == "goes" else first[:-1]
    return f"{stem} {rest}".strip()


def _background(background: Background, rng: np.random.Generator) -> str:
    colour = _pick(_BACKGROUNDS[background.colour], rng)
    if background.pattern == "plain":
        return f"a {colour} {'background' if rng.random() < 0.7 else 'backdrop'}"
    if background.pattern == "gradient":
        return f"a background that fades from {background.colour} to {background.second}"
    words = _pick(_PATTERNS[background.pattern], rng).format(background.colour)
    return f"a {words}"


def _closed(sentence: str) -> str:
    return f"{sentence[0].upper()}{sentence[1:]}."


def _pick(words: Sequence[str], rng: np.random.Generator) -> str:
    return words[int(rng.integers(len(words)))]
