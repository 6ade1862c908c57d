"""Which scenes are drawn at random: a ``World`` says from what vocabulary and how often, a hash what is held out."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations, product
from typing import NamedTuple

import numpy as np

from ospnext.shapes.scene import (
    BACKGROUNDS,
    CANNOT_SPIN,
    COLOURS,
    FRAME,
    MOTIONS,
    PAN_DISTANCE,
    PANS,
    PATTERNS,
    RADII,
    REACH,
    RELATIONS,
    Background,
    Scene,
    Thing,
    tracks,
)

MARGIN = 3.0  # between a thing and the frame's edge
GAP = 9.0  # between two things, so that a blurred clip still shows two
TRAVEL = (46.0, 62.0)  # length of a path from end to end
HELD_OUT_SHARE = 0.15
GRADIENTS = (("white", "grey"), ("beige", "white"), ("dark blue", "black"), ("grey", "black"), ("brown", "black"))
_VOCABULARIES = {
    "shapes": tuple(REACH),
    "colours": tuple(COLOURS),
    "motions": tuple(MOTIONS),
    "sizes": tuple(RADII),
    "backgrounds": tuple(BACKGROUNDS),
    "patterns": tuple(PATTERNS),
}
_SIZE_OF_MOTION = {"grow": "small", "shrink": "large"}  # the size at the start, where the motion leaves no choice
_ATTEMPTS = 1000  # different scenes before giving up
_PROPOSALS = 64  # places for the things of one scene


@dataclass(frozen=True)
class World:
    """Which scenes are drawn, and how often; all fields are vocabularies or probabilities.

    ``counts`` are the odds of one, two and three things, ``alike`` the probability that several things are the same
    ("two green stars"), ``pan`` the probability of a pan where the background shows one.

    Raises:
        ValueError: a field is empty or holds a word that is not of this world, or the odds are not positive.
    """

    shapes: tuple[str, ...] = _VOCABULARIES["shapes"]
    colours: tuple[str, ...] = _VOCABULARIES["colours"]
    motions: tuple[str, ...] = _VOCABULARIES["motions"]
    sizes: tuple[str, ...] = _VOCABULARIES["sizes"]
    backgrounds: tuple[str, ...] = _VOCABULARIES["backgrounds"]
    patterns: tuple[str, ...] = _VOCABULARIES["patterns"]
    counts: tuple[float, float, float] = (0.5, 0.3, 0.2)
    alike: float = 0.4
    pan: float = 0.5

    def __post_init__(self) -> None:
        for field, vocabulary in _VOCABULARIES.items():
            words = getattr(self, field)
            unknown = sorted(set(words) - set(vocabulary))
            if unknown or not words:
                raise ValueError(f"{field} of a world are some of {', '.join(vocabulary)}, not {unknown or 'none'}")
        if len(self.counts) != 3 or min(self.counts) < 0 or sum(self.counts) <= 0:
            raise ValueError(f"counts of a world are the odds of 1, 2 and 3 things, not {self.counts}")

    @classmethod
    def full(cls) -> "World":
        """Everything: one to three things, relations, textured backgrounds, camera pans."""
        return cls()

    @classmethod
    def simple(cls) -> "World":
        """One thing on a plain background; all shapes, colours and motions."""
        return cls(patterns=("plain",), counts=(1.0, 0.0, 0.0), pan=0.0)

    @classmethod
    def large(cls) -> "World":
        """The simple world without its small things, which take a model longest to learn."""
        return replace(cls.simple(), sizes=("large",))


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
        if not (motion == "spin" and shape in CANNOT_SPIN)
        and (held_out is None or _held_out(shape, colour, motion) == held_out)
    )


@lru_cache(maxsize=4096)
def _held_out(shape: str, colour: str, motion: str) -> bool:
    digest = hashlib.sha256(f"{shape} {colour} {motion}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32
