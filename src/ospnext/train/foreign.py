"""OSP-Next's own ``iter_*`` folders: what of them a run goes on from.

=================================  ======================================================================
file                               becomes
=================================  ======================================================================
``model_state_dict.pt``            the weights, loaded as any file of weights
``ema_model_state_dict.pt``        the moving average
``optim_state_dict.pt``            AdamW's moments and step counts, by name or by number as it was written
``adaptive_grad_clip_states.pt``   the clipper's mean and variance
the folder's name                  the step
=================================  ======================================================================

``random_states`` and ``dataloader_states`` are not read: they are pickles, and belong to other samplers; the data begin
with their first clip. The optimiser's rate, betas and decay are those of this run's configuration.

Every process maps the files and copies its own rows.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ospnext.checkpoints.formats import DEFAULTS
from ospnext.checkpoints.read import TORCH_DAMAGE, list_names
from ospnext.config import ConfigError
from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.parallel.fsdp import shard_of
from ospnext.parallel.state import read_record
from ospnext.train.job import Job
from ospnext.train.settings import TrainConfig
from ospnext.train.state import TrainState, latest

MODEL, AVERAGE = "model_state_dict.pt", "ema_model_state_dict.pt"
OPTIMISER, CLIPPER = "optim_state_dict.pt", "adaptive_grad_clip_states.pt"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
INSTEAD = "take the folder before it, or weights alone with model_config.pretrained_model_dir_or_checkpoint"
NO_CLIPPER = f", {CLIPPER} (its numbers are negative or not finite: clipping begins anew)"
_CLIPPER = {"mean": "moving_avg_max_grad_norm", "variance": "moving_avg_max_grad_norm_var"}


def started_from(config: TrainConfig) -> TrainConfig:
    """The configuration whose weights are those of the folder it is to go on from, if it is to go on from one.

    Where ``output_dir`` holds a state nothing is taken over, and the folder need not be there any more.

    Raises:
        ConfigError: the folder is not complete, or the configuration names other weights too.
        StateError: the newest state in ``output_dir`` cannot be gone on from.
    """
    if config.import_checkpoint is None:
        return config
    folder, section = Path(config.import_checkpoint), config.transformer_config
    if config.model is not None or section.pretrained_model_dir_or_checkpoint is not None:
        raise ConfigError(
            "import_checkpoint brings the weights: take out model and model_config.pretrained_model_dir_or_checkpoint"
        )
    if (own := latest(Path(config.output_dir))) is not None:
        return resumed(config, own)
    step_of(folder)
    missing = [name for name in (MODEL, AVERAGE, OPTIMISER, CLIPPER) if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"import_checkpoint {folder} is not complete: {', '.join(missing)} not there: {INSTEAD}")
    section = section.model_copy(update={"pretrained_model_dir_or_checkpoint": str(folder / MODEL)})
    return config.model_copy(update={"transformer_config": section})


def resumed(config: TrainConfig, state: Path) -> TrainConfig:
    """The configuration of a run that went over before it wrote ``state``.

    The old weights, while they are there, still say how the network is built, and every process reads its own rows of
    them; without them the state says it. What they hold is the state's in the end.

    Raises:
        ConfigError: they are the teacher too, and gone.
    """
    weights, section = Path(str(config.import_checkpoint)) / MODEL, config.transformer_config
    if weights.is_file():
        found: dict[str, Any] = {"pretrained_model_dir_or_checkpoint": str(weights)}
    elif config.distillation_config.weight and config.distillation_config.teacher is None:
        raise ConfigError(f"{weights} is the teacher, and not there any more: name distillation_config.teacher")
    else:
        told = read_record(state).get("about", {}).get("transformer", {})
        told = {key: tuple(value) if isinstance(value, list) else value for key, value in told.items()}
        found = {key: told[key] for key in DEFAULTS if key in told and getattr(section, key) is None}
    section = section.model_copy(update=found)
    return config.model_copy(update={"import_checkpoint": None, "transformer_config": section})


def step_of(folder: Path) -> int:
    """The step in the folder's name.

    Raises:
        ConfigError: there is none.
    """
    number = folder.name.removeprefix("iter_")
    if not folder.name.startswith("iter_") or not number.isdecimal():
        raise ConfigError(f"import_checkpoint {folder}: name a folder iter_NUMBER of OSP-Next")
    return int(number)


def check_foreign(config: TrainConfig, job: Job) -> None:
    """Hold the folder to the model before anything is loaded.

    Raises:
        ConfigError: a file cannot be read, or is of another model.
    """
    if config.import_checkpoint is None:
        return
    if config.train_text_encoder or job.adapter is not None:
        raise ConfigError("import_checkpoint is of a whole transformer: train that alone, without lora_config")
    folder = Path(config.import_checkpoint)
    with torch.device("meta"):
        model = OSPNextTransformer3DModel(**job.transformer)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    compare(folder / AVERAGE, read(folder / AVERAGE), shapes)
    moments = optimiser_state(folder)
    for kind in _MOMENTS[:2]:
        compare(folder / OPTIMISER, {name: values[kind] for name, values in moments.items()}, shapes)
    clipper_state(folder)


def take_over(folder: Path, state: TrainState) -> str:
    """Fill what changes while a run trains, the weights aside, which are loaded already; returns what was done.

    Raises:
        ConfigError: as ``check_foreign``.
    """
    average, moments = read(folder / AVERAGE), optimiser_state(folder)
    for full, own in state.average.shadow.items():
        name = full.removeprefix("transformer.")
        fill(own, average[name])
        own_moments = state.moments[full]
        for kind in _MOMENTS[:2]:
            fill(own_moments[kind], moments[name][kind])
        own_moments["step"].fill_(number(moments[name]["step"]))
    state.step = state.average.updates = step_of(folder)
    clipper = clipper_state(folder)
    state.clipper.load_state_dict(state.clipper.state_dict() | clipper)
    taken, left = (", clipper", "") if clipper else ("", NO_CLIPPER)
    return (
        f"went over from {folder} at step {state.step}: weights, average, AdamW's moments{taken}; not taken: "
        f"random_states, dataloader_states (the data begin anew){left}"
    )


@torch.no_grad()
def fill(own: Tensor, whole: Tensor) -> None:
    """Copy this process's rows of a tensor."""
    rows, values = shard_of(own)
    values.copy_(whole if rows is None else whole[rows])


def optimiser_state(folder: Path) -> dict[str, dict[str, Any]]:
    """AdamW's state of every parameter by its name.

    Where it was written by number, the numbers count the parameters in the order of the file of weights.

    Raises:
        ConfigError: the file is none of AdamW's.
    """
    path = folder / OPTIMISER
    saved = read(path)
    values = saved.get("state")
    if not isinstance(values, dict) or not all(
        isinstance(v, dict) and v.keys() >= set(_MOMENTS) for v in values.values()
    ):
        raise ConfigError(f"{path}: no state of AdamW ({', '.join(_MOMENTS)} of every parameter)")
    for key, value in values.items():
        steps = number(value["step"])
        if steps is None or not 0 <= steps < math.inf:
            said = " ".join(str(value["step"]).split())[:60]
            raise ConfigError(f"{path}: step of {key} is {said}, which is no count: {INSTEAD}")
    if all(isinstance(key, str) for key in values):
        return values
    names = list(read(folder / MODEL))
    if values.keys() != set(range(len(names))):
        raise ConfigError(
            f"{path}: its {len(values)} parameters are neither all by name nor numbered as the {len(names)} of {MODEL}"
        )
    return {name: values[place] for place, name in enumerate(names)}


def clipper_state(folder: Path) -> dict[str, float]:
    """The clipper's moving mean and variance of the gradients' norm; nothing where clipping with them would be none.

    Raises:
        ConfigError: they are not there.
    """
    saved = read(folder / CLIPPER)
    numbers = {ours: number(saved.get(theirs)) for ours, theirs in _CLIPPER.items()}
    found = {key: value for key, value in numbers.items() if value is not None}
    if len(found) < len(numbers):
        raise ConfigError(f"{folder / CLIPPER}: {', '.join(_CLIPPER.values())} not there, or no numbers")
    return found if all(0 <= value < math.inf for value in found.values()) else {}


def number(value: Any) -> float | None:
    """A number, or the only one of a tensor; None for all else."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def compare(path: Path, tensors: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> None:
    """Hold names and shapes to the model's.

    Raises:
        ConfigError: they differ, or some are no tensors of floating point; names some.
    """
    wrong = [str(name) for name, x in tensors.items() if not isinstance(x, Tensor) or not x.is_floating_point()]
    if wrong:
        raise ConfigError(f"{path}: no tensors of floating point: {list_names(wrong, 3)}: {INSTEAD}")
    names = sorted(map(str, tensors.keys() ^ shapes.keys()))
    names += [name for name in shapes.keys() & tensors.keys() if tensors[name].shape != shapes[name]]
    if names:
        raise ConfigError(
            f"{path}: of another model: {len(names)} names or shapes differ, such as {', '.join(names[:3])}"
        )


def read(path: Path) -> dict[str, Any]:
    """A file of tensors and plain values, mapped and not read, without running anything that is in it.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except TORCH_DAMAGE as error:
        raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())[:120]})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: holds a {type(found).__name__}, no dictionary")
    return found
