"""A pipeline that is quick to ask."""

import pytest
import torch
from transformers import ByT5Tokenizer

from ospnext.generate.pipeline import OSPNextPipeline
from ospnext.generate.sampler import make_scheduler
from ospnext.models.text import small_text_encoder
from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.train.video_vae import VAEArchitecture


@pytest.fixture
def model(tmp_path):
    """A tiny pipeline's folder, with random weights."""
    torch.manual_seed(0)
    architecture = {"dim": 32, "ffn_dim": 64, "freq_dim": 16, "text_dim": 32, "text_len": 128, "num_heads": 2}
    transformer = OSPNextTransformer3DModel(**architecture, num_layers=2)
    torch.nn.init.normal_(transformer.head.head.weight, std=0.1)  # else all is zero velocity
    pipe = OSPNextPipeline(
        transformer,
        VAEArchitecture(base_dim=8, dim_mult=(1, 1, 1)).build(),
        small_text_encoder(32, len(ByT5Tokenizer())),
        ByT5Tokenizer(),
        make_scheduler("euler", 3.0),
        negative_prompt="",
        defaults={"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 3.0},
    )
    pipe.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"
