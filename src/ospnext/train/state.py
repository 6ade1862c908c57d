"""What a run is resumed from: everything that changes while it trains, by name.

Tensors (weights of what is trained, their average, AdamW's moments) may be sharded; ``parallel.state`` writes them in
the background and reads them on any number of processes. All else is a record of plain values: step, clipper, where
the data was, the tracker's run. There are no states of random generators: all random numbers are functions of the
seed and of what they are for (``loop``, ``noise``).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ospnext.parallel.launch import Launch, agree
from ospnext.parallel.state import StateError, StateWriter, load, newest, read_record, step_of
from ospnext.quant import running
from ospnext.train.clipping import AdaptiveClipper
from ospnext.train.optim import MovingAverage, moments

FORMAT = "ospnext training state 1"
ALPHAS = "lora_alphas"
"""What of ``about`` says that an adapter was trained: alpha by linear. Its tensors do not tell it."""


class Data(Protocol):
    """Where a run's samples come from, with a state of plain values that is the same on all processes."""

    def state_dict(self) -> dict[str, Any]:
        """Where the last micro-batch left off."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after ``state``; raises ValueError where it is of other data."""


class TrainState:
    """Everything that changes while a run trains.

    Args:
        modules: the trained modules by name; what needs gradients is saved, and HiF8's running numbers.
        optimiser: AdamW over their parameters.
        average: of their parameters.
        clipper: of their gradients.
        data: None where the recipe draws from its generator alone.
        about: plain values to keep beside: what is needed to make a model of a state.

    Attributes:
        step: steps taken, those left out included.
        tracker: what the trackers need to go on with the same run, plain values.
        moments: AdamW's state of every parameter, by the parameter's name.
        unsound: the parameter nearest the output whose gradient was not finite, at the last step that was left out.
        terminated: whether the run was asked to end by a signal.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        optimiser: torch.optim.Optimizer,
        average: MovingAverage,
        clipper: AdaptiveClipper,
        data: Data | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.modules = dict(modules)
        self.optimiser, self.average, self.clipper, self.data = optimiser, average, clipper, data
        self.about = dict(about or {})
        self.step = 0
        self.tracker: dict[str, Any] = {}
        self.unsound = ""
        self.terminated = False
        self.moments = moments(optimiser, average.live)

    def save(self, writer: StateWriter) -> None:
        """Begin to write the state; it is there once ``writer.finish`` has returned.

        Raises:
            StateError: the state before it could not be written. Older states are untouched.
        """
        for module in self.modules.values():
            running.share(module)  # the same on all processes, as what is not sharded has to be
        writer.save(self.step, self.tensors(), self.record())

    def load(self, folder: Path, launch: Launch | None = None) -> None:
        """Restore a saved state, strictly; settings of the optimiser (rates, betas, decay) stay this run's.

        Args:
            folder: of the state.
            launch: this process among those that load it together; None for one alone.

        Raises:
            StateError: a file is missing or damaged, or the folder belongs to another run. Nothing has changed.
            RefusalError: the same on many processes, in all of them.
        """
        launch = launch or Launch()
        before = None if self.data is None else self.data.state_dict()
        tensors = self.tensors()
        try:
            # Apart, for the one may fail in a single process, and the other would wait for it.
            record = agree(launch, lambda: self._take_record(folder))
            agree(launch, lambda: load(folder, tensors))
        except ValueError:
            if self.data is not None and before is not None:
                self.data.load_state_dict(before)
            raise
        for moment, steps in zip(self.moments.values(), tensors["optimiser.steps"].tolist(), strict=True):
            moment["step"].fill_(steps)
        self.step, self.average.updates = record["step"], record["ema_updates"]
        self.clipper.load_state_dict(record["clipper"])
        self.tracker = record["tracker"]

    def _take_record(self, folder: Path) -> dict[str, Any]:
        """The record of a state that is this run's, to which the data are set."""
        record = read_record(folder)
        if record.get("format") != FORMAT or (record["data"] is None) != (self.data is None):
            raise _foreign(
                folder, f"it is no {FORMAT}" if record.get("format") != FORMAT else "its data is of another kind"
            )
        if record["step"] != step_of(folder):
            raise StateError(
                f"{folder} holds the state of step {record['step']}: give the folder its own name back "
                f"(iter_{record['step']:09d}), or remove it to go on from another state"
            )
        told = record.get("about")  # states of reinforcement learning once told nothing
        if told and (problem := _other_adapter(told.get(ALPHAS), self.about.get(ALPHAS))):
            raise _foreign(folder, problem)
        try:
            if self.data is not None:
                self.data.load_state_dict(record["data"])
        except KeyError as error:
            raise _foreign(folder, f"its data is of another kind (there is no {error} in it)") from error
        except ValueError as error:
            raise _foreign(folder, str(error)) from error
        return record

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; those of the optimiser's step counts are one copy."""
        named: dict[str, Tensor] = {f"live.{name}": p.detach() for name, p in self.average.live.items()}
        named |= {f"average.{name}": shadow for name, shadow in self.average.shadow.items()}
        for name, moment in self.moments.items():
            named |= {f"{key}.{name}": moment[key] for key in ("exp_avg", "exp_avg_sq")}
        for key, module in self.modules.items():
            named |= {f"running.{key}.{name}": buffer for name, buffer in running.buffers(module).items()}
        return named | {"optimiser.steps": torch.stack([m["step"].detach().cpu() for m in self.moments.values()])}

    def record(self) -> dict[str, Any]:
        """All else, in plain values."""
        return {
            "format": FORMAT,
            "step": self.step,
            "modules": list(self.modules),
            "about": self.about,
            "ema_updates": self.average.updates,
            "clipper": self.clipper.state_dict(),
            "data": None if self.data is None else self.data.state_dict(),
            "tracker": self.tracker,
        }


def latest(output_dir: Path) -> Path | None:
    """The state to go on from, or None.

    Raises:
        StateError: the newest folder with a state's name is incomplete, or of a format that is no longer read.
    """
    try:
        return newest(output_dir)
    except StateError as error:
        old = [path for path in output_dir.glob("iter_*/*") if path.name in ("state.json", "model_state_dict.pt")]
        if not old:
            raise
        raise StateError(
            f"{old[0].parent} was not written by this trainer: give another output_dir, and go on from it with "
            "import_checkpoint (or from its weights alone, with model_config.pretrained_model_dir_or_checkpoint)"
        ) from error


def _other_adapter(theirs: Mapping[str, float] | None, ours: Mapping[str, float] | None) -> str:
    """How the adapter of a state differs from this run's, as far as its tensors would not say; empty if it does not."""
    if (theirs is None) != (ours is None):
        what = ("the whole network", "an adapter (lora_config)")
        return f"it trained {what[theirs is not None]}, and this run trains {what[ours is not None]}"
    for name in (theirs or {}).keys() & (ours or {}).keys():
        if theirs is not None and ours is not None and theirs[name] != ours[name]:
            return f"lora_config.alpha is {ours[name]:g} here, but {theirs[name]:g} there ({name})"
    return ""


def _foreign(folder: Path, problem: str) -> StateError:
    return StateError(
        f"{folder} is the state of another run: {problem}; give another output_dir, or remove the iter_ folders in "
        "this one to start over"
    )
