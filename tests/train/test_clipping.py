"""The threshold follows the run, is not fooled by a spike, and cannot get stuck."""

import math

import pytest

from ospnext.train.clipping import AdaptiveClipper


def test_the_first_step_sets_the_threshold() -> None:
    assert AdaptiveClipper(1.0).step(0.1).threshold == pytest.approx(0.3)
    calm = AdaptiveClipper(1.0).step(5.0)
    assert calm.threshold == 1.0
    assert calm.scale == pytest.approx(0.2)


def test_it_is_the_formula_while_norms_stay_below() -> None:
    clipper = AdaptiveClipper(1.0)
    mean, variance = 0.6, 0.0
    for norm in (0.2, 0.25, 0.15, 0.3, 0.22):
        threshold = mean + 3 * math.sqrt(variance)
        step = clipper.step(norm)
        assert step.threshold == pytest.approx(threshold)
        assert step.scale == 1.0
        mean = 0.99 * mean + 0.01 * norm
        variance = 0.99 * variance + 0.01 * (mean - norm) ** 2


def test_a_spike_is_clipped_and_soon_forgotten() -> None:
    clipper = AdaptiveClipper(1.0)
    for _ in range(500):
        clipper.step(0.1)
    before = clipper.threshold
    spike = clipper.step(1e4)
    assert spike.scale == pytest.approx(before / 1e4)
    assert clipper.threshold < 2 * before
    for _ in range(500):
        clipper.step(0.1)
    assert clipper.threshold < 1.1 * before


def test_it_cannot_get_stuck() -> None:
    clipper = AdaptiveClipper(1.0)
    for _ in range(300):
        clipper.step(0.01)
    steps = next(i for i in range(2000) if clipper.step(3.0).scale == 1.0)
    assert steps < 500


def test_steps_without_a_gradient_are_no_measure() -> None:
    clipper = AdaptiveClipper(1.0)
    assert clipper.step(0.0).scale == 1.0
    assert clipper.step(0.2) == AdaptiveClipper(1.0).step(0.2)
    before = clipper.state_dict()
    clipper.step(0.0)
    assert clipper.state_dict() == before


def test_what_is_not_finite_is_left_out_and_counted() -> None:
    clipper = AdaptiveClipper(1.0)
    clipper.step(0.5)
    state = clipper.state_dict()
    for norm in (math.nan, math.inf):
        assert clipper.step(norm).scale is None
    assert clipper.state_dict() == state | {"skipped": 2, "in_a_row": 2}
    assert AdaptiveClipper(1.0).step(math.nan).scale is None
    assert AdaptiveClipper(1.0).step(0.0).scale == 1.0


def test_its_state_goes_on() -> None:
    one = AdaptiveClipper(1.0)
    for norm in (0.4, 0.2, 0.9):
        one.step(norm)
    two = AdaptiveClipper(1.0)
    two.load_state_dict(one.state_dict())
    assert two.step(0.3) == one.step(0.3)
