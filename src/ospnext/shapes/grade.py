"""Read a clip of the small world back from its pixels alone, and grade it against the scene that was asked for.

Nothing is guessed: a thing whose outline, colour or path fits no word of the world well has none, so that a clip of
garbage is graded wrong.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise, permutations, product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ospnext.shapes.render import signed_distance
from ospnext.shapes.scene import COLOURS, RADII, REACH, Scene
from ospnext.shapes.segment import PATCH, PATCH_REACH, Track, segment

ATTRIBUTES = ("count", "shape", "colour", "motion", "relation", "pan")  # that a prompt may ask for
SHAPE_FLOOR = 0.75  # least overlap (IoU) with a shape's outline, reached in three quarters of the frames
ROUND_FLOOR = 0.85  # the same for circles and squares, which any blob comes near
COLOUR_CEILING = 55.0  # greatest distance to a colour, in weighted opponent RGB
MOVING, RESTING = 22.0, 12.0  # extent of a path that is a motion, and of one that is none, in pixels of 128
LEAP = 14.0  # a speed, in extents of a path per clip, at which a thing jumps; bouncing reaches 8
_SYMMETRY = {"circle": 0, "square": 4, "triangle": 3, "star": 5, "cross": 4, "ring": 0, "crescent": 1}
_ANGLES = 40  # of a full turn, at which outlines are compared
_PAN_LEAST = 12.0


@dataclass(frozen=True)
class Seen:
    """One thing as read; a name is empty where nothing fits. ``track`` is relative to the background."""

    shape: str
    colour: str
    motion: str
    size: str
    x: float
    y: float
    fits: Mapping[str, float]  # how well the outline of every shape lies on it: the lower quartile of IoU over frames
    track: np.ndarray  # [frames it was seen in, 2], pixels of a clip whose shorter side is 128


@dataclass(frozen=True)
class Reading:
    """What a clip shows: ``count`` things, of which ``things`` could be followed, and the camera's ``pan``."""

    count: int
    things: tuple[Seen, ...]
    pan: str

    def relation(self, first: int, second: int) -> str:
        """Where one thing stands to another on the whole: ``left of | right of | above | below``."""
        one, two = self.things[first], self.things[second]
        across, down = two.x - one.x, two.y - one.y
        if abs(across) > abs(down):
            return "left of" if across > 0 else "right of"
        return "above" if down > 0 else "below"


@dataclass(frozen=True)
class Grade:
    """Whether each asked attribute is right; None where the scene does not ask for it.

    ``shape_margin`` says how sure the mark of the shape is: by how much, in IoU, the outline asked for fits better than
    it must and than any other; above 0 it is right. The least over all things, -1 where one is missing.
    """

    count: bool
    shape: bool
    colour: bool
    motion: bool
    relation: bool | None = None
    pan: bool | None = None
    shape_margin: float = field(default=-1.0, kw_only=True, compare=False)

    @property
    def marks(self) -> dict[str, bool | None]:
        """Every attribute's mark."""
        return {name: getattr(self, name) for name in ATTRIBUTES}

    @property
    def all_right(self) -> bool:
        """Whether everything that was asked for is right."""
        return all(mark is not False for mark in self.marks.values())


def read(frames: np.ndarray | Tensor) -> Reading:
    """What a clip uint8 [T, H, W, 3] shows.

    Raises:
        ValueError: the clip has another shape or type, or fewer than 2 frames.
    """
    found = segment(frames)
    things = tuple(_see(track, found.pan) for track in found.tracks)
    return Reading(found.things, things, _direction(*found.pan) if np.abs(found.pan).max() > _PAN_LEAST else "")


def grade(frames: np.ndarray | Tensor, scene: Scene) -> Grade:
    """Grade a clip uint8 [T, H, W, 3] against the scene it was to show.

    Things found are matched with things asked for so that most is right; a thing that is missing or too many makes the
    count wrong, a missing one also its own attributes.

    Raises:
        ValueError: the clip has another shape or type, or fewer than 2 frames.
    """
    reading = read(frames)
    asked = scene.things
    places: list[int | None] = [*range(len(reading.things)), *[None] * max(0, len(asked) - len(reading.things))]
    orders = set(permutations(places, len(asked)))
    marks, margin = max(
        ((_marks(reading, scene, order), _margin(reading, scene, order)) for order in orders),
        key=lambda found: (sum(map(bool, found[0])), found[1]),
        default=((False,) * 4, -1.0),
    )
    shape, colour, motion, relation = marks
    return Grade(
        count=reading.count == len(asked) == len(reading.things),
        shape=shape,
        colour=colour,
        motion=motion,
        relation=relation if scene.relation else None,
        pan=reading.pan == scene.pan if scene.pan else None,
        shape_margin=margin,
    )


def _marks(reading: Reading, scene: Scene, order: tuple[int | None, ...]) -> tuple[bool, bool, bool, bool]:
    """Shape, colour, motion and relation, if the things asked for are the things found in this order."""
    seen = [None if place is None else reading.things[place] for place in order]
    shape, colour, motion = (
        all(
            one is not None and getattr(one, name) == getattr(thing, name)
            for one, thing in zip(seen, scene.things, strict=True)
        )
        for name in ("shape", "colour", "motion")
    )
    relation = not scene.relation or all(
        one is not None and two is not None and reading.relation(one, two) == scene.relation
        for one, two in pairwise(order)
    )
    return shape, colour, motion, relation


def _margin(reading: Reading, scene: Scene, order: tuple[int | None, ...]) -> float:
    """By how much the worst of these things has the shape asked for."""
    return min(
        -1.0 if place is None else shape_margin(reading.things[place].fits, thing.shape)
        for place, thing in zip(order, scene.things, strict=True)
    )


def shape_margin(fits: Mapping[str, float], shape: str) -> float:
    """By how much an outline fits better than it must and than any other, in IoU; above 0 the thing is called so."""
    other = max(fit for name, fit in fits.items() if name != shape)
    return fits[shape] - max(other, _floor(shape))


def _floor(shape: str) -> float:
    return ROUND_FLOOR if shape in ("circle", "square") else SHAPE_FLOOR


def _see(track: Track, pan: np.ndarray) -> Seen:
    fits = _fits(track.patches)
    best = max(fits, key=lambda name: fits[name])
    shape = best if fits[best] >= _floor(best) else ""
    path = np.stack([track.x, track.y], 1) + (track.times[:, None] - 0.5) * pan
    growth = _growth(np.sqrt(track.area), track.times)
    x, y = path.mean(0)
    return Seen(
        shape=shape,
        colour=_colour(track.colour),
        motion=_motion(path, track.times, growth, _turns(track.patches, shape)),
        size=_size(float(np.median(track.area[:3])), shape),
        x=float(x),
        y=float(y),
        fits=fits,
        track=path,
    )


def _fits(patches: np.ndarray) -> dict[str, float]:
    """How well each shape's outline fits, at its best angle and thickness: the lower quartile of IoU over frames."""
    bank, sizes, owner = _bank()
    flat = patches[:: max(1, len(patches) // 16)].reshape(-1, PATCH * PATCH).astype(np.float32)
    common = flat @ bank
    overlap = common / (flat.sum(1)[:, None] + sizes - common)
    names = list(REACH)
    fits = np.quantile([overlap[:, owner == i].max(1) for i in range(len(names))], 0.25, axis=1)
    return dict(zip(names, fits.tolist(), strict=True))


class _Bank(NamedTuple):
    """Outlines to compare with, [PATCH * PATCH, N] scaled to the area of patches, their sizes and whose each is [N]."""

    outlines: np.ndarray
    sizes: np.ndarray
    owner: np.ndarray


@lru_cache(maxsize=1)
def _bank() -> _Bank:
    """Every shape at every angle, upright to a full turn, each also a little thinner and fatter as blur makes it."""
    cells = (torch.arange(PATCH) + 0.5) / PATCH * 2 - 1
    y, x = torch.meshgrid(cells * PATCH_REACH, cells * PATCH_REACH, indexing="ij")
    outlines, owner = [], []
    for shape, order in _SYMMETRY.items():
        angles = np.arange(round(_ANGLES / order) if order else 1) * (2 * np.pi / _ANGLES)
        for swelling, angle in product((-0.08, 0.0, 0.08), angles):
            radius = float(np.sqrt(np.pi / _area(shape, swelling)))
            u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
            outlines.append((signed_distance(shape, u / radius, v / radius) < swelling).flatten().numpy())
            owner.append(list(REACH).index(shape))
    bank = np.stack(outlines, 1).astype(np.float32)
    return _Bank(bank, bank.sum(0), np.array(owner))


@lru_cache(maxsize=64)
def _area(shape: str, swelling: float = 0.0) -> float:
    """The area of a shape of radius 1, its outline moved out by ``swelling``."""
    grid = torch.linspace(-2, 2, 401)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    return float((signed_distance(shape, x, y) < swelling).float().mean()) * 16


def _colour(colours: np.ndarray) -> str:
    """The nearest colour name to the median of a thing's colours [K, 3], empty if none is near or they change."""
    weights = np.array([[0.15, 0.295, 0.055], [0.7, -0.59, -0.11], [-0.24, -0.472, 0.712]])
    median = np.median(colours, axis=0)
    if np.quantile(np.linalg.norm((colours - median) @ weights.T, axis=1), 0.8) > COLOUR_CEILING / 2:
        return ""
    distances = np.linalg.norm((np.array(list(COLOURS.values())) - median) @ weights.T, axis=1)
    return list(COLOURS)[int(distances.argmin())] if distances.min() < COLOUR_CEILING else ""


def _size(area: float, shape: str) -> str:
    """Small or large by the area at the start; half-way between the two counts for the nearer one."""
    radius = np.sqrt(area / _area(shape or "circle"))
    return "small" if radius < (RADII["small"][1] + RADII["large"][0]) / 2 else "large"


def _growth(radius: np.ndarray, times: np.ndarray) -> float:
    """Last over first radius, by the straight line through its logarithm over time."""
    return float(np.exp(np.polyfit(times, np.log(radius), 1)[0]))


def _turns(patches: np.ndarray, shape: str) -> float:
    """Whole turns of a thing, clockwise, by the phase of its outline's harmonic; 0 for what looks alike all round."""
    order = _SYMMETRY.get(shape, 0)
    if not order:
        return 0.0
    cells = (np.arange(PATCH) + 0.5) / PATCH * 2 - 1
    y, x = np.meshgrid(cells, cells, indexing="ij")
    weight = np.hypot(x, y) ** 3 * np.exp(1j * order * np.arctan2(y, x))
    phase = np.unwrap(np.angle((patches * weight).sum((1, 2))))
    return float(phase[-1] - phase[0]) / (2 * np.pi * order)


def _motion(path: np.ndarray, times: np.ndarray, growth: float, turns: float) -> str:
    """The motion of a path [K, 2] relative to the background at ``times`` [K]; empty if it is none, or two at once."""
    extent = np.ptp(path, axis=0)
    if extent.max() < RESTING:
        return _change(growth, turns)
    if extent.max() < MOVING or not 1 / 1.4 < growth < 1.4 or abs(turns) > 0.4:
        return ""
    if np.abs(np.diff(path, axis=0) / np.diff(times)[:, None]).max() > LEAP * extent.max():
        return ""
    start, end = path[:2].mean(0), path[-2:].mean(0)
    long = int(extent.argmax())
    straight = extent[1 - long] < 0.45 * extent[long]
    if straight and abs(end - start)[long] > 0.75 * extent[long]:
        return _direction(*(end - start))
    spoke = (path - (path.max(0) + path.min(0)) / 2) @ np.array([1, 1j])
    swept = np.diff(np.unwrap(np.angle(spoke)))
    if extent.min() > 0.55 * extent.max() and abs(swept.sum()) > 0.7 * 2 * np.pi:
        return "clockwise" if swept.sum() > 0 else "anticlockwise"
    if straight and _reversals(path[:, long], 0.35 * extent[long]) >= 2:
        return ("sway", "bounce")[long]
    return ""


def _change(growth: float, turns: float) -> str:
    """The motion of a thing that stays in its place."""
    if abs(turns) > 0.6 and 1 / 1.3 < growth < 1.3:
        return "spin"
    if abs(turns) > 0.3:
        return ""
    if growth > 1.35:
        return "grow"
    if growth < 1 / 1.35:
        return "shrink"
    return "still" if 1 / 1.2 < growth < 1.2 else ""


def _reversals(values: np.ndarray, least: float) -> int:
    """How often values turn back by at least ``least``."""
    turns, direction, extreme = 0, 0, values[0]
    for value in values:
        if direction * (value - extreme) >= 0 and direction:
            extreme = value
        elif abs(value - extreme) > least:
            turns += direction != 0
            direction, extreme = (1 if value > extreme else -1), value
    return turns


def _direction(x: float, y: float) -> str:
    if abs(x) > abs(y):
        return "right" if x > 0 else "left"
    return "down" if y > 0 else "up"
