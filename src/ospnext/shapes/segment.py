"""Find the things in a clip of the small world from its pixels: background, foreground, blobs, tracks, camera.

Everything is measured on a copy of the clip whose shorter side is ``SIDE`` pixels, in which lengths are given.
"""

from itertools import pairwise, permutations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 128
PATCH = 36  # cells of a normalised picture of a thing, along each side
PATCH_REACH = 1.95  # how far it reaches from the centroid, in radii of the disc of equal area
_OPPONENT = ((0.105, 0.2065, 0.0385), (0.7, -0.59, -0.11), (-0.24, -0.472, 0.712))  # luma (weighted low), red, blue
_FOREGROUND = (
    30.0  # distance from the background, in which things are 75 or more away and shadows and textures below 20
)
_MIN_AREA = 70.0
_MAX_THINGS = 4
_PAN_STEPS, _PAN_SEARCH = 8, 7  # pairs of frames compared, and how far a background may shift between them


class Track(NamedTuple):
    """One thing over the frames in which it was seen.

    ``times`` [K] in 0..1; centroid ``x``, ``y`` and ``area`` [K] in pixels of the measured copy; ``colour`` [K, 3] its
    mean RGB; ``patches`` bool [K, PATCH, PATCH] its outline around its centroid, scaled to one area.
    """

    times: np.ndarray
    x: np.ndarray
    y: np.ndarray
    area: np.ndarray
    colour: np.ndarray
    patches: np.ndarray


class Segments(NamedTuple):
    """What a clip holds: how many things, their tracks (none where they are not steady), the camera's whole travel."""

    things: int
    tracks: list[Track]
    pan: np.ndarray


class _Blobs(NamedTuple):
    """The connected regions of all frames: ``frame``, centroid, ``area`` [N], mean ``colour`` [N, 3], a typical
    ``distance`` [N] from the background, and ``label`` [N] in the picture of labels."""

    frame: np.ndarray
    x: np.ndarray
    y: np.ndarray
    area: np.ndarray
    colour: np.ndarray
    distance: np.ndarray
    label: np.ndarray


def segment(frames: np.ndarray | Tensor) -> Segments:
    """Find the things of a clip uint8 [T, H, W, 3].

    Raises:
        ValueError: the clip has another shape or type, or fewer than 2 frames.
    """
    clip = torch.as_tensor(frames).cpu()
    if clip.dtype != torch.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or len(clip) < 2:
        raise ValueError(f"frames must be uint8 [T, H, W, 3] with T >= 2, not {clip.dtype} {list(clip.shape)}")
    picture = clip.permute(0, 3, 1, 2).float()
    if min(picture.shape[2:]) != SIDE:
        scale = SIDE / min(picture.shape[2:])
        size = [round(side * scale) for side in picture.shape[2:]]
        picture = F.interpolate(picture, size, mode="area" if scale < 1 else "bilinear")
    picture = _softened(picture.contiguous())
    deviation = _deviation(picture)
    distance = deviation.square().sum(1).sqrt_().numpy()
    foreground = distance > _FOREGROUND
    pan = _camera(deviation[:, 0].numpy(), foreground)
    if foreground.mean() > 0.6:
        return Segments(0, [], pan)
    labels = _label(foreground)
    blobs = _blobs(labels, distance, picture.numpy())
    per_frame = np.bincount(blobs.frame, minlength=len(clip))
    count = int(np.bincount(per_frame).argmax())
    steady = np.flatnonzero(per_frame == count)
    if not 1 <= count <= _MAX_THINGS or len(steady) < 0.75 * len(clip):
        return Segments(count, [], pan)
    patches = _patches(blobs, labels, distance)
    return Segments(count, _tracks(blobs, patches, steady, len(clip)), pan)


def _softened(picture: Tensor) -> Tensor:
    """The mean over 3 x 3 pixels, against noise; edges repeat."""
    softened = torch.empty_like(picture)
    for frame, result in zip(picture, softened, strict=True):  # one at a time stays in the cache
        (wide,) = F.pad(frame[None], (1, 1, 1, 1), mode="replicate")
        rows = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
        torch.add(rows[..., :-2], rows[..., 1:-1], out=result)
        result += rows[..., 2:]
        result /= 9
    return softened


def _deviation(picture: Tensor) -> Tensor:
    """How each pixel of [T, 3, H, W] differs from the background, a straight vertical gradient, in opponent colours.

    Each row's median sees the background; the line through them is fitted to least absolute error.
    """
    colours = torch.einsum("dc,tchw->tdhw", torch.tensor(_OPPONENT), picture)
    pixels = colours[::2, :, :, ::2].permute(2, 1, 0, 3).flatten(2).numpy()
    middle = (pixels.shape[2] - 1) // 2
    rows = torch.from_numpy(np.partition(pixels, middle)[..., middle])  # [H, 3]; torch's median takes twice as long
    height = torch.linspace(-1, 1, len(rows))
    design = torch.stack([torch.ones_like(height), height], 1)
    weights = torch.ones_like(rows)
    line = rows
    for _ in range(12):
        normal = torch.einsum("hi,hc,hj->cij", design, weights, design)
        line = design @ torch.linalg.solve(normal, torch.einsum("hi,hc->ci", design, weights * rows)).T
        weights = 1 / (rows - line).abs().clamp(min=1.0)
    return colours - line.T[None, :, :, None]


def _label(mask: np.ndarray) -> np.ndarray:
    """Number the connected regions of each frame of bool [T, H, W]: int32, 0 for none; by runs of pixels in rows."""
    count, height, width = mask.shape
    padded = np.zeros((count * height, width + 2), np.int8)
    padded[:, 1:-1] = mask.reshape(-1, width)
    change = np.diff(padded, axis=1)
    row, start = np.nonzero(change == 1)
    end = np.nonzero(change == -1)[1]
    stride = width + 2
    below = (row + 1) * stride
    first = np.searchsorted(row * stride + end, below + start, side="right")
    last = np.searchsorted(row * stride + start, below + end, side="left")
    last = np.where((row + 1) % height == 0, first, np.maximum(first, last))  # nothing lies below a frame's last row
    links = last - first
    upper = np.repeat(np.arange(len(row)), links)
    lower = np.arange(links.sum()) - np.repeat(np.cumsum(links) - links, links) + np.repeat(first, links)
    root = np.arange(len(row))
    while len(upper):
        least = np.minimum(root[upper], root[lower])
        if (root[upper] == least).all() and (root[lower] == least).all():
            break
        np.minimum.at(root, root[upper], least)
        np.minimum.at(root, root[lower], least)
        root = root[root]
    labels = np.zeros(mask.size, np.int32)
    labels[np.flatnonzero(mask)] = np.repeat(np.unique(root, return_inverse=True)[1] + 1, end - start)
    return labels.reshape(mask.shape)


def _blobs(labels: np.ndarray, distance: np.ndarray, picture: np.ndarray) -> _Blobs:
    """Measure the regions within the outline where a thing covers half of a pixel; small ones are dropped."""
    where = np.flatnonzero(labels)
    label, far = labels.ravel()[where], distance.ravel()[where]
    total = np.bincount(label, far)
    typical = np.bincount(label, far**2) / np.maximum(total, 1e-6)
    inside = far > typical[label] / 2
    where, label, far = where[inside], label[inside], far[inside]
    area = np.bincount(label, minlength=len(typical)).astype(float)
    frame, y, x = np.unravel_index(where, labels.shape)
    size = np.maximum(area, 1)
    core = far > 0.8 * typical[label]
    pixels = picture[frame[core], :, y[core], x[core]]
    hues = [np.bincount(label[core], pixels[:, channel], len(typical)) for channel in range(3)]
    cores = np.maximum(np.bincount(label[core], minlength=len(typical)), 1)
    measured = _Blobs(
        frame=(np.bincount(label, frame, len(typical)) / size).round().astype(int),
        x=np.bincount(label, x, len(typical)) / size,
        y=np.bincount(label, y, len(typical)) / size,
        area=area,
        colour=np.stack(hues, 1) / cores[:, None],
        distance=typical,
        label=np.arange(len(typical)),
    )
    kept = np.flatnonzero(area >= _MIN_AREA)
    kept = kept[np.argsort(measured.frame[kept], kind="stable")]
    return _Blobs(*(values[kept] for values in measured))


def _patches(blobs: _Blobs, labels: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """The outline of each blob around its centroid, scaled to one area, sampled bilinearly: bool [N, PATCH, PATCH]."""
    cells = (np.arange(PATCH) + 0.5) / PATCH * 2 - 1
    radius = np.sqrt(blobs.area / np.pi) * PATCH_REACH
    height, width = labels.shape[1:]
    y = np.clip(blobs.y[:, None] + radius[:, None] * cells, 0, height - 1.001)[:, :, None]
    x = np.clip(blobs.x[:, None] + radius[:, None] * cells, 0, width - 1.001)[:, None, :]
    frame = blobs.frame[:, None, None]
    top, left = y.astype(int), x.astype(int)
    v, u = y - top, x - left
    upper = distance[frame, top, left] * (1 - u) + distance[frame, top, left + 1] * u
    lower = distance[frame, top + 1, left] * (1 - u) + distance[frame, top + 1, left + 1] * u
    own = labels[frame, y.round().astype(int), x.round().astype(int)] == blobs.label[:, None, None]
    return own & (upper * (1 - v) + lower * v > blobs.distance[:, None, None] / 2)


def _tracks(blobs: _Blobs, patches: np.ndarray, steady: np.ndarray, frames: int) -> list[Track]:
    """Follow the things through the steady frames, by the assignment of least change of place and colour."""
    members = np.stack([np.flatnonzero(blobs.frame == frame) for frame in steady])
    places = np.concatenate([np.stack([blobs.x, blobs.y], 1), blobs.colour / 4], 1)
    for before, now in pairwise(members):
        orders = [list(order) for order in permutations(range(len(now)))]
        costs = [np.square(places[now[order]] - places[before]).sum() for order in orders]
        now[:] = now[orders[int(np.argmin(costs))]]
    times = steady / (frames - 1)
    return [
        Track(times, blobs.x[own], blobs.y[own], blobs.area[own], blobs.colour[own], patches[own]) for own in members.T
    ]


def _camera(luma: np.ndarray, foreground: np.ndarray) -> np.ndarray:
    """The camera's travel (x, y) over the clip, from how the background's texture shifts; zero where it has none.

    Frames a few steps apart are compared at half resolution, leaving out the things, for every shift along each axis.
    """
    picks = np.unique(np.linspace(0, len(luma) - 1, _PAN_STEPS + 1).round().astype(int))
    halves = F.avg_pool2d(torch.from_numpy(luma[picks]), 2).numpy()
    things = F.max_pool2d(torch.from_numpy(foreground[picks]).float(), 2)
    free = F.max_pool2d(F.max_pool2d(things, (15, 1), 1, (7, 0)), (1, 15), 1, (0, 7)).numpy() < 0.5  # nor shadows
    changed = np.abs(np.diff(halves, axis=0)) > 2.0
    both = free[1:] & free[:-1]
    if (changed & both).sum() < 0.08 * both.sum() or not both.any():
        return np.zeros(2)
    travel = np.zeros(2)
    best_gain = 0.5  # a shift must explain at least half of the change
    for axis in (0, 1):
        error = np.array([_mismatch(halves, free, axis, shift) for shift in range(-_PAN_SEARCH, _PAN_SEARCH + 1)])
        unmoved, lowest = error[_PAN_SEARCH], int(error.argmin())
        gain = 1 - error[lowest] / max(unmoved, 1e-6)
        if gain < best_gain or lowest in (0, len(error) - 1):
            continue
        best_gain = gain
        left, middle, right = error[lowest - 1 : lowest + 2]
        fine = (left - right) / max(2 * (left - 2 * middle + right), 1e-6)
        travel[:] = 0.0
        travel[axis] = 2 * (lowest - _PAN_SEARCH + fine) * (len(picks) - 1)
    return travel


def _mismatch(frames: np.ndarray, free: np.ndarray, axis: int, shift: int) -> float:
    """Mean squared difference between each frame and the next one, moved along ``axis`` (0: x, 1: y) by ``shift``."""
    size = frames.shape[2 - axis]
    early = [slice(max(shift, 0), size + min(shift, 0)), slice(None)]
    late = [slice(max(-shift, 0), size + min(-shift, 0)), slice(None)]
    if axis == 0:
        early, late = early[::-1], late[::-1]
    before, after = (slice(None, -1), *early), (slice(1, None), *late)
    both = free[before] & free[after]
    return float(np.square(frames[before] - frames[after])[both].mean()) if both.any() else 0.0
