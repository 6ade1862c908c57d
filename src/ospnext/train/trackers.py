"""Where a run's log goes besides its file: accelerate's trackers, TensorBoard unless told otherwise.

A resumed run goes on with the same curve: TensorBoard hides what was logged after the step it goes on from, wandb is
given the run's id, which is part of the state.
"""

import uuid
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ospnext.config import ConfigError
from ospnext.train.log import Tracker
from ospnext.train.rl.settings import RLConfig
from ospnext.train.settings import TrainConfig
from ospnext.train.state import TrainState

_PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "comet_ml": ("comet_ml",),
    "mlflow": ("mlflow", "mlflow_skinny"),
}


def tracker_names(config: TrainConfig | RLConfig) -> tuple[list[str], list[str]]:
    """Which trackers a run has, and what there is to say of them.

    Raises:
        ConfigError: one is asked for that is not known or not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    names, said = list(dict.fromkeys(config.trackers)), []
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(map(str, LOGGER_TYPE_TO_CLASS)))
            raise ConfigError(f"trackers names {name!r}: use some of {known}, or [] for none")
        if not any(find_spec(package) for package in _PACKAGES.get(name, (name,))):
            raise ConfigError(f"trackers names {name}, which is not installed: pip install {name}, or leave it out")
    if config.wandb_config.project_name is not None and "wandb" not in names:
        if find_spec("wandb"):
            names.append("wandb")
        else:
            said.append("wandb_config names a project, but wandb is not installed: pip install wandb to log to it")
    return names, said


def open_trackers(names: Sequence[str], config: TrainConfig | RLConfig, state: TrainState) -> list[Tracker]:
    """The trackers of a run that begins, or goes on from ``state``."""
    if not names:
        return []
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState(cpu=config.device == "cpu")  # accelerate's own logging asks for it
    return [_open(LOGGER_TYPE_TO_CLASS[name], name, config, state) for name in names]


def _open(cls: Any, name: str, config: TrainConfig | RLConfig, state: TrainState) -> Any:
    folder = Path(config.output_dir)
    project = config.wandb_config.project_name or "ospnext"
    cls.main_process_only = False  # only the first process opens any
    if name == "tensorboard":
        tracker = cls("tensorboard", folder, purge_step=state.step + 1 if state.step else None)
    elif name == "wandb":
        state.tracker.setdefault("wandb", uuid.uuid4().hex[:8])
        options = {"id": state.tracker["wandb"], "resume": "allow", "dir": str(folder)}
        tracker = cls(project, name=config.wandb_config.exp_name or project, **options)
    elif cls.requires_logging_directory:
        tracker = cls(project, folder)
    else:
        tracker = cls(project)
    tracker.start()
    return tracker
