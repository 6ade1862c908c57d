"""The path between data and noise, and the noise levels of training."""

import math

import pytest
import torch

from ospnext.flow.path import dynamic_shift, interpolate, sample_sigmas, shift_sigmas


def test_shift_is_the_formula_and_keeps_the_ends() -> None:
    sigmas = torch.linspace(0, 1, 11)
    torch.testing.assert_close(shift_sigmas(sigmas, 7.0), 7 * sigmas / (1 + 6 * sigmas))
    assert shift_sigmas(sigmas, 3.0)[[0, -1]].tolist() == [0.0, 1.0]
    assert torch.equal(shift_sigmas(sigmas, 1.0), sigmas)
    with pytest.raises(ValueError, match="positive"):
        shift_sigmas(sigmas, 0)


def test_dynamic_shift_at_known_lengths() -> None:
    assert dynamic_shift(256) == pytest.approx(math.exp(0.5))
    assert dynamic_shift(4096) == pytest.approx(math.exp(1.15))
    assert dynamic_shift(45 * 80) == pytest.approx(2.90, abs=0.01)  # 720P


def test_interpolate_runs_straight_from_data_to_noise() -> None:
    x0, noise = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    sample = interpolate(x0, noise, torch.tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(sample.x_t[0], x0[0])
    torch.testing.assert_close(sample.x_t[2], noise[2])
    torch.testing.assert_close(sample.x_t[1] - 0.25 * sample.velocity[1], x0[1])


@pytest.mark.parametrize("logit_normal", [True, False])
def test_sampled_levels_are_inside_and_repeatable(logit_normal: bool) -> None:
    def draw(shift: float) -> torch.Tensor:
        return sample_sigmas(4000, torch.Generator().manual_seed(1), logit_normal, shift)

    plain = draw(1.0)
    assert plain.shape == (4000,)
    assert (plain > 0).all()
    assert (plain < 1).all()
    assert plain.mean().item() == pytest.approx(0.5, abs=0.02)
    torch.testing.assert_close(draw(3.0), shift_sigmas(plain, 3.0))
    assert plain.std().item() == pytest.approx(0.208 if logit_normal else 0.289, abs=0.01)
