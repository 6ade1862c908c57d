"""Random steps against torch's distributions, against the ODE, and against a flow whose marginals are known."""

import itertools
import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ospnext.flow.path import TIMESTEPS
from ospnext.flow.sample import denoise, euler_step, sigma_schedule
from ospnext.flow.sde import (
    NOISE_LEVELS,
    Recorder,
    SecondOrder,
    divergence,
    excess_noise,
    gaussian,
    log_prob,
    rollout_levels,
    step_noises,
)

NOISES = list(NOISE_LEVELS)
MEAN, SPREAD = 1.5, 0.4  # of the data of the toy


def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The exact velocity where data are N(MEAN, SPREAD²): E[ε - x_0 | x]."""
    s = (t / TIMESTEPS).view(-1, *[1] * (x.ndim - 1))
    variance = s**2 + (1 - s) ** 2 * SPREAD**2
    away = x - (1 - s) * MEAN
    return s / variance * away - (MEAN + (1 - s) * SPREAD**2 / variance * away)


def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(*shape), torch.randn(*shape)


@pytest.mark.parametrize("noise", NOISES)
def test_log_probs_are_those_of_torch(noise):
    torch.manual_seed(0)
    x, v = pair(3, 4, 5)
    levels = sigma_schedule(6, 3.0)
    for sigma, sigma_next in itertools.pairwise(levels[:-1]):
        step = gaussian(x, v, sigma, sigma_next, levels[1], noise, 0.5)
        x_next = step.mean + step.std * torch.randn_like(x)
        expected = Normal(step.mean, step.std.expand_as(x)).log_prob(x_next).flatten(1).mean(1)
        torch.testing.assert_close(log_prob(x_next, step), expected)


@pytest.mark.parametrize("noise", NOISES)
def test_without_noise_a_step_is_eulers(noise):
    x, v = pair(2, 7)
    for sigma, sigma_next in itertools.pairwise(sigma_schedule(5, 2.0)[:-1]):
        step = gaussian(x, v, sigma, sigma_next, torch.tensor(0.9), noise, 0.0)
        torch.testing.assert_close(step.mean, euler_step(x, v, sigma, sigma_next))
        assert float(step.std) == 0


def test_steps_by_hand():
    x, v = torch.tensor([[2.0]]), torch.tensor([[-1.0]])
    s, after, top = torch.tensor(0.5), torch.tensor(0.25), torch.tensor(0.8)
    flow = gaussian(x, v, s, after, top, "flow", 0.7)  # s² = 0.49 * 0.5 / 0.5
    assert flow.mean.item() == pytest.approx(2 * (1 - 0.49 * 0.25) - (1 + 0.49 * 0.5) * -0.25)
    assert flow.std.item() == pytest.approx(0.7 * 0.5)
    dance = gaussian(x, v, s, after, top, "dance", 0.3)
    data = 2 + 0.5  # x - σ v; score = -(x - (1 - σ) x_0) / σ²
    assert dance.mean.item() == pytest.approx(2 + 0.25 - 0.5 * 0.09 * -0.25 * -((2 - 0.5 * data) / 0.25) * 1)
    assert dance.std.item() == pytest.approx(0.3 * 0.5)
    osp = gaussian(x, v, s, after, top, "osp", 1.0)
    assert osp.std.item() == pytest.approx(0.5 * 0.5)
    first = gaussian(x, v, torch.tensor(1.0), torch.tensor(0.8), top, "flow", 0.7)
    assert first.std.item() == pytest.approx(0.7 * math.sqrt(1 / (1 - 0.8)) * math.sqrt(0.2))


def test_levels_may_differ_from_sample_to_sample():
    x, v = pair(2, 3, 4)
    s, after, top = torch.tensor([1.0, 0.6]), torch.tensor([0.9, 0.3]), torch.tensor(0.9)
    for noise in NOISES:
        both = gaussian(x, v, s, after, top, noise, 0.5)
        for i in range(2):
            alone = gaussian(x[i : i + 1], v[i : i + 1], s[i], after[i], top, noise, 0.5)
            torch.testing.assert_close(both.mean[i : i + 1], alone.mean)
            torch.testing.assert_close(both.std[i].squeeze(), alone.std)


@pytest.mark.parametrize("noise", ["flow", "dance", "osp"])  # CPS is no SDE: its noise does not shrink with the step
def test_the_sde_keeps_the_marginals_of_the_ode(noise):
    """Data N(1.5, 0.4²): whatever noise a step adds, states at σ are N((1 - σ) 1.5, σ² + (1 - σ)² 0.4²)."""
    generator = torch.Generator().manual_seed(1)
    steps = 300
    # Flow-GRPO's s grows without bound towards σ = 1, and would need finer levels there.
    sigmas = torch.linspace(0.95, 0.1, steps + 1)
    x = (1 - 0.95) * MEAN + math.hypot(0.95, 0.05 * SPREAD) * torch.randn(20000, 1, generator=generator)
    seen = {}

    def step(x, v, sigma, sigma_next):
        where = gaussian(x, v, sigma, sigma_next, sigmas[1], noise, 0.5)
        return where.mean + where.std * torch.randn(x.shape, generator=generator)

    def look(i, t, x):
        if i + 1 in (150, 300):
            seen[i + 1] = x

    denoise(velocity, x, sigmas, step, look)
    for i, x in seen.items():
        sigma = float(sigmas[i])
        assert x.mean().item() == pytest.approx((1 - sigma) * MEAN, abs=0.02)
        assert x.std().item() == pytest.approx(math.hypot(sigma, (1 - sigma) * SPREAD), rel=0.02)


def test_cps_has_the_right_noise_in_a_single_step():
    """A long step of the SDE leaves the wrong amount of noise; CPS, with the true velocity of a point, does not."""
    generator = torch.Generator().manual_seed(2)
    data, old, new = 0.7, *(torch.randn(2, 20000, 1, generator=generator))
    s, after = torch.tensor(0.8), torch.tensor(0.4)
    x = 0.8 * old + 0.2 * data
    step = gaussian(x, old - data, s, after, torch.tensor(0.9), "cps", 0.6)
    x_next = step.mean + step.std * new
    assert x_next.mean().item() == pytest.approx(0.6 * data, abs=0.01)
    assert x_next.std().item() == pytest.approx(0.4, rel=0.02)


@pytest.mark.parametrize(("noise", "level"), [("flow", 0.7), ("flow", 1.4), ("dance", 1.0), ("osp", 2.0), ("cps", 0.9)])
def test_the_noise_that_steps_leave_is_what_is_measured(noise, level):
    """Of a point at zero the true velocity is the noise itself: all that a step leaves is noise."""
    levels = rollout_levels(10, 3.0, 0, 9)
    old, new = torch.randn(2, 20000, 1, generator=torch.Generator().manual_seed(3))
    for i, excess in enumerate(excess_noise(levels, noise, level)):
        s, after = levels.sigmas[i], levels.sigmas[i + 1]
        step = gaussian(s * old, old, s, after, levels.sigmas[1], noise, level)
        assert (step.mean + step.std * new).std().item() / float(after) == pytest.approx(excess, rel=0.02)
    if noise == "cps":
        assert max(excess_noise(levels, noise, level)) == pytest.approx(1.0)
    many = excess_noise(rollout_levels(1000, 3.0, 10, 500), noise, level)  # Flow-GRPO's first are long however many
    assert max(many) < 1.05


def test_the_noise_of_steps_is_by_the_formulas():
    levels = rollout_levels(10, 3.0, 1, 4)
    sigmas = [3 * k / 10 / (1 + 2 * k / 10) for k in range(10, -1, -1)]
    roots = [math.sqrt(sigmas[i] - sigmas[i + 1]) for i in range(1, 5)]
    spreads = [0.7 * math.sqrt(sigma / (1 - sigma)) for sigma in sigmas[1:5]]
    found = step_noises(levels, "flow", 0.7)
    assert found == pytest.approx([s * root for s, root in zip(spreads, roots, strict=True)], rel=1e-5)
    assert step_noises(levels, "dance", 0.3) == pytest.approx([0.3 * root for root in roots], rel=1e-5)
    assert step_noises(levels, "cps", 0.5) == pytest.approx([s * math.sqrt(0.5) for s in sigmas[2:6]], rel=1e-5)


def test_divergence_is_torchs_and_the_other_convention_lacks_dt():
    x, v = pair(2, 5)
    s, after = torch.tensor([0.9, 0.5]), torch.tensor([0.6, 0.4])
    step, base = (gaussian(x, w, s, after, torch.tensor(0.9), "flow", 0.7) for w in (v, v + 0.1))
    each = kl_divergence(*(Normal(g.mean, g.std.expand_as(x)) for g in (step, base))).mean(1)
    torch.testing.assert_close(divergence(step, base, s, after), each)
    torch.testing.assert_close(divergence(step, base, s, after, "no_dt"), each * (s - after))


# ── rollouts ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def roll(levels, noise="flow", level=0.7, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(3, 4, generator=generator)
    recorder = Recorder(levels, noise, level, lambda x: torch.randn(x.shape, generator=generator), **options)
    return denoise(velocity, start, levels.sigmas, recorder), recorder, start


def test_a_rollout_records_its_window_alone():
    levels = rollout_levels(8, 3.0, 2, 3)
    x, recorder, start = roll(levels)
    assert len(recorder.states) == 4
    assert len(recorder.log_probs) == 3
    before = denoise(velocity, start, levels.sigmas[:3])
    torch.testing.assert_close(recorder.states[0], before)
    torch.testing.assert_close(denoise(velocity, recorder.states[-1], levels.sigmas[5:]), x)
    for i in range(3):  # what training computes again
        sigma, after = levels.sigmas[2 + i], levels.sigmas[3 + i]
        v = velocity(recorder.states[i], TIMESTEPS * sigma.expand(3))
        again = gaussian(recorder.states[i], v, sigma, after, levels.sigmas[1], "flow", 0.7)
        assert torch.equal(log_prob(recorder.states[i + 1], again), recorder.log_probs[i])


def test_the_last_step_has_no_noise_and_no_log_prob():
    levels = rollout_levels(5, 1.0, 0, 99)
    assert levels.random == 4
    x, recorder, _ = roll(levels)
    assert len(recorder.log_probs) == 4
    torch.testing.assert_close(denoise(velocity, recorder.states[-1], levels.sigmas[4:]), x)
    with pytest.raises(ValueError, match="the last has no noise"):
        rollout_levels(5, 1.0, 4, 1)


def test_a_policy_other_than_the_one_that_leads_on():
    levels = rollout_levels(6, 1.0, 0, 2)
    x, plain, _ = roll(levels)
    y, told, _ = roll(levels, policy=lambda i, x, v: v + 1)
    assert torch.equal(x, y)
    v = velocity(plain.states[0], torch.full((3,), 1000.0)) + 1
    step = gaussian(plain.states[0], v, levels.sigmas[0], levels.sigmas[1], levels.sigmas[1], "flow", 0.7)
    torch.testing.assert_close(told.log_probs[0], log_prob(plain.states[1], step))
    assert not torch.equal(told.log_probs[0], plain.log_probs[0])


def test_flash_compresses_what_comes_after_the_window():
    whole, flash = rollout_levels(25, 3.0, 4, 4), rollout_levels(25, 3.0, 4, 4, tail=0.4)
    assert torch.equal(whole.sigmas[:9], flash.sigmas[:9])
    assert len(whole.sigmas) == 26
    assert len(flash.sigmas) - 1 == 8 + 7  # ceil(0.4 * 17) of the 17 that are left
    assert flash.sigmas[-1] == 0
    assert bool((flash.sigmas.diff() < 0).all())


@pytest.mark.parametrize("end", [0.2, 0.0])
def test_the_second_order_solver_is_of_second_order(end):
    """Quantiles go to quantiles: the exact flow of the toy. Its last step, to σ = 0, is of first order."""
    x, spread = torch.linspace(-2, 2, 9).view(9, 1), [math.hypot(s, (1 - s) * SPREAD) for s in (0.9, end)]
    exact = (1 - end) * MEAN + (x - 0.1 * MEAN) * spread[1] / spread[0]
    euler, second = (
        [
            (denoise(velocity, x, torch.linspace(0.9, end, steps + 1), solver()) - exact).abs().max().item()
            for steps in (20, 40)
        ]
        for solver in (lambda: euler_step, SecondOrder)
    )
    assert 1.6 < euler[0] / euler[1] < 2.4
    assert second[0] < euler[0] / 3
    if end:
        assert second[0] / second[1] > 3.5


def test_without_a_past_the_second_order_solver_is_euler():
    x, v = pair(2, 3)
    for sigma, after in ((torch.tensor(1.0), torch.tensor(0.7)), (torch.tensor(0.3), torch.tensor(0.0))):
        torch.testing.assert_close(SecondOrder()(x, v, sigma, after), euler_step(x, v, sigma, after))
