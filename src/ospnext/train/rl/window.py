"""Where the random steps of a rollout lie: OSP-Next's leading window, and the ways in which Mix-GRPO's slides.

A rollout of T steps has T - 1 that can be random, for the last has no noise. The window is ``size`` of them, one after
the other, and only they are trained on. Its place is a function of the iteration, so there is no state to keep.

Li et al., "MixGRPO" (2025): a window of 4 that moves by 1 every 25 iterations, of 25 steps.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

Strategy = Literal["leading", "progressive", "random", "decay"]


@dataclass(frozen=True)
class Window:
    """How the window moves.

    Attributes:
        strategy: ``leading`` stays at the start (OSP-Next, and MixGRPO's "frozen"); ``progressive`` moves by ``stride``
            every ``interval`` iterations and begins anew when it has reached the end; ``random`` jumps anywhere every
            ``interval`` iterations; ``decay`` is ``progressive`` with an interval that shrinks for late places l, which
            matter less: ceil(interval · exp(-rate · max(l - start, 0))).
        size: random steps.
        stride, interval: as above.
        rate, start: of the decay; MixGRPO's are 0.1 and 13 of 25 steps.
        seed: of random places.
    """

    strategy: Strategy = "leading"
    size: int = 4
    stride: int = 1
    interval: int = 25
    rate: float = 0.1
    start: int = 13
    seed: int = 0

    def place(self, iteration: int, num_steps: int) -> tuple[int, int]:
        """First random step of an iteration's rollouts of ``num_steps``, and how many there are.

        Raises:
            ValueError: no step can be random.
        """
        size = min(self.size, num_steps - 1)
        if size < 1:
            raise ValueError(f"{num_steps} steps with {self.size} random ones: two steps and one are the least")
        last = num_steps - 1 - size
        if self.strategy == "leading":
            return 0, size
        if self.strategy == "random":
            rng = np.random.default_rng([self.seed, iteration // self.interval])
            return int(rng.integers(0, last + 1)), size
        places = range(0, last + 1, self.stride)
        stays = [self._stay(place) for place in places]
        rest = iteration % sum(stays)
        for place, stay in zip(places, stays, strict=True):
            if rest < stay:
                return place, size
            rest -= stay
        raise AssertionError("the cycle has an end")

    def _stay(self, place: int) -> int:
        """For how many iterations the window stays in a place."""
        if self.strategy == "progressive":
            return self.interval
        return math.ceil(self.interval * math.exp(-self.rate * max(place - self.start, 0)))
