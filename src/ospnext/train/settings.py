"""What ``ospnext train`` can be told."""

from typing import Literal

from pydantic import Field

from ospnext.config import Config
from ospnext.sections import RunConfig, SchedulerConfig


class NoiseConfig(SchedulerConfig):
    """How training draws noise levels sigma in (0, 1]."""

    shift: float = Field(default=1.0, gt=0, description="shift of the noise levels, without dynamic shifting")
    use_dynamic_shifting: bool = Field(default=False, description="shift by exp of a line in the tokens of one frame")
    base_image_seq: int = Field(default=256, ge=1, description="tokens at which the line is base_shift")
    max_image_seq: int = Field(default=4096, ge=1, description="tokens at which the line is max_shift")
    base_shift: float = Field(default=0.5, description="the line at base_image_seq")
    max_shift: float = Field(default=1.15, description="the line at max_image_seq")
    use_logitnorm_time_sampling: bool = Field(
        default=False, description="sigmoid of a normal instead of uniform levels"
    )
    logit_mean: float = Field(default=0.0, description="mean of that normal")
    logit_std: float = Field(default=1.0, gt=0, description="standard deviation of that normal")


class DatasetConfig(Config):
    """What one sample is."""

    sample_height: int = Field(default=480, ge=16, description="pixels, a multiple of 16")
    sample_width: int = Field(default=832, ge=16, description="pixels, a multiple of 16")
    sample_num_frames: int = Field(default=49, ge=1, description="frames, 4k+1")
    text_drop_ratio: float = Field(default=0.1, ge=0, le=1, description="share of captions left out, for guidance")
    world: Literal["large", "simple", "full", "both"] = Field(
        default="simple", description="which scenes the shapes dataset renders"
    )
    num_clips: int = Field(
        default=20_000, ge=1, le=10**6, description="clips of the shapes dataset, kept on the device as latents"
    )


class DataConfig(Config):
    """Where samples come from and how they are batched."""

    dataset_name: Literal["t2v_random", "wan_t2v", "shapes"] = Field(
        default="t2v_random", description="noise (to try the loop), real videos, or rendered moving shapes"
    )
    batch_size: int = Field(default=1, ge=1, description="samples of one forward pass on one rank")
    dataset_config: DatasetConfig = DatasetConfig()


class OptimizerConfig(Config):
    """AdamW."""

    lr: float = Field(default=1e-4, gt=0, description="learning rate, after warm-up")
    weight_decay: float = Field(default=1e-2, ge=0, description="decoupled weight decay")
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="decay of the two moments")
    eps: float = Field(default=1e-15, gt=0, description="added to the root of the second moment")


class TrainConfig(RunConfig):
    """``ospnext train``: supervised flow matching of the transformer."""

    model: str | None = Field(
        default=None, description="train this pipeline folder, or 'shapes' (embedded), further; default: the sections"
    )
    training_iteration: int = Field(default=1_000_000, ge=1, description="optimiser steps in all")
    time_budget_minutes: float | None = Field(
        default=None, gt=0, description="save and stop after it; start again to go on"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations backward: less memory, more time"
    )
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="batches of one optimiser step")
    init_max_grad_norm: float = Field(default=1.0, gt=0, description="gradients are scaled down to this norm")
    lr_schedule: Literal["constant", "cosine"] = Field(default="constant", description="learning rate after warm-up")
    warmup_steps: int = Field(default=0, ge=0, description="steps in which the learning rate rises from 0")
    log_interval: int = Field(default=1, ge=1, description="steps between log lines")
    save_interval: int = Field(default=1000, ge=1, description="steps between checkpoints")
    ema_decay: float = Field(default=0.9999, ge=0, lt=1, description="decay of the averaged weights")
    ema_update_interval: int = Field(default=1, ge=1, description="steps between updates of the averaged weights")
    compile: bool = Field(default=True, description="torch.compile the transformer's blocks, on accelerators")
    deterministic_training: bool = Field(default=False, description="only deterministic kernels: slower, repeatable")
    train_text_encoder: bool = Field(default=False, description="train the text encoder along")
    scheduler_config: NoiseConfig = NoiseConfig()
    data_config: DataConfig = DataConfig()
    optimizer_config: OptimizerConfig = OptimizerConfig()
