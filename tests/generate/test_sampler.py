"""What scheduler components mean for the sampling loop."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from ospnext.flow.path import dynamic_shift
from ospnext.flow.sample import sigma_schedule
from ospnext.generate.sampler import make_sampler, make_scheduler, sampler_name, sampler_shift

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["euler", "unipc"])
def test_a_scheduler_keeps_its_name_and_shift(name: str) -> None:
    scheduler = make_scheduler(name, 7.0)
    assert (sampler_name(scheduler), sampler_shift(scheduler)) == (name, 7.0)
    sampler = make_sampler(scheduler, 10, 100, CPU)
    torch.testing.assert_close(sampler.sigmas, sigma_schedule(10, 7.0), atol=5e-3, rtol=0)
    assert len(sampler.timesteps) == 10


def test_dynamic_shifting_follows_the_size_of_a_frame() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    sampler = make_sampler(scheduler, 10, 3600, CPU)
    torch.testing.assert_close(sampler.sigmas, sigma_schedule(10, dynamic_shift(3600)))


@pytest.mark.parametrize(
    "scheduler",
    [FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True), UniPCMultistepScheduler(use_flow_sigmas=False)],
)
def test_what_is_not_supported_is_said(scheduler: object) -> None:
    with pytest.raises(ValueError, match="scheduler"):
        make_sampler(scheduler, 10, 100, CPU)


def test_unknown_samplers_and_shifts_are_refused() -> None:
    with pytest.raises(ValueError, match="'ddim'"):
        make_scheduler("ddim", 1.0)
    with pytest.raises(ValueError, match="shift is 0"):
        make_scheduler("euler", 0)
