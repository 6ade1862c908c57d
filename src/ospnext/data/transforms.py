"""From pictures as decoded to what the model sees: resize to cover, cut the middle, scale to [-1, 1]."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ospnext.data.records import Crop


class Size(NamedTuple):
    """Height and width in pixels."""

    height: int
    width: int


def cover_size(size: Size, target: Size) -> Size:
    """The smallest size of the aspect ratio of ``size``, rounded up, that covers ``target``.

    The side that binds is the target's; the other is ceil(side * scale), in whole numbers, so that no rounding of a
    quotient makes it a pixel larger.
    """
    if target.width * size.height >= target.height * size.width:
        return Size(-(-size.height * target.width // size.width), target.width)
    return Size(target.height, -(-size.width * target.height // size.height))


def resize(frames: Tensor, size: Size) -> Tensor:
    """Bicubic with antialias, uint8 [N, 3, H, W] to uint8 [N, 3, height, width]; the same where the size is right."""
    if tuple(frames.shape[-2:]) == tuple(size):
        return frames
    return F.interpolate(frames, tuple(size), mode="bicubic", antialias=True)


def centre_crop(frames: Tensor, size: Size) -> Tensor:
    """The middle of ``frames`` [..., H, W], which cover ``size``; where it is off by half a pixel, up and left."""
    top, left = (frames.shape[-2] - size.height) // 2, (frames.shape[-1] - size.width) // 2
    return frames[..., top : top + size.height, left : left + size.width]


def fit(pixels: np.ndarray, displayed: Size, crop: Crop | None, target: Size) -> Tensor:
    """One stored picture as the model's: stretched to how it is displayed, cropped, resized to cover, cut.

    Args:
        pixels: uint8 [H, W, 3].
        displayed: size that ``crop`` is measured in.
        crop: the part to use; None for all.
        target: of the result.

    Returns:
        uint8 [3, height, width].
    """
    frame = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]  # channels last: the fast kernel
    frame = resize(frame, displayed)
    if crop is not None:
        frame = frame[..., crop.y0 : crop.y1, crop.x0 : crop.x1]
    frame = resize(frame, cover_size(Size(*frame.shape[-2:]), target))
    return centre_crop(frame, target)[0]


def to_pixel_values(video: Tensor) -> Tensor:
    """uint8 of any shape to float32 in [-1, 1]: x / 255 * 2 - 1."""
    return video.float().div_(255).mul_(2).sub_(1)
