"""Why reinforcement learning stopped, in words: what is no number, or what rollout and training compute differently.

What asks the model is called by all processes together, for their weights may be shared.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ospnext.flow.sde import log_prob
from ospnext.train.rl.policy import Policy
from ospnext.train.rl.rollout import At, Rollouts, Worth, step_at
from ospnext.train.rl.settings import GRPOConfig

_BROKEN = "where the adapter is broken already, remove the newest iter_ folders"
_LOWER = f"lower optimizer_config.lr or rl_config.noise_level; {_BROKEN}"


def why_unscored(c: GRPOConfig, worth: Worth, unsound: str | None) -> str:
    """What is to blame where no sample of an epoch has a reward; ``unsound`` is what ``not_finite`` found."""
    if worth.unsound:
        return f"{worth.unsound} of them hold NaN or infinity: {unsound or _LOWER}"
    silent = [name for name in c.reward_fn if not bool(worth.each[name].isfinite().any())]
    return f"{', '.join(silent) or 'their sum'} gave no number (a reward that raises is warned of above)"


@torch.no_grad()
def not_finite(
    config: GRPOConfig, policy: Policy, rollouts: Rollouts, parts: Sequence[list[int]], steps: range
) -> str | None:
    """What is the first to be NaN or infinite in random steps of these samples, and what to change; None: nothing is.

    Args:
        config: the noise.
        policy: asked once for each part and step.
        rollouts: of this rank.
        parts: places among them, as many parts on every rank.
        steps: random ones, counted from the first.
    """
    found: str | None = None
    for step in steps:
        for part in parts:
            x, x_next = rollouts.states[step][part], rollouts.states[step + 1][part]
            now = step_at(config, policy, rollouts, step, rollouts.text.rows(part), x)
            if found is None and (why := _cause(config, x, now, x_next, rollouts.log_probs[step][part])) is not None:
                found = f"in random step {step} (sigma {now.sigma:.6g} to {now.sigma_next:.6g}) {why}"
    return found


def _cause(config: GRPOConfig, x: Tensor, now: At, x_next: Tensor, recorded: Tensor) -> str | None:
    """What of a random step is not finite, in the order in which it comes about, and what to change."""
    std = now.step.std + 0.0  # no -0
    noise = f"of noise of standard deviation {std:.1e}"
    if not bool(x.isfinite().all()):
        return f"the state before it is not finite: {_LOWER}"
    if not bool(now.velocity.isfinite().all()):
        return f"the velocity is not finite, of a state of up to {x.abs().max():.1e}: {_LOWER}"
    way = f"{'raise' if std < 1 else 'lower'} rl_config.noise_level ({config.level:g})"
    if not bool(x_next.isfinite().all()):
        return f"the state after it is not finite, {noise}: {way}"
    if not bool(recorded.isfinite().all() & log_prob(x_next, now.step).isfinite().all()):
        return f"the log-probability is not finite, {noise}: {way}"
    return None


@torch.no_grad()
def describe_difference(config: GRPOConfig, policy: Policy, rollouts: Rollouts, part: list[int], steps: range) -> str:
    """Which of the things that differ between rollout and training changes log-probabilities, in words.

    All processes call it together: it asks the model.
    """

    def distance(step: int, places: list[int], gradients: bool) -> float:
        with torch.set_grad_enabled(gradients):
            now = step_at(config, policy, rollouts, step, rollouts.text.rows(places), rollouts.states[step][places])
        values = log_prob(rollouts.states[step + 1][places], now.step)
        return (values.detach() - rollouts.log_probs[step][places]).abs().max().item()

    step = max(steps, key=lambda s: distance(s, part, gradients=True))
    batch = list(range(min(rollouts.batch, len(rollouts.samples))))
    training, sampling, again = (distance(step, part, True), distance(step, part, False), distance(step, batch, False))
    said = (
        f"Log-probabilities of random step {step} differ by {training:.1e} in training; without gradients, as the "
        f"kernels of sampling compute, by {sampling:.1e}; in the rollout's own batch of {len(batch)} by {again:.1e}. "
    )
    if again > 10 * max(training, 1e-12) or min(training, sampling, again) > training / 2:
        return said + "All differ: the weights or the text are not those of the rollout"
    if sampling < training / 2:
        return said + (
            "Gradients make the difference: other kernels or compilation compute with them: set "
            "rl_config.exact_rollouts=true"
        )
    return said + (
        f"The batch makes the difference: use train_batch_size={rollouts.batch}, weight_dtype=fp32, or a larger "
        "clip_range"
    )
