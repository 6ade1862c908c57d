"""Resize to cover, cut the middle, scale."""

import numpy as np
import pytest
import torch
from PIL import Image

from ospnext.data.records import Crop
from ospnext.data.transforms import Size, cover_size, fit, resize, to_pixel_values


@pytest.mark.parametrize(
    ("size", "target", "expected"),
    [
        ((720, 1280), (480, 832), (480, 854)),
        ((720, 1280), (720, 1280), (720, 1280)),
        ((1280, 720), (480, 832), (1480, 832)),
        ((100, 300), (480, 832), (480, 1440)),
        ((1080, 1920), (720, 1280), (720, 1280)),
        ((7, 3), (49, 21), (49, 21)),
    ],
)
def test_cover_size(size: tuple[int, int], target: tuple[int, int], expected: tuple[int, int]) -> None:
    assert cover_size(Size(*size), Size(*target)) == expected


def test_cover_size_always_covers_and_never_by_a_pixel_too_much() -> None:
    rng = np.random.default_rng(0)
    for height, width, wanted_height, wanted_width in rng.integers(16, 2000, (500, 4)).tolist():
        got = cover_size(Size(height, width), Size(wanted_height, wanted_width))
        assert got.height >= wanted_height
        assert got.width >= wanted_width
        assert got.height == wanted_height or got.width == wanted_width
        scale = max(wanted_height / height, wanted_width / width)
        assert got.height - height * scale < 1 + 1e-6
        assert got.width - width * scale < 1 + 1e-6


def test_resize_is_bicubic_with_antialias() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    ours = resize(torch.from_numpy(frame).permute(2, 0, 1)[None], Size(30, 50))[0].permute(1, 2, 0).numpy()
    exact = torch.from_numpy(frame).permute(2, 0, 1)[None].float()
    exact = torch.nn.functional.interpolate(exact, (30, 50), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    assert np.abs(ours.astype(float) - exact.clamp(0, 255).round().numpy()).max() <= 1
    peer = np.asarray(Image.fromarray(frame).resize((50, 30), Image.Resampling.BICUBIC)).astype(float)
    assert np.abs(ours - peer).max() <= 2


def test_fit_crops_stretches_and_centres() -> None:
    frame = np.zeros((60, 100, 3), np.uint8)
    frame[10:50, 20:80] = 200
    assert fit(frame, Size(60, 100), Crop(20, 80, 10, 50), Size(40, 60)).unique().tolist() == [200]
    assert fit(frame, Size(60, 100), None, Size(40, 60)).shape == (3, 40, 60)
    columns = np.tile(np.arange(100, dtype=np.uint8), (60, 1))[..., None].repeat(3, 2)
    middle = fit(columns, Size(60, 100), None, Size(60, 60))
    assert middle[0, 0].tolist() == list(range(20, 80))
    wide = fit(columns, Size(60, 200), None, Size(60, 200))
    assert wide.shape == (3, 60, 200)
    assert abs(int(wide[0, 0, 100]) - 50) <= 1


def test_pixel_values() -> None:
    values = to_pixel_values(torch.tensor([0, 255, 51], dtype=torch.uint8))
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, torch.tensor([-1.0, 1.0, -0.6]))
