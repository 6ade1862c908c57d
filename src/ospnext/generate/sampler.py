"""Which solver a scheduler component stands for, and what the sampling loop needs of it.

The scheduler holds settings. Euler's own arithmetic is ``flow.sample``'s; UniPC's is diffusers'.
"""

from typing import NamedTuple, TypeAlias

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from ospnext.flow.path import TIMESTEPS, dynamic_shift
from ospnext.flow.sample import Step, euler_step, sigma_schedule

Scheduler: TypeAlias = FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler

_OTHER_LEVELS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "shift_terminal")


class Sampler(NamedTuple):
    """What ``flow.sample.denoise`` takes: n + 1 levels ``sigmas``, the solver's ``step``, the n ``timesteps``."""

    sigmas: Tensor
    step: Step
    timesteps: Tensor


def make_scheduler(sampler: str, shift: float) -> Scheduler:
    """The scheduler component for ``sampler`` euler or unipc.

    Raises:
        ValueError: the sampler is neither, or the shift not positive.
    """
    if shift <= 0:
        raise ValueError(f"shift is {shift}: it must be positive, 1 for none")
    if sampler == "euler":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMESTEPS, shift=shift)
    if sampler == "unipc":
        return UniPCMultistepScheduler(
            num_train_timesteps=TIMESTEPS,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=shift,
        )
    raise ValueError(f"sampler {sampler!r} is not known: use euler or unipc")


def sampler_name(scheduler: Scheduler) -> str:
    """The name `make_scheduler` knows the scheduler by."""
    return "unipc" if isinstance(scheduler, UniPCMultistepScheduler) else "euler"


def sampler_shift(scheduler: Scheduler, frame_tokens: int | None = None) -> float:
    """The shift of the scheduler's noise levels; for a dynamic one, at ``frame_tokens`` tokens a frame."""
    config = scheduler.config
    if isinstance(scheduler, UniPCMultistepScheduler):
        return config.flow_shift
    if not config.use_dynamic_shifting or frame_tokens is None:
        return config.shift
    return dynamic_shift(
        frame_tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )


def make_sampler(scheduler: Scheduler, num_steps: int, frame_tokens: int, device: torch.device) -> Sampler:
    """The levels and the solver for one run of ``num_steps``.

    Raises:
        ValueError: a scheduler that is set up for other levels or other models.
    """
    if not isinstance(scheduler, UniPCMultistepScheduler):
        if odd := [name for name in _OTHER_LEVELS if scheduler.config.get(name)]:
            raise ValueError(f"the scheduler asks for {', '.join(odd)}: only the plain levels, shifted, are supported")
        sigmas = sigma_schedule(num_steps, sampler_shift(scheduler, frame_tokens)).to(device)
        return Sampler(sigmas, euler_step, TIMESTEPS * sigmas[:-1])
    if not scheduler.config.use_flow_sigmas or scheduler.config.prediction_type != "flow_prediction":
        raise ValueError("this UniPC scheduler is not for flow matching: set use_flow_sigmas and flow_prediction")
    scheduler.set_timesteps(num_steps, device=device)
    scheduler.set_begin_index(0)  # the steps are taken in order: no search for the timestep
    times = iter(scheduler.timesteps)

    def unipc_step(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        return scheduler.step(v, next(times), x, return_dict=False)[0]

    return Sampler(scheduler.sigmas.to(device), unipc_step, scheduler.timesteps)
