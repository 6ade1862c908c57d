"""The format equals an independent one (PyPI en-dtypes) on every code and at every edge; what is ours, its own text."""

import math

import numpy as np
import pytest
import torch
from en_dtypes import hifloat8

from ospnext.ops import hif8

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
CODES = torch.arange(256, dtype=torch.uint8)
ORACLE = torch.from_numpy(np.arange(256, dtype=np.uint8).view(hifloat8).astype(np.float32))
FINITE = torch.tensor(sorted(value for value in hif8.VALUES if math.isfinite(value)))
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def oracle(x: torch.Tensor) -> torch.Tensor:
    """The codes en-dtypes gives float32 numbers."""
    with np.errstate(invalid="ignore"):  # NaN
        return torch.from_numpy(x.numpy().astype(hifloat8).view(np.uint8))


def edges() -> torch.Tensor:
    """Float32 at every number, every midpoint and where overflow and underflow begin, with two neighbours each way."""
    middles = (FINITE[1:].double() + FINITE[:-1].double()).float() / 2
    assert (2 * middles.double()).equal(FINITE[1:].double() + FINITE[:-1].double())
    extreme = torch.tensor([40960.0, 49152.0, 65536.0, 2.0**-23, 2.0**-24, 2.0**-126, 3e38, 1e-45, 0.0, -0.0])
    x = torch.cat([FINITE, middles, extreme, -extreme])
    near = [x]
    for direction in (-math.inf, math.inf):
        y = x
        for _ in range(2):
            y = torch.nextafter(y, torch.tensor(direction))
            near.append(y)
    return torch.cat([*near, torch.tensor([math.inf, -math.inf, math.nan])])


def every(dtype: torch.dtype) -> torch.Tensor:
    """All 65,536 numbers of a half-precision dtype."""
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)


def test_every_code_decodes_as_the_oracle() -> None:
    torch.testing.assert_close(hif8.decode(CODES), ORACLE, rtol=0, atol=0, equal_nan=True)
    assert len(FINITE.unique()) == 2 * 126 + 1
    anchors = {
        0x08: 1,
        0x10: 2,
        0x18: 0.5,
        0x2F: 15,
        0x4F: 224,
        0x5C: 2**-7,
        0x6D: 24576,
        0x7F: 1.5 * 2**-15,
        1: 2**-22,
    }
    assert {code: hif8.VALUES[code] for code in anchors} == anchors


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_survives_a_round_trip(dtype: torch.dtype) -> None:
    values = hif8.decode(CODES).to(dtype)
    assert hif8.encode(values).equal(CODES)
    torch.testing.assert_close(hif8.round(values), values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_precision_number_encodes_as_the_oracle(dtype: torch.dtype) -> None:
    x = every(dtype)
    assert hif8.encode(x).equal(oracle(x.float()))


def test_float32_encodes_as_the_oracle_at_every_edge_and_anywhere() -> None:
    anywhere = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0))
    for x in (edges(), anywhere.to(torch.int32).view(torch.float32)):
        assert hif8.encode(x).equal(oracle(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ["half_away", "hybrid"])
@pytest.mark.parametrize("overflow", ["infinity", "saturate"])
def test_rounding_is_decoding_what_was_encoded(dtype: torch.dtype, rounding: str, overflow: str) -> None:
    x = every(dtype) if dtype.itemsize == 2 else edges().to(dtype)
    rounded = hif8.round(x, rounding, overflow)
    expected = hif8.decode(hif8.encode(x, rounding, overflow)).to(dtype)
    assert rounded.dtype is dtype
    torch.testing.assert_close(rounded, expected, rtol=0, atol=0, equal_nan=True)
    assert not (rounded.signbit() & (rounded == 0)).any()
    assert rounded.isnan().equal(x.isnan())


@pytest.mark.parametrize("overflow", ["infinity", "saturate"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_the_tables_are_the_arithmetic(device: str, overflow: str) -> None:
    patterns = torch.randint(-(2**31), 2**31, (300_000,), generator=torch.Generator().manual_seed(1))
    silent = torch.tensor([0x7F800001, 0xFF800001 - 2**32, 0x7F80FFFF])  # NaN by their lower halves alone
    x = torch.cat([patterns, silent]).to(torch.int32).view(torch.float32)
    x = torch.cat([x, edges(), every(torch.bfloat16).float()]).to(device)
    assert hif8.has_table(x)
    rounded = hif8._round(x, "half_away", overflow)
    torch.testing.assert_close(hif8.round(x, overflow=overflow), rounded, rtol=0, atol=0, equal_nan=True)
    assert hif8.encode(x, overflow=overflow).equal(hif8._encode(x, "half_away", overflow))
    assert not hif8.has_table(x.to("meta"))
    assert hif8.round(x.to("meta")).is_meta


def test_saturation_changes_only_the_infinite() -> None:
    x = edges()
    free, bounded = hif8.round(x), hif8.round(x, overflow="saturate")
    torch.testing.assert_close(bounded, free.clamp(-hif8.MAX, hif8.MAX), rtol=0, atol=0, equal_nan=True)
    assert hif8.encode(torch.tensor([40959.0, 40960.0, math.inf]), overflow="saturate").tolist() == [0x6E] * 3


def test_float64_is_rounded_once() -> None:
    middles = (FINITE[1:].double() + FINITE[:-1].double()) / 2
    tiny = torch.nextafter(middles, torch.zeros(1, dtype=torch.float64))  # in float32 it would be the midpoint itself
    assert (hif8.round(tiny).abs() <= middles.abs()).all()
    assert (hif8.round(middles).abs() >= middles.abs()).all()


def test_hybrid_rounding_goes_up_as_often_as_there_is_to_round() -> None:
    x = torch.empty(400_000).uniform_(16, 20, generator=torch.Generator().manual_seed(0))  # two bits: 16, 20
    for low in range(16, 20):
        up = hif8.round(x[(x >= low) & (x < low + 1)], "hybrid") == 20
        assert abs(up.float().mean() - (low + 0.5 - 16) / 4) < 0.01
    assert hif8.round(x, "hybrid").equal(hif8.round(x, "hybrid"))
    near_one = torch.empty(1000).uniform_(0.07, 15, generator=torch.Generator().manual_seed(1))
    assert hif8.round(near_one[near_one >= 0.125], "hybrid").equal(hif8.round(near_one[near_one >= 0.125]))


def test_hybrid_rounding_of_half_precision_knows_two_thresholds() -> None:
    # bfloat16 between 16 and 20 has steps of 1/8; the lowest bit is set in odd ones.
    x = torch.arange(16, 20, 0.125).bfloat16()
    threshold = torch.where(torch.arange(32) % 2 == 1, 0.75, 0.25)
    expected = torch.where((x.float() - 16) / 4 >= threshold, 20.0, 16.0)
    assert hif8.round(x, "hybrid").float().equal(expected)


def test_it_compiles_and_takes_any_layout() -> None:
    x = torch.randn(33, 17, generator=torch.Generator().manual_seed(0)) * 100
    for function in (hif8.round, hif8.encode):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        assert compiled(x).equal(function(x))
        assert function(x.t()).equal(function(x).t())
    compiled = torch.compile(hif8.decode, backend="aot_eager", fullgraph=True)
    assert compiled(hif8.encode(x)).equal(hif8.round(x))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="half_away or hybrid"):
        hif8.round(torch.ones(1), "nearest")  # type: ignore[arg-type]
