"""Which clips are kept. Each rule is a function whose docstring is its formula; the first that fails names the drop.

Written for a clip of ``n`` frames at ``fps``, of ``h`` x ``w`` pixels (of its crop, where it has one: what training
sees), and the target: ``sample_num_frames`` frames of ``sample_height`` x ``sample_width`` at ``train_fps``.
"""

import math
from collections.abc import Callable
from typing import Self

from pydantic import Field, model_validator

from ospnext.config import Config
from ospnext.data.records import ClipRecord, frame_interval


class FilterConfig(Config):
    """What a clip must be like to be kept; keys and defaults are those of OSP-Next's filter."""

    sample_height: int = Field(480, ge=1, description="height that training will ask for")
    sample_width: int = Field(832, ge=1, description="width that training will ask for")
    sample_num_frames: int = Field(49, ge=1, description="frames that training will ask for")
    train_fps: float | None = Field(16, gt=0, description="frames per second of training")
    sample_stride: int | None = Field(None, ge=1, description="take every n-th frame, whatever the rate; not train_fps")
    min_hxw: int = Field(399360, ge=0, description="fewest pixels of a frame, at the target's aspect ratio")
    too_long_factor: float = Field(5.0, gt=0, description="longest clip, in lengths of a training sample")
    max_h_div_w_ratio: float = Field(2.0, gt=0, description="largest height / width")
    min_h_div_w_ratio: float = Field(0.5, gt=0, description="smallest height / width")
    max_motion_value: float = Field(1.0, description="largest motion; 0 where it is unknown")
    min_motion_value: float = Field(0.0, description="smallest motion; 0 where it is unknown")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.train_fps is None and self.sample_stride is None:
            raise ValueError("train_fps and sample_stride are both empty: give one")
        for what in ("h_div_w_ratio", "motion_value"):
            if getattr(self, f"min_{what}") > getattr(self, f"max_{what}"):
                raise ValueError(f"min_{what} is larger than max_{what}: nothing would be kept")
        return self

    def interval(self, fps: float) -> float:
        """Frames of a file of ``fps`` from one frame of training to the next."""
        return frame_interval(fps, self.train_fps or fps, self.sample_stride)


def caption(clip: ClipRecord, config: FilterConfig) -> str | None:
    """there is at least one caption that is not empty"""
    return None if clip.captions else "no caption"


def aspect(clip: ClipRecord, config: FilterConfig) -> str | None:
    """min_h_div_w_ratio <= h / w <= max_h_div_w_ratio"""
    height, width = _size(clip)
    ratio = height / width
    low, high = config.min_h_div_w_ratio, config.max_h_div_w_ratio
    return None if low <= ratio <= high else f"{height} x {width}: {ratio:.3g} is not in [{low:g}, {high:g}]"


def area(clip: ClipRecord, config: FilterConfig) -> str | None:
    """h * w >= ceil(min_hxw * max(r / r0, r0 / r)), r = h / w, r0 = sample_height / sample_width"""
    height, width = _size(clip)
    relative = height / width / (config.sample_height / config.sample_width)
    least = math.ceil(config.min_hxw * max(relative, 1 / relative))
    return None if height * width >= least else f"{height} x {width} = {height * width} pixels, fewer than {least}"


def too_long(clip: ClipRecord, config: FilterConfig) -> str | None:
    """n <= too_long_factor * sample_num_frames * fps / train_fps (with sample_stride: that in place of the quotient)"""
    interval = config.sample_stride or clip.fps / (config.train_fps or clip.fps)
    most = config.too_long_factor * config.sample_num_frames * interval
    return None if clip.num_frames <= most else f"{clip.num_frames} frames, more than {most:g}"


def too_slow(clip: ClipRecord, config: FilterConfig) -> str | None:
    """interval >= 1, interval = 1 if |fps - train_fps| < 0.1 else fps / train_fps (sample_stride: always kept)"""
    interval = config.interval(clip.fps)
    return None if interval >= 1 else f"{clip.fps:.4g} frames per second, fewer than {config.train_fps:g}"


def motion(clip: ClipRecord, config: FilterConfig) -> str | None:
    """min_motion_value <= motion <= max_motion_value, motion = 0 where it is unknown"""
    value, low, high = clip.motion or 0.0, config.min_motion_value, config.max_motion_value
    return None if low <= value <= high else f"motion {value:.4g} is not in [{low:g}, {high:g}]"


def too_short(clip: ClipRecord, config: FilterConfig) -> str | None:
    """len(arange(start, start + n, interval)) = ceil(n / interval) >= sample_num_frames"""
    interval = config.interval(clip.fps)
    count = math.ceil(clip.num_frames / interval)
    return None if count >= config.sample_num_frames else f"{clip.num_frames} frames give {count} of training"


Rule = Callable[[ClipRecord, FilterConfig], str | None]
RULES: tuple[Rule, ...] = (caption, aspect, area, too_long, too_slow, motion, too_short)
"""In the order of OSP-Next's filter. Each returns None, or what is wrong with the clip."""


def first_failure(clip: ClipRecord, config: FilterConfig, skip: Rule | None = None) -> tuple[str, str] | None:
    """Name of the first rule but ``skip`` that drops ``clip`` and why; None if it is kept."""
    for rule in RULES:
        if rule is not skip and (detail := rule(clip, config)) is not None:
            return rule.__name__, detail
    return None


def _size(clip: ClipRecord) -> tuple[int, int]:
    if clip.crop is None:
        return clip.height, clip.width
    return clip.crop.y1 - clip.crop.y0, clip.crop.x1 - clip.crop.x0
