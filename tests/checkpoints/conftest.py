"""Tiny random models of the real classes."""

import pytest
import torch
from diffusers import AutoencoderKLWan
from transformers import UMT5Config, UMT5EncoderModel

from ospnext.models.transformer import OSPNextTransformer3DModel

SIZES = {"dim": 48, "ffn_dim": 80, "num_heads": 2, "num_layers": 4, "text_dim": 24, "freq_dim": 32}


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter distinct random values, so that no two can be taken for each other."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.eval()


@pytest.fixture(scope="session")
def transformer() -> OSPNextTransformer3DModel:
    """A sparse transformer with random weights; not to be changed."""
    return randomise(OSPNextTransformer3DModel(**SIZES, skiparse_model_type="dual_end"))


@pytest.fixture(scope="session")
def dense() -> OSPNextTransformer3DModel:
    """A dense transformer with random weights; not to be changed."""
    return randomise(OSPNextTransformer3DModel(**SIZES))


@pytest.fixture(scope="session")
def vae() -> AutoencoderKLWan:
    """A small autoencoder of Wan2.1's shape: two residual blocks a level, four levels."""
    return randomise(AutoencoderKLWan(base_dim=4))


@pytest.fixture(scope="session")
def text_encoder() -> UMT5EncoderModel:
    """A small UMT5 encoder."""
    return randomise(
        UMT5EncoderModel(UMT5Config(vocab_size=384, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=4))
    )
