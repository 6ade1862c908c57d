"""``lora-checkpoint-{step}/`` and ``lora-checkpoint-{step}-ema/``, as OSP-Next saves them and reads them back.

==================================  ====================================================================================
file                                holds
==================================  ====================================================================================
adapter_model.safetensors, .bin     A and B; ``-ema`` their average, and no more than this and the next
adapter_config.json                 rank, alpha, linears: what ``peft`` makes the adapter of again
adaptive_grad_clipper.pt            the clipper's numbers under OSP-Next's names
rl_training_state.json              ``global_step``, ``next_epoch``
config.yaml                         the configuration of the run
iter_*/                             the whole state: a run that is given this folder as ``lora_path`` goes on exactly
==================================  ====================================================================================
"""

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ospnext.checkpoints.lora import adapter_of
from ospnext.checkpoints.lora_files import write_adapter, write_into
from ospnext.checkpoints.read import TORCH_DAMAGE
from ospnext.parallel.launch import Launch, agree
from ospnext.parallel.state import StateError, StateWriter, newest
from ospnext.train.clipping import DECAY, AdaptiveClipper
from ospnext.train.folder import SETTINGS
from ospnext.train.state import TrainState

CLIPPER = "adaptive_grad_clipper.pt"
OTHER_CLIPPER = "adaptive_grad_clip_states.pt"  # what OSP-Next's code calls it; its README the other
TRAINING = "rl_training_state.json"


def save_checkpoint(folder: Path, state: TrainState, epoch: int, config: str, launch: Launch) -> Path:
    """Write both folders, whole or not at all; all processes call it together.

    Args:
        folder: of the run.
        state: after ``epoch`` epochs.
        epoch: the next one.
        config: the run's, as YAML.
        launch: this process.

    Returns:
        The first of them.

    Raises:
        StateError, OSError: they cannot be written.
    """
    final = folder / f"lora-checkpoint-{state.step}"
    transformer = state.modules["transformer"]
    live = adapter_of(transformer)
    averages = {name.removeprefix("transformer."): value for name, value in state.average.shadow.items()}
    average = adapter_of(transformer, values=averages)
    draft = folder / f".{final.name}.tmp"

    def begin() -> None:
        if launch.first:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            write_into(live, draft, torch_file=True)
            torch.save(clipper_numbers(state.clipper), draft / CLIPPER)
            (draft / TRAINING).write_text(json.dumps({"global_step": state.step, "next_epoch": epoch}) + "\n")
            (draft / SETTINGS).write_text(config, encoding="utf-8")

    def publish() -> None:
        if launch.first:
            write_adapter(average, folder / f"{final.name}-ema", torch_file=True)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(draft, final)

    try:
        agree(launch, begin)
        writer = StateWriter(draft)
        state.save(writer)
        writer.finish()
        agree(launch, publish)
    finally:
        if launch.first:
            shutil.rmtree(draft, ignore_errors=True)  # of what a full disk cut short
    return final


def clipper_numbers(clipper: AdaptiveClipper) -> dict[str, float]:
    """Its numbers under OSP-Next's names."""
    return {
        "clip_grad_ema_decay": DECAY,
        "moving_avg_max_grad_norm": clipper.max_grad_norm if clipper.mean is None else clipper.mean,
        "moving_avg_max_grad_norm_var": clipper.variance,
        "max_grad_norm": clipper.threshold,
        "max_grad_norm_var": clipper.variance,
        "grad_norm_before_clip": 0.0,
        "grad_norm_after_clip": 0.0,
    }


def resume_from(folder: Path, state: TrainState, launch: Launch) -> int | None:
    """Go on from a checkpoint folder: ours exactly; OSP-Next's with its clipper, its step and a new optimiser.

    Args:
        folder: ``lora_config.lora_path``; its adapter has been put on the model.
        state: to be filled.
        launch: this process; all of them call it together.

    Returns:
        The epoch to go on with; None where the folder holds an adapter alone.

    Raises:
        StateError: what it holds is damaged.
    """
    if newest(folder) is not None:
        state.load(newest(folder) or folder, launch)
        return None if state.data is None else int(state.data.state_dict()["epoch"])
    if not (folder / TRAINING).is_file():
        return None
    try:
        said = json.loads((folder / TRAINING).read_text(encoding="utf-8"))
        state.step, epoch = int(said["global_step"]), int(said["next_epoch"])
        if state.step < 0 or epoch < 0:
            raise ValueError(f"step {state.step}, epoch {epoch}")
        for name in (CLIPPER, OTHER_CLIPPER):
            if (folder / name).is_file():
                _read_clipper(state.clipper, torch.load(folder / name, map_location="cpu", weights_only=True))
                break
    except TORCH_DAMAGE as error:
        raise StateError(
            f"{folder}: its training state cannot be read ({error}); name the adapter's file alone"
        ) from error
    return epoch


def _read_clipper(clipper: AdaptiveClipper, numbers: Mapping[str, Any]) -> None:
    mean, variance = float(numbers["moving_avg_max_grad_norm"]), float(numbers["moving_avg_max_grad_norm_var"])
    if math.isfinite(mean) and math.isfinite(variance):
        clipper.mean, clipper.variance = mean, variance
