"""A frozen teacher beside the model that learns: how dense weights become sparse in few steps.

The student starts from the teacher's weights, which load one to one whatever the layouts of the blocks, and learns to
give the teacher's velocity where its own attention no longer sees every token. The teacher runs on the same processes
as the student: its weights are sharded like the student's and gathered block by block, its tokens are shared by the
same sequence, all of it dense if it is dense. It is in no state and has no gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ospnext.assemble import Crew, assemble_transformer
from ospnext.checkpoints.components import pipeline_folder
from ospnext.checkpoints.load import SPARSE, find_transformer, load_transformer
from ospnext.config import ConfigError
from ospnext.device import resolve_dtype
from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.ops.layout import Layout
from ospnext.train.flops import training_flops
from ospnext.train.job import Job
from ospnext.train.settings import TrainConfig

_SAME = ("in_dim", "out_dim", "text_dim", "text_len", "patch_size")  # what teacher and student must have alike


@dataclass(frozen=True)
class Teacher:
    """A model whose velocity is learnt.

    Args:
        transformer: frozen, in eval mode, in the dtype it computes in.
        weight: its share of the loss.
    """

    transformer: OSPNextTransformer3DModel
    weight: float

    @torch.no_grad()
    def __call__(self, x_t: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Its velocity, float32; arguments as the student's."""
        with torch.autocast(x_t.device.type, enabled=False):
            return self.transformer(x_t, timestep, text, return_dict=False)[0]

    def flops(self, latents: Sequence[int]) -> int:
        """FLOPs of its forward pass for a sample of latents ``[C, t, h, w]``."""
        settings = self.transformer.config
        return training_flops(settings, self.transformer.layouts, latents, settings["text_len"])[1] // 3

    def __str__(self) -> str:
        layouts = self.transformer.layouts
        dense = sum(layout is Layout.FULL for layout in layouts)
        return f"a frozen teacher with {dense} of {len(layouts)} blocks dense gives {self.weight:.0%} of the loss"


def check_teacher(config: TrainConfig, job: Job) -> None:
    """Find out before anything is loaded whether there is a teacher where one is asked for, and whether it fits.

    Raises:
        ValueError: it is missing, unreadable or of other sizes.
    """
    if not config.distillation_config.weight:
        return
    path = teacher_path(config, job)
    teacher = load_transformer(path, device="meta", **teacher_settings(config, path))
    for key in _SAME:
        ours, theirs = (tuple(x) if isinstance(x, list) else x for x in (job.transformer[key], teacher.config[key]))
        if ours != theirs:
            raise ConfigError(f"model_config.{key} is {ours}, but the teacher's in {path} {theirs}: they must be equal")


def build_teacher(config: TrainConfig, job: Job, crew: Crew) -> Teacher | None:
    """The teacher that the configuration asks for, this process's part of it where processes share weights.

    Raises:
        CheckpointError, OutOfMemoryError: as ``checkpoints.load``.
    """
    weight = config.distillation_config.weight
    if not weight:
        return None
    path = teacher_path(config, job)
    # Gathered weights are always freed after use: what is kept for a backward pass would be kept for none.
    beside = replace(crew, sharding=replace(crew.sharding, reshard_after_forward=True, param_dtype=None))
    dtype = resolve_dtype(config.weight_dtype)
    model = assemble_transformer(path, beside, dtype, **teacher_settings(config, path))
    model.set_attention_kernel(config.attention_kernel)
    return Teacher(model.requires_grad_(False), weight)


def teacher_path(config: TrainConfig, job: Job) -> Path:
    """Where the teacher's weights are.

    Raises:
        ConfigError: nobody says.
    """
    if config.distillation_config.teacher is not None:
        return pipeline_folder(config.distillation_config.teacher)
    if job.sources.transformer is None:
        raise ConfigError(
            f"distillation_config.weight is {config.distillation_config.weight}, but training starts from random "
            "weights: name distillation_config.teacher, or weights to start from"
        )
    return job.sources.transformer


def teacher_settings(config: TrainConfig, path: Path) -> dict[str, Any]:
    """What ``load_transformer`` is to be told of the teacher: sizes of a single file, never the student's layouts.

    Raises:
        CheckpointError: there is no model at ``path``.
    """
    if find_transformer(path).is_dir():
        return {}
    return {key: value for key, value in config.architecture().items() if key not in SPARSE}
