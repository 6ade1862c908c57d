"""A tiny pipeline whose videos an adapter can change, and runs of ``ospnext rl`` on it."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import ByT5Tokenizer

from ospnext.config import load_config
from ospnext.config_keys import key_rules
from ospnext.generate.pipeline import OSPNextPipeline
from ospnext.generate.sampler import make_scheduler
from ospnext.models.text import small_text_encoder
from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.train.rl.settings import RLConfig
from ospnext.train.video_vae import VAEArchitecture

ARCHITECTURE: dict[str, Any] = {
    "dim": 32,
    "ffn_dim": 48,
    "freq_dim": 16,
    "text_dim": 32,
    "text_len": 12,
    "num_heads": 4,
    "in_dim": 4,
    "out_dim": 4,
    "num_layers": 4,
    "skiparse_model_type": "dual_end",
    "num_full_blocks": 0,
}
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "weight_dtype": "fp32",
    "num_epochs": 3,
    "trackers": "[]",
    "ema_decay": 0.9,
    "lora_config.rank": 4,
    "lora_config.alpha": 8,
    "optimizer_config.lr": 0.01,
    # A large eps keeps AdamW from blowing rounding up.
    "optimizer_config.eps": 1e-3,
    "rl_config.height": 32,
    "rl_config.width": 48,
    "rl_config.num_frames": 5,
    "rl_config.num_inference_steps": 4,
    "rl_config.guidance_scale": 3.0,
    "rl_config.sample_batch_size": 4,
    "rl_config.train_batch_size": 4,
    "rl_config.num_batches_per_epoch": 2,
    "rl_config.num_image_per_prompt": 4,
    "rl_config.eval_num_steps": 3,
    "rl_config.eval_keep": 2,
    "rl_config.reward_fn": "{brightness: 1.0}",
}


def save_pipeline(folder: Path) -> Path:
    """A tiny random model on disk; its head is drawn too, which a new one's is not, so that blocks matter."""
    torch.manual_seed(0)
    transformer = OSPNextTransformer3DModel(**ARCHITECTURE)
    torch.nn.init.normal_(transformer.head.head.weight, std=0.1)
    pipe = OSPNextPipeline(
        transformer,
        VAEArchitecture(base_dim=8, dim_mult=(1, 1, 1), z_dim=4).build(),
        small_text_encoder(32, len(ByT5Tokenizer())),
        ByT5Tokenizer(),
        make_scheduler("euler", 3.0),
        negative_prompt="",
        defaults={"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 3, "guidance_scale": 3.0},
    )
    pipe.save_pretrained(folder / "pipeline")
    (folder / "prompts.txt").write_text("".join(f"prompt number {i}\n" for i in range(5)))
    (folder / "held_out.txt").write_text("".join(f"another one, {i}\n" for i in range(3)))
    return folder


def words_of(folder: Path, out: Path, **settings: Any) -> list[str]:
    """A command line; settings are by dotted key, with __ for the dot."""
    given = SETTINGS | {
        "model": folder / "pipeline",
        "rl_config.prompt_file": folder / "prompts.txt",
        "rl_config.eval_prompt_file": folder / "held_out.txt",
        "output_dir": out,
    }
    given |= {key.replace("__", "."): value for key, value in settings.items()}
    return [f"{key}={value}" for key, value in given.items() if value is not None]


def config_of(folder: Path, out: Path, **settings: Any) -> RLConfig:
    """The same as a configuration."""
    return load_config(RLConfig, None, words_of(folder, out, **settings), key_rules("rl"))


def lines_of(path: Path) -> list[dict[str, Any]]:
    """A log without what is measured."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    measured = ("seconds", "memory_gib")
    return [{k: v for k, v in line.items() if not k.endswith(measured) and k != "seconds_per_step"} for line in lines]
