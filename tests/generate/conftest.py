"""A pipeline of the real classes at toy sizes, with random weights that matter: nothing in it is zero."""

from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderKLWan
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from ospnext.generate.pipeline import OSPNextPipeline
from ospnext.generate.sampler import make_scheduler
from ospnext.models.transformer import OSPNextTransformer3DModel

DEFAULTS = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 3, "guidance_scale": 3.0}


@pytest.fixture
def build_pipeline() -> Callable[..., OSPNextPipeline]:
    """A function that makes one; keyword arguments go to the pipeline's constructor."""

    def build(**settings: object) -> OSPNextPipeline:
        torch.manual_seed(0)
        transformer = OSPNextTransformer3DModel(
            text_len=24,
            dim=32,
            ffn_dim=64,
            freq_dim=16,
            text_dim=16,
            num_heads=2,
            num_layers=4,
            skiparse_model_type="dual_end",
            num_full_blocks=0,
        )
        torch.nn.init.normal_(transformer.head.head.weight, std=0.1)  # untrained, it would always say zero velocity
        vae = AutoencoderKLWan(
            base_dim=8,
            dim_mult=[1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            patch_size=2,
            in_channels=12,
            out_channels=12,
        )
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        text_encoder = UMT5EncoderModel(UMT5Config(vocab_size=384, **sizes))
        components = {"scheduler": make_scheduler("euler", 3.0), "defaults": DEFAULTS, "negative_prompt": "ugly"}
        pipe = OSPNextPipeline(
            transformer.eval(), vae.eval(), text_encoder.eval(), ByT5Tokenizer(), **(components | settings)
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build


@pytest.fixture
def pipe(build_pipeline: Callable[..., OSPNextPipeline]) -> OSPNextPipeline:
    """The plain one: Euler, shift 3."""
    return build_pipeline()
