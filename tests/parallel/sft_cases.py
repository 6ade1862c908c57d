"""What the tests of training run in every process: the command itself on tiny random networks."""

import json
from pathlib import Path
from typing import Any

import processes
import torch
from transformers import ByT5Tokenizer

from ospnext.checkpoints.save import save_transformer
from ospnext.config import load_config
from ospnext.config_keys import key_rules
from ospnext.models.text import small_text_encoder
from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.parallel.launch import Launch
from ospnext.parallel.state import newest, read, read_record
from ospnext.train.settings import TrainConfig
from ospnext.train.sft import run
from ospnext.train.video_vae import VAEArchitecture

# 2 x 2 x 3 tokens: no size divides by anything. A large eps keeps AdamW from blowing rounding up.
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "weight_dtype": "fp32",
    "model_config.dim": 32,
    "model_config.ffn_dim": 48,
    "model_config.freq_dim": 16,
    "model_config.text_dim": 32,
    "model_config.text_len": 12,
    "model_config.in_dim": 4,
    "model_config.out_dim": 4,
    "model_config.num_heads": 4,
    "model_config.num_layers": 8,
    "model_config.skiparse_model_type": "dual_end",
    "model_config.num_full_blocks": 4,
    "data_config.num_workers": 0,
    "data_config.batch_size": 4,
    "data_config.dataset_config.sample_num_frames": 5,
    "data_config.dataset_config.sample_height": 32,
    "data_config.dataset_config.sample_width": 48,
    "optimizer_config.lr": 0.01,
    "optimizer_config.eps": 1e-3,
    "training_iteration": 4,
    "save_interval": 2,
    "ema_decay": 0.9,
    "trackers": "[]",
}


def save_encoders(folder: Path) -> dict[str, str]:
    """A tiny VAE and text encoder on disk; the keys that name them."""
    torch.manual_seed(0)
    VAEArchitecture(base_dim=8, dim_mult=(1, 1, 1), z_dim=4).build().save_pretrained(folder / "vae")
    small_text_encoder(32, len(ByT5Tokenizer())).save_pretrained(folder / "text_encoder")
    return {
        "vae_config.vae_path": str(folder / "vae"),
        "text_encoder_config.checkpoint_path": str(folder / "text_encoder"),
    }


def save_dense(folder: Path) -> Path:
    """A random transformer of these sizes whose blocks are all dense."""
    torch.manual_seed(1)
    sizes = {k.partition(".")[2]: v for k, v in SETTINGS.items() if k.startswith("model_config.")}
    model = OSPNextTransformer3DModel(**sizes | {"skiparse_model_type": "full", "num_full_blocks": 0})
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    model.save_pretrained(folder)
    return folder


def save_base(folder: Path) -> dict[str, str]:
    """A random transformer of the tests' sizes on disk; the keys that train an adapter of it."""
    given = config_of({}).architecture()
    torch.manual_seed(0)
    model = OSPNextTransformer3DModel(**given)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    save_transformer(model, folder)
    return {"model_config.pretrained_model_dir_or_checkpoint": str(folder), "lora_config.rank": "3"}


def save_foreign(state: Path, folder: Path, by_name: bool) -> Path:
    """A state of ours as OSP-Next would have written it."""
    folder.mkdir(parents=True)
    live = read(state, "live.transformer.")
    names = [name for name, _ in model_of(live).named_parameters()]
    torch.save({name: live[name] for name in names}, folder / "model_state_dict.pt")
    torch.save(read(state, "average.transformer."), folder / "ema_model_state_dict.pt")
    steps = read(state, "optimiser.steps")[""][0]
    first, second = (read(state, f"{kind}.transformer.") for kind in ("exp_avg", "exp_avg_sq"))
    moments = {n: {"step": steps, "exp_avg": first[n], "exp_avg_sq": second[n]} for n in names}
    numbered = moments if by_name else dict(enumerate(moments.values()))
    groups = [{"lr": 1e-5, "betas": (0.9, 0.999), "params": list(numbered)}]
    torch.save({"state": numbered, "param_groups": groups}, folder / "optim_state_dict.pt")
    clipper = read_record(state)["clipper"]
    kept = {"moving_avg_max_grad_norm": clipper["mean"], "moving_avg_max_grad_norm_var": clipper["variance"]}
    torch.save(kept | {"clip_grad_ema_decay": 0.99}, folder / "adaptive_grad_clip_states.pt")
    return folder


def model_of(live: dict[str, torch.Tensor]) -> OSPNextTransformer3DModel:
    """A model of the tests' sizes with these weights."""
    sizes = {k.partition(".")[2]: v for k, v in SETTINGS.items() if k.startswith("model_config.")}
    model = OSPNextTransformer3DModel(**sizes)
    model.load_state_dict(live)
    return model


def config_of(values: dict[str, Any]) -> TrainConfig:
    """The configuration of the tests, changed."""
    words = [f"{key}={value}" for key, value in (SETTINGS | values).items()]
    return load_config(TrainConfig, None, words, key_rules("train"))


@processes.groups_forgotten()
def train(rank: int, world: int, values: dict[str, Any]) -> str:
    """The command's run; how it refuses, if it does."""
    torch.set_num_threads(1)
    config = config_of(values)
    try:
        run(config if world > 1 else config.alone(), Launch(rank, world, rank))
    except ValueError as error:
        return str(error)
    return ""


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Tensors of a run's newest state, and its log without what is measured."""
    state = newest(folder)
    assert state is not None
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k.startswith(("loss", "grad")) or k == "step"} for line in lines]
    return read(state, ""), kept
