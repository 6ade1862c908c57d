"""The video VAE: a thin face of diffusers' ``AutoencoderKLWan`` that keeps its modules, weights and names.

The stock model walks over a clip in chunks of one latent frame, with a cache of past frames for every causal
convolution. The same result comes from one pass over the whole clip (`encode_whole`, `decode_whole`): faster, free of
state, differentiable and compilable, at the price of memory that grows with the clip. Training uses the whole-clip
pass; `decode` takes the fastest way that the free memory allows.

Latents are normalised channel by channel, (μ - mean) / std, with the constants in the VAE's config.
"""

import logging
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify
from torch import Tensor

from ospnext.device import free_memory

logger = logging.getLogger(__name__)

DecodeMode = Literal["whole", "chunked", "tiled"]
DECODE_MODES: tuple[DecodeMode, ...] = ("whole", "chunked", "tiled")  # fastest first, least memory last


# ── one pass over the whole clip ──────────────────────────────────────────────────────────────────────────────────────


def encode_whole(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Posterior moments of a whole clip in one differentiable pass; equals the stock walk over chunks.

    Args:
        vae: an AutoencoderKLWan of the Wan2.1 kind (``is_residual=False``).
        video: [B, 3, T, H, W] in [-1, 1], T = 1 + k · (temporal factor).

    Returns:
        [B, 2 · z_dim, 1 + k, H / f, W / f]: mean and log-variance along the channels, not normalised. Give it to
        diffusers' ``DiagonalGaussianDistribution`` to sample.

    Raises:
        ValueError: the VAE is of the residual kind, or the clip's length does not fit.
    """
    _require_plain(vae)
    check_frames(vae, video.shape[2])
    encoder = vae.encoder
    x = encoder.conv_in(patchify(video, vae.config.patch_size or 1))
    for layer in encoder.down_blocks:
        x = _resample_whole(layer, x) if isinstance(layer, WanResample) else layer(x)
    x = encoder.nonlinearity(encoder.norm_out(encoder.mid_block(x)))
    return vae.quant_conv(encoder.conv_out(x))


def decode_whole(vae: AutoencoderKLWan, z: Tensor) -> Tensor:
    """A whole clip from latents in one differentiable pass; equals the stock walk before its clamp to [-1, 1].

    Args:
        vae: an AutoencoderKLWan of the Wan2.1 kind (``is_residual=False``).
        z: [B, z_dim, 1 + k, h, w], not normalised.

    Returns:
        [B, 3, T, H, W], not clamped, so that gradients survive outside the range.

    Raises:
        ValueError: the VAE is of the residual kind.
    """
    _require_plain(vae)
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(z)))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = resnet(x)
        for upsampler in block.upsamplers or ():
            x = _resample_whole(upsampler, x)
    x = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))
    return unpatchify(x, vae.config.patch_size or 1)


def _resample_whole(layer: WanResample, x: Tensor) -> Tensor:
    """``WanResample`` over all frames at once; without a cache the stock layer does its spatial part only.

    The first frame never meets the temporal convolution, since a clip's first latent frame stands for one frame. Going
    down, the others are strided windows that begin on the first frame; going up, each of the others becomes two.
    """
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        pairs = layer.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))  # [B, 2, C, T-1, H, W]
        x = torch.cat([x[:, :, :1], pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], dim=2)
    x = layer(x)
    if layer.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)
    return x


def _require_plain(vae: AutoencoderKLWan) -> None:
    if vae.config.is_residual:
        raise ValueError("this VAE is of the residual kind (Wan2.2's 5B): only Wan2.1's layout is supported")


def check_frames(vae: AutoencoderKLWan, frames: int) -> None:
    """Raise ValueError unless a clip of ``frames`` is one frame plus whole groups of the VAE's temporal factor."""
    factor = vae.config.scale_factor_temporal
    if frames < 1 or (frames - 1) % factor:
        raise ValueError(f"a clip of {frames} frames does not fit the VAE: it needs {factor}k + 1 of them")


# ── normalised latents ────────────────────────────────────────────────────────────────────────────────────────────────


def _statistics(vae: AutoencoderKLWan, like: Tensor) -> tuple[Tensor, Tensor]:
    """The config's latent mean and standard deviation, shaped [C, 1, 1, 1] for ``like``."""
    shape = (-1, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, dtype=like.dtype, device=like.device).view(shape)
    return mean, torch.tensor(vae.config.latents_std, dtype=like.dtype, device=like.device).view(shape)


def normalise(vae: AutoencoderKLWan, mu: Tensor) -> Tensor:
    """(μ - mean) / std per channel; ``mu`` is [B, z_dim, t, h, w]."""
    mean, std = _statistics(vae, mu)
    return (mu - mean) / std


def denormalise(vae: AutoencoderKLWan, z: Tensor) -> Tensor:
    """z · std + mean per channel, the inverse of `normalise`."""
    mean, std = _statistics(vae, z)
    return z * std + mean


@torch.no_grad()
def encode_video(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Normalised posterior means [B, z_dim, t, h, w] in float32 for ``video`` [B, 3, T, H, W] in [-1, 1]."""
    check_frames(vae, video.shape[2])
    mu = vae.encode(video.to(vae.device, vae.dtype)).latent_dist.mode()
    return normalise(vae, mu.float())


# ── decoding in the memory there is ───────────────────────────────────────────────────────────────────────────────────


class Decoded(NamedTuple):
    """A ``video`` [B, 3, T, H, W] float32 in [-1, 1], and the ``mode`` that made it."""

    video: Tensor
    mode: DecodeMode


def decode_latents(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Video [B, 3, T, H, W] float32 in [-1, 1] on the CPU, from normalised latents [B, z_dim, t, h, w]."""
    return decode(vae, latents).video


@torch.no_grad()
def decode(vae: AutoencoderKLWan, latents: Tensor, modes: Sequence[DecodeMode] = DECODE_MODES) -> Decoded:
    """Decode normalised latents, one clip at a time, in the first of ``modes`` whose estimate fits the free memory.

    The last mode is tried whatever its estimate says; a mode that runs out of memory all the same gives way to the
    next. Whole and chunked give the same video; tiles are decoded for themselves and blended where they overlap, so
    their result differs a little.

    Args:
        vae: on the device and in the dtype to decode with.
        latents: [B, z_dim, t, h, w], normalised.
        modes: allowed ways, best first.

    Returns:
        The video, on the CPU, and the last mode used.

    Raises:
        torch.OutOfMemoryError: not even the last mode fits.
    """
    z = denormalise(vae, latents.float()).to(vae.dtype)
    allowed = list(modes)
    clips = []
    for clip in z.split(1):
        free = free_memory(vae.device)
        while len(allowed) > 1 and decode_bytes(vae, clip, allowed[0]) > free:
            allowed.pop(0)
        while True:
            try:
                clips.append(_DECODERS[allowed[0]](vae, clip.to(vae.device)))
                break
            except torch.OutOfMemoryError:
                if len(allowed) == 1:
                    raise
                logger.warning("decoding the %s clip ran out of memory: trying %s", *allowed[:2])
                allowed.pop(0)
    return Decoded(torch.cat(clips), allowed[0])


def decode_bytes(vae: AutoencoderKLWan, z: Tensor, mode: DecodeMode) -> int:
    """Estimated peak bytes that decoding one clip takes on top of the weights; ``z`` is [B, z_dim, t, h, w]."""
    latent_frames, height, width = z.shape[2:]
    config = vae.config
    frames = 1 + config.scale_factor_temporal * (latent_frames - 1)
    pixels = height * width * config.scale_factor_spatial**2
    at_once = frames if mode == "whole" else 2 * config.scale_factor_temporal  # a chunk, and the cache beside it
    tile = min(pixels, vae.tile_sample_min_height * vae.tile_sample_min_width) if mode == "tiled" else pixels
    channels = (config.decoder_base_dim or config.base_dim) * max(config.dim_mult[:2])
    maps = at_once * tile // (config.patch_size or 1) ** 2 * channels * _LIVE_MAPS * vae.dtype.itemsize
    return maps + 3 * frames * pixels * 3 * 4  # and three copies of the finished video, float32


# Feature maps of the widest stage at full size that live at the same time: 2.5 in float32 and 3.6 in bfloat16 were
# counted; the rest is room for the convolutions' workspace.
_LIVE_MAPS = 4


def _decode_chunked(vae: AutoencoderKLWan, z: Tensor) -> Tensor:
    """The stock walk, one latent frame at a time, with finished frames put away on the CPU."""
    _require_plain(vae)
    x = vae.post_quant_conv(z)
    cache: list[Tensor | None] = [None] * vae._cached_conv_counts["decoder"]
    frames = []
    for i, frame in enumerate(x.split(1, dim=2)):
        frames.append(vae.decoder(frame, feat_cache=cache, feat_idx=[0], first_chunk=i == 0).float().cpu())
    return unpatchify(torch.cat(frames, dim=2), vae.config.patch_size or 1).clamp(-1, 1)


def _decode_tiled(vae: AutoencoderKLWan, z: Tensor) -> Tensor:
    """diffusers' overlapping tiles, blended."""
    vae.enable_tiling()
    try:
        return vae.decode(z, return_dict=False)[0].float().cpu()
    finally:
        vae.disable_tiling()


def _decode_at_once(vae: AutoencoderKLWan, z: Tensor) -> Tensor:
    return decode_whole(vae, z).float().clamp(-1, 1).cpu()


_DECODERS = {"whole": _decode_at_once, "chunked": _decode_chunked, "tiled": _decode_tiled}
