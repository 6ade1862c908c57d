"""Gradient clipping whose threshold follows the run, as OSP-Next trains, without its trap.

The threshold of a step is μ + 3 √v, where μ and v are moving averages of the gradients' norm and of its squared
distance from μ. OSP-Next averages only norms below the threshold: once norms lie above it, it can never rise again and
every step is clipped for good. Here a norm above it counts as at most twice the threshold, so that a lasting change is
followed at 1% a step or more, and a single spike moves it by as much.
"""

import math
from typing import Any, NamedTuple

DECAY = 0.99
DEVIATIONS = 3.0
FIRST = 3.0  # times the first norm: where the threshold starts, if that is below the configured norm


class Clipped(NamedTuple):
    """What is to become of a step's gradients: times ``scale``; None leaves the step out."""

    scale: float | None
    threshold: float


class AdaptiveClipper:
    """Decides from the norm of every step's gradients how they are scaled.

    Args:
        max_grad_norm: the largest threshold at the start.
    """

    def __init__(self, max_grad_norm: float) -> None:
        self.max_grad_norm = max_grad_norm
        self.mean: float | None = None  # no step with a gradient yet
        self.variance = 0.0
        self.skipped = 0  # steps whose gradients were not finite
        self.in_a_row = 0  # of them, those since the last that was

    def step(self, norm: float) -> Clipped:
        """Take in a step's norm; the same on all processes."""
        if not math.isfinite(norm):
            self.skipped += 1
            self.in_a_row += 1
            return Clipped(None, self.threshold)
        self.in_a_row = 0
        if norm == 0:  # nothing was to be learnt, as from equal rewards: no measure of what is to come
            return Clipped(1.0, self.threshold)
        if not self.mean:
            self.mean = min(self.max_grad_norm, FIRST * norm)
        threshold = self.threshold
        seen = min(norm, 2 * threshold)
        self.mean += (1 - DECAY) * (seen - self.mean)
        self.variance += (1 - DECAY) * ((seen - self.mean) ** 2 - self.variance)
        return Clipped(min(1.0, threshold / norm), threshold)

    @property
    def threshold(self) -> float:
        """Norm to which the next step's gradients are scaled down."""
        mean = self.mean or self.max_grad_norm
        return mean + DEVIATIONS * math.sqrt(self.variance)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"mean": self.mean, "variance": self.variance, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self.mean, self.variance = state["mean"], state["variance"]
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
