"""Which clips come next: a pure function of the seed and of how much was taken.

The order of an epoch is a permutation drawn from (seed, epoch). A step takes ``batch_size`` clips for each rank, all
of one group (a bucket; without buckets there is one group): ranks take neighbouring slices, so the order of the clips
is the same whatever the number of ranks. The whole state is a ``Progress``: the epoch, and the clips taken of each
group by all ranks together. A run that goes on from it, with as many ranks or others, takes the very next clips.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

import numpy as np


class Draw(NamedTuple):
    """One clip to take: ``clip``, its index in the data set, in which ``epoch``, for which ``group``."""

    epoch: int
    clip: int
    group: int


class Progress(NamedTuple):
    """How far training has come: clips ``taken`` of each group in this ``epoch``, by all ranks together."""

    epoch: int
    taken: tuple[int, ...]


class Step(NamedTuple):
    """What one rank takes, and the progress when all ranks have."""

    draws: list[Draw]
    after: Progress


class Sampler:
    """Batches of one data-parallel rank, in an order that any number of ranks shares.

    Args:
        groups: indices of the clips of each group.
        batch_size: clips of one rank in a step.
        rank, world: of the data-parallel ranks; those that share a video are one.
        seed: of the order.
        shuffle: False takes clips by rising index.
        drop_last: leave out the end of a group that does not fill a step of all ranks; otherwise its first clips of
            the epoch fill it up. With one rank fewer or more another end is left out.

    Raises:
        ValueError: nothing would ever be drawn.
    """

    def __init__(
        self,
        groups: Sequence[np.ndarray],
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world:
            raise ValueError(f"batch_size {batch_size}, rank {rank} of {world}: there is no such share")
        self.groups = [np.asarray(group, dtype=np.int64) for group in groups]
        self.batch_size, self.rank, self.world, self.seed = batch_size, rank, world, seed
        self.shuffle, self.drop_last = shuffle, drop_last
        self._orders: dict[int, list[np.ndarray]] = {}
        if not any(self._drawable(len(group)) for group in self.groups):
            sizes = ", ".join(str(len(group)) for group in self.groups) or "none"
            raise ValueError(
                f"batch_size {batch_size} on {world} ranks takes {self.step_size} clips a step, but the groups of "
                f"clips hold {sizes}: lower batch_size, or set drop_last=false"
            )

    @property
    def step_size(self) -> int:
        """Clips that all ranks take in a step."""
        return self.batch_size * self.world

    @property
    def start(self) -> Progress:
        """Before the first step."""
        return Progress(0, (0,) * len(self.groups))

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch that is not interrupted."""
        return sum(
            len(group) // self.step_size if self.drop_last else -(-len(group) // self.step_size)
            for group in self.groups
        )

    def step(self, progress: Progress) -> Step:
        """What this rank takes after ``progress``; when an epoch is at its end, of the next one."""
        open_groups = self._open(progress)
        if not open_groups:
            progress = Progress(progress.epoch + 1, (0,) * len(self.groups))
            open_groups = self._open(progress)
        group = self._choose(progress, open_groups)
        order, first = self._order(progress.epoch)[group], progress.taken[group]
        places = first + self.rank * self.batch_size + np.arange(self.batch_size)
        draws = [Draw(progress.epoch, int(order[place % len(order)]), group) for place in places]
        taken = list(progress.taken)
        taken[group] = min(first + self.step_size, len(order))
        return Step(draws, Progress(progress.epoch, tuple(taken)))

    def state_dict(self, progress: Progress) -> dict[str, Any]:
        """``progress`` in plain values, with what it depends on."""
        sizes = [len(group) for group in self.groups]
        return {
            "epoch": progress.epoch,
            "taken": list(progress.taken),
            "seed": self.seed,
            "shuffle": self.shuffle,
            "groups": sizes,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> Progress:
        """The progress that ``state_dict`` described, of any number of ranks and any batch size.

        Raises:
            ValueError: it is of another order.
        """
        mine = self.state_dict(self.start)
        for key, what in (("seed", "seed"), ("shuffle", "shuffle"), ("groups", "number of clips in each group")):
            if state[key] != mine[key]:
                raise ValueError(
                    f"the data's state was saved with {what} {state[key]}, but this run has {mine[key]}: resume with "
                    "the settings and the data of the first run, or start anew"
                )
        return Progress(int(state["epoch"]), tuple(int(number) for number in state["taken"]))

    def _drawable(self, left: int) -> bool:
        return left >= (self.step_size if self.drop_last else 1)

    def _open(self, progress: Progress) -> list[int]:
        """Groups that another step can be taken of."""
        lefts = [len(group) - taken for group, taken in zip(self.groups, progress.taken, strict=True)]
        return [group for group, left in enumerate(lefts) if self._drawable(left)]

    def _choose(self, progress: Progress, open_groups: list[int]) -> int:
        """The group of the next step: at random by what is left of each, or that of the lowest index."""
        if len(open_groups) == 1:
            return open_groups[0]
        if not self.shuffle:
            return min(open_groups, key=lambda group: self.groups[group][progress.taken[group]])
        left = np.array([len(self.groups[group]) - progress.taken[group] for group in open_groups], float)
        rng = np.random.default_rng([self.seed, progress.epoch, sum(progress.taken), 1])
        return open_groups[int(rng.choice(len(open_groups), p=left / left.sum()))]

    def _order(self, epoch: int) -> list[np.ndarray]:
        """The clips of each group in the order of ``epoch``; those of two epochs are kept."""
        if epoch not in self._orders:
            for old in [other for other in self._orders if other not in (epoch - 1, epoch + 1)]:
                del self._orders[old]
            self._orders[epoch] = [
                np.random.default_rng([self.seed, epoch, place]).permutation(group) if self.shuffle else group
                for place, group in enumerate(self.groups)
            ]
        return self._orders[epoch]


class Steps:
    """What one rank takes in all coming steps, without end: the ``batch_sampler`` of a DataLoader.

    A DataLoader with workers reads ahead of the training. ``Loader`` counts what was trained on; torchdata's
    StatefulDataLoader keeps the state that belongs to each batch. Either goes on from it with any number of ranks.

    Args:
        sampler: of the rank.
        progress: to go on from.
        first, every: only the ``first`` step (from 0) and every ``every``-th after it: the share of one of several
            processes that take turns.

    Attributes:
        progress: when the last step that was drawn is taken.
    """

    def __init__(self, sampler: Sampler, progress: Progress | None = None, first: int = 0, every: int = 1) -> None:
        self.sampler, self.progress = sampler, progress or sampler.start
        self.first, self.every = first, every

    def __iter__(self) -> Iterator[list[Draw]]:
        for number in count():
            step = self.sampler.step(self.progress)
            self.progress = step.after
            if number % self.every == self.first:
                yield step.draws

    def state_dict(self) -> dict[str, Any]:
        """``progress`` in plain values, the same on every rank."""
        return self.sampler.state_dict(self.progress)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after ``state``.

        Raises:
            ValueError: it is of another order.
        """
        self.progress = self.sampler.load_state_dict(state)
