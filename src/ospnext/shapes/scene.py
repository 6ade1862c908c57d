"""What a scene of the small verifiable world is: its vocabulary, its things, and how they move.

Lengths are pixels of a ``FRAME`` x ``FRAME`` picture, x to the right and y down; the renderer scales them to any frame.
Time runs from 0 (first frame) to 1 (last frame). A scene says everything about a clip: its pixels are a function of it.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

FRAME = 128.0
PAN_DISTANCE = 28.0  # how far the camera travels in a clip

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

CANNOT_SPIN = ("circle", "ring")


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
        if self.motion == "spin" and self.shape in CANNOT_SPIN:
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


@lru_cache(maxsize=1)
def _weights() -> dict[str, np.ndarray]:
    """Each motion's weights on the basis, [2 axes, curves]."""
    names = tuple(_basis(1))
    return {
        name: np.array([[axis.get(curve, 0.0) for curve in names] for axis in (motion.dx, motion.dy)])
        for name, motion in MOTIONS.items()
    }
