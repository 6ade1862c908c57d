"""Group relative policy optimisation, in pure tensors: advantages, the clipped loss, who is trained on.

Shao et al., "DeepSeekMath" (2024) for GRPO, Schulman et al., "Proximal Policy Optimization" (2017) for the clipped
ratio; Flow-GRPO and DanceGRPO (2025) for their use with flows. A reward that is not a number is one that could not be
had: its sample counts nowhere and gets the advantage 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-4  # added to a standard deviation: Flow-GRPO's, OSP-Next's


def advantages(
    rewards: Tensor, groups: Tensor, *, per_group: bool = True, global_std: bool = False, most: float | None = 5.0
) -> Tensor:
    """A = (r - mean) / (std + 1e-4), kept within ± ``most``.

    Args:
        rewards: [S], all of an epoch.
        groups: [S] whole numbers: samples of one prompt have the same.
        per_group: mean (and std) of the sample's group, else of all.
        global_std: the std of all, even if the mean is the group's.
        most: None does not clip.

    Returns:
        float32 [S].
    """
    r = rewards.double()
    there = r.isfinite()
    mean, std = r.new_zeros(r.shape), r.new_zeros(r.shape)
    members = [groups == group for group in groups.unique()] if per_group else [torch.ones_like(there)]
    for member in members:
        values = r[member & there]
        if len(values):
            mean[member], std[member] = values.mean(), values.std(correction=0)
    if global_std and bool(there.any()):
        std[:] = r[there].std(correction=0)
    result = torch.where(there, (r - mean) / (std + EPSILON), 0.0)
    return (result if most is None else result.clamp(-most, most)).float()


def mixed_advantages(
    rewards: Tensor,
    weights: Tensor,
    groups: Tensor,
    *,
    per_group: bool = True,
    global_std: bool = False,
    most: float | None = 5.0,
) -> Tensor:
    """Σ_k w_k A_k: every reward's own advantages, weighted (MixGRPO), so that no scale hides another; then clipped.

    Args:
        rewards: [S, K].
        weights: [K].
        groups, per_group, global_std, most: as ``advantages``.
    """
    each = [advantages(r, groups, per_group=per_group, global_std=global_std, most=None) for r in rewards.T]
    mixed = (torch.stack(each, 1) * weights.to(each[0])).sum(1)
    result = torch.where(rewards.isfinite().all(1), mixed, 0.0)
    return result if most is None else result.clamp(-most, most)


class Clipped(NamedTuple):
    """The loss of each sample, its probability ratio, and whether clipping has stopped its gradient; all [B]."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def clipped_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip_range: float) -> Clipped:
    """max(-A ρ, -A clip(ρ, 1 ± c)) with ρ = exp(log p - log p_old); all [B]."""
    ratio = (log_prob - old_log_prob).exp()
    plain = -advantage * ratio
    kept = -advantage * ratio.clamp(1 - clip_range, 1 + clip_range)
    return Clipped(torch.maximum(plain, kept), ratio.detach(), (kept > plain).detach())


def best_and_worst(rewards: Tensor, groups: Tensor, count: int) -> Tensor:
    """Which ``count`` samples of every group are trained on: half the best, half the worst (DanceGRPO's best-of-n).

    Args:
        rewards: [S]; what is no number counts as the middle.
        groups: [S]; every group has at least ``count`` members.
        count: even.

    Returns:
        Places in 0..S-1, rising, ``count`` for each group.
    """
    chosen = []
    for group in groups.unique():
        places = (groups == group).nonzero().flatten()
        values = rewards[places].double()
        known = values[values.isfinite()]
        middle = known.quantile(0.5) if len(known) else values.new_zeros(())
        order = torch.where(values.isfinite(), values, middle).argsort(stable=True)
        chosen.append(places[torch.cat([order[: count // 2], order[len(order) - count // 2 :]])])
    return torch.cat(chosen).sort().values


def most_varied(rewards: Tensor, groups: Tensor, count: int) -> Tensor:
    """Which ``count`` groups teach most: those whose rewards deviate most, the earlier ones where they are alike.

    Compared within itself, a group whose rewards are all the same has no gradient, but would take as long to train on
    (Yu et al., "DAPO", 2025, draws others in its place).

    Args:
        rewards: [S]; what is no number counts nowhere.
        groups: [S]; at least ``count`` of them.
        count: groups to keep.

    Returns:
        Places in 0..S-1, rising, of all members of these groups.
    """
    names = groups.unique()
    spread = []
    for group in names:
        values = rewards[groups == group].double()
        values = values[values.isfinite()]
        spread.append(values.std(correction=0) if len(values) else values.new_zeros(()))
    kept = names[torch.stack(spread).argsort(descending=True, stable=True)[:count]]
    return torch.isin(groups, kept).nonzero().flatten()


def zero_variance_share(rewards: Tensor, groups: Tensor) -> float:
    """The share of groups whose rewards are all the same (or not there): these teach nothing."""
    flat = []
    for group in groups.unique():
        values = rewards[groups == group]
        values = values[values.isfinite()]
        flat.append(len(values) < 2 or bool((values.max() - values.min()) <= 1e-8))
    return sum(flat) / len(flat)
