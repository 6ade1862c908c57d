"""Advantages and the clipped loss, by hand."""

import math

import pytest
import torch

from ospnext.train.rl.grpo import (
    advantages,
    best_and_worst,
    clipped_loss,
    mixed_advantages,
    most_varied,
    zero_variance_share,
)
from ospnext.train.rl.run import places_to_train
from ospnext.train.rl.settings import GRPOConfig

REWARDS = torch.tensor([1.0, 3.0, 10.0, 30.0])
GROUPS = torch.tensor([0, 0, 7, 7])


def test_advantages_of_groups_and_of_all():
    own = advantages(REWARDS, GROUPS)
    torch.testing.assert_close(own, torch.tensor([-1.0, 1.0, -1.0, 1.0]), atol=2e-4, rtol=0)
    std = REWARDS.std(correction=0).item()
    shared = advantages(REWARDS, GROUPS, global_std=True)
    torch.testing.assert_close(shared, torch.tensor([-1.0, 1.0, -10.0, 10.0]) / (std + 1e-4))
    flat = advantages(REWARDS, GROUPS, per_group=False)
    torch.testing.assert_close(flat, (REWARDS - 11) / (std + 1e-4))


def test_advantages_are_clipped_and_a_flat_group_has_none():
    assert advantages(torch.tensor([0.0] * 99 + [1.0]), torch.zeros(100)).max() == 5
    assert advantages(torch.tensor([0.0] * 99 + [1.0]), torch.zeros(100), most=None).max() > 9
    assert advantages(torch.full((4,), 0.3), torch.zeros(4)).abs().max() < 1e-6


def test_what_could_not_be_scored_counts_nowhere():
    rewards = torch.tensor([1.0, 3.0, math.nan, math.nan, math.inf])
    result = advantages(rewards, torch.tensor([0, 0, 0, 1, 1]))
    torch.testing.assert_close(result, torch.tensor([-1.0, 1.0, 0.0, 0.0, 0.0]), atol=2e-4, rtol=0)
    assert not advantages(torch.full((3,), math.nan), torch.zeros(3), global_std=True).any()


def test_each_rewards_own_advantages_have_no_scale():
    rewards = torch.stack([REWARDS, REWARDS.flip(0) * 1000], 1)
    mixed = mixed_advantages(rewards, torch.tensor([1.0, 0.5]), GROUPS)
    torch.testing.assert_close(mixed, torch.tensor([-0.5, 0.5, -0.5, 0.5]), atol=5e-4, rtol=0)


def test_the_loss_and_its_gradient_by_hand():
    old = torch.zeros(4)
    new = torch.tensor([0.05, 0.5, 0.5, -0.5], requires_grad=True)
    advantage = torch.tensor([2.0, 2.0, -2.0, -2.0])
    result = clipped_loss(new, old, advantage, 0.2)
    rho = new.detach().exp()
    # Inside the range; above it and good: clipped; above it and bad: not clipped; below it and bad: clipped.
    expected = [-2 * rho[0].item(), -2 * 1.2, 2 * rho[2].item(), 2 * 0.8]
    assert result.loss.tolist() == pytest.approx(expected)
    assert result.clipped.tolist() == [False, True, False, True]
    torch.testing.assert_close(result.ratio, rho)
    result.loss.sum().backward()
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx([-2 * rho[0].item(), 0, 2 * rho[2].item(), 0])


def test_at_ratio_one_the_gradient_is_that_of_reinforce():
    new = torch.randn(8, requires_grad=True)
    advantage = torch.randn(8)
    clipped_loss(new, new.detach(), advantage, 1e-4).loss.sum().backward()
    assert new.grad is not None
    torch.testing.assert_close(new.grad, -advantage)


def test_best_and_worst_of_every_group():
    rewards = torch.tensor([5.0, 1.0, 3.0, 2.0, 4.0, 9.0, math.nan, 7.0, 8.0, 6.0])
    groups = torch.tensor([0] * 5 + [1] * 5)
    assert best_and_worst(rewards, groups, 2).tolist() == [0, 1, 5, 9]
    assert best_and_worst(rewards, groups, 4).tolist() == [0, 1, 3, 4, 5, 7, 8, 9]


def test_groups_whose_rewards_differ_most():
    rewards = torch.tensor([1.0, 1.0, 0.0, 3.0, math.nan, math.nan, 2.0, math.nan, 5.0, 4.0])
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    assert most_varied(rewards, groups, 1).tolist() == [2, 3]
    assert most_varied(rewards, groups, 2).tolist() == [2, 3, 8, 9]
    assert most_varied(rewards, groups, 3).tolist() == [0, 1, 2, 3, 8, 9]  # of equals the first
    assert most_varied(rewards, groups, 5).tolist() == list(range(10))


@pytest.mark.parametrize(("varied", "best"), [(None, None), (2, None), (None, 2), (2, 2)])
def test_who_is_trained_on(varied: int | None, best: int | None):
    """As many whatever the rewards, and of the groups that are kept the best and the worst."""
    config = GRPOConfig(
        prompt_file="-", reward_fn={"motion": 1}, num_image_per_prompt=4, train_groups=varied, best_of_n=best
    )
    rewards = torch.tensor([1, 1, 1, 1, 0, 9, 5, 4, 2, 2, 2, 2, 0, 0, 7, 1], dtype=torch.float64)
    places = places_to_train(config, rewards)
    assert len(places) == (varied or 4) * (best or 4)
    assert places == sorted(set(places))
    if varied:
        assert {place // 4 for place in places} == {1, 3}
    if best:
        assert {4, 5, 14} <= set(places)
    assert len(places_to_train(config, torch.zeros(16))) == len(places)


def test_zero_variance_share():
    rewards = torch.tensor([1.0, 1.0, 1.0, 2.0, math.nan, 5.0, math.nan, math.nan])
    assert zero_variance_share(rewards, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])) == 0.75
