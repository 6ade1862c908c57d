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
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify
from torch import Tensor

from ospnext.device import free_memory
from ospnext.models.vae_pieces import (
    MARGIN,
    Alone,
    Piece,
    Team,
    area,
    blend,
    decode_piece,
    new_cache,
    resample_whole,
    split,
    tiles,
)

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
        x = resample_whole(layer, x) if isinstance(layer, WanResample) else layer(x)
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
    return decode_piece(vae, z)


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
    """A ``video`` [B, 3, T, H, W] float32 in [-1, 1], and the ``mode`` that made it.

    Where several decode together, the first of them has the video, the others None.
    """

    video: Tensor | None
    mode: DecodeMode


def decode_latents(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Video [B, 3, T, H, W] float32 in [-1, 1] on the CPU, from normalised latents [B, z_dim, t, h, w]."""
    video = decode(vae, latents).video
    assert video is not None
    return video


@torch.no_grad()
def decode(
    vae: AutoencoderKLWan,
    latents: Tensor,
    modes: Sequence[DecodeMode] = DECODE_MODES,
    team: Team | None = None,
) -> Decoded:
    """Decode normalised latents, one clip at a time, in the first of ``modes`` whose estimate fits the free memory.

    The last mode is tried whatever its estimate says; a mode that runs out of memory all the same gives way to the
    next. Whole and chunked give the same video; tiles are decoded for themselves and blended where they overlap, so
    their result differs a little.

    Args:
        vae: on the device and in the dtype to decode with.
        latents: [B, z_dim, t, h, w], normalised.
        modes: allowed ways, best first.
        team: who decodes along; all of them call this with the same latents. Each takes a piece of every frame, or
            every so many tiles; the result is that of one.

    Returns:
        The video, on the CPU, and the last mode used.

    Raises:
        torch.OutOfMemoryError: not even the last mode fits.
    """
    _require_plain(vae)
    team = team or Alone()
    z = denormalise(vae, latents.float()).to(vae.dtype)
    allowed = list(modes)
    clips: list[Tensor] = []
    for clip in z.split(1):
        free = free_memory(vae.device)
        while len(allowed) > 1 and not team.all(decode_bytes(vae, clip, allowed[0], team.count) <= free):
            allowed.pop(0)
        while True:
            own: list[Tensor] | None = None
            try:
                own = _DECODERS[allowed[0]](vae, clip.to(vae.device), team)
            except torch.OutOfMemoryError:
                if len(allowed) == 1:
                    raise
                logger.warning("decoding the %s clip ran out of memory: trying %s", *allowed[:2])
            if team.all(own is not None):
                break
            allowed.pop(0)
        assert own is not None
        clips += _put_together(vae, clip, allowed[0], own, team)
    return Decoded(torch.cat(clips).clamp(-1, 1) if clips else None, allowed[0])


@torch.no_grad()
def decode_together(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Video [B, 3, T, H, W] in [-1, 1] of whole clips, many at once where memory has room, left on the device.

    Where there is no room for one, it is `decode` that makes them, on the CPU.

    Args:
        vae: on the device and in the dtype to decode with.
        latents: [B, z_dim, t, h, w], normalised.
    """
    need = decode_bytes(vae, latents, "whole")
    at_once = int(free_memory(vae.device) * 0.8) // need
    if at_once < 1:
        return decode_latents(vae, latents)
    at_once = min(at_once, max(1, _MOST_BYTES // need))
    z = denormalise(vae, latents.float()).to(vae.device, vae.dtype)
    return torch.cat([decode_whole(vae, some).float().clamp(-1, 1) for some in z.split(at_once)])


def decode_bytes(vae: AutoencoderKLWan, z: Tensor, mode: DecodeMode, team: int = 1) -> int:
    """Estimated peak bytes that decoding one clip takes on top of the weights; ``z`` is [B, z_dim, t, h, w].

    Args:
        vae, z, mode: what is decoded, and how.
        team: how many share the clip.
    """
    latent_frames, height, width = z.shape[2:]
    config = vae.config
    frames = 1 + config.scale_factor_temporal * (latent_frames - 1)
    pixels = height * width * config.scale_factor_spatial**2
    at_once = frames if mode == "whole" else 2 * config.scale_factor_temporal  # a chunk, and the cache beside it
    widest = max(area(piece.grown(MARGIN, height, width)) for piece in split(height, width, team))
    largest = widest * config.scale_factor_spatial**2
    tile = min(pixels, vae.tile_sample_min_height * vae.tile_sample_min_width) if mode == "tiled" else largest
    channels = (config.decoder_base_dim or config.base_dim) * max(config.dim_mult[:2])
    maps = at_once * tile // (config.patch_size or 1) ** 2 * channels * _LIVE_MAPS * vae.dtype.itemsize
    return maps + 3 * frames * pixels // team * 3 * 4  # and three copies of the finished video, float32


_MOST_BYTES = 8 * 2**30  # of clips decoded together: more is no faster, and kernels count elements in 32 bits
# Feature maps of the widest stage at full size that live at the same time: 2.5 in float32 and 3.6 in bfloat16 were
# counted; the rest is room for the convolutions' workspace.
_LIVE_MAPS = 4


def _pieces(z: Tensor, mode: DecodeMode, vae: AutoencoderKLWan, team: Team) -> list[Piece]:
    """What a clip is decoded in."""
    height, width = z.shape[-2:]
    if mode == "tiled":
        return [tile for row in tiles(vae, height, width) for tile in row]
    return split(height, width, team.count)


def _decode_whole(vae: AutoencoderKLWan, z: Tensor, team: Team) -> list[Tensor]:
    """All frames at once of this member's piece."""
    own = _pieces(z, "whole", vae, team)[team.place :: team.count]
    return [decode_piece(vae, z, piece).float() for piece in own]


def _decode_chunked(vae: AutoencoderKLWan, z: Tensor, team: Team) -> list[Tensor]:
    """One latent frame after the other of this member's piece."""
    own = _pieces(z, "chunked", vae, team)[team.place :: team.count]
    return [_walk(vae, z, piece, team) for piece in own]


def _decode_tiled(vae: AutoencoderKLWan, z: Tensor, team: Team) -> list[Tensor]:
    """One latent frame after the other of each of this member's tiles, the other tiles unknown."""
    own = _pieces(z, "tiled", vae, team)[team.place :: team.count]
    frame = Piece(0, z.shape[-2], 0, z.shape[-1])
    return [_walk(vae, tile.cut(z, frame), None, team) for tile in own]


def _walk(vae: AutoencoderKLWan, z: Tensor, piece: Piece | None, team: Team) -> Tensor:
    """The stock walk, one latent frame at a time; a lone process puts finished frames away on the CPU."""
    cache = new_cache(vae)
    frames = []
    for frame in z.split(1, dim=2):
        done = decode_piece(vae, frame, piece, cache).float()
        frames.append(done.cpu() if team.count == 1 else done)
    return torch.cat(frames, dim=2)


def _put_together(vae: AutoencoderKLWan, z: Tensor, mode: DecodeMode, own: list[Tensor], team: Team) -> list[Tensor]:
    """The clip on the CPU, from what the team's members have made; none for all but the first of them."""
    pieces, scale = _pieces(z, mode, vae, team), vae.config.scale_factor_spatial
    made = team.collect(own, len(pieces))
    if made is None:
        return []
    made = [piece.cpu() for piece in made]
    height, width = scale * z.shape[-2], scale * z.shape[-1]
    if mode == "tiled":
        across = len(tiles(vae, *z.shape[-2:])[0])
        return [blend(vae, [made[i : i + across] for i in range(0, len(made), across)], height, width)]
    if len(made) == 1:
        return made
    video = made[0].new_empty(*made[0].shape[:-2], height, width)
    for piece, pixels in zip(pieces, made, strict=True):
        piece.times(scale).cut(video, Piece(0, height, 0, width)).copy_(pixels)
    return [video]


_DECODERS = {"whole": _decode_whole, "chunked": _decode_chunked, "tiled": _decode_tiled}
