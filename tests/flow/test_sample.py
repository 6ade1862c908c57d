"""The sampling loop against formulas and exact solutions."""

import itertools

import pytest
import torch

from ospnext.flow.sample import StopSampling, denoise, euler_step, guided, sigma_schedule


def test_schedule_is_shifted_once() -> None:
    sigmas = sigma_schedule(4, shift=7.0)
    even = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    torch.testing.assert_close(sigmas, 7 * even / (1 + 6 * even))
    assert sigmas.dtype == torch.float32
    with pytest.raises(ValueError, match="at least one"):
        sigma_schedule(0)


def test_straight_flow_is_solved_exactly() -> None:
    data, noise = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    x = denoise(lambda x, t: noise - data, noise, sigma_schedule(7, 5.0))
    torch.testing.assert_close(x, data, atol=1e-5, rtol=1e-5)


def test_euler_by_hand_in_float32_with_timesteps_in_thousands() -> None:
    seen = []

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.float32
        seen.append(t)
        return (x * t.view(-1, 1) / 1000).to(torch.bfloat16).float()

    start = torch.randn(2, 8).to(torch.bfloat16)
    x = denoise(velocity, start, sigma_schedule(3, 2.0))
    by_hand = start.float()
    sigmas = sigma_schedule(3, 2.0)
    for now, after in itertools.pairwise(sigmas):
        by_hand = by_hand + (after - now) * (by_hand * now).to(torch.bfloat16).float()
    torch.testing.assert_close(x, by_hand)
    torch.testing.assert_close(torch.stack([t[0] for t in seen]), 1000 * sigmas[:-1])
    assert all(t.shape == (2,) for t in seen)


def test_guidance_modes_agree_and_scale_one_asks_once() -> None:
    calls = []

    def model(x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return x * c + t.view(-1, 1)

    x, t = torch.randn(2, 4), torch.tensor([500.0, 500.0])
    cond, uncond = torch.randn(2, 4), torch.randn(2, 4)
    expected = model(x, t, uncond) + 5 * (model(x, t, cond) - model(x, t, uncond))
    calls.clear()
    torch.testing.assert_close(guided(model, cond, uncond, 5.0, "batched")(x, t), expected)
    torch.testing.assert_close(guided(model, cond, uncond, 5.0, "sequential")(x, t), expected)
    assert calls == [4, 2, 2]
    calls.clear()
    torch.testing.assert_close(guided(model, cond, None, 1.0)(x, t), model(x, t, cond))
    assert calls == [2, 2]
    with pytest.raises(ValueError, match="negative"):
        guided(model, cond, None, 2.0)


def test_callback_sees_changes_and_stops() -> None:
    seen = []

    def callback(i: int, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
        seen.append((i, round(t.item())))
        if i == 2:
            raise StopSampling(x)
        return torch.zeros_like(x) if i == 1 else None

    x = denoise(lambda x, t: torch.ones_like(x), torch.ones(1, 2), sigma_schedule(4), callback=callback)
    assert seen == [(0, 1000), (1, 750), (2, 500)]
    torch.testing.assert_close(x, torch.full((1, 2), -0.25))


def test_another_step_and_timesteps_can_be_given() -> None:
    times = [torch.tensor(900), torch.tensor(10)]
    seen = []

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(t.item())
        return x

    def half(x: torch.Tensor, v: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        return euler_step(x, v, sigma, sigma_next) / 2

    x = denoise(velocity, torch.ones(1, 1), sigma_schedule(2), step=half, timesteps=times)
    assert seen == [900, 10]
    torch.testing.assert_close(x, torch.full((1, 1), 0.0625))
