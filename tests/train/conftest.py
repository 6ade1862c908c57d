"""Tiny networks of the true classes, for training that takes a second."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

from ospnext.train.video_vae import VAEArchitecture


@pytest.fixture
def tiny_vae() -> AutoencoderKLWan:
    """A random video VAE: 8 x 8 pixels and 4 frames a latent, 4 channels, 50 thousand parameters."""
    torch.manual_seed(0)
    vae = VAEArchitecture(base_dim=8, dim_mult=(1, 1, 1), z_dim=4).build()
    vae.register_to_config(latents_mean=[0.1, -0.2, 0.0, 0.3], latents_std=[0.5, 1.5, 1.0, 2.0])
    return vae


@pytest.fixture
def vae_folder(tiny_vae, tmp_path) -> Path:
    """The same on disk."""
    tiny_vae.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"
