"""What a run is resumed from: weights, their average, optimiser, random numbers and the step, in one folder.

``output_dir/iter_000000500/`` holds ``NAME.safetensors`` and ``NAME.ema.safetensors`` for every trained module,
``optimiser.pt`` (read with ``weights_only``) and ``state.json``. It is written as ``.iter_000000500.tmp`` and renamed
when nothing is missing: a folder with the final name is complete, unless something was done to it afterwards.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError  # only the exception: torch's weights-only reader raises it
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ospnext.checkpoints.save import let_others_read
from ospnext.train.optim import MovingAverage

_SUFFIXES = ("", ".ema")  # of the files of a module: its weights, and their average
_UNREADABLE = (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError, EOFError, UnpicklingError)
_UNWRITABLE = (OSError, SafetensorError, RuntimeError)  # torch.save says RuntimeError where a disk is full


class StateError(ValueError):
    """A state that cannot be written or taken; the message names its folder and the way out."""


class _Saved(NamedTuple):
    """A state as read: tensors named ``module.parameter``, what ``optimiser.pt`` holds, and ``state.json``."""

    live: dict[str, Tensor]
    average: dict[str, Tensor]
    rest: dict[str, Any]
    record: dict[str, Any]


class TrainState:
    """Everything that changes while a run trains.

    Args:
        modules: the trained modules by name; their parameters are saved, and they have no buffers that change.
        optimiser: over their parameters.
        average: of their parameters.
        generator: the source of all random numbers of the steps.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        optimiser: torch.optim.Optimizer,
        average: MovingAverage,
        generator: torch.Generator,
    ) -> None:
        self.modules = dict(modules)
        self.optimiser = optimiser
        self.average = average
        self.generator = generator
        self.step = 0

    def save(self, output_dir: Path) -> Path:
        """Write the state atomically and return its folder; one of the same step is left as it is.

        Raises:
            StateError: it cannot be written. Nothing is left of it, and older states are untouched.
        """
        final = output_dir / f"iter_{self.step:09d}"
        if final.exists():
            return final
        draft = output_dir / f".{final.name}.tmp"
        try:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            self._write(draft)
            os.replace(draft, final)
        except _UNWRITABLE as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise StateError(
                f"cannot save {final}: {_line(error)}; make room, or give another output_dir (states before it are "
                "untouched: the same command goes on from the newest)"
            ) from error
        return final

    def load(self, folder: Path) -> None:
        """Restore a saved state, strictly; settings of the optimiser (rates, betas, decay) stay this run's.

        Raises:
            StateError: a file is missing or damaged, or the folder belongs to another run. Nothing has changed.
        """
        saved = self._read(folder)
        live, average = self._parameters(), self.average.shadow
        try:
            _compare(live, saved.live)
            _compare(average, saved.average)
            settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimiser.param_groups]
            self.optimiser.load_state_dict(saved.rest["optimiser"])
            for group, own in zip(self.optimiser.param_groups, settings, strict=True):
                group.update(own)
            self.generator.set_state(saved.rest["generator"])
        except (ValueError, RuntimeError, KeyError) as error:
            raise StateError(
                f"{folder} is the state of another run: {_line(error)}; give another output_dir, or remove the iter_ "
                "folders in this one to start over"
            ) from error
        with torch.no_grad():
            for ours, theirs in ((live, saved.live), (average, saved.average)):
                for key, tensor in ours.items():
                    tensor.copy_(theirs[key])
        self.step, self.average.updates = saved.record["step"], saved.record["ema_updates"]

    def _parameters(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": p for name, module in self.modules.items() for key, p in module.named_parameters()}

    def _write(self, folder: Path) -> None:
        for name in self.modules:
            for suffix, tensors in zip(_SUFFIXES, (self._parameters(), self.average.shadow), strict=True):
                own = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}
                path = folder / f"{name}{suffix}.safetensors"
                save_file({k: t.detach().contiguous() for k, t in own.items()}, path)
                let_others_read(path)
        state = {"optimiser": self.optimiser.state_dict(), "generator": self.generator.get_state()}
        torch.save(state, folder / "optimiser.pt")
        record = {"step": self.step, "ema_updates": self.average.updates, "modules": list(self.modules)}
        (folder / "state.json").write_text(json.dumps(record, indent=2) + "\n")

    def _read(self, folder: Path) -> _Saved:
        """All of a folder's files, before anything is changed by them."""
        try:
            record = json.loads((folder / "state.json").read_text())
            live, average = (_join(folder, record["modules"], suffix) for suffix in _SUFFIXES)
            rest = torch.load(folder / "optimiser.pt", map_location="cpu", weights_only=True)
            return _Saved(live, average, rest, {"step": int(record["step"]), "ema_updates": int(record["ema_updates"])})
        except _UNREADABLE as error:
            raise StateError(
                f"cannot resume from {folder}: it is incomplete or damaged ({_line(error)}); remove the folder to go "
                "on from the one before"
            ) from error


def latest(output_dir: Path) -> Path | None:
    """The state with the highest step in a run's folder, if there is one; drafts do not count."""
    found = [p for p in output_dir.glob("iter_*") if p.name[5:].isdigit()]
    return max(found, key=lambda p: int(p.name[5:]), default=None)


def _join(folder: Path, modules: Sequence[str], suffix: str) -> dict[str, Tensor]:
    """The tensors of several modules' files, named ``module.parameter``."""
    files = {name: load_file(folder / f"{name}{suffix}.safetensors") for name in modules}
    return {f"{name}.{key}": tensor for name, tensors in files.items() for key, tensor in tensors.items()}


def _compare(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Raise ValueError where names or shapes differ."""
    names = sorted(ours.keys() ^ theirs.keys())
    if names:
        raise ValueError(f"{len(names)} tensors are in one of them only, such as {', '.join(names[:3])}")
    shapes = [key for key, tensor in ours.items() if tensor.shape != theirs[key].shape]
    if shapes:
        key = shapes[0]
        raise ValueError(
            f"{len(shapes)} tensors differ in shape, such as {key}: {list(theirs[key].shape)} there, "
            f"{list(ours[key].shape)} in this run"
        )


def _line(error: BaseException) -> str:
    """An error in one short line; some have no words."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"no {text}" if isinstance(error, KeyError) else text[:200]
