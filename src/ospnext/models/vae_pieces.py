"""The video decoder's way from latents to pixels, for whole frames or for a piece of them; and who decodes along.

Below the middle block every output pixel depends on few neighbours: what follows are convolutions over 3 x 3. So a
piece of a frame, cut out there with a margin that shrinks from level to level, becomes exactly the same pixels as in
the whole frame. Several processes can share a clip that way at little extra work: ``split`` says who takes what.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, unpatchify
from torch import Tensor

_KEPT = 2  # frames that a causal convolution remembers
MARGIN = 3  # latent pixels: about what a piece computes beyond its edge where most of the work is

Cache = list[Tensor | None]


class Team(Protocol):
    """Those who decode a clip together; the first of them gets the result."""

    count: int
    place: int

    def all(self, ok: bool) -> bool:
        """Whether all of them say ``ok``."""

    def collect(self, own: list[Tensor], count: int) -> list[Tensor] | None:
        """What all have made, in order, to the first of them: it has item 0, the next one item 1, and so on around."""


class Alone:
    """A team of one."""

    count = 1
    place = 0

    def all(self, ok: bool) -> bool:
        """The one's own word."""
        return ok

    def collect(self, own: list[Tensor], count: int) -> list[Tensor]:
        """There is nothing to wait for."""
        return own


class Piece(NamedTuple):
    """A rectangle of a frame: rows ``top`` to ``bottom`` and columns ``left`` to ``right``, ends not included."""

    top: int
    bottom: int
    left: int
    right: int

    def times(self, factor: int) -> "Piece":
        """The same where the frame is ``factor`` times as large."""
        return Piece(*(factor * edge for edge in self))

    def grown(self, margin: int, height: int, width: int) -> "Piece":
        """With a margin, as far as a frame of that size goes."""
        return Piece(
            max(0, self.top - margin),
            min(height, self.bottom + margin),
            max(0, self.left - margin),
            min(width, self.right + margin),
        )

    def cut(self, x: Tensor, out_of: "Piece") -> Tensor:
        """This rectangle of ``x [..., H, W]``, which is the rectangle ``out_of``."""
        top, left = out_of.top, out_of.left
        return x[..., self.top - top : self.bottom - top, self.left - left : self.right - left]


def area(piece: Piece) -> int:
    """Latent pixels of a piece."""
    return (piece.bottom - piece.top) * (piece.right - piece.left)


def split(height: int, width: int, count: int) -> list[Piece]:
    """A frame in ``count`` pieces, in rows and columns of near-equal size; fewer where it has not as many pixels."""
    for number in range(count, 0, -1):
        ways = [(n, number // n) for n in range(1, number + 1) if number % n == 0]
        ways = [(rows, columns) for rows, columns in ways if rows <= height and columns <= width]
        if ways:
            rows, columns = min(ways, key=lambda way: _largest(height, way[0]) * _largest(width, way[1]))
            across = list(_runs(width, columns))
            return [Piece(*run, *other) for run in _runs(height, rows) for other in across]
    raise AssertionError("one piece always fits")


def decode_piece(vae: AutoencoderKLWan, z: Tensor, piece: Piece | None = None, cache: Cache | None = None) -> Tensor:
    """Pixels of a piece of every frame, not clamped; equal to those of the whole frames.

    Args:
        vae: an AutoencoderKLWan of the Wan2.1 kind.
        z: ``[B, z_dim, t, h, w]``, whole frames, not normalised.
        piece: in latent pixels; None for all.
        cache: what the causal convolutions remember of the frames before ``z``, changed in place; None where ``z`` is
            a whole clip. A new one is ``new_cache``.
    """
    decoder, at = vae.decoder, [0]
    remembered: dict[str, Any] = {} if cache is None else {"feat_cache": cache, "feat_idx": at}
    x = decoder.mid_block(_causal(decoder.conv_in, vae.post_quant_conv(z), cache, at), **remembered)
    factor = 1
    height, width = x.shape[-2:]
    there = Piece(0, height, 0, width)
    for block, margin in zip(decoder.up_blocks, margins(decoder), strict=True):
        if piece is not None:
            needed = piece.times(factor).grown(margin, factor * height, factor * width)
            x, there = needed.cut(x, there), needed
        x = _block_whole(block, x) if cache is None else block(x, **remembered)
        if block.upsamplers is not None:
            factor, there = 2 * factor, there.times(2)
    x = _causal(decoder.conv_out, decoder.nonlinearity(decoder.norm_out(x)), cache, at)
    if piece is not None:
        x = piece.times(factor).cut(x, there)
    return unpatchify(x, vae.config.patch_size or 1)


def new_cache(vae: AutoencoderKLWan) -> Cache:
    """What is remembered before the first frame: nothing."""
    return [None] * vae._cached_conv_counts["decoder"]


def margins(decoder: Any) -> list[int]:
    """For every level, how many of its pixels beyond an edge the pixels inside depend on."""
    below = 1  # of the convolution at the end
    found = []
    for block in reversed(decoder.up_blocks):
        if block.upsamplers is not None:
            below = (below + 2) // 2  # its convolution comes after doubling
        below += 2 * len(block.resnets)
        found.append(below)
    return found[::-1]


def resample_whole(layer: WanResample, x: Tensor) -> Tensor:
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


def tiles(vae: AutoencoderKLWan, height: int, width: int) -> list[list[Piece]]:
    """diffusers' overlapping tiles of a frame in latent pixels, row by row; one where the frame is no larger."""
    scale = vae.config.scale_factor_spatial
    tall, wide = vae.tile_sample_min_height // scale, vae.tile_sample_min_width // scale
    if height <= tall and width <= wide:
        return [[Piece(0, height, 0, width)]]
    rows = range(0, height, vae.tile_sample_stride_height // scale)
    columns = range(0, width, vae.tile_sample_stride_width // scale)
    return [[Piece(y, min(height, y + tall), x, min(width, x + wide)) for x in columns] for y in rows]


def blend(vae: AutoencoderKLWan, decoded: Sequence[Sequence[Tensor]], height: int, width: int) -> Tensor:
    """The frame of ``height x width`` pixels from its decoded tiles, each blended into the ones above and to the left.

    As diffusers does it, tile after tile; the tiles are changed.
    """
    if len(decoded) == len(decoded[0]) == 1:
        return decoded[0][0]
    tall, wide = vae.tile_sample_stride_height, vae.tile_sample_stride_width
    over_y, over_x = vae.tile_sample_min_height - tall, vae.tile_sample_min_width - wide
    rows = []
    for i, row in enumerate(decoded):
        for j, tile in enumerate(row):
            if i > 0:
                vae.blend_v(decoded[i - 1][j], tile, over_y)
            if j > 0:
                vae.blend_h(row[j - 1], tile, over_x)
        rows.append(torch.cat([tile[..., :tall, :wide] for tile in row], dim=-1))
    return torch.cat(rows, dim=-2)[..., :height, :width]


def _block_whole(block: Any, x: Tensor) -> Tensor:
    for resnet in block.resnets:
        x = resnet(x)
    for upsampler in block.upsamplers or ():
        x = resample_whole(upsampler, x)
    return x


def _causal(conv: Any, x: Tensor, cache: Cache | None, at: list[int]) -> Tensor:
    """A causal convolution that goes on from the frames its place in the cache remembers."""
    if cache is None:
        return conv(x)
    before = cache[at[0]]
    seen = x if before is None else torch.cat([before, x], dim=2)
    cache[at[0]] = seen[:, :, -_KEPT:].clone()
    at[0] += 1
    return conv(x, before)


def _largest(length: int, parts: int) -> int:
    return -(-length // parts) + (2 * MARGIN if parts > 2 else MARGIN if parts == 2 else 0)


def _runs(length: int, parts: int) -> Iterable[tuple[int, int]]:
    return pairwise(length * i // parts for i in range(parts + 1))
