"""The training loop, for one device: forward, backward, step, average, log, save; the same for every recipe.

A recipe gives the modules it trains and a function that returns the losses of one micro-batch. Logs are JSON lines in
``output_dir/train_log.jsonl``, one every ``log_interval`` steps and at the end, with the mean of each loss since the
line before (or since the run was resumed).
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from ospnext.train.optim import MovingAverage, Schedule, adamw, clip_gradients, learning_rate
from ospnext.train.state import TrainState, latest

Losses = Mapping[str, torch.Tensor]  # scalars by name; "loss" is the one that is minimised


class DivergedError(ValueError):
    """The loss or its gradient is not finite; the message says how to go on."""


@dataclass(frozen=True)
class LoopSettings:
    """What the loop needs to know of a recipe's configuration.

    Intervals count steps of the optimiser; ``time_budget_minutes`` counts from the first step, and a step that has
    begun is finished.
    """

    output_dir: Path
    iterations: int
    lr: float
    lr_schedule: Schedule = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    accumulation_steps: int = 1
    ema_decay: float = 0.999
    ema_update_interval: int = 1
    log_interval: int = 50
    save_interval: int = 1000
    time_budget_minutes: float | None = None
    seed: int = 42
    dtype: torch.dtype = torch.bfloat16  # of the arithmetic, by autocast; float32 turns it off


def fit(
    modules: Mapping[str, nn.Module],
    losses: Callable[[torch.Generator, int], Losses],
    settings: LoopSettings,
    device: torch.device,
) -> TrainState:
    """Train until the last iteration or until the time budget is spent; then save.

    Resumes from the newest state in ``output_dir``, and says so, with the result of a run that was never interrupted.

    Args:
        modules: what is trained, by the names it is saved under.
        losses: (generator on the device, step) -> losses of one micro-batch; called under autocast. All randomness
            must come from the two arguments.

    Returns:
        The state after the last step; its ``average`` still has to be swapped in.

    Raises:
        StateError: a state cannot be restored or written.
        DivergedError: the loss is not finite; saved states are untouched, and none is saved after it.
    """
    state = TrainState(
        modules,
        adamw(modules, settings.lr, settings.betas, settings.eps, settings.weight_decay),
        MovingAverage(modules, settings.ema_decay),
        torch.Generator(device).manual_seed(settings.seed),
    )
    if (folder := latest(settings.output_dir)) is not None:
        state.load(folder)
        print(f"resumed from {folder}: step {state.step} of {settings.iterations}")
    if settings.time_budget_minutes is None:
        deadline = float("inf")
    else:
        deadline = time.monotonic() + 60 * settings.time_budget_minutes
    log = _Log(settings, state.step)
    with _progress() as bar:
        task = bar.add_task("training", total=settings.iterations, completed=state.step)
        while state.step < settings.iterations and time.monotonic() < deadline:
            log.add(_step(state, losses, settings, device))
            bar.update(task, completed=state.step)
            if state.step % settings.log_interval == 0 or state.step == settings.iterations:
                bar.update(task, description=log.write(state))
            if state.step % settings.save_interval == 0:
                log.check(state.step)
                state.save(settings.output_dir)
    if log.count:
        log.write(state)  # what a spent time budget has left since the last line
    print(f"saved {state.save(settings.output_dir)}")
    if state.step < settings.iterations:
        print(f"stopped at step {state.step} of {settings.iterations}: start again to go on")
    return state


def _step(state: TrainState, losses: Callable, settings: LoopSettings, device: torch.device) -> dict[str, torch.Tensor]:
    rate = learning_rate(state.step, settings.lr, settings.lr_schedule, settings.warmup_steps, settings.iterations)
    for group in state.optimiser.param_groups:
        group["lr"] = rate
    total: dict[str, torch.Tensor] = {}
    for _ in range(settings.accumulation_steps):
        with torch.autocast(device.type, settings.dtype, enabled=settings.dtype != torch.float32):
            parts = losses(state.generator, state.step)
        (parts["loss"] / settings.accumulation_steps).backward()
        for name, value in parts.items():
            total[name] = total.get(name, 0) + value.detach() / settings.accumulation_steps
    parameters = [p for group in state.optimiser.param_groups for p in group["params"]]
    total["grad_norm"] = clip_gradients(parameters, settings.max_grad_norm)
    state.optimiser.step()
    state.optimiser.zero_grad(set_to_none=True)
    state.step += 1
    if state.step % settings.ema_update_interval == 0:
        state.average.update()
    return total


class _Log:
    """Means of the losses between two lines of the log; kept on the device so that steps do not wait for the host."""

    def __init__(self, settings: LoopSettings, step: int) -> None:
        self.path = settings.output_dir / "train_log.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _cut_log(self.path, step)
        self.sums: dict[str, torch.Tensor] = {}
        self.count, self.since = 0, time.monotonic()

    def add(self, losses: Losses) -> None:
        """Take in the losses of one step."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.count += 1

    def check(self, step: int) -> None:
        """Stop the run if anything since the last line was not finite: what a bad gradient made is not worth saving.

        Raises:
            DivergedError: names the value and the way out.
        """
        for name in ("loss", "grad_norm"):
            value = self.sums[name].item() if self.count else 0.0
            if not math.isfinite(value):
                raise DivergedError(
                    f"{name} became {value} within the {self.count} steps before step {step}; nothing of them is "
                    f"saved: lower the learning rate and start again, to go on from the newest state in "
                    f"{self.path.parent}"
                )

    def write(self, state: TrainState) -> str:
        """Append a line; returns the progress bar's description."""
        self.check(state.step)
        means = {name: (value / self.count).item() for name, value in self.sums.items()}
        now = time.monotonic()
        line = {
            "step": state.step,
            **{name: round(value, 6) for name, value in means.items()},
            "lr": state.optimiser.param_groups[0]["lr"],
            "seconds_per_step": round((now - self.since) / self.count, 5),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.sums, self.count, self.since = {}, 0, now
        return f"training, loss {means['loss']:.4f}"


def _cut_log(path: Path, step: int) -> None:
    """Take out the lines after ``step``: a run that was killed lost these steps, and they come again."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
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


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )
