"""From noise to data: the noise levels, one step, guidance, and the sampling loop. There is one of each.

A velocity here is a function of a state x [B, ...] and timesteps t = 1000 σ [B]; see ``path`` for the symbols.
"""

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ospnext.flow.path import TIMESTEPS, shift_sigmas

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x, t[B]) -> v
ConditionalVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, t[B], condition) -> v
Step = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (x, v, σ, σ') -> x'
Callback = Callable[[int, Tensor, Tensor], Tensor | None]  # (index, t, x') -> x' to go on with, None: unchanged
GuidanceMode = Literal["batched", "sequential"]


class StopSampling(Exception):  # noqa: N818 - a signal, not an error
    """Raised by a callback to end `denoise` after the present step, with the state ``x`` to return."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x


def sigma_schedule(num_steps: int, shift: float = 1.0) -> Tensor:
    """The noise levels of a sampling run: float32 [num_steps + 1], evenly spaced from 1 to 0, then shifted once.

    Raises:
        ValueError: there is no step, or the shift is not positive.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}: sampling needs at least one")
    return shift_sigmas(torch.linspace(1, 0, num_steps + 1), shift)


def euler_step(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """x' = x + (σ' - σ) v."""
    return x + (sigma_next - sigma) * v


class Halves(NamedTuple):
    """The two velocities that guidance mixes, float32."""

    uncond: Tensor
    cond: Tensor


BothHalves = Callable[[ConditionalVelocity, Tensor, Tensor, Tensor, Tensor], Halves]  # (velocity, x, t, ∅, c) -> both


def both_in_one_batch(velocity: ConditionalVelocity, x: Tensor, t: Tensor, uncond: Tensor, cond: Tensor) -> Halves:
    """Both halves of guidance from one call with a batch of 2B."""
    return Halves(*velocity(torch.cat([x, x]), torch.cat([t, t]), torch.cat([uncond, cond])).float().chunk(2))


def one_after_the_other(velocity: ConditionalVelocity, x: Tensor, t: Tensor, uncond: Tensor, cond: Tensor) -> Halves:
    """Both halves of guidance from two calls, in less memory."""
    return Halves(velocity(x, t, uncond).float(), velocity(x, t, cond).float())


_HALVES: dict[str, BothHalves] = {"batched": both_in_one_batch, "sequential": one_after_the_other}


def guided(
    velocity: ConditionalVelocity,
    cond: Tensor,
    uncond: Tensor | None,
    scale: float,
    mode: GuidanceMode | BothHalves = "batched",
) -> Velocity:
    """Classifier-free guidance: v = v(∅) + w (v(c) - v(∅)), in float32.

    Args:
        velocity: the model, called with a condition.
        cond, uncond: c and ∅, both [B, ...]; ∅ is not needed where guidance is off.
        scale: w; at 1 and below guidance is off, and the model is called with c only.
        mode: how to get both halves: ``batched`` or ``sequential``, or a function of one's own.

    Raises:
        ValueError: guidance is on without ``uncond``.
    """
    if scale <= 1:
        return lambda x, t: velocity(x, t, cond).float()
    if uncond is None:
        raise ValueError(f"guidance_scale {scale} needs a negative condition")
    halves = _HALVES[mode] if isinstance(mode, str) else mode

    def mixed(x: Tensor, t: Tensor) -> Tensor:
        v_uncond, v_cond = halves(velocity, x, t, uncond, cond)
        return v_uncond + scale * (v_cond - v_uncond)

    return mixed


def denoise(
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor,
    step: Step = euler_step,
    callback: Callback | None = None,
    timesteps: Iterable[Tensor] | None = None,
) -> Tensor:
    """Follow the flow from noise to data. The state is float32 from the first step to the last.

    Args:
        velocity: v(x, t).
        x: noise at the first level [B, ...].
        sigmas: n + 1 falling noise levels.
        step: the solver; a multistep one keeps its own memory.
        callback: called after every step; may return another state, or raise `StopSampling`.
        timesteps: what the model is told at each of the n steps, where that is not 1000 σ.
    """
    x, sigmas = x.float(), sigmas.to(x.device, torch.float32)
    times = TIMESTEPS * sigmas[:-1] if timesteps is None else timesteps
    for i, (t, sigma, sigma_next) in enumerate(zip(times, sigmas[:-1], sigmas[1:], strict=True)):
        x = step(x, velocity(x, t.expand(len(x))).float(), sigma, sigma_next)
        if callback is not None:
            try:
                changed = callback(i, t, x)
            except StopSampling as stop:
                return stop.x
            x = x if changed is None else changed.float()
    return x
