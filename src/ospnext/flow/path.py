"""The straight path between data and noise, and which noise levels training looks at.

A sample of data x_0 and a sample of noise ε are joined by x_t = σ ε + (1 - σ) x_0, with the noise level σ from 0 (data)
to 1 (noise); the velocity along it is v = dx_t / dσ = ε - x_0. A model is told σ as a timestep t = 1000 σ.

Lipman et al., "Flow Matching for Generative Modeling" (2022); Esser et al., "Scaling Rectified Flow Transformers"
(2024) for the shift and the logit-normal levels.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

TIMESTEPS = 1000  # t = TIMESTEPS · σ


class NoisySample(NamedTuple):
    """A point ``x_t`` on the path and the ``velocity`` ε - x_0 there, both shaped like the data."""

    x_t: Tensor
    velocity: Tensor


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Noise levels moved towards noise: σ' = s σ / (1 + (s - 1) σ), which keeps 0 and 1; s = 1 changes nothing.

    Raises:
        ValueError: ``shift`` is not positive.
    """
    if shift <= 0:
        raise ValueError(f"shift is {shift}: it must be positive, 1 for none")
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def dynamic_shift(
    seq_len: int, base_seq: int = 256, max_seq: int = 4096, base_shift: float = 0.5, max_shift: float = 1.15
) -> float:
    """The shift for a frame of ``seq_len`` tokens: s = exp(μ), with μ linear in the length.

    μ runs through ``base_shift`` at ``base_seq`` tokens and ``max_shift`` at ``max_seq``. Only one frame's tokens
    count, not the number of frames.
    """
    slope = (max_shift - base_shift) / (max_seq - base_seq)
    return math.exp(base_shift + slope * (seq_len - base_seq))


def sample_sigmas(
    n: int,
    generator: torch.Generator | None = None,
    logit_normal: bool = True,
    shift: float = 1.0,
    device: torch.device | str = "cpu",
    *,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
) -> Tensor:
    """Noise levels to train on: float32 [n] in (0, 1).

    σ = sigmoid(N(``logit_mean``, ``logit_std``)), or uniform without ``logit_normal``; then shifted. Drawn on the
    generator's device, or ``device`` without one.
    """
    source = device if generator is None else generator.device
    draw = torch.randn if logit_normal else torch.rand
    base = draw(n, generator=generator, device=source)
    return noise_levels(base, logit_normal, shift, logit_mean=logit_mean, logit_std=logit_std).to(device)


def noise_levels(
    base: Tensor, logit_normal: bool = True, shift: float = 1.0, *, logit_mean: float = 0.0, logit_std: float = 1.0
) -> Tensor:
    """The noise levels of ``sample_sigmas`` for numbers that were drawn already: normal ones, or uniform ones in
    [0, 1) without ``logit_normal``.
    """
    return shift_sigmas(torch.sigmoid(logit_mean + logit_std * base) if logit_normal else base, shift)


def interpolate(x0: Tensor, noise: Tensor, sigma: Tensor) -> NoisySample:
    """x_t = σ ε + (1 - σ) x_0 and v = ε - x_0.

    Args:
        x0: data [B, ...].
        noise: ε, shaped like ``x0``.
        sigma: noise levels [B].
    """
    s = sigma.view(-1, *[1] * (x0.ndim - 1))
    return NoisySample(s * noise + (1 - s) * x0, noise - x0)
