"""Evaluation while reinforcement learning runs: the same prompts and seeds, as deployed, and what nobody optimises.

``output_dir/eval/epoch_000020/`` holds the first videos and ``scores.json``; ``output_dir/evaluations.jsonl`` a line
for each; ``output_dir/eval/over_time.mp4`` the same videos side by side, a prompt a row, an evaluation a column.
Trackers show the first few (``pictures``).
"""

import json
import math
import time
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ospnext.generate.manifest import write_text
from ospnext.generate.videos import to_uint8
from ospnext.media import video_grid, write_video
from ospnext.parallel.launch import Launch, gather_objects
from ospnext.rewards.base import find_factory
from ospnext.train.pictures import Shown, shown
from ospnext.train.rl.policy import Policy
from ospnext.train.rl.prompts import Prompt
from ospnext.train.rl.rollout import Videos, without_noise
from ospnext.train.rl.settings import GRPOConfig

FILE = "evaluations.jsonl"
ROWS, COLUMNS = 4, 8  # of the grid over time; as many videos as it has rows go to the trackers


class Evaluation(NamedTuple):
    """What all processes get: means of all scores, ``reward`` the weighted sum, and the first videos for trackers."""

    means: dict[str, float]
    videos: list[Shown]


class HeldOut:
    """Evaluates.

    Args:
        config: steps, what is kept and watched.
        videos: from noise to scores; its rewards measure what is optimised and what is watched.
        policy: the model; the caller has put the averaged adapter in place.
        prompts: of evaluation.
        shift, seed: of the noise: video i has the noise of ``seed + i``, as ``ospnext generate`` would give it.
        folder: of the run.
        launch: this process.
        rank, ranks: this process's group among those that make different videos.
        trackers: names of those that show videos.
    """

    def __init__(
        self,
        config: GRPOConfig,
        videos: Videos,
        policy: Policy,
        prompts: Sequence[Prompt],
        shift: float,
        seed: int,
        folder: Path,
        launch: Launch,
        rank: int,
        ranks: int,
        trackers: Collection[str],
    ) -> None:
        self.config, self.videos, self.policy, self.prompts = config, videos, policy, list(prompts)
        self.shift, self.seed, self.folder, self.launch = shift, seed, folder, launch
        self.rank, self.ranks, self.trackers = rank, ranks, trackers

    def evaluate(self, epoch: int, step: int, seconds: float) -> Evaluation:
        """Evaluate; all processes call it together.

        Args:
            epoch, step, seconds: how far training is.
        """
        began = time.perf_counter()
        place = self.folder / "eval" / f"epoch_{epoch:06d}"
        place.mkdir(parents=True, exist_ok=True)
        count, size, keep = len(self.prompts), self.config.sample_batch_size, self.config.eval_keep
        mine: dict[int, dict[str, float]] = {}
        kept: dict[int, np.ndarray] = {}
        pending = []
        for start in range(0, count, size * self.ranks):
            own = list(range(start, min(start + size * self.ranks, count)))[self.rank :: self.ranks]
            numbers = own or [start]  # all processes ask the model equally often: some perhaps in vain
            prompts = [self.prompts[n] for n in numbers]
            latents = without_noise(self.videos, self.policy, prompts, [self.seed + n for n in numbers], self.shift)
            some = self.videos.own(len(numbers)) if own else []
            if some:
                pixels = self.videos.pixels(latents[some])
                kept |= {numbers[k]: to_uint8(pixels[i]).cpu().numpy() for i, k in enumerate(some) if numbers[k] < keep}
                scored = self.videos.score(pixels, [prompts[k] for k in some])
                pending.append(([numbers[k] for k in some], scored))
        for numbers, future in pending:
            scores = future.result()
            for i, n in enumerate(numbers):
                mine[n] = {"reward": float(scores.total[i])} | {name: float(v[i]) for name, v in scores.each.items()}
        everyone = gather_objects(self.launch, (mine, self._keep(kept, place)))  # and so all videos are there
        marks = {n: values for part, _ in everyone for n, values in part.items()}
        means = {name: _mean([m[name] for m in marks.values()]) for name in marks[0]}
        if self.launch.first:
            took = round(time.perf_counter() - began, 1)
            when = {"epoch": epoch, "step": step, "seconds": round(seconds, 1), "evaluation_seconds": took}
            self._write(place, when, means, marks)
        return Evaluation(means, sorted((one for _, some in everyone for one in some), key=lambda one: one.number))

    def _keep(self, kept: Mapping[int, np.ndarray], place: Path) -> list[Shown]:
        """Write videos, or where there is no PyAV their frames; returns what trackers get of them."""
        fps, made = self.config.save_fps, []
        for number, frames in sorted(kept.items()):
            path = place / f"video_{number}.mp4" if find_spec("av") else None
            if path is None:
                np.save(place / f"video_{number}.npy", frames)
            else:
                write_video(path, frames, fps)
            if number < ROWS and (picture := shown(number, frames, fps, path, self.trackers)) is not None:
                made.append(picture)
        return made

    def _write(
        self, place: Path, when: dict[str, Any], means: Mapping[str, float], marks: Mapping[int, Mapping[str, float]]
    ) -> None:
        listed = [{"prompt": p.text, "seed": self.seed + n, **marks[n]} for n, p in enumerate(self.prompts)]
        record, epoch = when | {name: _plain(value) for name, value in means.items()}, when["epoch"]
        write_text(place / "scores.json", json.dumps(record | {"videos": _plainly(listed)}, indent=1) + "\n")
        before = [line for line in read_lines(self.folder / FILE) if line["epoch"] < epoch]
        write_text(self.folder / FILE, "".join(json.dumps(line) + "\n" for line in [*before, record]))
        if find_spec("av") and self.config.eval_keep:
            self._grid([line["epoch"] for line in before] + [epoch])

    def _grid(self, epochs: list[int]) -> None:
        """The first and the latest evaluations of the first prompts, side by side."""
        kept = epochs if len(epochs) <= COLUMNS else [epochs[0], *epochs[1 - COLUMNS :]]
        rows = range(min(ROWS, self.config.eval_keep, len(self.prompts)))
        paths = [self.folder / "eval" / f"epoch_{e:06d}" / f"video_{n}.mp4" for n in rows for e in kept]
        if all(path.exists() for path in paths):
            video_grid(paths, self.folder / "eval" / "over_time.mp4", self.config.save_fps, columns=len(kept))


def suspicions(now: Mapping[str, float], before: Mapping[str, float], config: GRPOConfig) -> list[str]:
    """What has got worse while the reward rose, in words: the marks of a reward that is being cheated."""
    if not now["reward"] > before["reward"]:
        return []
    said = []
    for name in config.watch_fn:
        change, allowed = now[name] - before[name], config.watch_tolerance * abs(before[name])
        if change < -allowed or (change > allowed and getattr(find_factory(name), "either_way", False)):
            said.append(
                f"the reward rose from {before['reward']:.4g} to {now['reward']:.4g}, but {name}, which nobody "
                f"optimises, {'fell' if change < 0 else 'rose'} from {before[name]:.4g} to {now[name]:.4g}"
            )
    return said


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log in JSON; what was not written to its end is left out.

    Raises:
        ValueError: the file is another's.
    """
    if not path.exists():
        return []
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
        if not isinstance(lines[-1], dict) or "epoch" not in lines[-1]:
            raise ValueError(f"{path}, line {number}: no line of this log ({line[:80]}): move the file away")
    return lines


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def _plain(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def _plainly(listed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """JSON has no NaN."""
    return [{k: _plain(v) if isinstance(v, float) else v for k, v in one.items()} for one in listed]
