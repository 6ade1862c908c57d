"""From rollouts to a better adapter: the clipped loss over random steps, and the check that the ratio starts at 1.

Before the first update of an epoch the model is the one that rolled it out, so that every probability ratio is 1 but
for rounding. Where it is not, training would follow numbers that mean nothing: the run stops and says what differs.
Within the bound rounding is divided out: the log-probabilities of the kernels that train become the old ones, else
rounding would clip, now and then, what no update has moved.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ospnext.flow.sde import divergence, log_prob, step_noises
from ospnext.parallel.fsdp import synchronise_gradients
from ospnext.parallel.launch import Launch, agree, any_of, gather_objects
from ospnext.train.log import Log
from ospnext.train.loop import LoopSettings, take_step
from ospnext.train.rl.grpo import clipped_loss
from ospnext.train.rl.policy import Policy
from ospnext.train.rl.rollout import Rollouts, step_at
from ospnext.train.rl.settings import GRPOConfig
from ospnext.train.rl.why import describe_difference, not_finite
from ospnext.train.state import TrainState


class RatioError(ValueError):
    """The ratio is not 1 before an update."""


class Updater:
    """Trains on rollouts.

    Args:
        config: the numbers.
        policy: what is trained.
        state: of the run.
        settings: of the optimiser's steps.
        launch: this process.
        exact: whether the base is in float32.
    """

    def __init__(
        self,
        config: GRPOConfig,
        policy: Policy,
        state: TrainState,
        settings: LoopSettings,
        launch: Launch,
        exact: bool,
    ) -> None:
        self.config, self.policy, self.state = config, policy, state
        self.settings, self.launch = settings, launch
        self.tolerance = config.tolerance(exact)
        self._anchors: list[tuple[int, list[int], Tensor]] = []  # log-probabilities of an epoch's first update
        self.deviation = 0.0  # greatest distance of a ratio from 1 before the last epoch's first update

    def update(
        self,
        rollouts: Rollouts,
        places: Sequence[int],
        advantages: Tensor,
        facts: Mapping[str, float],
        log: Log,
        check: Callable[[], None],
    ) -> None:
        """Train on an epoch's rollouts; all processes call it together and take the same number of steps.

        Args:
            rollouts: of this rank.
            places: those of them that are trained on, as many on every rank.
            advantages: of all this rank's rollouts, [n].
            facts: what the log is to say of the epoch besides.
            log: a line's means are over these steps.
            check: called before each step; may raise on all processes.

        Raises:
            RatioError: on all processes, before anything has changed.
        """
        c = self.config
        steps = range(c.trained_steps(rollouts.levels.random))
        parts = [list(places[i : i + c.train_batch_size]) for i in range(0, len(places), c.train_batch_size)]
        together = self.settings.accumulation_steps
        first = True
        for _ in range(c.num_inner_epochs):
            for i in range(0, len(parts), together):
                check()
                total = self._gradients(rollouts, parts[i : i + together], steps, advantages, first)
                if first:
                    self._check_ratio(rollouts, parts[i : i + together], steps, float(total.pop("deviation")))
                    while self._anchors:
                        step, part, values = self._anchors.pop()
                        rollouts.log_probs[step][part] = values
                    if self.deviation > 0:
                        self._anchor(rollouts, parts[i + together :], steps)
                    log.add_facts(facts)
                    first = False
                total.pop("deviation", None)
                take_step(self.state, self.settings, total)
                self.state.step += 1
                log.add(total)

    def _anchor(self, rollouts: Rollouts, parts: Sequence[list[int]], steps: range) -> None:
        """Make the old log-probabilities of parts those of the kernels that train; all processes call it together."""
        for part in parts:
            text = rollouts.text.rows(part)
            for step in steps:  # with gradients, whose kernels are meant, but nothing goes back
                now = step_at(self.config, self.policy, rollouts, step, text, rollouts.states[step][part])
                rollouts.log_probs[step][part] = log_prob(rollouts.states[step + 1][part], now.step).detach()

    def _gradients(
        self, rollouts: Rollouts, parts: Sequence[list[int]], steps: range, advantages: Tensor, first: bool
    ) -> dict[str, Tensor]:
        """Add up the gradients of one optimiser step, perhaps the first of an epoch; what the log says of it."""
        c, samples = self.config, sum(map(len, parts))
        passes = [(part, step) for part in parts for step in steps]
        total: dict[str, Tensor] = {}
        for number, (part, step) in enumerate(passes):
            synchronise_gradients(self.state.modules.values(), number == len(passes) - 1)
            share = len(part) / (samples * len(steps))
            losses = self._losses(rollouts, part, step, advantages, first)
            (losses["loss"] * share).backward()
            for name, value in losses.items():
                value = value.detach()
                if name == "deviation":
                    total[name] = torch.maximum(total.get(name, value), value)
                else:
                    total[name] = total.get(name, 0) + value * share
        variance = total.pop("off_square") - (total["ratio"] - 1) ** 2  # about 1: float32 holds no square near 1
        total["ratio_std"] = variance.clamp(min=0).sqrt()
        if not c.kl_beta:
            total.pop("kl")
        return total

    def _losses(
        self, rollouts: Rollouts, part: list[int], step: int, advantages: Tensor, first: bool
    ) -> dict[str, Tensor]:
        c, device = self.config, rollouts.states[0].device
        x, x_next = rollouts.states[step][part], rollouts.states[step + 1][part]
        text = rollouts.text.rows(part)
        if c.kl_beta:  # first: nothing comes between the forward pass that is trained and its way back
            with self.policy.base():
                base = step_at(c, self.policy, rollouts, step, text, x)
        now = step_at(c, self.policy, rollouts, step, text, x)
        new, old = log_prob(x_next, now.step), rollouts.log_probs[step][part]
        deviation = (new.detach() - old).exp().sub(1).abs().max()
        if first:
            old = new.detach()
            self._anchors.append((step, part, old))
        clipped = clipped_loss(new, old, advantages[part].to(device), c.clip_range)
        loss = clipped.loss.mean() * self._weight(rollouts, step)
        losses = {"policy_loss": loss.detach(), "kl": loss.new_zeros(())}
        if c.kl_beta:
            kl = divergence(now.step, base.step, now.sigma, now.sigma_next, c.kl_convention).mean()
            losses["kl"] = kl.detach()
            loss = loss + c.kl_beta * kl
        return losses | {
            "loss": loss,
            "ratio": clipped.ratio.mean(),
            "off_square": (clipped.ratio - 1).square().mean(),
            "clip_fraction": clipped.clipped.float().mean(),
            "deviation": deviation,
        }

    def _weight(self, rollouts: Rollouts, step: int) -> float:
        """Of a random step in the loss; 1 on the average of those that are trained on.

        The gradient of a log-probability is ε/std times that of the mean, so that of all steps the last ones, whose
        noise is least, have the largest gradients, while what they decide is least. TempFlow-GRPO (He et al., 2025,
        arXiv 2508.04324) weighs steps by std.
        """
        if self.config.step_weights == "equal":
            return 1.0
        noises = step_noises(rollouts.levels, self.config.noise, self.config.level)
        noises = noises[: self.config.trained_steps(rollouts.levels.random)]
        return noises[step] * len(noises) / sum(noises)

    def _check_ratio(self, rollouts: Rollouts, parts: Sequence[list[int]], steps: range, deviation: float) -> None:
        """Hold the ratio to 1 on all processes; ``deviation`` is this one's greatest distance."""
        far = not deviation <= self.tolerance  # also where it is no number
        self.deviation = max(gather_objects(self.launch, deviation), key=lambda d: math.inf if math.isnan(d) else d)
        if not any_of(self.launch, far):
            return
        unsound = not_finite(self.config, self.policy, rollouts, parts, steps)
        said = describe_difference(self.config, self.policy, rollouts, parts[0], steps)
        for module in self.state.modules.values():
            module.zero_grad(set_to_none=True)

        def refuse() -> None:
            if unsound is not None:
                raise RatioError(f"there is no probability ratio: {unsound}")
            if far:
                raise RatioError(
                    f"before an update the probability ratio is {self.deviation:.2e} from 1, and {self.tolerance:.1e} "
                    f"is allowed (rl_config.ratio_tolerance): rollout and training do not compute alike. {said}"
                )

        agree(self.launch, refuse)
