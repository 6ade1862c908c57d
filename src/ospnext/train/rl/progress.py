"""What of a reinforcement-learning run's state is no tensor, and whether it goes the wrong way."""

import math
from collections.abc import Mapping
from statistics import fmean, variance
from typing import Any

SPAN = 8  # epochs at either end that are compared
DEVIATIONS = 4.0  # how far apart their means have to be: each epoch has other prompts


class Progress:
    """Counts, and what the first and the newest epochs were like.

    Attributes:
        epoch: the next one.
        baseline: what the first evaluation said.
        seconds: that rolling out and training took so far, without evaluations; measured, not part of the result.
        first, last: mean rewards of the first and the newest ``SPAN`` epochs.
    """

    def __init__(self) -> None:
        self.epoch, self.seconds = 0, 0.0
        self.baseline: dict[str, float] = {}
        self.first: list[float] = []
        self.last: list[float] = []

    def add(self, reward: float) -> None:
        """Take in an epoch's mean reward."""
        if len(self.first) < SPAN:
            self.first.append(reward)
        else:
            self.last = [*self.last, reward][-SPAN:]

    @property
    def decline(self) -> tuple[float, float] | None:
        """Mean rewards at first and now, where the latter is lower than other prompts explain."""
        if len(self.last) < SPAN:
            return None
        before, now = fmean(self.first), fmean(self.last)
        error = math.sqrt((variance(self.first) + variance(self.last)) / SPAN)
        return (before, now) if before - now > DEVIATIONS * error else None

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "epoch": self.epoch,
            "baseline": self.baseline,
            "seconds": round(self.seconds, 2),
            "rewards": [self.first, self.last],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``; raises ValueError where it is of another kind of run."""
        if "epoch" not in state:
            raise ValueError("its data are not those of reinforcement learning")
        self.epoch, self.baseline = int(state["epoch"]), dict(state["baseline"])
        self.seconds = float(state["seconds"])
        self.first, self.last = map(list, state.get("rewards", ([], [])))
