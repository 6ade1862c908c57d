"""The training loop: forward, backward, step, average, log, save; the same for every recipe, on one process or many.

A recipe gives the modules it trains and a function that returns the losses of one micro-batch. All random numbers come
from the generator it is given, which is seeded anew from (seed, step, micro-batch), or are functions of the sample
(``noise``): so a resumed run is the run that was never interrupted. Gradients of a step's micro-batches are added up
and exchanged once. A step whose gradients are not finite is left out and counted.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from ospnext.parallel.fsdp import gradient_norm, scale_gradients, synchronise_gradients, unsound
from ospnext.parallel.launch import Launch, any_of
from ospnext.parallel.state import StateError, StateWriter, newest
from ospnext.train.clipping import AdaptiveClipper
from ospnext.train.log import Log, Losses, Meter, Tracker
from ospnext.train.optim import MovingAverage, Schedule, adamw, learning_rate
from ospnext.train.state import Data, TrainState, latest

MOST_SKIPPED = 20  # steps in a row without finite gradients: no accident


class DivergedError(ValueError):
    """Step after step has no finite gradient; the message says how to go on."""


@dataclass(frozen=True)
class LoopSettings:
    """What the loop needs to know of a recipe's configuration.

    Intervals count steps of the optimiser; ``time_budget_minutes`` counts from the first step, and a step that has
    begun is finished. ``keep`` states stay, None: all.
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
    keep: int | None = 3
    time_budget_minutes: float | None = None
    seed: int = 42
    dtype: torch.dtype = torch.bfloat16  # of the arithmetic, by autocast; float32 turns it off


@dataclass(frozen=True)
class Surroundings:
    """What a run has besides its recipe.

    Attributes:
        launch: this process among those of the run.
        data: where samples come from, if it has a state.
        trackers: where lines of the log go besides the file; in the first process.
        meter: counts the work, for throughput in the log.
        prepare: called while the device is busy with a micro-batch: what the host can do for the next one.
        after_step: called after each step and its average, before it is saved, with the state.
        begin: called with the state where there is none to resume; returns what is to be said of it.
        about: plain values that states keep: what is needed to make a model of them.
        accepted: called by all processes once there is a state to go on from, before the first step.
    """

    launch: Launch = field(default_factory=Launch)
    data: Data | None = None
    trackers: Callable[[TrainState], Sequence[Tracker]] = lambda state: ()
    meter: Meter | None = None
    prepare: Callable[[], None] = lambda: None
    after_step: Callable[[TrainState, Log], None] = lambda state, log: None
    about: Mapping[str, Any] = field(default_factory=dict)
    begin: Callable[[TrainState], str] | None = None
    accepted: Callable[[], None] = lambda: None


def seed_of(*numbers: int) -> int:
    """A seed of 63 bits for what the numbers name."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def fit(
    modules: Mapping[str, nn.Module],
    losses: Callable[[torch.Generator, int], Losses],
    settings: LoopSettings,
    device: torch.device,
    around: Surroundings | None = None,
) -> TrainState:
    """Train until the last iteration, until the time budget is spent or until SIGTERM; then save.

    Resumes from the newest state in ``output_dir``, and says so, with the result of a run that was never interrupted.

    Args:
        modules: what is trained, by the names it is saved under; whole, or sharded by ``parallel``.
        losses: (generator on the device, step) -> losses of one micro-batch; called under autocast. All randomness
            must come from the two arguments or from the data. The generator is the same on all processes.
        settings: the numbers.
        device: of this process.
        around: the rest; None in one process with nothing around it.

    Returns:
        The state after the last step; its ``average`` still has to be swapped in.

    Raises:
        StateError: a state cannot be restored or written.
        DivergedError: gradients stopped being finite; saved states are untouched.
    """
    around = around or Surroundings()
    say: Callable[[str], None] = print if around.launch.first else _silent
    state = _begin(modules, settings, around, say)
    around.accepted()
    deadline = time.monotonic() + 60 * (settings.time_budget_minutes or float("inf"))
    writer = StateWriter(settings.output_dir, settings.keep)
    log = Log(settings.output_dir, around.launch, around.trackers(state), around.meter, device, state.step)
    with finishing(writer, around.launch), termination() as asked, progress_bar(around.launch.first) as bar:
        task = bar.add_task("training", total=settings.iterations, completed=state.step)
        while state.step < settings.iterations:
            if any_of(around.launch, asked.is_set() or time.monotonic() >= deadline):
                break
            log.add(_step(state, losses, settings, device, around.prepare))
            bar.update(task, completed=state.step)
            if state.clipper.in_a_row:
                say(f"step {state.step} is left out: gradients are not finite, from {state.unsound} on backwards")
            if state.step % settings.log_interval == 0 or state.step == settings.iterations:
                bar.update(task, description=log.write(state))
            around.after_step(state, log)
            if state.step % settings.save_interval == 0:
                state.save(writer)
        state.terminated = any_of(around.launch, asked.is_set())
        if log.count:
            log.write(state)  # what a spent time budget has left since the last line
        state.save(writer)
        writer.finish()
    log.finish()
    say(f"saved {newest(settings.output_dir)}")
    if state.step < settings.iterations:
        say(f"stopped at step {state.step} of {settings.iterations}: start again to go on")
    return state


def _begin(
    modules: Mapping[str, nn.Module], settings: LoopSettings, around: Surroundings, say: Callable[[str], None]
) -> TrainState:
    """The state to go on from: the newest in ``output_dir``, else the first."""
    state = TrainState(
        modules,
        adamw(modules, settings.lr, settings.betas, settings.eps, settings.weight_decay),
        MovingAverage(modules, settings.ema_decay),
        AdaptiveClipper(settings.max_grad_norm),
        around.data,
        around.about,
    )
    if (folder := latest(settings.output_dir)) is not None:
        state.load(folder, around.launch)
        say(f"resumed from {folder}: step {state.step} of {settings.iterations}")
    elif around.begin is not None:
        say(around.begin(state))
    return state


def _step(
    state: TrainState,
    losses: Callable[[torch.Generator, int], Losses],
    settings: LoopSettings,
    device: torch.device,
    prepare: Callable[[], None],
) -> dict[str, torch.Tensor]:
    rate = learning_rate(state.step, settings.lr, settings.lr_schedule, settings.warmup_steps, settings.iterations)
    for group in state.optimiser.param_groups:
        group["lr"] = rate
    total: dict[str, torch.Tensor] = {}
    generator = torch.Generator(device)
    for micro in range(settings.accumulation_steps):
        synchronise_gradients(state.modules.values(), micro == settings.accumulation_steps - 1)
        generator.manual_seed(seed_of(settings.seed, state.step, micro))
        with torch.autocast(device.type, settings.dtype, enabled=settings.dtype != torch.float32):
            parts = losses(generator, state.step)
        (parts["loss"] / settings.accumulation_steps).backward()
        prepare()  # before the host waits for the gradients' norm
        for name, value in parts.items():
            total[name] = total.get(name, 0) + value.detach() / settings.accumulation_steps
    take_step(state, settings, total)
    state.step += 1
    return total


def take_step(state: TrainState, settings: LoopSettings, total: dict[str, torch.Tensor]) -> None:
    """Clip and take the step, or leave it out."""
    parameters = list(state.average.live.values())
    norm = gradient_norm(parameters)
    scale, threshold = state.clipper.step(norm.item())
    if scale is not None:
        if scale < 1:
            scale_gradients(parameters, scale)
        state.optimiser.step()
        if (state.step + 1) % settings.ema_update_interval == 0:
            state.average.update()
        total |= {"grad_norm": norm.detach(), "grad_threshold": norm.new_tensor(threshold)}
    else:
        state.unsound = unsound(state.average.live)
    state.optimiser.zero_grad(set_to_none=True)
    if state.clipper.in_a_row >= MOST_SKIPPED:
        raise DivergedError(
            f"gradients were not finite in {MOST_SKIPPED} steps in a row, up to step {state.step + 1} (there "
            f"from {state.unsound} on backwards); none of them changed the weights: lower the learning rate and start "
            f"again, to go on from the newest state in {settings.output_dir}"
        )


@contextmanager
def finishing(writer: StateWriter, launch: Launch) -> Iterator[None]:
    """Let the state that is being written when something goes wrong be written to its end.

    Among many processes only where all fail alike: the others may be anywhere, and would be waited for.
    """
    try:
        yield
    except BaseException as error:
        if launch.world == 1 or isinstance(error, DivergedError):
            with suppress(StateError):
                writer.finish()
        raise


@contextmanager
def termination() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; where signals cannot be had (not the main thread) it stays unset."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def progress_bar(shown: bool) -> Progress:
    """A bar of steps that nobody sees unless ``shown``."""
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), disable=not shown)


def _silent(text: str) -> None:
    """What processes other than the first say."""
