"""The fate of every key that OSP-Next's own configs, old and new, may hold, for each command that reads them.

One table. A key is mapped (it means the same here, maybe in another place), has no effect (accepted, and said in one
line), or is renamed (refused, with its new name). Names that users of related projects are used to are refused the
same way. Keys of the table that a command's configuration class has need no row to work: they stand here so that
nothing of the older scheme is forgotten, which the tests check.
"""

from collections.abc import Iterator, Mapping

from ospnext.config import Fate, KeyRule

Row = tuple[tuple[str, ...], str, KeyRule]

_RUN = "generate train rl"
_SHARED_ALIKE = "the text encoder is shared by as many ranks as the transformer: fsdp_size"
_TEXT_TO_VIDEO = "text to video is the only task"
_UNREAD = "nothing reads it, there or here"


def _mapped(commands: str, keys: str, section: str = "") -> Iterator[Row]:
    """Keys that mean the same in the same place."""
    for key in keys.split():
        yield tuple(commands.split()), _join(section, key), KeyRule(Fate.MAPPED)


def _moved(commands: str, places: Mapping[str, str]) -> Iterator[Row]:
    """Keys that mean the same in another place."""
    for key, target in places.items():
        yield tuple(commands.split()), key, KeyRule(Fate.MAPPED, target=target)


def _no_effect(commands: str, keys: str, why: str, section: str = "") -> Iterator[Row]:
    """Keys that are accepted and change nothing, with the reason."""
    for key in keys.split():
        yield tuple(commands.split()), _join(section, key), KeyRule(Fate.NO_EFFECT, why=why)


def _renamed(commands: str, names: Mapping[str, str]) -> Iterator[Row]:
    """Keys that are refused, with the key to use."""
    for key, target in names.items():
        yield tuple(commands.split()), key, KeyRule(Fate.RENAMED, target=target)


def _join(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key


_TABLE: tuple[Row, ...] = (
    # Common to all runs
    *_mapped(_RUN, "model_name seed output_dir weight_dtype"),
    *_mapped(_RUN, "fsdp_size ddp_size sp_size skiparse_sp_size"),
    *_mapped(_RUN, "use_sequence_parallel use_skiparse_sequence_parallel"),
    *_no_effect(_RUN, "task pipeline_name", _TEXT_TO_VIDEO),
    *_mapped(_RUN, "reshard_after_forward explicit_prefetching_num_blocks model_cpu_offload"),
    *_no_effect(_RUN, "save_with_dcp_api", "a checkpoint says by itself how it was written"),
    *_mapped(_RUN, "encoder_cpu_offload"),
    *_renamed(
        _RUN,
        {
            "cp_size": "sp_size",
            "skiparse_cp_size": "skiparse_sp_size",
            "use_context_parallel": "use_sequence_parallel",
            "use_skiparse_context_parallel": "use_skiparse_sequence_parallel",
        },
    ),
    # The model
    *_mapped(_RUN, "pretrained_model_dir_or_checkpoint", "model_config"),
    *_mapped(_RUN, "patch_size text_len in_dim out_dim dim ffn_dim freq_dim text_dim", "model_config"),
    *_mapped(_RUN, "num_heads num_layers qk_norm cross_attn_norm eps", "model_config"),
    *_mapped(_RUN, "skiparse_model_type sparse_ratio num_full_blocks", "model_config"),
    *_no_effect(_RUN, "model_type", _TEXT_TO_VIDEO, "model_config"),
    *_no_effect(_RUN, "window_size num_register_tokens", _UNREAD, "model_config"),
    *_no_effect(_RUN, "lock_main_parameters training_with_full", _UNREAD, "model_config"),
    *_mapped(_RUN, "quant quant_attn scale_max_forward scale_max_backward", "model_config"),
    *_renamed(
        _RUN,
        {
            "model_config.skiparse_1d": "model_config.skiparse_pattern (1d)",
            "model_config.skiparse_2d": "model_config.skiparse_pattern (2d)",
        },
    ),
    # Encoders
    *_mapped(_RUN, "vae_path dtype", "vae_config"),
    *_mapped(_RUN, "text_len checkpoint_path text_tokenizer_path dtype", "text_encoder_config"),
    *_no_effect("generate rl", "use_fsdp", _SHARED_ALIKE, "text_encoder_config"),
    *_mapped("train", "use_fsdp", "text_encoder_config"),
    # Noise levels
    *_mapped(_RUN, "scheduler_name shift", "scheduler_config"),
    *_mapped("generate", "num_inference_steps guidance_scale", "scheduler_config"),
    *_no_effect("train", "num_inference_steps guidance_scale", "training takes no sampling steps", "scheduler_config"),
    *_no_effect("rl", "num_inference_steps guidance_scale", "rl_config holds the rollout's own", "scheduler_config"),
    *_mapped("train", "use_dynamic_shifting base_image_seq max_image_seq base_shift max_shift", "scheduler_config"),
    *_mapped("train", "use_logitnorm_time_sampling logit_mean logit_std", "scheduler_config"),
    *_no_effect(
        "generate rl",
        "use_dynamic_shifting base_image_seq max_image_seq base_shift max_shift",
        "sampling shifts its noise levels by scheduler_config.shift",
        "scheduler_config",
    ),
    *_no_effect(
        "generate rl",
        "use_logitnorm_time_sampling logit_mean logit_std",
        "it is for training on videos",
        "scheduler_config",
    ),
    # Logging
    *_mapped("train rl", "project_name exp_name", "wandb_config"),
    *_no_effect("generate", "project_name exp_name", "generating logs nothing there", "wandb_config"),
    # Generate
    *_mapped("generate", "prompt_txt batch_size num_frames height width save_fps"),
    *_renamed(
        "generate",
        {
            **dict.fromkeys(("sample_steps", "infer_steps", "steps"), "scheduler_config.num_inference_steps"),
            **dict.fromkeys(("sample_shift", "sigma_shift", "flow_shift"), "scheduler_config.shift"),
            **dict.fromkeys(("sample_guide_scale", "cfg_scale", "cfg"), "scheduler_config.guidance_scale"),
            **dict.fromkeys(("frame_num", "target_video_length"), "num_frames"),
            **dict.fromkeys(("ckpt_dir", "model_path", "model_dir"), "model"),
            **dict.fromkeys(("offload_model", "t5_cpu"), "encoder_cpu_offload"),
            **dict.fromkeys(("dit_fsdp", "t5_fsdp"), "fsdp_size"),
            **dict.fromkeys(("ulysses_size", "ulysses_degree", "ring_size", "ring_degree"), "sp_size"),
            **dict.fromkeys(("save_path", "save_file", "output"), "output_dir"),
            "prompt_file": "prompts",
            "sample_solver": "sampler",
            "size": "height and width",
            "base_seed": "seed",
            "fps": "save_fps",
            "attention_backend": "attention_kernel",
            "max_sequence_length": "text_encoder_config.text_len",
        },
    ),
    *_moved("generate", {"lora_config.lora_path": "lora_path"}),
    *_no_effect("generate", "rank alpha target_modules", "the LoRA's files say it", "lora_config"),
    # Train and RL
    *_mapped("train", "training_iteration log_interval deterministic_training"),
    *_mapped("train rl", "gradient_checkpointing gradient_accumulation_steps init_max_grad_norm save_interval"),
    *_mapped("train rl", "ema_decay ema_update_interval"),
    *_mapped("train rl", "lr weight_decay betas eps", "optimizer_config"),
    *_mapped("rl", "num_epochs resume_epoch deterministic_training"),
    *_mapped("rl", "resume_override_lr resume_lr", "optimizer_config"),
    *_no_effect("rl", "log_interval", "every epoch is logged"),
    *_mapped("train", "profiling"),
    *_no_effect("rl", "profiling", "a profiler is started from outside"),
    *_renamed(
        "train rl",
        {
            "learning_rate": "optimizer_config.lr",
            "checkpointing_steps": "save_interval",
            "mixed_precision": "weight_dtype",
            "max_grad_norm": "init_max_grad_norm",
            "hsdp_shard_dim": "fsdp_size",
            "hsdp_replicate_dim": "ddp_size",
        },
    ),
    *_renamed(
        "train",
        {
            "train_batch_size": "data_config.batch_size",
            "max_train_steps": "training_iteration",
            "lr_warmup_steps": "warmup_steps",
            "lr_scheduler": "lr_schedule",
            "resume_from_checkpoint": "output_dir (a run goes on from the newest checkpoint in it)",
        },
    ),
    # Training data
    *_mapped("train", "batch_size dataset_name num_workers pin_memory drop_last shuffle", "data_config"),
    *_mapped("train", "sample_height sample_width sample_num_frames text_drop_ratio", "data_config.dataset_config"),
    *_mapped("train", "metafile_or_dir_path train_fps sample_stride timeout", "data_config.dataset_config"),
    *_no_effect("train", "sampler_name collator_name collator_config", "there is one of its kind", "data_config"),
    *_no_effect(
        "train rl", "return_prompt_mask", "the text encoder always gets the mask", "data_config.dataset_config"
    ),
    *_moved(
        "train rl",
        {
            "data_config.dataset_config.text_tokenizer_path": "text_encoder_config.text_tokenizer_path",
            "data_config.dataset_config.text_max_length": "text_encoder_config.text_len",
        },
    ),
    *_no_effect("train", "tokenizer_max_length", "text_encoder_config.text_len decides", "data_config.dataset_config"),
    *_moved("rl", {"data_config.dataset_config.tokenizer_max_length": "text_encoder_config.text_len"}),
    *_no_effect(
        "rl",
        "batch_size num_workers pin_memory drop_last shuffle dataset_name sampler_name collator_name collator_config",
        "prompts come from rl_config.prompt_file",
        "data_config",
    ),
    *_no_effect(
        "rl",
        "metafile_or_dir_path sample_height sample_width sample_num_frames train_fps sample_stride text_drop_ratio"
        " timeout",
        "prompts come from rl_config.prompt_file",
        "data_config.dataset_config",
    ),
    # RL
    *_mapped("train rl", "rank alpha target_modules lora_path", "lora_config"),
    *_mapped("rl", "prompt_file eval_prompt_file height width num_frames num_inference_steps", "rl_config"),
    *_mapped("rl", "sde_steps guidance_scale sample_batch_size train_batch_size", "rl_config"),
    *_mapped("rl", "num_batches_per_epoch num_inner_epochs num_image_per_prompt sample_time_per_prompt", "rl_config"),
    *_mapped("rl", "timestep_fraction clip_range adv_clip_max kl_reward kl_beta use_cfg_in_train", "rl_config"),
    *_mapped("rl", "per_prompt_stat_tracking global_std eval_freq eval_num_steps reward_fn", "rl_config"),
    *_renamed(
        "rl",
        {
            "num_generations": "rl_config.num_image_per_prompt",
            "sampling_steps": "rl_config.num_inference_steps",
            **dict.fromkeys(("beta", "kl_coeff"), "rl_config.kl_beta"),
            **dict.fromkeys(("eta", "rl_config.eta"), "rl_config.noise_level"),
            **dict.fromkeys(("sde_window_size", "rl_config.sde_window_size"), "rl_config.sde_steps"),
            **dict.fromkeys(("sample_strategy", "rl_config.sample_strategy"), "rl_config.window"),
            **dict.fromkeys(("iters_per_group", "rl_config.iters_per_group"), "rl_config.window_interval"),
            **dict.fromkeys(("init_same_noise", "same_latent"), "rl_config.same_noise"),
        },
    ),
    # Choosing training videos
    *_mapped("filter", "ann_txt_path save_path save_absolute_path sample_height sample_width sample_num_frames"),
    *_mapped("filter", "train_fps sample_stride min_hxw too_long_factor max_h_div_w_ratio min_h_div_w_ratio"),
    *_mapped("filter", "max_motion_value min_motion_value"),
)


def key_rules(command: str) -> dict[str, KeyRule]:
    """The fate of every key of the table that concerns ``command``, by dotted key; empty for other commands."""
    return {key: rule for commands, key, rule in _TABLE if command in commands}
