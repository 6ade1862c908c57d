"""What ``ospnext train`` can be told."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ospnext.config import Config
from ospnext.sections import Fps, LoraConfig, RunConfig, SchedulerConfig, Shift, TextEncoderConfig

LogShift = Annotated[float, Field(ge=-4.6, le=6.9)]  # of a Shift
LearningRate = Annotated[float, Field(gt=0, le=1000)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class NoiseConfig(SchedulerConfig):
    """How training draws noise levels sigma in (0, 1]."""

    shift: Shift = Field(default=1.0, description="shift of the noise levels, without dynamic shifting")
    use_dynamic_shifting: bool = Field(default=False, description="shift by exp of a line in the tokens of one frame")
    base_image_seq: int = Field(default=256, ge=1, description="tokens at which the line is base_shift")
    max_image_seq: int = Field(default=4096, ge=1, description="tokens at which the line is max_shift")
    base_shift: LogShift = Field(default=0.5, description="the line at base_image_seq")
    max_shift: LogShift = Field(default=1.15, description="the line at max_image_seq")
    use_logitnorm_time_sampling: bool = Field(
        default=False, description="sigmoid of a normal instead of uniform levels"
    )
    logit_mean: float = Field(default=0.0, description="mean of that normal")
    logit_std: float = Field(default=1.0, gt=0, description="standard deviation of that normal")

    @model_validator(mode="after")
    def _a_line(self) -> Self:
        if self.use_dynamic_shifting and self.base_image_seq == self.max_image_seq:
            raise ValueError(
                f"base_image_seq and max_image_seq are both {self.max_image_seq}: use_dynamic_shifting needs a line "
                "through two points"
            )
        return self


class SharedTextEncoderConfig(TextEncoderConfig):
    """The text encoder of training."""

    use_fsdp: bool = Field(
        default=False, description="share its weights among fsdp_size processes, which then all encode together"
    )


class DatasetConfig(Config):
    """What one sample is."""

    metafile_or_dir_path: str | None = Field(
        default=None, description="wan_t2v: the store of data build; latents: the folder of data encode"
    )
    train_fps: float | None = Field(default=16, gt=0, le=1000, description="frames per second of a sample")
    sample_stride: int | None = Field(
        default=None, ge=1, description="take every n-th frame instead, whatever the rate"
    )
    keep_chinese: bool = Field(default=False, description="leave Chinese characters in captions")
    timeout: float = Field(default=600.0, gt=0, le=10**6, description="seconds that reading a clip may take")
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

    dataset_name: Literal["t2v_random", "wan_t2v", "latents", "shapes"] = Field(
        default="t2v_random", description="noise (to try the loop), real videos, encoded videos, or rendered shapes"
    )
    batch_size: int = Field(default=1, ge=1, description="samples of one forward pass, of the ranks that share a video")
    num_workers: int = Field(default=4, ge=0, description="processes that read clips, of each rank")
    pin_memory: bool = Field(default=False, description="keep batches where accelerators copy fastest from")
    drop_last: bool = Field(default=True, description="leave out the end of an epoch that fills no step")
    shuffle: bool = Field(default=True, description="a new order each epoch")
    dataset_config: DatasetConfig = DatasetConfig()


class OptimizerConfig(Config):
    """AdamW."""

    lr: LearningRate = Field(default=1e-4, description="learning rate, after warm-up")
    weight_decay: float = Field(default=1e-2, ge=0, le=1000, description="decoupled weight decay")
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.999), description="decay of the two moments")
    eps: float = Field(default=1e-15, ge=1e-37, le=1, description="added to the root of the second moment")


class DistillationConfig(Config):
    """Learning from another model's velocities beside, or instead of, the data's."""

    weight: float = Field(
        default=0.0, ge=0, le=1, description="share of the loss that is the distance to the teacher's velocity; 0: off"
    )
    teacher: str | None = Field(
        default=None,
        description="weights of the frozen teacher, a folder or file; default: those that training starts from, in "
        "the layouts they know",
    )

    @model_validator(mode="after")
    def _used(self) -> Self:
        if self.teacher is not None and self.weight == 0:
            raise ValueError("distillation_config.teacher is named, but weight is 0: give a weight up to 1")
        return self


class ValidationConfig(Config):
    """Videos of the averaged weights along the way, always of the same prompts and noise."""

    interval: int | None = Field(
        default=None, ge=1, description="steps between videos, which also come at the end; empty: none"
    )
    prompts: str | None = Field(
        default=None,
        description="file with a prompt a line (ends in .txt, or exists), else a prompt; the shapes dataset has its "
        "own, of held-out scenes that are graded",
    )
    num_videos: int = Field(default=4, ge=1, le=10_000, description="videos each time: the first so many prompts")
    seed: int = Field(default=1, ge=0, lt=2**62, description="of the noise; video i has seed + i")
    num_inference_steps: int | None = Field(
        default=None, ge=1, le=10_000, description="sampling steps; default: 20 for shapes, else 50"
    )
    guidance_scale: float | None = Field(default=None, ge=0, description="guidance; default: 4 for shapes, else 5")
    shift: Shift | None = Field(default=None, description="of the noise levels; default: 3 for shapes, else 7")
    save_fps: Fps = Field(default=16, description="frames per second of the files")


class TrackerConfig(Config):
    """The run in wandb; it is on where a project is named and the package is there."""

    project_name: str | None = Field(default=None, description="also log to wandb, offline unless WANDB_MODE says so")
    exp_name: str | None = Field(default=None, description="name of the run there; default: the project's")


class TrainConfig(RunConfig):
    """``ospnext train``: supervised flow matching of the transformer."""

    text_encoder_config: SharedTextEncoderConfig = SharedTextEncoderConfig()
    model: str | None = Field(
        default=None, description="train this pipeline folder, or 'shapes' (embedded), further; default: the sections"
    )
    import_checkpoint: str | None = Field(
        default=None,
        description="iter_ folder of OSP-Next to go on from, with its average and optimiser, where output_dir holds no "
        "state yet",
    )
    convert_layouts: bool = Field(
        default=False,
        description="sparse settings of model_config win over those of the weights: so dense weights become sparse",
    )
    distillation_config: DistillationConfig = DistillationConfig()
    lora_config: LoraConfig | None = Field(
        default=None, description="train an adapter on the frozen weights, not the weights; any key turns it on"
    )
    training_iteration: int = Field(default=1_000_000, ge=1, description="optimiser steps in all")
    time_budget_minutes: float | None = Field(
        default=None, gt=0, description="save and stop after it; start again to go on"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations backward: less memory, more time"
    )
    selective_checkpointing: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="share of the blocks that gradient_checkpointing recomputes, evenly spread; 1: all",
    )
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="batches of one optimiser step")
    init_max_grad_norm: float = Field(
        default=1.0, gt=0, description="largest norm gradients are scaled down to at first; then it follows the run"
    )
    lr_schedule: Literal["constant", "cosine"] = Field(default="constant", description="learning rate after warm-up")
    warmup_steps: int = Field(default=0, ge=0, description="steps in which the learning rate rises from 0")
    log_interval: int = Field(default=1, ge=1, description="steps between log lines")
    save_interval: int = Field(default=1000, ge=1, description="steps between checkpoints")
    keep_checkpoints: int | None = Field(default=3, ge=1, description="newest checkpoints that stay; empty: all")
    ema_decay: float = Field(default=0.9999, ge=0, lt=1, description="decay of the averaged weights")
    ema_update_interval: int = Field(default=1, ge=1, description="steps between updates of the averaged weights")
    compile: bool = Field(default=True, description="torch.compile the transformer's blocks, on accelerators")
    deterministic_training: bool = Field(default=False, description="only deterministic kernels: slower, repeatable")
    profiling: bool = Field(default=False, description="write a trace of steps 3 to 5 of this start to output_dir")
    encoder_cpu_offload: bool = Field(
        default=False, description="keep VAE and text encoder in host memory while they are not needed"
    )
    trackers: tuple[str, ...] = Field(
        default=("tensorboard",), description="accelerate's trackers that get the log besides train_log.jsonl"
    )
    wandb_config: TrackerConfig = TrackerConfig()
    validation_config: ValidationConfig = ValidationConfig()
    train_text_encoder: bool = Field(default=False, description="train the text encoder along")
    scheduler_config: NoiseConfig = NoiseConfig()
    data_config: DataConfig = DataConfig()
    optimizer_config: OptimizerConfig = OptimizerConfig()

    @property
    def checkpointed(self) -> float:
        """Share of the blocks that are recomputed in the backward pass."""
        return self.selective_checkpointing if self.gradient_checkpointing else 0.0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        data, clip = self.data_config.dataset_name, self.data_config.dataset_config
        if data in ("wan_t2v", "latents") and clip.metafile_or_dir_path is None:
            raise ValueError(
                f"data_config.dataset_name is {data}, but data_config.dataset_config.metafile_or_dir_path is missing: "
                f"name what `ospnext data {'build' if data == 'wan_t2v' else 'encode'}` wrote"
            )
        if data in ("t2v_random", "shapes") and clip.metafile_or_dir_path is not None:
            raise ValueError(
                f"data_config.dataset_config.metafile_or_dir_path is {clip.metafile_or_dir_path}, but dataset_name is "
                f"{data}, which reads no files: set data_config.dataset_name=wan_t2v, or leave the path out"
            )
        if data != "shapes" and self.train_text_encoder:
            raise ValueError(f"train_text_encoder is for rendered shapes, but data_config.dataset_name is {data}")
        if self.selective_checkpointing < 1 and not self.gradient_checkpointing:
            raise ValueError(
                f"selective_checkpointing is {self.selective_checkpointing:g}, but gradient_checkpointing is off: set "
                "gradient_checkpointing=true too"
            )
        if self.distillation_config.weight and self.train_text_encoder:
            raise ValueError(
                "distillation_config.weight is above 0: the teacher knows its text encoder as it is, so "
                "train_text_encoder must be off"
            )
        if self.lora_config is not None and self.train_text_encoder:
            raise ValueError("lora_config trains an adapter alone: turn train_text_encoder off, or leave it out")
        if clip.train_fps is None and clip.sample_stride is None:
            raise ValueError("train_fps and sample_stride are both empty: give one")
        if self.weight_dtype in ("fp16", "float16"):
            raise ValueError(f"weight_dtype is {self.weight_dtype}: training needs bf16's range: use bf16 or fp32")
        return self
