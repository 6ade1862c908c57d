"""Pieces and tiles of frames against whole frames and diffusers' own tiles."""

from itertools import product

import pytest
import torch
from diffusers import AutoencoderKLWan
from test_video_vae import SMALL, WAN21

from ospnext.models.vae_pieces import Piece, blend, decode_piece, margins, new_cache, split, tiles


@pytest.fixture(scope="module", params=[SMALL, WAN21], ids=["small", "wan2.1"])
def vae(request: pytest.FixtureRequest) -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(**request.param).eval()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 7, 8])
def test_a_frame_is_split_without_rest(count: int) -> None:
    for height, width in ((90, 160), (3, 50), (1, 2), (7, 7)):
        seen = torch.zeros(height, width)
        pieces = split(height, width, count)
        for piece in pieces:
            part = piece.cut(seen, Piece(0, height, 0, width))
            assert part.numel() > 0
            part += 1
        assert seen.eq(1).all()
        assert len(pieces) <= count
    assert len(split(90, 160, count)) == count


def test_margins_of_wan() -> None:
    """At the end 1 for the last convolution and 6 for three residual blocks; below half of that, and 6 again."""
    assert margins(AutoencoderKLWan(**WAN21).decoder) == [13, 12, 10, 7]


@torch.no_grad()
def test_pieces_are_those_of_the_whole_frame(vae: AutoencoderKLWan) -> None:
    z = torch.randn(1, 16, 2, 4, 34)
    whole, scale = decode_piece(vae, z), vae.config.scale_factor_spatial
    frame = Piece(0, whole.shape[-2], 0, whole.shape[-1])
    for count in (2, 3, 8):
        for piece in split(4, 34, count):
            expected = piece.times(scale).cut(whole, frame)
            torch.testing.assert_close(decode_piece(vae, z, piece), expected, atol=2e-5, rtol=2e-5)
    cache, piece = new_cache(vae), split(4, 34, 3)[1]
    frames = torch.cat([decode_piece(vae, frame, piece, cache) for frame in z.split(1, dim=2)], dim=2)
    torch.testing.assert_close(frames, piece.times(scale).cut(whole, frame), atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_tiles_are_those_of_diffusers() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**WAN21).eval()
    vae.enable_tiling(64, 48, 48, 40)
    z = torch.randn(1, 16, 2, 13, 17)
    stock = vae.decode(z).sample
    rows = tiles(vae, 13, 17)
    frame = Piece(0, 13, 0, 17)

    def walk(tile: Piece) -> torch.Tensor:
        cache = new_cache(vae)
        parts = [decode_piece(vae, part, None, cache) for part in tile.cut(z, frame).split(1, dim=2)]
        return torch.cat(parts, dim=2)

    ours = blend(vae, [[walk(tile) for tile in row] for row in rows], 8 * 13, 8 * 17).clamp(-1, 1)
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)
    assert len(rows) > 1
    assert len(rows[0]) > 1
    for y, x in product(range(13), range(17)):
        assert any(t.top <= y < t.bottom and t.left <= x < t.right for row in rows for t in row)
