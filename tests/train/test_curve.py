"""Twenty steps whose losses are committed: a change that moves them means to, and says why.

Written anew with ``python tests/train/test_curve.py`` from the repository's root.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from ospnext.cli import main
from ospnext.train.video_vae import VAEArchitecture

CURVE = Path(__file__).parent / "curve.json"
WORDS = [
    "device=cpu",
    "weight_dtype=fp32",
    "seed=3",
    "training_iteration=20",
    "save_interval=20",
    "gradient_accumulation_steps=2",
    "train_text_encoder=true",
    "trackers=[]",
    "ema_decay=0.9",
    "warmup_steps=5",
    "lr_schedule=cosine",
    "model_config.dim=32",
    "model_config.ffn_dim=64",
    "model_config.freq_dim=16",
    "model_config.text_dim=32",
    "model_config.text_len=128",
    "model_config.in_dim=4",
    "model_config.out_dim=4",
    "model_config.num_heads=2",
    "model_config.num_layers=8",
    "model_config.skiparse_model_type=dual_end",
    "model_config.num_full_blocks=4",
    "data_config.dataset_name=shapes",
    "data_config.batch_size=2",
    "data_config.dataset_config.num_clips=6",
    "data_config.dataset_config.sample_num_frames=5",
    "data_config.dataset_config.sample_height=48",
    "data_config.dataset_config.sample_width=80",
    "scheduler_config.use_logitnorm_time_sampling=true",
    "scheduler_config.use_dynamic_shifting=true",
    "optimizer_config.lr=0.003",
    "optimizer_config.eps=1e-5",
]


def curve(folder: Path) -> list[list[float]]:
    """Loss and gradient norm of every step."""
    torch.manual_seed(0)
    VAEArchitecture(base_dim=8, dim_mult=(1, 1, 1), z_dim=4).build().save_pretrained(folder / "vae")
    assert main(["train", *WORDS, f"vae_config.vae_path={folder / 'vae'}", f"output_dir={folder / 'run'}"]) == 0
    lines = [json.loads(line) for line in (folder / "run/train_log.jsonl").read_text().splitlines()]
    return [[line["loss"], line["grad_norm"]] for line in lines]


def test_twenty_steps_are_those_that_are_committed(tmp_path):
    expected = json.loads(CURVE.read_text())
    assert len(expected) == 20
    # Within what other processors and other versions of torch round differently.
    assert torch.tensor(curve(tmp_path)).numpy() == pytest.approx(torch.tensor(expected).numpy(), rel=5e-3)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        CURVE.write_text(json.dumps(curve(Path(folder)), indent=None).replace("], [", "],\n[") + "\n")
    sys.exit(0)
