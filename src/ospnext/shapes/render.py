"""Draw scenes as video, in torch on any device: signed distance functions, anti-aliased, lit from the upper left.

A clip is a function of its scene alone. All frames of many clips are drawn at once: no loop runs over pixels, frames
or clips, only over kinds of shapes and backgrounds and over the (at most three) things of a scene.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ospnext.shapes.scene import BACKGROUNDS, COLOURS, FRAME, REACH, Background, Scene, Thing, Tracks, camera, tracks

CHUNK_PIXELS = 2**25  # pixels drawn at once on an accelerator, about 3 GB
CHUNK_PIXELS_CPU = 2**20  # the same on a CPU: what its caches hold is drawn twice as fast
TEXTURE_PERIOD = 24.0  # pixels of a FRAME-sized picture
TEXTURE_CONTRAST = 0.11  # how far the second tone of a texture is from the first


def render(
    scenes: Sequence[Scene],
    frames: int = 33,
    height: int = 128,
    width: int = 128,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Draw scenes as uint8 RGB [scenes, frames, height, width, 3] on ``device``.

    The square world fills the middle of a frame that is not square.

    Raises:
        ValueError: there is no scene, or a size is not positive.
    """
    if not scenes or min(frames, height, width) < 1:
        raise ValueError(f"nothing to draw: {len(scenes)} scenes of {frames} x {height} x {width}")
    device = torch.device(device)
    step = max(1, (CHUNK_PIXELS_CPU if device.type == "cpu" else CHUNK_PIXELS) // (frames * height * width))
    chunks = [scenes[i : i + step] for i in range(0, len(scenes), step)]
    return torch.cat([_draw(chunk, frames, height, width, device) for chunk in chunks])


def signed_distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Distance to the outline of an upright shape of radius 1 around its centroid, negative inside; y points down.

    Exact near the outline; off a corner it is the distance to the circle that touches the farthest ones.
    """
    return torch.maximum(_SHAPES[shape](x, y), torch.hypot(x, y) - REACH[shape])


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 1.0


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.9


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs() * (math.sqrt(3) / 2) - y / 2, y) - 0.71


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points: fold the plane to half a point, then measure from the line between its tip and its valley."""
    tip, valley, sector = 1.42, 0.62, math.pi / 5
    angle = torch.atan2(x, -y)
    folded = (angle - 2 * sector * torch.round(angle / (2 * sector))).abs()
    radius = torch.hypot(x, y)
    across, along = radius * folded.sin(), radius * folded.cos()
    line_x, line_y = valley * math.sin(sector), valley * math.cos(sector) - tip
    length = math.hypot(line_x, line_y)
    return (across * -line_y + (along - tip) * line_x) / length


def _cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.minimum(torch.maximum(x - 1.17, y - 0.41), torch.maximum(x - 0.41, y - 1.17))


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.87).abs() - 0.27


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    """A moon open to the right: a disc with a smaller disc taken out."""
    x = x - 0.455
    return torch.maximum(torch.hypot(x, y) - 1.19, 0.95 - torch.hypot(x - 0.61, y))


_SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "crescent": _crescent,
}


def _draw(scenes: Sequence[Scene], frames: int, height: int, width: int, device: torch.device) -> Tensor:
    scale = min(height, width) / FRAME
    x = ((torch.arange(width, device=device) + 0.5 - width / 2) / scale + FRAME / 2).view(1, 1, 1, width)
    y = ((torch.arange(height, device=device) + 0.5 - height / 2) / scale + FRAME / 2).view(1, 1, height, 1)
    picture = _backgrounds(scenes, x, y, frames)
    for slot in range(max(len(scene.things) for scene in scenes)):
        clips = [i for i, scene in enumerate(scenes) if len(scene.things) > slot]
        things = [scenes[i].things[slot] for i in clips]
        path = tracks(things, frames, [scenes[i].pan for i in clips])
        if len(clips) == len(scenes):
            _paint(picture, things, path, x, y, 1 / scale)
        else:
            index = torch.tensor(clips, device=device)
            picture[index] = _paint(picture[index], things, path, x, y, 1 / scale)
    return picture.mul_(255).round_().clamp_(0, 255).to(torch.uint8)


def _paint(picture: Tensor, things: Sequence[Thing], path: Tracks, x: Tensor, y: Tensor, pixel: float) -> Tensor:
    """Paint a thing and its shadow into each clip of ``picture``, in place; ``pixel`` is its side in the world."""
    centre_x, centre_y, radius, angle = (_per_frame(curve, x) for curve in path)
    across, down = (x - centre_x) / radius, (y - centre_y) / radius
    distance = _distances(things, across, down, angle)
    cover = _smooth(0.5 - distance * radius / (1.5 * pixel))
    light = 1 - 0.09 * (across + down) - 0.1 * _smooth(1 + distance / 0.22)
    fall = _distances(things, across - 0.14, down - 0.26, angle)  # of the shadow, down and to the right
    shade = 1 - 0.24 * _smooth(0.42 - fall / 0.75) * (1 - cover)
    colour = torch.tensor([COLOURS[thing.colour] for thing in things], device=x.device).view(-1, 1, 1, 1, 3) / 255
    return picture.mul_(shade[..., None]).lerp_((colour * light[..., None]).clamp_(0, 1), cover[..., None])


def _distances(things: Sequence[Thing], across: Tensor, down: Tensor, angle: Tensor) -> Tensor:
    """Each clip's signed distance to the outline of its thing, turned by ``angle``, in radii."""
    distance = torch.empty(torch.broadcast_shapes(across.shape, down.shape), device=across.device)
    for shape in {thing.shape for thing in things}:
        clips = torch.tensor([i for i, thing in enumerate(things) if thing.shape == shape], device=across.device)
        cos, sin, u, v = angle[clips].cos(), angle[clips].sin(), across[clips], down[clips]
        distance[clips] = signed_distance(shape, u * cos + v * sin, v * cos - u * sin)
    return distance


def _backgrounds(scenes: Sequence[Scene], x: Tensor, y: Tensor, frames: int) -> Tensor:
    """The empty stage, float 0..1 [scenes, frames, height, width, 3]."""
    shift = _per_frame(np.stack([camera(scene.pan, frames) for scene in scenes]), x)
    first = _colours([scene.background.colour for scene in scenes], x)
    second = torch.cat([_second_tone(scene.background, x) for scene in scenes])
    amount = torch.zeros(len(scenes), frames, y.shape[2], x.shape[3], device=x.device)
    for pattern, texture in _TEXTURES.items():
        which = [i for i, scene in enumerate(scenes) if scene.background.pattern == pattern]
        if which:
            clips = torch.tensor(which, device=x.device)
            amount[clips] = texture(x + shift[clips, ..., 0], y + shift[clips, ..., 1])
    return torch.lerp(first, second, amount[..., None])


def _second_tone(background: Background, like: Tensor) -> Tensor:
    if background.pattern == "gradient":
        return _colours([background.second], like)
    tone = _colours([background.colour], like)
    return tone + TEXTURE_CONTRAST * (1 if tone.mean() < 0.5 else -1)


def _wave(u: Tensor) -> Tensor:
    """A soft-edged square wave of period 1, from 0 to 1."""
    return _smooth(0.5 + 2.2 * torch.cos(2 * math.pi * u))


def _dots(x: Tensor, y: Tensor) -> Tensor:
    u, v = x / TEXTURE_PERIOD, y / TEXTURE_PERIOD
    return _smooth(0.5 + (0.3 - torch.hypot(u - u.round(), v - v.round())) * TEXTURE_PERIOD / 2)


_TEXTURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gradient": lambda x, y: (y / FRAME).clamp(0, 1).expand(*y.shape[:3], x.shape[3]),
    "vertical stripes": lambda x, y: _wave(x / TEXTURE_PERIOD),
    "horizontal stripes": lambda x, y: _wave(y / TEXTURE_PERIOD),
    "dots": _dots,
    "checks": lambda x, y: _smooth(
        0.5 + 2.2 * (math.pi * x / TEXTURE_PERIOD).sin() * (math.pi * y / TEXTURE_PERIOD).sin()
    ),
}


def _smooth(u: Tensor) -> Tensor:
    """The smooth step: 0 up to u = 0, 1 from u = 1 on."""
    u = u.clamp(0, 1)
    return u * u * (3 - 2 * u)


def _colours(names: Sequence[str], like: Tensor) -> Tensor:
    return torch.tensor([BACKGROUNDS[name] for name in names], device=like.device).view(-1, 1, 1, 1, 3) / 255


def _per_frame(curves: np.ndarray, like: Tensor) -> Tensor:
    """Curves [clips, frames, ...] as a tensor [clips, frames, 1, 1, ...]."""
    return torch.from_numpy(curves.astype(np.float32)).to(like.device)[:, :, None, None]
