"""The whole-clip passes against diffusers' walk over chunks."""

import pytest
import torch
from diffusers import AutoencoderKLWan

from ospnext.models import video_vae

SMALL = {
    "base_dim": 24,
    "dim_mult": [1, 2, 4],
    "num_res_blocks": 1,
    "z_dim": 16,
    "temperal_downsample": [True, True],
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
}
WAN21 = {"base_dim": 8}  # the stock 2.1 layout: [1, 2, 4, 4], two residual blocks, [False, True, True]


@pytest.fixture(scope="module", params=[SMALL, WAN21], ids=["small", "wan2.1"])
def vae(request: pytest.FixtureRequest) -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(**request.param).eval()


@pytest.mark.parametrize("frames", [1, 5, 13])
@torch.no_grad()
def test_whole_clip_equals_chunks(vae: AutoencoderKLWan, frames: int) -> None:
    video = torch.rand(2, 3, frames, 32, 48) * 2 - 1
    moments = video_vae.encode_whole(vae, video)
    stock = vae.encode(video).latent_dist
    torch.testing.assert_close(moments, stock.parameters, atol=1e-5, rtol=1e-5)
    z = torch.randn_like(stock.mode())
    torch.testing.assert_close(video_vae.decode_whole(vae, z).clamp(-1, 1), vae.decode(z).sample, atol=1e-5, rtol=1e-5)


def test_gradients_reach_every_weight(vae: AutoencoderKLWan) -> None:
    video = torch.rand(1, 3, 5, 16, 16)
    z = video_vae.encode_whole(vae, video).chunk(2, dim=1)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = video_vae.decode_whole(vae, z).float().square().mean()
    loss.backward()
    missing = [n for n, p in vae.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    vae.zero_grad()
    assert not missing


def test_whole_clip_compiles_without_a_break(vae: AutoencoderKLWan) -> None:
    def reconstruct(video: torch.Tensor) -> torch.Tensor:
        return video_vae.decode_whole(vae, video_vae.encode_whole(vae, video).chunk(2, dim=1)[0])

    video = torch.rand(1, 3, 5, 16, 16)
    compiled = torch.compile(reconstruct, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(video), reconstruct(video))


def test_normalisation_round_trips(vae: AutoencoderKLWan) -> None:
    z = torch.randn(2, 16, 3, 4, 4)
    torch.testing.assert_close(video_vae.denormalise(vae, video_vae.normalise(vae, z)), z)


def test_refuses_what_does_not_fit(vae: AutoencoderKLWan) -> None:
    with pytest.raises(ValueError, match="4k \\+ 1"):
        video_vae.encode_whole(vae, torch.zeros(1, 3, 4, 16, 16))
    residual = AutoencoderKLWan(base_dim=4, decoder_base_dim=4, is_residual=True, patch_size=2, in_channels=12)
    with pytest.raises(ValueError, match="residual"):
        video_vae.decode_whole(residual, torch.zeros(1, 16, 2, 4, 4))
