"""Which sizes of video a model can make, and the nearest one to what is asked for."""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from ospnext.ops.rope import MAX_POSITIONS

logger = logging.getLogger(__name__)


class VideoSize(NamedTuple):
    """A clip: frames, and pixels of a frame."""

    num_frames: int
    height: int
    width: int


class SizeStep(NamedTuple):
    """A model makes 1 + k · ``frames`` frames of multiples of ``height`` and ``width`` pixels (Wan: 4, 16, 16)."""

    frames: int
    height: int
    width: int


def size_step(vae: Mapping[str, Any], transformer: Mapping[str, Any]) -> SizeStep:
    """What sizes of video components with these configs make."""
    patch_t, patch_h, patch_w = transformer["patch_size"]
    scale = vae["scale_factor_spatial"]
    return SizeStep(vae["scale_factor_temporal"] * patch_t, scale * patch_h, scale * patch_w)


def fit_size(size: VideoSize, step: SizeStep) -> VideoSize:
    """The size nearest to ``size`` that the model can make; another one than asked for is said in a warning.

    Raises:
        ValueError: nothing near can be made: no frame, sides of less than half a step, or more tokens along an axis
            than the model has positions.
    """
    fitted = VideoSize(
        1 + step.frames * _nearest(size.num_frames - 1, step.frames),
        step.height * _nearest(size.height, step.height),
        step.width * _nearest(size.width, step.width),
    )
    if size.num_frames < 1 or fitted.height < 1 or fitted.width < 1:
        raise ValueError(
            f"num_frames {size.num_frames}, height {size.height}, width {size.width} cannot be made: the least is 1 "
            f"frame of {step.height} by {step.width}"
        )
    most = VideoSize(1 + step.frames * (MAX_POSITIONS - 1), step.height * MAX_POSITIONS, step.width * MAX_POSITIONS)
    if any(asked > limit for asked, limit in zip(fitted, most, strict=True)):
        raise ValueError(
            f"num_frames {size.num_frames}, height {size.height}, width {size.width} cannot be made: the most is "
            f"{most.num_frames} frames, {most.height} high and {most.width} wide"
        )
    if fitted != size:
        logger.warning(
            "%d frames of height %d and width %d become %d of %d and %d: this model makes %dk + 1 frames, in steps of "
            "%d and %d pixels",
            *size,
            *fitted,
            *step,
        )
    return fitted


def _nearest(value: int, step: int) -> int:
    """How many steps come nearest to ``value``; halves go up."""
    return (2 * value + step) // (2 * step)
