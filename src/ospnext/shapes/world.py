"""The small verifiable world: what its scenes are made of, how things move, and how scenes are drawn at random.

Lengths are pixels of a ``FRAME`` x ``FRAME`` picture, x to the right and y down; the renderer scales them to any frame.
Time runs from 0 (first frame) to 1 (last frame). A scene says everything about a clip: its pixels are a function of it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product
from typing import Any, NamedTuple

import numpy as np

FRAME = 128.0
MARGIN = 3.0  # between a thing and the frame's edge
GAP = 9.0  # between two things, so that a blurred clip still shows two
PAN_DISTANCE = 28.0  # how far the camera travels in a clip
TRAVEL = (46.0, 62.0)  # length of a path from end to end
HELD_OUT_SHARE = 0.15

REACH = {"circle": 1.0, "square": 1.27, "triangle": 1.42, "star": 1.42, "cross": 1.25, "ring": 1.14, "crescent": 1.53}
"""Distance from each shape's centroid to its farthest point, in radii; its keys are the shapes."""

COLOURS = {
    "red": (224, 40, 42),
    "orange": (250, 132, 16),
    "yellow": (252, 218, 36),
    "green": (38, 168, 66),
    "cyan": (36, 206, 220),
    "blue": (36, 88, 232),
    "purple": (132, 44, 186),
    "pink": (252, 124, 190),
}

BACKGROUNDS = {
    "white": (246, 246, 243),
    "black": (16, 16, 19),
    "grey": (136, 137, 141),
    "dark blue": (22, 28, 70),
    "beige": (232, 218, 190),
    "brown": (84, 58, 44),
}

RADII = {"small": (11.0, 12.5), "large": (18.5, 20.5)}
"""The range of a thing's radius at the start of a clip, for each size."""

PANS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
"""The direction in which the camera looks further and further; the picture moves the other way."""

PATTERNS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "gradient": (),
    "vertical stripes": ("left", "right"),
    "horizontal stripes": ("up", "down"),
    "dots": tuple(PANS),
    "checks": tuple(PANS),
}
"""Patterns of a background, each with the pans that can be seen on it."""

GRADIENTS = (("white", "grey"), ("beige", "white"), ("dark blue", "black"), ("grey", "black"), ("brown", "black"))
RELATIONS = ("left of", "above")


class Motion(NamedTuple):
    """A motion as weights on ``_basis``: ``dx``, ``dy`` times the travel, final over first radius, turns clockwise."""

    dx: Mapping[str, float] = {}
    dy: Mapping[str, float] = {}
    growth: float = 1.0
    turns: float = 0.0


MOTIONS = {
    "right": Motion(dx={"glide": 1.0}),
    "left": Motion(dx={"glide": -1.0}),
    "up": Motion(dy={"glide": -1.0}),
    "down": Motion(dy={"glide": 1.0}),
    "clockwise": Motion(dx={"sine": 1.0}, dy={"cosine": -1.0}),
    "anticlockwise": Motion(dx={"sine": -1.0}, dy={"cosine": -1.0}),
    "bounce": Motion(dy={"hop": -1.0}),
    "sway": Motion(dx={"swing": 1.0}),
    "grow": Motion(growth=1.75),
    "shrink": Motion(growth=1 / 1.75),
    "spin": Motion(turns=1.0),
    "still": Motion(),
}

_SIZE_OF_MOTION = {"grow": "small", "shrink": "large"}  # the size at the start, where the motion leaves no choice
_CANNOT_SPIN = ("circle", "ring")
_ATTEMPTS = 1000  # different scenes before giving up
_PROPOSALS = 64  # places for the things of one scene


def _basis(frames: int) -> dict[str, np.ndarray]:
    """The curves that paths are made of, [frames] each, all within -0.5..0.5."""
    t = np.linspace(0.0, 1.0, frames) if frames > 1 else np.zeros(1)
    hop = 2 * t - np.floor(2 * t)
    return {
        "glide": t - 0.5,
        "sine": np.sin(2 * np.pi * t) / 2,
        "cosine": np.cos(2 * np.pi * t) / 2,
        "swing": np.sin(4 * np.pi * t) / 2,
        "hop": 4 * hop * (1 - hop) - 0.5,
    }


def _known(what: str, name: str, vocabulary: Iterable[str]) -> None:
    if name not in vocabulary:
        raise ValueError(f"{what} {name!r} is not of this world: use one of {', '.join(vocabulary)}")


@dataclass(frozen=True)
class Thing:
    """One coloured shape: (``x``, ``y``) is the middle of its path, ``radius`` its size at the start.

    Raises:
        ValueError: a name is not in the vocabularies above, or a circle or ring is to spin.
    """

    shape: str
    colour: str
    size: str
    motion: str
    x: float
    y: float
    radius: float
    travel: float = 0.0

    def __post_init__(self) -> None:
        _known("shape", self.shape, REACH)
        _known("colour", self.colour, COLOURS)
        _known("size", self.size, RADII)
        _known("motion", self.motion, MOTIONS)
        if self.motion == "spin" and self.shape in _CANNOT_SPIN:
            raise ValueError(f"a {self.shape} cannot be seen to spin: choose another motion or shape")


@dataclass(frozen=True)
class Background:
    """A ``pattern`` in a ``colour``; a gradient runs from ``colour`` at the top to ``second`` at the bottom."""

    pattern: str = "plain"
    colour: str = "white"
    second: str = ""

    def __post_init__(self) -> None:
        _known("pattern", self.pattern, PATTERNS)
        _known("background colour", self.colour, BACKGROUNDS)
        if self.pattern == "gradient":
            _known("second background colour", self.second, BACKGROUNDS)


@dataclass(frozen=True)
class Scene:
    """One to three things on a background.

    With a ``relation`` the things differ, and each is left of (or above) the next; several without one are alike.
    ``pan`` names where the camera turns, or is empty. ``things[0]`` comes first in the relation.
    """

    things: tuple[Thing, ...]
    background: Background = Background()
    pan: str = ""
    relation: str = ""

    def __post_init__(self) -> None:
        if not 1 <= len(self.things) <= 3:
            raise ValueError(f"a scene holds 1 to 3 things, not {len(self.things)}")
        if self.pan and self.pan not in PATTERNS[self.background.pattern]:
            raise ValueError(
                f"pan {self.pan!r} cannot be seen on {self.background.pattern!r}: choose another background"
            )
        if self.relation:
            _known("relation", self.relation, RELATIONS)

    def to_dict(self) -> dict[str, Any]:
        """The scene as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Scene":
        """The scene that ``to_dict`` wrote.

        Raises:
            ValueError: a key is missing or unknown, or a value is not of this world.
        """
        try:
            return cls(
                things=tuple(Thing(**thing) for thing in values["things"]),
                background=Background(**values["background"]),
                pan=values["pan"],
                relation=values["relation"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a scene ({error}): {json.dumps(values)[:200]}") from error


@dataclass(frozen=True)
class World:
    """Which scenes are drawn, and how often; all fields are vocabularies or probabilities.

    ``counts`` are the odds of one, two and three things, ``alike`` the probability that several things are the same
    ("two green stars"), ``pan`` the probability of a pan where the background shows one.
    """

    shapes: tuple[str, ...] = tuple(REACH)
    colours: tuple[str, ...] = tuple(COLOURS)
    motions: tuple[str, ...] = tuple(MOTIONS)
    sizes: tuple[str, ...] = tuple(RADII)
    backgrounds: tuple[str, ...] = tuple(BACKGROUNDS)
    patterns: tuple[str, ...] = tuple(PATTERNS)
    counts: tuple[float, float, float] = (0.5, 0.3, 0.2)
    alike: float = 0.4
    pan: float = 0.5

    @classmethod
    def full(cls) -> "World":
        """Everything: one to three things, relations, textured backgrounds, camera pans."""
        return cls()

    @classmethod
    def simple(cls) -> "World":
        """One thing on a plain background; all shapes, colours and motions."""
        return cls(patterns=("plain",), counts=(1.0, 0.0, 0.0), pan=0.0)


class Tracks(NamedTuple):
    """Where things are in the picture, each [things, frames]: centre ``x``, ``y`` and ``radius`` in pixels, ``angle``
    in radians, clockwise as seen."""

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    angle: np.ndarray


def camera(pan: str, frames: int) -> np.ndarray:
    """How far the camera has gone at each frame, [frames, 2] in pixels; zero in the middle of the clip."""
    direction = np.asarray(PANS[pan] if pan else (0.0, 0.0))
    return PAN_DISTANCE * _basis(frames)["glide"][:, None] * direction


def tracks(things: Sequence[Thing], frames: int, pans: Sequence[str] = ()) -> Tracks:
    """The paths of things as the camera sees them; ``pans`` gives each thing's camera, still where left out."""
    basis = _basis(frames)
    curves = np.stack(list(basis.values()))
    weights = np.array([_weights()[thing.motion] for thing in things])
    placement = np.array([(thing.x, thing.y, thing.radius, thing.travel) for thing in things])
    offsets = np.einsum("nak,kt->ant", weights, curves) * placement[:, 3, None]
    if any(pans):
        offsets = offsets - np.stack([camera(pan, frames) for pan in pans]).transpose(2, 0, 1)
    t = basis["glide"] + 0.5
    growth = np.array([MOTIONS[thing.motion].growth for thing in things])[:, None]
    turns = np.array([MOTIONS[thing.motion].turns for thing in things])[:, None]
    return Tracks(
        x=placement[:, 0, None] + offsets[0],
        y=placement[:, 1, None] + offsets[1],
        radius=placement[:, 2, None] * (1 + (growth - 1) * t),
        angle=2 * np.pi * turns * t,
    )


def is_held_out(scene: Scene) -> bool:
    """Whether a thing of the scene has a combination of shape, colour and motion that training never shows."""
    return any(_held_out(thing.shape, thing.colour, thing.motion) for thing in scene.things)


def sample_scene(rng: np.random.Generator, world: World, held_out: bool | None = False) -> Scene:
    """Draw a scene; its things stay in the frame and apart from each other over the whole clip.

    ``held_out``: False draws what training may show, True scenes with at least one held-out combination, None any.

    Raises:
        ValueError: the world has no combination of that kind, or none that fits the frame.
    """
    count = 1 + int(np.searchsorted(np.cumsum(world.counts), rng.random() * sum(world.counts), side="right"))
    alike = count > 1 and rng.random() < world.alike
    relation = RELATIONS[rng.integers(len(RELATIONS))] if count > 1 and not alike else ""
    for _ in range(_ATTEMPTS):
        background = _sample_background(rng, world)
        visible = PATTERNS[background.pattern]
        pan = visible[rng.integers(len(visible))] if visible and rng.random() < world.pan else ""
        kinds = _sample_kinds(rng, world, 1 if alike else count, held_out)
        things = _place(rng, _actors(rng, world, kinds * count if alike else kinds), pan, relation)
        if things:
            return Scene(things, background, pan, relation)
    raise ValueError(
        f"no scene fits the frame after {_ATTEMPTS} attempts: allow smaller sizes or fewer things in {world}"
    )


class _Kind(NamedTuple):
    shape: str
    colour: str
    motion: str


def _sample_kinds(rng: np.random.Generator, world: World, count: int, held_out: bool | None) -> list[_Kind]:
    """``count`` different kinds in random order, of which the first drawn is held out if that is asked."""
    kinds: list[_Kind] = []
    for _ in range(count):
        wanted = None if held_out and kinds else held_out
        choices = _kinds(world, wanted)
        drawn = (choices[rng.integers(len(choices))] for _ in range(_ATTEMPTS if choices else 0))
        kind = next((kind for kind in drawn if all(kind[:2] != other[:2] for other in kinds)), None)
        if kind is None:
            raise ValueError(f"the world has too few shapes, colours and motions (held_out={wanted}): widen it")
        kinds.append(kind)
    return [kinds[i] for i in rng.permutation(count)] if count > 1 else kinds


def _actors(rng: np.random.Generator, world: World, kinds: Sequence[_Kind]) -> list[Thing]:
    """Things of these kinds, all in the middle of the frame; those alike share size and path."""
    things: list[Thing] = []
    for index, kind in enumerate(kinds):
        if index and kind == kinds[index - 1]:
            things.append(things[-1])
            continue
        sizes = world.sizes if len(kinds) < 3 else ("small",)
        size = _SIZE_OF_MOTION.get(kind.motion) or sizes[rng.integers(len(sizes))]
        motion = MOTIONS[kind.motion]
        travel = float(rng.uniform(*TRAVEL)) if motion.dx or motion.dy else 0.0
        radius = float(rng.uniform(*RADII[size]))
        things.append(Thing(kind.shape, kind.colour, size, kind.motion, FRAME / 2, FRAME / 2, radius, travel))
    return things


def _place(rng: np.random.Generator, things: Sequence[Thing], pan: str, relation: str) -> tuple[Thing, ...]:
    """The things at places where they keep within the frame and apart; empty if no such place was found."""
    room = np.array([_room(thing, pan) for thing in things])
    if room.min() < 0:
        return ()
    count = len(things)
    places = FRAME / 2 + rng.uniform(-1.0, 1.0, (1 if count == 1 else _PROPOSALS, count, 2)) * room
    if relation:
        axis = RELATIONS.index(relation)
        places[..., axis] = np.clip(np.sort(places[..., axis]), *(FRAME / 2 + sign * room[:, axis] for sign in (-1, 1)))
    place = next(_apart(things, places, relation), None) if count > 1 else places[0]
    if place is None:
        return ()
    return tuple(
        dataclasses.replace(thing, x=float(x), y=float(y)) for thing, (x, y) in zip(things, place, strict=True)
    )


def _room(thing: Thing, pan: str) -> tuple[float, float]:
    """How far the middle of a thing's path may be from the middle of the frame, along x and y; negative for nowhere."""
    motion = MOTIONS[thing.motion]
    rest = FRAME / 2 - MARGIN - REACH[thing.shape] * thing.radius * max(1.0, motion.growth)
    pans = PANS[pan] if pan else (0.0, 0.0)
    x, y = (
        rest - (thing.travel * bool(path) + PAN_DISTANCE * abs(turn)) / 2
        for path, turn in zip((motion.dx, motion.dy), pans, strict=True)
    )
    return x, y


def _apart(things: Sequence[Thing], places: np.ndarray, relation: str) -> Iterator[np.ndarray]:
    """Those of ``places`` [proposals, things, 2] that keep things apart throughout and make their relation plain.

    A relation holds at every moment along its axis, and on the average over the clip outweighs the other axis.
    """
    path = tracks(things, 33)
    reach = path.radius * np.array([REACH[thing.shape] for thing in things])[:, None]
    offsets = np.stack([path.x, path.y]) - FRAME / 2
    pairs = list(combinations(range(len(things)), 2))
    good = np.ones(len(places), dtype=bool)
    for i, j in pairs if relation else ():
        axis = RELATIONS.index(relation)
        steps, drift = (places[:, j] - places[:, i]).T, offsets[:, j] - offsets[:, i]
        good &= steps[axis] + drift[axis].min() > 14
        if j == i + 1:
            mean = np.abs(steps + drift.mean(1)[:, None])
            good &= mean[axis] > mean[1 - axis] + 8
    for place in places[good]:
        paths = offsets + place.T[:, :, None]
        if all(np.all(np.hypot(*(paths[:, i] - paths[:, j])) > reach[i] + reach[j] + GAP) for i, j in pairs):
            yield place


def _sample_background(rng: np.random.Generator, world: World) -> Background:
    pattern = world.patterns[rng.integers(len(world.patterns))]
    if pattern == "gradient":
        return Background(pattern, *GRADIENTS[rng.integers(len(GRADIENTS))])
    return Background(pattern, world.backgrounds[rng.integers(len(world.backgrounds))])


@lru_cache(maxsize=64)
def _kinds(world: World, held_out: bool | None) -> tuple[_Kind, ...]:
    """All combinations of the world that can be seen, those held out or not if asked."""
    return tuple(
        _Kind(shape, colour, motion)
        for shape, colour, motion in product(world.shapes, world.colours, world.motions)
        if not (motion == "spin" and shape in _CANNOT_SPIN)
        and (held_out is None or _held_out(shape, colour, motion) == held_out)
    )


@lru_cache(maxsize=4096)
def _held_out(shape: str, colour: str, motion: str) -> bool:
    digest = hashlib.sha256(f"{shape} {colour} {motion}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


@lru_cache(maxsize=1)
def _weights() -> dict[str, np.ndarray]:
    """Each motion's weights on the basis, [2 axes, curves]."""
    names = tuple(_basis(1))
    return {
        name: np.array([[axis.get(curve, 0.0) for curve in names] for axis in (motion.dx, motion.dy)])
        for name, motion in MOTIONS.items()
    }
