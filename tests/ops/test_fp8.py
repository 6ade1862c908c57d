"""HiF8's numbers fit E4M3 where the table says so, and the product is that of the numbers."""

import math

import pytest
import torch

from ospnext.ops import fp8, hif8

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs FP8 tensor cores"
)
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
ONE = torch.ones(())


@pytest.mark.parametrize(
    ("scale_max", "factor", "exact_from", "error"), [(15.0, 16.0, 2.0**-12, 2.0**-14), (224.0, 2.0, 2.0**-9, 2.0**-11)]
)
def test_every_hif8_number_fits(scale_max: float, factor: float, exact_from: float, error: float) -> None:
    assert fp8.headroom(scale_max) == factor
    x = torch.tensor([v for v in hif8.VALUES if math.isfinite(v) and abs(v) <= scale_max])
    cast = fp8.to_e4m3(x, ONE, scale_max).float() / factor
    large = x.abs() >= exact_from
    assert cast[large].equal(x[large])
    assert (cast - x).abs().max() <= error
    assert not cast.equal(x)  # the table does not claim too little
    codes = hif8.encode(x)
    assert fp8.codes_to_e4m3(codes, scale_max).float().equal(cast * factor)


@pytest.mark.parametrize("scale_max", [15.0, 224.0])
def test_the_cast_is_hif8s_rounding(scale_max: float) -> None:
    """Every float16 number and its bfloat16 neighbours: E4M3 rounds nothing that HiF8 has not."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    x = x[x.abs() <= scale_max]
    rounded = hif8.round(x)
    cast = fp8.to_e4m3(x, ONE, scale_max).float() / fp8.headroom(scale_max)
    near_zero = {15.0: 2.0**-12, 224.0: 2.0**-9}[scale_max]
    assert cast[rounded.abs() >= near_zero].equal(rounded[rounded.abs() >= near_zero])
    assert (cast - rounded).abs().max() <= near_zero / 4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale_max", [2.0**-8, 1.0, 15.0, 27.0, 224.0, 384.0])
def test_the_table_is_the_arithmetic(device: str, scale_max: float) -> None:
    patterns = torch.randint(-(2**31), 2**31, (300_000,), generator=torch.Generator().manual_seed(1))
    x = patterns.to(torch.int32).view(torch.float32) * 1
    limit = fp8.E4M3_MAX / fp8.headroom(scale_max)
    near = torch.nextafter(torch.tensor([limit, limit]), torch.tensor([0.0, math.inf]))
    x = torch.cat([x, torch.linspace(-2 * limit, 2 * limit, 100_001), near]).to(device)
    expected = fp8._scaled_to_e4m3(x, scale_max)
    got = fp8.to_e4m3(x, ONE.to(device), scale_max)
    assert got.isnan().equal(x.isnan())
    assert got[~x.isnan()].view(torch.uint8).equal(expected[~x.isnan()].view(torch.uint8))


def test_what_is_larger_saturates_and_nan_stays() -> None:
    x = torch.tensor([28.0, 29.0, 1e6, -1e6, math.inf, math.nan])
    cast = fp8.to_e4m3(x, ONE, 15.0).float() / 16
    assert cast[:5].tolist() == [28, 28, 28, -28, 28]
    assert cast[5].isnan()
    cast = fp8.to_e4m3(x[2:], ONE, 384.0).float()  # 448 is no number of HiF8: it is rounded to 512
    assert cast[:3].tolist() == [448, -448, 448]
    assert cast[3].isnan()


@pytest.mark.parametrize("scale_max", [2.0**-8, 15.0, 224.0, 384.0])
def test_nothing_too_large_is_cast(scale_max: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this torch makes of it: the numbers that are cast are looked at themselves."""
    monkeypatch.setattr(fp8, "E4M3", torch.float32)
    limit = fp8.E4M3_MAX / fp8.headroom(scale_max)
    cast = fp8._scaled_to_e4m3(torch.linspace(-2 * limit, 2 * limit, 10_001), scale_max)
    assert cast.abs().max() == fp8.E4M3_MAX


@pytest.mark.parametrize("largest", [0.3, 1.0, 14.9, 15.0, 27.0, 100.0, 224.0, 384.0])
def test_headroom_leaves_nothing_out(largest: float) -> None:
    x = torch.linspace(-largest, largest, 4097)
    cast = fp8.to_e4m3(x, ONE, largest).float() / fp8.headroom(largest)
    torch.testing.assert_close(cast, hif8.round(x), rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [(32, 48, 64), (5, 7, 3), (1, 33, 130)])
@pytest.mark.parametrize("by_row", [False, True])
def test_product_is_that_of_the_numbers(sizes: tuple[int, int, int], by_row: bool, device: str) -> None:
    rows, columns, inner = sizes
    generator = torch.Generator().manual_seed(rows)
    a = fp8.to_e4m3(torch.randn(rows, inner, generator=generator), 4 * ONE, 15.0).to(device)
    b = fp8.to_e4m3(torch.randn(columns, inner, generator=generator), 4 * ONE, 15.0).to(device)
    scale_a = torch.rand((rows, 1) if by_row else (), generator=generator).to(device) / 100
    scale_b = torch.tensor(0.01, device=device)
    dtype = torch.bfloat16 if by_row else torch.float32
    out = fp8.scaled_mm(a, b, scale_a, scale_b, dtype)
    expected = (a.double() * scale_a.double()) @ (b.double() * scale_b.double()).t()
    assert out.shape == (rows, columns)
    assert out.dtype is dtype
    # Hopper's tensor cores keep about 14 bits of a sum.
    near = 2.0**-8 if by_row else 1e-5 if device == "cpu" else 2.0**-10
    assert (out.double() - expected).norm() <= near * expected.norm()
    transposed = fp8.scaled_mm(a.t().contiguous().t(), b.t().contiguous().t(), scale_a, scale_b, dtype)
    assert transposed.equal(out)
