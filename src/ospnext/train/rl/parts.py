"""Networks and rewards of reinforcement learning: settled and checked from headers, then loaded and shared.

``settle`` finds out everything that can be known before weights are read; ``load`` puts the pipeline together in the
order of ``assemble``. All processes call them together.
"""

from dataclasses import replace
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from ospnext.assemble import Crew, assemble_text_encoder, assemble_transformer, join
from ospnext.checkpoints.components import load_scheduler
from ospnext.checkpoints.fill import ProgressCallback
from ospnext.checkpoints.load import load_tokenizer, load_vae
from ospnext.checkpoints.lora import NewAdapter, WithAdapter, asked_for, leave_casting_to_autocast, linear_shapes
from ospnext.checkpoints.lora_files import Adapter
from ospnext.config import ConfigError
from ospnext.device import resolve_device
from ospnext.flow.sde import excess_noise, rollout_levels
from ospnext.generate.pipeline import OSPNextPipeline
from ospnext.generate.sampler import make_scheduler, sampler_name, sampler_shift
from ospnext.generate.settings import GenerateConfig, SamplerConfig
from ospnext.generate.sources import Plan, find_sources, make_plan
from ospnext.models.text import WAN_NEGATIVE_PROMPT
from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.parallel.apply import Options
from ospnext.parallel.fsdp import Sharding, copies_mesh
from ospnext.parallel.launch import Launch, place
from ospnext.quant.settings import SAVED
from ospnext.rewards.base import RewardSet, check_metadata, check_reward
from ospnext.sections import RunConfig
from ospnext.train.rl.prompts import Prompt, read_prompts, share_of
from ospnext.train.rl.settings import GRPOConfig, RLConfig

SHIFT = 7.0  # OSP-Next's own recipe for generating
NOISE_CEILING = 1.25  # times the noise of its level that a random step may leave before it is said


class Job(NamedTuple):
    """A run, settled and checked.

    ``config`` is ``rl_config`` with the size that the model makes; ``negative`` what videos are to avoid.
    """

    device: torch.device
    plan: Plan
    config: GRPOConfig
    negative: str
    prompts: list[Prompt]
    eval_prompts: list[Prompt]
    adapter: NewAdapter | Adapter
    notices: list[str]


def settle(config: RLConfig, launch: Launch) -> Job:
    """Everything about a run that can be known before weights are loaded; nothing is written.

    Raises:
        ValueError: bad input, in one line that names it.
    """
    device = place(launch, config.device)
    c = config.rl_config
    for name in (*c.reward_fn, *c.watch_fn):
        check_reward(name, config.reward_config.options.get(name, {}))
    if unused := sorted(config.reward_config.options.keys() - {*c.reward_fn, *c.watch_fn}):
        raise ConfigError(f"reward_config.options names {', '.join(unused)}, which reward_fn and watch_fn do not")
    if unknown := sorted({*config.reward_config.separate} - {*c.reward_fn, *c.watch_fn}):
        raise ConfigError(f"reward_config.separate names {', '.join(unknown)}, which reward_fn and watch_fn do not")
    if config.reward_config.device is not None:
        resolve_device(config.reward_config.device)
    generating, notices = as_generate(config)
    plan = make_plan(generating, device, launch.world)
    sizes = plan.sizes.sizes
    check_groups(c, sizes.dp)
    if sizes.cfg > 1 and not c.use_cfg_in_train:
        raise ConfigError("cfg_parallel_size is 2, but use_cfg_in_train is false: without guidance there are no halves")
    sampling = plan.sampling
    size = {"height": sampling.height, "width": sampling.width, "num_frames": sampling.num_frames}
    if c.sde_steps is not None and c.sde_steps > c.random_steps:
        notices.append(f"sde_steps is {c.sde_steps}: {c.random_steps} are random, for the last step has no noise")
    if c.eval_prompt_file is not None and c.eval_keep and not find_spec("av"):
        notices.append("PyAV is not installed: evaluations keep frames as .npy, and there is no grid over time")
    negative = plan.places.settings.get("negative_prompt", WAN_NEGATIVE_PROMPT)
    adapter = asked_for(config.lora_config, config.seed)
    with torch.device("meta"):
        own = {k: v for k, v in plan.transformer.items() if not k.startswith("_") and k not in SAVED}
        adapter.sizes(linear_shapes(OSPNextTransformer3DModel(**own)))  # refuses what is none of this model's
    prompts = read_prompts(c.prompt_file, config.seed)
    eval_prompts = [] if c.eval_prompt_file is None else read_prompts(c.eval_prompt_file, config.seed, held_out=True)
    for name in c.reward_fn:
        check_metadata(name, [*prompts, *eval_prompts])
    for name in c.watch_fn:
        check_metadata(name, eval_prompts)
    return Job(
        device,
        plan,
        c.model_copy(update=size),
        negative if c.negative_prompt is None else c.negative_prompt,
        prompts,
        eval_prompts,
        adapter,
        notices,
    )


def as_generate(config: RLConfig) -> tuple[GenerateConfig, list[str]]:
    """How the same model is sampled from, and what there is to say of it: one schedule for all.

    Raises:
        ValueError: there is no such model.
    """
    c = config.rl_config
    given: dict[str, Any] = {
        name: getattr(config, name)
        for name in RunConfig.model_fields
        if name in config.model_fields_set and name != "output_dir"
    }
    given |= {"model": config.model, "encoder_cpu_offload": config.encoder_cpu_offload, "prompt": "-"}
    given |= {"height": c.height, "width": c.width, "num_frames": c.num_frames}
    given |= {"batch_size": c.sample_batch_size, "guidance_mode": c.guidance_mode, "sampler": "euler"}
    sampler = SamplerConfig(num_inference_steps=c.num_inference_steps, guidance_scale=c.guidance_scale, shift=1.0)
    generating = GenerateConfig(**given, scheduler_config=sampler)
    shift, notices = config.scheduler_config.shift, []
    scheduler = find_sources(generating).scheduler
    own = None if scheduler is None else load_scheduler(scheduler)
    if shift is None:
        shift = SHIFT if own is None else sampler_shift(own)
        whose = "OSP-Next's recipe for generating" if own is None else "the model's own"
        notices.append(f"scheduler_config.shift is not set: rollouts, training and evaluation take {whose}, {shift:g}")
    elif own is not None and shift != sampler_shift(own):
        notices.append(
            f"scheduler_config.shift is {shift:g}, but the model is deployed with {sampler_shift(own):g}: generate "
            f"with scheduler_config.shift={shift:g}, too"
        )
    reach = c.random_steps if c.window == "leading" else c.num_inference_steps
    excess = max(excess_noise(rollout_levels(c.num_inference_steps, shift, 0, reach), c.noise, c.level))
    if excess > NOISE_CEILING:
        notices.append(
            f"noise_level {c.level:g} of {c.noise} is too much for steps as long as those of num_inference_steps "
            f"{c.num_inference_steps}: one leaves {excess:.2f} times the noise that its level has, which forgets what "
            "was decided before it and stays as grain; lower it, take more steps, or noise cps"
        )
    if own is not None and sampler_name(own) != "euler":
        notices.append(f"the model is deployed with {sampler_name(own)}: rollouts and evaluation take Euler's steps")
    return generating.model_copy(update={"scheduler_config": sampler.model_copy(update={"shift": shift})}), notices


def check_groups(c: GRPOConfig, ranks: int) -> None:
    """Find out whether groups come out even.

    Args:
        c: batches and groups.
        ranks: that make different videos.

    Raises:
        ConfigError: they do not; names numbers that do.
    """
    videos = c.num_batches_per_epoch * ranks * c.sample_batch_size
    if videos % c.num_image_per_prompt:
        raise ConfigError(
            f"num_batches_per_epoch {c.num_batches_per_epoch} x sample_batch_size {c.sample_batch_size} x {ranks} "
            f"groups of processes are {videos} videos, no multiple of num_image_per_prompt {c.num_image_per_prompt}: "
            "change one"
        )
    if c.best_of_n is None and c.train_groups is None:
        return
    groups = videos // c.num_image_per_prompt
    own = {s // c.group_size for s in share_of(0, ranks, groups, c.group_size)}
    if groups % ranks or len(own) * ranks != groups:
        raise ConfigError(
            f"{'train_groups' if c.best_of_n is None else 'best_of_n'} chooses by a prompt's group, but {groups} "
            f"groups do not go round {ranks} groups of processes: change num_batches_per_epoch or num_image_per_prompt"
        )
    if c.train_groups is not None and c.train_groups > len(own):
        raise ConfigError(
            f"train_groups is {c.train_groups}, but an epoch has {len(own)} prompts on each group of processes "
            "(num_batches_per_epoch x sample_batch_size / num_image_per_prompt): lower it"
        )


def arrange(config: RLConfig, job: Job) -> Crew:
    """Arrange the processes: unlike in sampling, they always share gradients."""
    crew = join(config, job.plan.sizes, job.device, config.model_cpu_offload)
    if crew.mesh is None:
        return crew
    weights = crew.weights or copies_mesh(job.plan.sizes.copies, job.device.type)
    # No dtype to gather in: the base stays in its own, and the adapter in float32.
    ahead = config.explicit_prefetching_num_blocks
    return replace(
        crew,
        weights=weights,
        sharding=Sharding(config.reshard_after_forward, ahead, config.model_cpu_offload),
    )


def load(config: RLConfig, job: Job, crew: Crew, progress: ProgressCallback | None = None) -> OSPNextPipeline:
    """The pipeline, its transformer frozen but for an adapter, every process's part in its place.

    Raises:
        CheckpointError, OutOfMemoryError: as ``checkpoints.load``.
    """
    plan = job.plan
    compiled = config.compile and job.device.type != "cpu"
    options = Options(crew.sharding, config.gradient_checkpointing, "inductor" if compiled else None)
    transformer = assemble_transformer(
        plan.places.transformer,
        crew,
        plan.dtypes.transformer,
        options=options,
        progress=progress,
        quant=plan.quant,
        adapters=[WithAdapter(job.adapter)],
        **config.architecture(),
    )
    transformer.set_attention_kernel(config.attention_kernel)
    if plan.dtypes.transformer != torch.float32:
        leave_casting_to_autocast(transformer)
    if crew.mesh is None:
        if config.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        if compiled:
            transformer.compile_repeated_blocks(dynamic=False)
    host, offload = (
        torch.device("cpu"),
        frozenset(("vae", "text_encoder")) if config.encoder_cpu_offload else frozenset(),
    )
    home = host if offload else crew.device
    pipe = OSPNextPipeline.from_parts(
        transformer,
        load_vae(plan.places.vae, plan.dtypes.vae, home, progress),
        assemble_text_encoder(plan.places.text_encoder, crew, plan.dtypes.text_encoder, home, bool(offload), progress),
        load_tokenizer(plan.places.tokenizer),
        make_scheduler("euler", plan.sampling.shift),
        plan.places.settings,
    )
    if crew.weights is not None:
        pipe.sharded = frozenset(("transformer", "text_encoder"))
    pipe.vae.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    pipe.place(crew.device, offload)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_rewards(config: RLConfig, job: Job) -> RewardSet:
    """What is optimised, and with weight 0 what is watched."""
    c, made = config.rl_config, config.reward_config
    return RewardSet(
        c.reward_fn | dict.fromkeys(c.watch_fn, 0.0),
        made.options,
        job.device if made.device is None else resolve_device(made.device),
        made.separate,
    )
