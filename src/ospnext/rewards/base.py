"""Rewards by name, their weighted sum, and what happens when one fails.

A reward is a plain callable:

    def reward(videos, prompts, metadata):  # [B, F, C, H, W] float in 0..1 on any device, B texts, B mappings
        return [0.3, 0.7]  # B scores, or {"score": [...], "part": [...]}: parts are recorded, ``score`` is what counts

Its factory is called with ``device`` and the options of the configuration. A package of its own offers one under the
entry-point group ``ospnext.rewards``; a factory may have a ``check(**options)`` that raises ValueError before anything
is loaded, ``needs``, the names of the metadata that every prompt has to have, and ``either_way``, which says that a
watched score should not rise either.
"""

import difflib
import inspect
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import entry_points
from pkgutil import resolve_name
from typing import Any, NamedTuple

import torch
import torch.multiprocessing
from torch import Tensor

logger = logging.getLogger(__name__)

Scores = Sequence[float] | Tensor | Mapping[str, Sequence[float] | Tensor]
Metadata = Mapping[str, Any]
Reward = Callable[[Tensor, Sequence[str], Sequence[Metadata]], Scores]

GROUP = "ospnext.rewards"
ATTEMPTS = 3
SECONDS = 600.0  # that a reward of its own process may take
BUILT_IN = {
    "brightness": "ospnext.rewards.simple:Brightness",
    "motion": "ospnext.rewards.simple:Motion",
    "flicker": "ospnext.rewards.simple:Flicker",
    "sharpness": "ospnext.rewards.simple:Sharpness",
    "shapes": "ospnext.rewards.shapes:Shapes",
    "videoalign": "ospnext.rewards.videoalign:VideoAlign",
}


class Scored(NamedTuple):
    """Scores of a batch, float64 on the CPU; NaN where one could not be had.

    Attributes:
        total: [B] the weighted sum.
        each: [B] by name of the reward, and by ``name.part`` for what it says besides.
    """

    total: Tensor
    each: dict[str, Tensor]


def find_factory(name: str) -> Callable[..., Reward]:
    """The factory of a reward by its name.

    Raises:
        ValueError: nobody offers it.
    """
    if name in BUILT_IN:
        return resolve_name(BUILT_IN[name])
    offered = entry_points(group=GROUP)
    if name in offered.names:
        with _named(name, "be imported"):
            return offered[name].load()
    known = [*BUILT_IN, *sorted(offered.names)]
    near = difflib.get_close_matches(name, known, 1)
    raise ValueError(
        f"reward {name!r} is not known" + (f"; did you mean {near[0]!r}?" if near else "") + f" There are "
        f"{', '.join(known)}; a package offers its own as an entry point of {GROUP}"
    )


@contextmanager
def _named(name: str, what: str) -> Iterator[None]:
    """Have what a reward's own code raises name the reward; bad input and lack of memory say enough by themselves.

    Raises:
        ValueError: in place of anything else.
    """
    try:
        yield
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"reward {name!r} cannot {what}: {type(error).__name__}: {error}") from error


def check_reward(name: str, options: Mapping[str, Any]) -> None:
    """Find out before anything is loaded whether a reward can be made.

    Raises:
        ValueError: it is not known, or its options will not do.
    """
    factory = find_factory(name)
    try:
        inspect.signature(factory).bind(device="cpu", **options)
    except TypeError as error:
        raise ValueError(f"reward_config.options.{name}: {error}; it takes {inspect.signature(factory)}") from error
    if (check := getattr(factory, "check", None)) is not None:
        check(**options)


def needs(name: str) -> tuple[str, ...]:
    """Which metadata a reward needs of every prompt."""
    return tuple(getattr(find_factory(name), "needs", ()))


def check_metadata(name: str, prompts: Iterable[tuple[str, Metadata]]) -> None:
    """Find out before anything is loaded whether prompts have the metadata that a reward needs.

    Raises:
        ValueError: one has not.
    """
    needed = needs(name)
    for prompt, metadata in prompts:
        if missing := [key for key in needed if key not in metadata]:
            raise ValueError(
                f"reward {name!r} needs {', '.join(missing)} of every prompt, and {prompt[:80]!r} has none: use "
                "prompts of shapes:WORLD, or .jsonl that says it"
            )


class RewardSet:
    """Several rewards and their weighted sum.

    Args:
        weights: by name; those of weight 0 are measured and do not count.
        options: of each by name, for its factory.
        device: where they compute.
        separate: names of rewards that get a process of their own: what ends there does not end the run.

    Attributes:
        failures: attempts that failed, by name; a reward that failed ``ATTEMPTS`` times on a batch gives NaN for it.

    Raises:
        ValueError: a reward is not known or cannot be made.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        options: Mapping[str, Mapping[str, Any]] | None = None,
        device: torch.device | str = "cpu",
        separate: Sequence[str] = (),
    ) -> None:
        self.weights = dict(weights)
        self.failures = dict.fromkeys(self.weights, 0)
        self._rewards: dict[str, Reward] = {}
        for name in self.weights:
            own = dict((options or {}).get(name, {}))
            factory = find_factory(name)
            with _named(name, "be made"):
                self._rewards[name] = (
                    SeparateReward(name, own, device) if name in separate else factory(device=device, **own)
                )

    def __call__(self, videos: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scored:
        """Score a batch; no failure of a reward is one of this call.

        Args:
            videos: [B, F, C, H, W] in 0..1.
            prompts, metadata: of each.
        """
        total, each = torch.zeros(len(prompts), dtype=torch.float64), {}
        for name, weight in self.weights.items():
            parts = self._try(name, videos, prompts, metadata)
            for part, values in parts.items():
                each[name if part == "score" else f"{name}.{part}"] = values
            if weight:
                total = total + weight * parts["score"]
        return Scored(total, each)

    def close(self) -> None:
        """End the processes of rewards that have any."""
        for reward in self._rewards.values():
            if (close := getattr(reward, "close", None)) is not None:
                close()

    def _try(
        self, name: str, videos: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> dict[str, Tensor]:
        problem: BaseException | None = None
        for _ in range(ATTEMPTS):
            try:
                return as_parts(self._rewards[name](videos, prompts, metadata), len(prompts))
            except (Exception, SystemExit) as error:  # a user's reward may raise anything, and the run shall live
                self.failures[name] += 1
                problem = error
        logger.warning(
            "reward %s failed %d times on a batch, whose videos are left out: %s: %s",
            name,
            ATTEMPTS,
            type(problem).__name__,
            problem,
        )
        return {"score": torch.full((len(prompts),), math.nan, dtype=torch.float64)}


def as_parts(scores: Scores, count: int) -> dict[str, Tensor]:
    """What a reward gave, float64 [count] by part.

    Raises:
        ValueError: not one number for each video, or no ``score``.
    """
    parts = dict(scores) if isinstance(scores, Mapping) else {"score": scores}
    values = {name: torch.as_tensor(part, dtype=torch.float64).detach().cpu().flatten() for name, part in parts.items()}
    if "score" not in values:
        raise ValueError(f"a reward that names its parts must name score, not only {', '.join(values)}")
    for name, part in values.items():
        if len(part) != count:
            raise ValueError(f"{len(part)} numbers ({name}) for {count} videos: a reward gives one for each")
    return values


class SeparateReward:
    """A reward in a process of its own, which is started anew when it has died or hangs.

    Args:
        name, options, device: what is made there, at the first call.
    """

    def __init__(self, name: str, options: Mapping[str, Any], device: torch.device | str) -> None:
        self._made = (name, dict(options), str(device))
        self._pool: ProcessPoolExecutor | None = None

    def __call__(self, videos: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
        """As the reward; videos travel through shared memory."""
        if self._pool is None:
            context = torch.multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, context, _make, self._made)
        try:
            return self._pool.submit(_score, videos.cpu(), list(prompts), list(metadata)).result(SECONDS)
        except (BrokenExecutor, TimeoutError):
            self.close()
            raise

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._pool is not None:
            _end(self._pool)
            self._pool = None


def _end(pool: Executor) -> None:
    for process in list((getattr(pool, "_processes", None) or {}).values()):
        process.kill()
    pool.shutdown(wait=True, cancel_futures=True)


_own: Reward | None = None  # in a SeparateReward's process


def _make(name: str, options: Mapping[str, Any], device: str) -> None:
    global _own
    _own = find_factory(name)(device=torch.device(device), **options)


def _score(videos: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> dict[str, list[float]]:
    assert _own is not None
    return {name: part.tolist() for name, part in as_parts(_own(videos, prompts, metadata), len(prompts)).items()}
