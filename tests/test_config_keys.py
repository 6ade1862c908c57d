"""Every key of OSP-Next's own configs has a fate, and every config we ship is valid."""

from pathlib import Path
from typing import Any

import pytest

from ospnext.config import Config, ConfigError, Fate, config_keys, load_config, read_yaml
from ospnext.config_keys import key_rules
from ospnext.generate.settings import GenerateConfig, read_prompts
from ospnext.sections import RunConfig
from ospnext.train.rl.settings import RLConfig
from ospnext.train.settings import TrainConfig

DATA = Path(__file__).parent / "data"
CONFIGS = Path(__file__).parents[1] / "configs"
CLASSES: dict[str, type[Config]] = {"generate": GenerateConfig, "train": TrainConfig, "rl": RLConfig}
SEEDS = {
    "generate": ["generate", "generate_paths", "generate_merged"],
    "train": ["train", "train_dataset"],
    "rl": ["rl"],
    "filter": ["filter"],
}

# What OSP-Next's code reads or has read, by section ("" is the top level).
COMMON = {
    "": "model_name task pipeline_name seed output_dir weight_dtype fsdp_size ddp_size sp_size skiparse_sp_size "
    "use_sequence_parallel use_skiparse_sequence_parallel reshard_after_forward explicit_prefetching_num_blocks "
    "model_cpu_offload encoder_cpu_offload save_with_dcp_api cp_size skiparse_cp_size use_context_parallel "
    "use_skiparse_context_parallel",
    "wandb_config": "project_name exp_name",
    "model_config": "model_type patch_size text_len in_dim out_dim dim ffn_dim freq_dim text_dim num_heads num_layers "
    "window_size qk_norm cross_attn_norm eps skiparse_model_type sparse_ratio num_full_blocks quant quant_attn "
    "scale_max_forward scale_max_backward pretrained_model_dir_or_checkpoint skiparse_1d skiparse_2d "
    "num_register_tokens lock_main_parameters training_with_full",
    "scheduler_config": "scheduler_name num_inference_steps guidance_scale shift use_dynamic_shifting base_image_seq "
    "max_image_seq base_shift max_shift use_logitnorm_time_sampling logit_mean logit_std",
    "vae_config": "vae_path dtype",
    "text_encoder_config": "text_len checkpoint_path text_tokenizer_path use_fsdp dtype",
}
TRAINING = {
    "": "gradient_checkpointing gradient_accumulation_steps init_max_grad_norm log_interval save_interval ema_decay "
    "ema_update_interval deterministic_training profiling",
    "data_config": "batch_size num_workers pin_memory drop_last shuffle dataset_name sampler_name collator_name "
    "collator_config",
    "data_config.dataset_config": "metafile_or_dir_path text_tokenizer_path sample_height sample_width "
    "sample_num_frames train_fps sample_stride text_drop_ratio text_max_length tokenizer_max_length "
    "return_prompt_mask timeout",
    "optimizer_config": "lr weight_decay betas eps",
}
KEYS: dict[str, list[dict[str, str]]] = {
    "generate": [COMMON, {"": "prompt_txt batch_size num_frames height width save_fps"}],
    "train": [COMMON, TRAINING, {"": "training_iteration"}],
    "rl": [
        COMMON,
        TRAINING,
        {
            "": "num_epochs resume_epoch",
            "optimizer_config": "resume_override_lr resume_lr",
            "lora_config": "rank alpha target_modules lora_path",
            "rl_config": "prompt_file eval_prompt_file height width num_frames num_inference_steps sde_steps "
            "guidance_scale sample_batch_size train_batch_size num_batches_per_epoch num_inner_epochs "
            "num_image_per_prompt sample_time_per_prompt timestep_fraction clip_range adv_clip_max kl_reward kl_beta "
            "use_cfg_in_train per_prompt_stat_tracking global_std eval_freq eval_num_steps reward_fn",
        },
    ],
    "filter": [
        {
            "": "ann_txt_path save_path save_absolute_path sample_height sample_width sample_num_frames train_fps "
            "sample_stride min_hxw too_long_factor max_h_div_w_ratio min_h_div_w_ratio max_motion_value "
            "min_motion_value"
        }
    ],
}


def keys_of(command: str) -> list[str]:
    return [
        f"{section}.{name}".lstrip(".")
        for group in KEYS[command]
        for section, names in group.items()
        for name in names.split()
    ]


def leaves(data: dict[str, Any], rules: dict, prefix: str = "") -> list[str]:
    found = []
    for name, value in data.items():
        nested = isinstance(value, dict) and prefix + name not in rules
        found += leaves(value, rules, f"{prefix}{name}.") if nested else [prefix + name]
    return found


@pytest.mark.parametrize("command", KEYS)
def test_every_key_has_a_fate(command):
    assert [key for key in keys_of(command) if key not in key_rules(command)] == []


@pytest.mark.parametrize("command", CLASSES)
def test_the_table_and_the_class_agree(command):
    fields = {key for key, _ in config_keys(CLASSES[command])}
    for key, rule in key_rules(command).items():
        target = rule.target.split(" ")[0]
        assert (key in fields) == (rule.fate is Fate.MAPPED and not target), key
        assert not target or target in fields, f"{key} leads to {target}"
        assert (rule.fate is Fate.NO_EFFECT) == bool(rule.why), key


@pytest.mark.parametrize(("command", "name"), [(c, name) for c in SEEDS for name in SEEDS[c]])
def test_every_key_of_the_seed_configs_is_accepted(command, name):
    rules = key_rules(command)
    for key in leaves(read_yaml(DATA / f"seed_{name}.yaml"), rules):
        assert rules[key].fate is not Fate.RENAMED, key


@pytest.mark.parametrize(("command", "name"), [(c, name) for c in CLASSES for name in SEEDS[c]])
def test_the_seed_configs_load_and_say_what_has_no_effect(command, name):
    rules, path = key_rules(command), DATA / f"seed_{name}.yaml"
    config = load_config(CLASSES[command], path, rules=rules)
    idle = [key for key in leaves(read_yaml(path), rules) if rules[key].fate is Fate.NO_EFFECT]
    assert [line.split(" ")[0] for line in config.notices] == idle


def test_the_seed_generate_config_means_what_it_says():
    config = load_config(GenerateConfig, DATA / "seed_generate.yaml", rules=key_rules("generate"))
    assert config.sampling() == (81, 720, 1280, 50, 5.0, 7.0, "euler")
    assert config.seed == 1024
    assert config.architecture() == {
        "dim": 5120,
        "ffn_dim": 13824,
        "num_heads": 40,
        "num_layers": 40,
        "skiparse_model_type": "dual_end",
        "sparse_ratio": 2,
        "num_full_blocks": 8,
        "text_len": 512,
    }
    *_, sizes, prefetching = config.alone().notices
    assert sizes == "one process: fsdp_size 8, sp_size 4, skiparse_sp_size 4 become 1"
    assert prefetching.startswith("explicit_prefetching_num_blocks has no effect here")
    assert (config.sequence, config.shards(8)) == ((4, 1), 8)


def test_the_seed_train_config_means_what_it_says():
    config = load_config(TrainConfig, DATA / "seed_train.yaml", rules=key_rules("train"))
    assert config.optimizer_config.lr == 2e-5
    assert config.scheduler_config.use_logitnorm_time_sampling
    assert config.text_encoder_config.text_tokenizer_path == "/path/to/text_tokenizer"
    assert config.data_config.dataset_config.sample_num_frames == 81


def test_a_number_with_an_exponent_is_a_number():
    assert read_yaml(DATA / "seed_rl.yaml")["rl_config"]["clip_range"] == 1e-4


def test_defaults_are_the_seeds():
    train, run = TrainConfig(), RunConfig()
    assert (run.seed, run.fsdp_size, run.output_dir, run.vae_config.dtype) == (42, 8, "./output", "fp32")
    assert (train.training_iteration, train.save_interval, train.ema_decay) == (1_000_000, 1000, 0.9999)
    optimiser = train.optimizer_config
    assert (optimiser.lr, optimiser.weight_decay, optimiser.betas, optimiser.eps) == (1e-4, 1e-2, (0.9, 0.999), 1e-15)


@pytest.mark.parametrize(
    ("command", "override", "use"),
    [
        ("generate", "use_context_parallel=true", "use_sequence_parallel"),
        ("train", "skiparse_cp_size=4", "skiparse_sp_size"),
        ("generate", "model_config.skiparse_1d=true", "model_config.skiparse_pattern"),
        ("generate", "sample_steps=20", "scheduler_config.num_inference_steps"),
        ("generate", "sample_guide_scale=5", "scheduler_config.guidance_scale"),
        ("generate", "frame_num=81", "num_frames"),
        ("generate", "ckpt_dir=weights", "model"),
        ("generate", "num_inference_steps=20", "'scheduler_config.num_inference_steps'"),
        ("train", "learning_rate=1e-4", "optimizer_config.lr"),
    ],
)
def test_names_used_elsewhere_lead_to_the_right_key(command, override, use):
    with pytest.raises(ConfigError) as caught:
        load_config(CLASSES[command], None, [override], key_rules(command))
    assert use in str(caught.value)


@pytest.mark.parametrize(
    ("command", "path"),
    [pytest.param(c, path, id=f"{c}-{path.stem}") for c in CLASSES for path in sorted((CONFIGS / c).glob("*.yaml"))],
)
def test_shipped_configs_are_valid(command, path):
    config = load_config(CLASSES[command], path, rules=key_rules(command))
    assert config.notices == ()


def test_shipped_prompt_files_are_found_from_the_repository(monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    for path in (CONFIGS / "generate").glob("*.yaml"):
        assert len(read_prompts(load_config(GenerateConfig, path))) >= 8
