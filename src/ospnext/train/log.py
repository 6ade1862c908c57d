"""What a run says while it trains: lines of JSON in ``output_dir/train_log.jsonl``, and the same to trackers.

A line holds means since the line before (or since the run was resumed) over all processes and over the steps that were
taken. A loss whose value is a pair (sum, count) is logged as their quotient, and left out where the count is 0.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from ospnext.parallel.launch import Launch, gather_objects
from ospnext.train.pictures import Shown, show

if TYPE_CHECKING:
    from ospnext.train.state import TrainState

Losses = Mapping[str, torch.Tensor]  # scalars or pairs by name; "loss" is the one that is minimised
FILE = "train_log.jsonl"


class Tracker(Protocol):
    """Where lines go besides the file, as accelerate's trackers."""

    def log(self, values: dict, step: int | None = None) -> None:
        """One line."""

    def finish(self) -> None:
        """No more lines."""


class Meter:
    """Counts this process's share of the work, for throughput.

    Args:
        peak: FLOP/s of one device in the arithmetic that is used; None where nobody knows.
    """

    def __init__(self, peak: float | None = None) -> None:
        self.peak = peak
        self.tokens = self.flops = 0.0

    def add(self, tokens: float, flops: float) -> None:
        """Count a micro-batch: tokens, and FLOPs of forward and backward without anything computed twice."""
        self.tokens += tokens
        self.flops += flops


class Log:
    """Means of the losses between two lines; kept on the device so that they cost no wait.

    Args:
        folder: of the run.
        launch: this process; the first one writes.
        trackers: of the first one.
        meter: None where nobody counts.
        device: whose memory is watched.
        step: to go on from; lines after it leave the file.
    """

    def __init__(
        self,
        folder: Path,
        launch: Launch,
        trackers: Sequence[Tracker],
        meter: Meter | None,
        device: torch.device,
        step: int,
    ) -> None:
        self.path, self.launch, self.trackers, self.meter = folder / FILE, launch, trackers, meter
        self.device = device
        if launch.first:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            cut_log(self.path, step)
        self._begin()

    def _begin(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.count, self.since = 0, time.monotonic()
        self._steps = 0
        if self.meter is not None:
            self.meter.tokens = self.meter.flops = 0.0

    def add(self, losses: Losses) -> None:
        """Take in the losses of one step; those without ``grad_norm`` were left out and only count."""
        self.count += 1
        if "grad_norm" not in losses:
            return
        self._steps += 1
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value

    def add_facts(self, facts: Mapping[str, float]) -> None:
        """Take in numbers that are of the whole line, not of a step."""
        for name, value in facts.items():
            self.sums[name] = torch.tensor([value, 1.0], dtype=torch.float64)

    def write(self, state: "TrainState") -> str:
        """Write a line, all processes together; returns the progress bar's description."""
        now = time.monotonic()
        means, work = self._gather()
        seconds = (now - self.since) / self.count
        line = {
            "step": state.step,
            **{name: float(f"{value:.6g}") if math.isfinite(value) else None for name, value in means.items()},
            "lr": state.optimiser.param_groups[0]["lr"],
            "skipped": state.clipper.skipped,
            "seconds_per_step": round(seconds, 5),
            **self._throughput(work, now - self.since),
        }
        if self.launch.first:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            numbers = {f"train/{name}": value for name, value in line.items() if name != "step" and value is not None}
            for tracker in self.trackers:
                tracker.log(numbers, step=state.step)
        self._begin()
        loss = means.get("loss", math.nan)
        return f"training, loss {loss:.4f}"

    def leave_out(self, seconds: float) -> None:
        """Time since the last line that was not spent on steps."""
        self.since += seconds

    def videos(self, name: str, videos: Sequence[Shown], step: int) -> None:
        """Show videos in the trackers, each as it can."""
        for tracker in self.trackers:
            show(tracker, name, videos, step)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Show numbers in the trackers that are no losses."""
        for tracker in self.trackers:
            tracker.log(dict(values), step=step)

    def finish(self) -> None:
        """No more lines."""
        for tracker in self.trackers:
            tracker.finish()

    def _gather(self) -> tuple[dict[str, float], tuple[float, float]]:
        """Means over steps and processes, and tokens and FLOPs of all."""
        own = {name: value.tolist() for name, value in self.sums.items()}
        work = (0.0, 0.0) if self.meter is None else (self.meter.tokens, self.meter.flops)
        everyone = gather_objects(self.launch, (own, work))
        means: dict[str, float] = {}
        for name in own:
            values = [losses[name] for losses, _ in everyone]
            if isinstance(values[0], list):
                total, count = (sum(value[i] for value in values) for i in (0, 1))
                if count:
                    means[name] = total / count
            else:
                means[name] = sum(values) / len(values) / max(self._steps, 1)
        return means, (sum(w[0] for _, w in everyone), sum(w[1] for _, w in everyone))

    def _throughput(self, work: tuple[float, float], seconds: float) -> dict[str, float]:
        said: dict[str, float] = {}
        if self.meter is not None and work[0]:
            said["tokens_per_second"] = round(work[0] / seconds, 1)
            said["tflops_per_second"] = round(work[1] / seconds / 1e12, 6)
            if self.meter.peak is not None:
                said["flops_utilisation"] = round(work[1] / seconds / self.launch.world / self.meter.peak, 4)
        return said | {"memory_gib": round(_most_memory(self.device) / 2**30, 3)}


def _most_memory(device: torch.device) -> int:
    """Most bytes this process has held: on its accelerator, or of the host's memory on a CPU."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return torch.accelerator.max_memory_allocated(device)


def cut_log(path: Path, step: int) -> None:
    """Take out the lines after ``step``: a run that was killed lost these steps, and they come again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= step]
    if kept != lines:
        draft = path.with_name(f".{path.name}.tmp")
        draft.write_text("".join(kept))
        draft.replace(path)


def _step_of(line: str) -> float:
    """The step of a line of the log; infinity for what is none, such as the rest of a full disk."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
