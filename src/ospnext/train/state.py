"""What a run is resumed from: weights, their average, optimiser, random numbers and the step, in one folder.

``output_dir/iter_000000500/`` holds ``NAME.safetensors`` and ``NAME.ema.safetensors`` for every trained module,
``optimiser.pt`` (read with ``weights_only``) and ``state.json``, which is written last into a temporary folder that is
then renamed: a folder with the final name is complete.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ospnext.train.optim import MovingAverage


class TrainState:
    """Everything that changes while a run trains.

    Args:
        modules: the trained modules by name.
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
        """Write the state atomically and return its folder; one of the same step is left as it is."""
        final = output_dir / f"iter_{self.step:09d}"
        if final.exists():
            return final
        output_dir.mkdir(parents=True, exist_ok=True)
        draft = output_dir / f".{final.name}.tmp"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        for name, module in self.modules.items():
            live = {key: t.detach().contiguous() for key, t in module.named_parameters()}
            save_file(live, draft / f"{name}.safetensors")
            prefix = f"{name}."
            mine = {
                k.removeprefix(prefix): t.contiguous() for k, t in self.average.shadow.items() if k.startswith(prefix)
            }
            save_file(mine, draft / f"{name}.ema.safetensors")
        state = {"optimiser": self.optimiser.state_dict(), "generator": self.generator.get_state()}
        torch.save(state, draft / "optimiser.pt")
        record = {"step": self.step, "ema_updates": self.average.updates, "modules": list(self.modules)}
        (draft / "state.json").write_text(json.dumps(record, indent=2) + "\n")
        os.replace(draft, final)
        return final

    def load(self, folder: Path) -> None:
        """Restore a saved state, strictly.

        Raises:
            ValueError: a file or key is missing, or the folder belongs to other modules.
        """
        try:
            record = json.loads((folder / "state.json").read_text())
            if record["modules"] != list(self.modules):
                raise ValueError(f"{folder} holds {record['modules']}, this run trains {list(self.modules)}")
            for name, module in self.modules.items():
                _restore(dict(module.named_parameters()), load_file(folder / f"{name}.safetensors"), folder)
                shadow = {k: t for k, t in self.average.shadow.items() if k.startswith(f"{name}.")}
                saved = load_file(folder / f"{name}.ema.safetensors")
                _restore(shadow, {f"{name}.{k}": t for k, t in saved.items()}, folder)
            state = torch.load(folder / "optimiser.pt", map_location="cpu", weights_only=True)
        except (OSError, json.JSONDecodeError, KeyError) as error:
            raise ValueError(
                f"cannot resume from {folder}: {error}; remove the folder to resume from the one before"
            ) from error
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"])
        self.step, self.average.updates = record["step"], record["ema_updates"]


def latest(output_dir: Path) -> Path | None:
    """The complete state with the highest step in a run's folder, if there is one."""
    found = [p for p in output_dir.glob("iter_*") if p.name[5:].isdigit() and (p / "state.json").exists()]
    return max(found, key=lambda p: int(p.name[5:]), default=None)


@torch.no_grad()
def _restore(live: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor], folder: Path) -> None:
    if live.keys() != saved.keys():
        differ = sorted(live.keys() ^ saved.keys())
        raise ValueError(f"{folder}: {len(differ)} tensors differ from this run's, such as {', '.join(differ[:5])}")
    for key, tensor in live.items():
        tensor.copy_(saved[key])
