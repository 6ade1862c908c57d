"""What ``ospnext rl`` can be told."""

from typing import Literal, Self

from pydantic import Field, model_validator

from ospnext.config import Config
from ospnext.flow.sde import NOISE_LEVELS
from ospnext.rewards.settings import RewardConfig
from ospnext.sections import Fps, LoraConfig, RunConfig, SchedulerConfig, Shift
from ospnext.train.rl.window import Window
from ospnext.train.settings import LearningRate, OptimizerConfig, TrackerConfig


class RLSchedulerConfig(SchedulerConfig):
    """The noise levels of rollouts, training and evaluation: one schedule, that of deployment."""

    shift: Shift | None = Field(
        default=None, description="shift of the noise levels; default: the model's (7 where it says nothing)"
    )


class RLOptimizerConfig(OptimizerConfig):
    """AdamW, over the adapter alone."""

    lr: LearningRate = Field(default=5e-4, description="learning rate")
    resume_override_lr: bool = Field(default=False, description="use resume_lr when a run is resumed")
    resume_lr: LearningRate | None = Field(default=None, description="learning rate of a resumed run")


class GRPOConfig(Config):
    """Rollouts, advantages and the loss."""

    prompt_file: str = Field(
        min_length=1,
        description="prompts: a line each, .jsonl with metadata, or shapes:WORLD for scenes that training may see",
    )
    eval_prompt_file: str | None = Field(
        default=None, description="prompts of evaluation; shapes:WORLD draws held-out scenes"
    )
    negative_prompt: str | None = Field(default=None, description="what to avoid; default: the model's own")
    height: int = Field(default=720, ge=16, description="pixels")
    width: int = Field(default=1280, ge=16, description="pixels")
    num_frames: int = Field(default=81, ge=1, description="frames, 4k+1")
    save_fps: Fps = Field(default=16, description="frames per second that videos are deployed and judged at")
    num_inference_steps: int = Field(default=20, ge=2, le=10_000, description="steps of a rollout")
    guidance_scale: float = Field(default=5.0, ge=0, description="classifier-free guidance, off up to 1")
    guidance_mode: Literal["batched", "sequential"] = Field(
        default="batched", description="both guidance passes at once, or one after the other in less memory"
    )
    use_cfg_in_train: bool = Field(
        default=True, description="train the guided velocity; false: the conditional one, whatever leads the rollout"
    )
    cfg_gradient: Literal["full", "detached"] = Field(
        default="full", description="detached: no gradient through the unconditional half, as OSP-Next (biased)"
    )
    sde_steps: int | None = Field(
        default=None, ge=1, description="random steps of a rollout, the window; default: all. The last is never random"
    )
    window: Literal["leading", "progressive", "random", "decay"] = Field(
        default="leading", description="where they are: at the start, or sliding as Mix-GRPO's"
    )
    window_stride: int = Field(default=1, ge=1, description="steps by which the window moves")
    window_interval: int = Field(default=25, ge=1, description="epochs between moves")
    window_decay: float = Field(default=0.1, ge=0, description="decay: how fast the interval shrinks for late places")
    window_decay_from: int = Field(default=13, ge=0, description="decay: the place from which it shrinks")
    flash: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Mix-GRPO-Flash: the share of steps kept after the window, by a second-order solver (0.4)",
    )
    noise: Literal["osp", "flow", "dance", "cps"] = Field(
        default="osp", description="random steps: OSP-Next's, Flow-GRPO's, DanceGRPO's, or coefficient-preserving"
    )
    noise_level: float | None = Field(
        default=None,
        gt=0,
        description=f"their factor; default: {', '.join(f'{k} {v}' for k, v in NOISE_LEVELS.items())}",
    )
    same_noise: bool = Field(default=False, description="one initial noise for all videos of a prompt (MixGRPO)")
    sample_batch_size: int = Field(
        default=4, ge=1, description="videos of one rollout, of the ranks that share a video"
    )
    train_batch_size: int = Field(default=4, ge=1, description="videos of one training pass")
    num_batches_per_epoch: int = Field(default=4, ge=1, description="rollouts of an epoch")
    num_inner_epochs: int = Field(default=1, ge=1, description="times an epoch's rollouts are trained on")
    num_image_per_prompt: int = Field(default=4, ge=2, description="videos of a prompt that are compared: a group")
    sample_time_per_prompt: int = Field(default=1, ge=1, description="times the rollouts are made: larger groups")
    best_of_n: int | None = Field(
        default=None, ge=2, description="train on so many of each group: half the best, half the worst"
    )
    train_groups: int | None = Field(
        default=None,
        ge=1,
        description="train on so many prompts of an epoch, of the ranks that share a video: those whose rewards differ "
        "most; default: all",
    )
    timestep_fraction: float = Field(default=1.0, gt=0, le=1, description="share of the random steps to train on")
    step_weights: Literal["equal", "noise"] = Field(
        default="equal",
        description="of random steps in the loss; noise: by the noise that they add, as TempFlow-GRPO, since gradients "
        "grow as it falls and rewards depend on it less",
    )
    clip_range: float = Field(default=5e-3, gt=0, description="how far the probability ratio counts")
    adv_clip_max: float = Field(default=5.0, gt=0, description="largest advantage")
    per_prompt_stat_tracking: bool = Field(default=True, description="compare within a prompt's group; false: with all")
    global_std: bool = Field(default=False, description="divide by the deviation of all rewards, not the group's")
    reward_mixing: Literal["sum", "advantages"] = Field(
        default="sum", description="add rewards up, or each reward's own advantages (MixGRPO)"
    )
    kl_beta: float = Field(default=0.0, ge=0, description="weight of the divergence from the base in the loss")
    kl_reward: float = Field(default=0.0, ge=0, description="weight of a rollout's divergence, taken off its reward")
    kl_convention: Literal["exact", "no_dt"] = Field(
        default="exact", description="exact: OSP-Next's; no_dt: Flow-GRPO's published code's"
    )
    reward_fn: dict[str, float] = Field(min_length=1, description="weights of rewards by name")
    eval_freq: int = Field(default=10_000, ge=1, description="epochs between evaluations")
    eval_num_steps: int = Field(
        default=50, ge=1, le=10_000, description="steps of an evaluation's videos, without noise"
    )
    eval_keep: int = Field(default=16, ge=0, description="videos of an evaluation that are kept")
    watch_fn: tuple[str, ...] = Field(
        default=("flicker", "sharpness"), description="rewards that are never optimised, measured at evaluations"
    )
    watch_tolerance: float = Field(
        default=0.1,
        gt=0,
        description="share by which a watched one may fall, or sharpness also rise, while the reward rises",
    )
    watch_stop: bool = Field(
        default=False, description="stop when one falls further, or the reward itself; not only warn"
    )
    ratio_tolerance: float | None = Field(
        default=None,
        gt=0,
        description="how far the ratio may be from 1 before an update; default: clip_range, 5e-3 or more below float32",
    )
    exact_rollouts: bool = Field(
        default=False, description="roll out with the kernels that train: slower on CUDA, and ratios nearer to 1"
    )

    def tolerance(self, exact: bool) -> float:
        """How far the ratio may be from 1 before an update, where the base is in float32 (``exact``) or not."""
        if self.ratio_tolerance is not None:
            return self.ratio_tolerance
        return self.clip_range if exact else max(self.clip_range, 5e-3)

    @property
    def guided(self) -> bool:
        """Whether rollouts use guidance."""
        return self.guidance_scale > 1

    @property
    def random_steps(self) -> int:
        """Random steps of a rollout."""
        return min(self.sde_steps or self.num_inference_steps, self.num_inference_steps - 1)

    def trained_steps(self, random: int) -> int:
        """How many of ``random`` random steps are trained on."""
        return max(1, int(random * self.timestep_fraction))

    @property
    def level(self) -> float:
        """The factor of the noise."""
        return NOISE_LEVELS[self.noise] if self.noise_level is None else self.noise_level

    @property
    def group_size(self) -> int:
        """Videos of a prompt."""
        return self.num_image_per_prompt * self.sample_time_per_prompt

    def sliding(self, seed: int) -> Window:
        """Where random steps are, by epoch."""
        return Window(
            self.window,
            self.random_steps,
            self.window_stride,
            self.window_interval,
            self.window_decay,
            self.window_decay_from,
            seed,
        )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not any(self.reward_fn.values()):
            raise ValueError(f"reward_fn is {self.reward_fn}: nothing is optimised; watch_fn measures alone")
        if both := sorted(set(self.watch_fn) & self.reward_fn.keys()):
            raise ValueError(f"watch_fn names {', '.join(both)}, which reward_fn optimises: watch another reward")
        if self.noise == "cps" and self.level > 1:
            raise ValueError(f"noise_level is {self.level:g}: that of noise cps is an angle of 0 to 1 quarter turns")
        if self.best_of_n is not None and (self.best_of_n % 2 or self.best_of_n > self.group_size):
            raise ValueError(
                f"best_of_n is {self.best_of_n}: it must be even, and at most the {self.group_size} of a group"
            )
        return self


class RLConfig(RunConfig):
    """``ospnext rl``: Mix-GRPO on an adapter of the sparse model."""

    model: str | None = Field(
        default=None,
        description="a pipeline folder, or 'shapes' (embedded); default: embedded unless model_config has weights",
    )
    output_dir: str = Field(default="./output_rl_lora", min_length=1, description="where results go")
    num_epochs: int = Field(default=1000, ge=1, description="rounds of rollouts and training")
    time_budget_minutes: float | None = Field(
        default=None, gt=0, description="save and stop after it; start again to go on"
    )
    resume_epoch: int | None = Field(default=None, ge=0, description="count epochs from here with lora_path")
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations backward: less memory, more time"
    )
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="training batches of one optimiser step")
    init_max_grad_norm: float = Field(
        default=1.0, gt=0, description="largest norm gradients are scaled down to at first; then it follows the run"
    )
    lr_schedule: Literal["constant", "cosine"] = Field(
        default="constant", description="learning rate by epoch; cosine: down to zero at the end of num_epochs"
    )
    save_interval: int = Field(default=100, ge=1, description="epochs between lora-checkpoint folders")
    state_interval: int = Field(default=1, ge=1, description="epochs between states to resume from")
    keep_checkpoints: int | None = Field(default=3, ge=1, description="newest of these states that stay; empty: all")
    ema_decay: float = Field(default=0.9999, ge=0, lt=1, description="decay of the averaged adapter")
    ema_update_interval: int = Field(default=1, ge=1, description="steps between updates of the averaged adapter")
    compile: bool = Field(default=False, description="torch.compile the transformer's blocks, on accelerators")
    deterministic_training: bool = Field(default=False, description="only deterministic kernels: slower, repeatable")
    encoder_cpu_offload: bool = Field(
        default=False, description="keep VAE and text encoder in host memory while they are not needed"
    )
    trackers: tuple[str, ...] = Field(
        default=("tensorboard",), description="accelerate's trackers that get the log besides train_log.jsonl"
    )
    wandb_config: TrackerConfig = TrackerConfig()
    scheduler_config: RLSchedulerConfig = RLSchedulerConfig()
    optimizer_config: RLOptimizerConfig = RLOptimizerConfig()
    lora_config: LoraConfig = LoraConfig()
    rl_config: GRPOConfig
    reward_config: RewardConfig = RewardConfig()

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        weights = self.transformer_config.pretrained_model_dir_or_checkpoint
        if self.model is not None and weights is not None:
            raise ValueError(
                f"model ({self.model}) and model_config.pretrained_model_dir_or_checkpoint ({weights}) both name "
                "weights: keep one"
            )
        if self.weight_dtype in ("fp16", "float16"):
            raise ValueError(f"weight_dtype is {self.weight_dtype}: training needs bf16's range: use bf16 or fp32")
        return self
