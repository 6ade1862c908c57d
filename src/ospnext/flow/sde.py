"""The flow as a random walk: steps with noise whose densities are known, which is what reinforcement learning needs.

The ODE dx = v dσ and, for any s(σ) >= 0, the SDE

    dx = [v + s² / (2σ) (x + (1 - σ) v)] dσ + s √(-dσ) ε,        dσ < 0

have the same marginals, since -(x + (1 - σ) v) / σ is the score of x_t = σ ε + (1 - σ) x_0. One step of it is a normal
distribution around

    mean = x (1 + s² Δ / (2σ)) + v (1 + s² (1 - σ) / (2σ)) Δ,    Δ = σ' - σ,    std = s √(-Δ)

(Liu et al., "Flow-GRPO", 2025). What differs between publications is s alone, and CPS, which mixes otherwise:

=========  ===================  ==================================================================================
noise      s, or the step       source
=========  ===================  ==================================================================================
flow       a √(σ / (1 - σ))     Flow-GRPO; at σ = 1 the level of the second step stands in the denominator
dance      a                    DanceGRPO (Xue et al., 2025), the same formula for a constant s
osp        a σ                  OSP-Next: Flow-GRPO's form for Wan, with s running from 1 to 0
cps        (see ``_cps``)       "Coefficients-preserving sampling" (arXiv 2509.05952, 2025), for few and long steps
=========  ===================  ==================================================================================

a is ``noise_level``. Symbols as in ``path``. The last step, to σ' = 0, has no noise and so no log-probability.
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ospnext.flow.path import shift_sigmas
from ospnext.flow.sample import euler_step

Noise = Literal["flow", "dance", "osp", "cps"]
NOISE_LEVELS: dict[str, float] = {"flow": 0.7, "dance": 0.3, "osp": 1.0, "cps": 0.7}  # a where nobody says
Draw = Callable[[Tensor], Tensor]  # a tensor -> standard normal noise like it


class Gaussian(NamedTuple):
    """Where a step may lead: ``mean [B, ...]`` and one ``std``, float32."""

    mean: Tensor
    std: Tensor


class Levels(NamedTuple):
    """The noise levels of a rollout and which of its steps are random.

    Attributes:
        sigmas: float32 [steps + 1], falling from 1 to 0.
        first: the first random step.
        random: how many there are, one after the other.
        second_order: whether the steps after them are ``SecondOrder``'s.
    """

    sigmas: Tensor
    first: int
    random: int
    second_order: bool = False


def gaussian(
    x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, top: Tensor, noise: Noise, level: float
) -> Gaussian:
    """The distribution of the next state.

    Args:
        x: the state [B, ...], float32.
        v: its velocity.
        sigma, sigma_next: the levels σ > σ' > 0, scalars or [B].
        top: the rollout's second level, which stands for 1 where Flow-GRPO's s would be infinite.
        noise, level: which s, and its factor a.
    """
    shape = (-1, *[1] * (x.ndim - 1)) if sigma.ndim else ()
    s, s_next, top = (value.to(x).reshape(shape) for value in (sigma, sigma_next, top.expand_as(sigma)))
    if noise == "cps":
        return _cps(x, v, s, s_next, level)
    spread = _spread(s, top, noise, level)
    delta = s_next - s
    mean = x * (1 + spread**2 * delta / (2 * s)) + v * (1 + spread**2 * (1 - s) / (2 * s)) * delta
    return Gaussian(mean, spread * (-delta).sqrt())


def excess_noise(levels: Levels, noise: Noise, level: float) -> list[float]:
    """How many times the noise that its level has each random step leaves: 1 after steps of the ODE and of CPS.

    Of x = (1 - σ) x̂_0 + σ x̂_1 a step of the SDE keeps (σ' - s² |Δ| / (2σ)) x̂_1 and adds s √|Δ| ε, which is σ' in all
    only where steps are short.
    """
    found = []
    for i, step in _unit_steps(levels, noise, level):
        found.append(float(torch.hypot(step.mean, step.std) / levels.sigmas[i + 1]))
    return found


def step_noises(levels: Levels, noise: Noise, level: float) -> list[float]:
    """The std of what each random step adds: s √|Δ|, or CPS' own."""
    return [float(step.std) for _, step in _unit_steps(levels, noise, level)]


def _unit_steps(levels: Levels, noise: Noise, level: float) -> Iterator[tuple[int, Gaussian]]:
    """The random steps, counted from the first of all, from pure noise of each level."""
    for i in range(levels.first, levels.first + levels.random):
        sigma, after = levels.sigmas[i], levels.sigmas[i + 1]
        yield i, gaussian(sigma.reshape(1, 1), torch.ones(1, 1), sigma, after, levels.sigmas[1], noise, level)


def _spread(sigma: Tensor, top: Tensor, noise: Noise, level: float) -> Tensor:
    """s(σ)."""
    if noise == "flow":
        return level * (sigma / (1 - torch.where(sigma >= 1, top, sigma))).sqrt()
    return level * sigma if noise == "osp" else torch.full_like(sigma, level)


def _cps(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, level: float) -> Gaussian:
    """x' = (1 - σ') x̂_0 + σ' cos(πa/2) x̂_1 + σ' sin(πa/2) ε, with x̂_0 = x - σ v and x̂_1 = x + (1 - σ) v.

    The two noises together have the variance σ'² that x' is to have, however long the step, where a step of the SDE has
    too much. It is no step of an SDE: what it adds does not shrink with the step.
    """
    angle = level * math.pi / 2
    data, old = x - sigma * v, x + (1 - sigma) * v
    return Gaussian((1 - sigma_next) * data + sigma_next * math.cos(angle) * old, sigma_next * math.sin(angle))


def log_prob(x_next: Tensor, step: Gaussian) -> Tensor:
    """Mean over all elements of a sample of the log-density of ``x_next`` [B, ...]: float32 [B].

    A mean and not the sum, so that clip ranges mean the same for videos of every size (Flow-GRPO, DanceGRPO).
    """
    std = step.std.expand_as(x_next)
    density = -((x_next - step.mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)


def divergence(step: Gaussian, base: Gaussian, sigma: Tensor, sigma_next: Tensor, convention: str = "exact") -> Tensor:
    """KL of a step from the base model's, of equal std, as a mean over elements: [B].

    Args:
        step, base: of the same state.
        sigma, sigma_next: its levels, scalars or [B].
        convention: ``exact`` is (μ - μ_base)² / (2 std²), OSP-Next's and MixGRPO's eq. 10; ``no_dt`` has s² in place of
            std² = s² |Δ|, as the published code of Flow-GRPO.
    """
    difference = ((step.mean - base.mean) ** 2 / (2 * step.std**2)).flatten(1).mean(1)
    return difference if convention == "exact" else difference * (sigma - sigma_next).to(difference)


# ── rollouts ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def rollout_levels(num_steps: int, shift: float, first: int, count: int, tail: float | None = None) -> Levels:
    """The schedule of a rollout with ``count`` random steps from ``first`` on.

    Args:
        num_steps: steps of the schedule.
        shift: of the noise levels, applied once.
        first, count: the window; what reaches into the last, noiseless step is left out.
        tail: None keeps the steps after the window; else that share of them, rounded up, by a second-order solver:
            MixGRPO-Flash (Li et al., "MixGRPO", 2025), which compresses only what comes after the window, for errors
            before it grow.

    Raises:
        ValueError: the window begins outside the schedule, or there is no random step in it.
    """
    count = min(count, num_steps - 1 - first)
    if first < 0 or count < 1:
        raise ValueError(f"no random step: the window begins at step {first} of {num_steps}, the last has no noise")
    even = torch.linspace(1, 0, num_steps + 1)
    end = first + count
    if tail is not None:
        rest = math.ceil((num_steps - end) * tail)
        even = torch.cat([even[:end], torch.linspace(float(even[end]), 0, max(rest, 1) + 1)])
    return Levels(shift_sigmas(even, shift), first, count, tail is not None)


class Recorder:
    """A step for ``sample.denoise`` that is random inside the window, and keeps what happened there.

    Args:
        levels: of the rollout.
        noise, level: of random steps.
        draw: gives their noise.
        policy: (i, x, v) -> the velocity whose density is recorded, if it is not the ``v`` that leads on.

    Attributes:
        states: x before each random step, and after the last of them: ``random + 1`` tensors.
        log_probs: [B] of each random step.
    """

    def __init__(
        self,
        levels: Levels,
        noise: Noise,
        level: float,
        draw: Draw,
        policy: Callable[[int, Tensor, Tensor], Tensor] = lambda i, x, v: v,
    ) -> None:
        self.levels, self.noise, self.level, self.draw, self.policy = levels, noise, level, draw, policy
        self.states: list[Tensor] = []
        self.log_probs: list[Tensor] = []
        self._index = 0
        self._solver = SecondOrder() if levels.second_order else None

    def __call__(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """The next state."""
        i, levels = self._index, self.levels
        self._index += 1
        if not levels.first <= i < levels.first + levels.random:
            after = self._solver is not None and i >= levels.first + levels.random
            return (
                (self._solver or euler_step)(x, v, sigma, sigma_next) if after else euler_step(x, v, sigma, sigma_next)
            )
        top = levels.sigmas[1]
        step = gaussian(x, v, sigma, sigma_next, top, self.noise, self.level)
        x_next = step.mean + step.std * self.draw(x)
        told = self.policy(i, x, v)
        if told is not v:
            step = gaussian(x, told, sigma, sigma_next, top, self.noise, self.level)
        self.states += [x, x_next] if not self.states else [x_next]
        self.log_probs.append(log_prob(x_next, step))
        return x_next


class SecondOrder:
    """DPM-Solver++ (2M) for the straight path, a step for ``sample.denoise`` (Lu et al., "DPM-Solver++", 2022).

    With x̂_0 = x - σ v, λ = log((1 - σ) / σ), h = λ' - λ and r = h_before / h:

        x' = (σ' / σ) x + (1 - σ' / σ) D,    D = x̂_0 + (x̂_0 - x̂_0,before) / (2r)

    Without a step before it, and in the last one (h infinite), D = x̂_0: that is Euler's step.
    """

    def __init__(self) -> None:
        self._before: tuple[Tensor, Tensor] | None = None  # x̂_0 and λ of the step before

    def __call__(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """The next state."""
        data, lam = x - sigma * v, ((1 - sigma) / sigma).log()
        towards = data
        if self._before is not None and float(sigma_next) > 0:
            old, lam_before = self._before
            h = ((1 - sigma_next) / sigma_next).log() - lam
            towards = data + (data - old) * (h / (2 * (lam - lam_before)))
        self._before = data, lam
        ratio = sigma_next / sigma
        return ratio * x + (1 - ratio) * towards
