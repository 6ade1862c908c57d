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


def test_chunks_and_whole_decode_alike_and_clips_do_not_mix(vae: AutoencoderKLWan) -> None:
    latents = torch.randn(2, 16, 3, 4, 6)
    whole = video_vae.decode(vae, latents, modes=["whole"])
    chunked = video_vae.decode(vae, latents, modes=["chunked"])
    assert (whole.mode, chunked.mode) == ("whole", "chunked")
    torch.testing.assert_close(whole.video, chunked.video, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(video_vae.decode_latents(vae, latents[1:]), whole.video[1:], atol=1e-5, rtol=1e-5)
    assert whole.video.shape == (2, 3, 9, 32, 48)
    assert whole.video.abs().max() <= 1


def test_tiles_cover_the_frame_and_leave_no_trace(vae: AutoencoderKLWan) -> None:
    decoded = video_vae.decode(vae, torch.randn(1, 16, 1, 34, 36), modes=["tiled"])
    assert decoded.mode == "tiled"
    assert decoded.video.shape == (1, 3, 1, 272, 288)
    assert not vae.use_tiling


def test_mode_follows_the_estimate(vae: AutoencoderKLWan, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.randn(1, 16, 5, 4, 4)
    need = {mode: video_vae.decode_bytes(vae, latents, mode) for mode in video_vae.DECODE_MODES}
    assert need["tiled"] <= need["chunked"] < need["whole"]
    for free, expected in ((need["whole"], "whole"), (need["chunked"], "chunked"), (0, "tiled")):
        monkeypatch.setattr(video_vae, "free_memory", lambda device, free=free: free)
        assert video_vae.decode(vae, latents).mode == expected


def test_running_out_of_memory_takes_the_next_way(vae: AutoencoderKLWan, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setitem(video_vae._DECODERS, "whole", out_of_memory)
    assert video_vae.decode(vae, torch.randn(2, 16, 1, 4, 4)).mode == "chunked"
    with pytest.raises(torch.OutOfMemoryError):
        video_vae.decode(vae, torch.randn(1, 16, 1, 4, 4), modes=["whole"])


def test_encoding_gives_normalised_means(vae: AutoencoderKLWan) -> None:
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    latents = video_vae.encode_video(vae, video)
    mu = video_vae.encode_whole(vae, video).chunk(2, dim=1)[0]
    torch.testing.assert_close(latents, video_vae.normalise(vae, mu), atol=1e-5, rtol=1e-5)
