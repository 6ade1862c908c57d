"""The noise and the noise level of every sample: functions of the seed, the epoch and the clip, and of nothing else.

So they are the same on one process and on many, in small batches and in large ones, and when a run is resumed.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ospnext.config import ConfigError
from ospnext.flow.path import dynamic_shift, interpolate, noise_levels
from ospnext.sections import SHIFTS
from ospnext.train.settings import NoiseConfig


class Noisy(NamedTuple):
    """Points ``x_t`` and velocities ``[B, C, t, h, w]`` on the path, and their noise levels ``sigma [B]``; float32."""

    x_t: Tensor
    velocity: Tensor
    sigma: Tensor


def shift_of(latents: Sequence[int], noise: NoiseConfig) -> float:
    """The shift of the noise levels for latents of a shape ``[..., h, w]``; dynamic shift counts tokens of 2 x 2.

    Raises:
        ConfigError: the line of dynamic shifting leads out of ``SHIFTS`` for these latents.
    """
    if not noise.use_dynamic_shifting:
        return noise.shift
    tokens = latents[-2] * latents[-1] // 4
    line = noise.base_image_seq, noise.max_image_seq, noise.base_shift, noise.max_shift
    try:
        shift = dynamic_shift(tokens, *line)
    except OverflowError:
        shift = math.inf
    if not SHIFTS[0] <= shift <= SHIFTS[1]:
        raise ConfigError(
            f"scheduler_config.use_dynamic_shifting shifts by {shift:g} for the {tokens} tokens of a frame here, not "
            f"by {SHIFTS[0]:g} to {SHIFTS[1]:g}: move base_image_seq ({line[0]}) and max_image_seq ({line[1]}) apart, "
            f"or base_shift ({line[2]:g}) and max_shift ({line[3]:g}) together"
        )
    return shift


def add_noise(latents: Tensor, seeds: Sequence[int], noise: NoiseConfig) -> Noisy:
    """Put every sample somewhere on the path to its noise.

    Args:
        latents: float32 ``[B, C, t, h, w]``.
        seeds: one of each sample.
        noise: how levels are drawn.
    """
    generator = torch.Generator(latents.device)
    # Numbers fill memory in its order, and encoders give latents in other orders on other numbers of threads.
    epsilon = torch.empty_like(latents, memory_format=torch.contiguous_format)
    base = latents.new_empty(len(latents))
    for i, seed in enumerate(seeds):
        generator.manual_seed(seed)
        draw = base[i].normal_ if noise.use_logitnorm_time_sampling else base[i].uniform_
        draw(generator=generator)
        epsilon[i].normal_(generator=generator)
    sigma = noise_levels(
        base,
        noise.use_logitnorm_time_sampling,
        shift_of(latents.shape, noise),
        logit_mean=noise.logit_mean,
        logit_std=noise.logit_std,
    )
    return Noisy(*interpolate(latents, epsilon, sigma), sigma)
