"""Fused quantisers give what the function and then the rounding give, number for number."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from ospnext.ops import fp8, fused, fused8
from ospnext.ops.fp8 import Held
from ospnext.ops.fused8 import Target
from ospnext.ops.layout import Grid
from ospnext.ops.rope import rope_table

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs FP8 tensor cores"
)
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
SHAPES = [(1, 7, 48), (2, 3 * 5 * 7, 96), (3, 33, 1536), (1, 9, 13824)]
HEADS, EPS = 2, 1e-6


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def inputs(shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    batch, tokens, dim = shape
    generator = torch.Generator().manual_seed(dim)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator)

    x = (3 * random(*shape) + 1) * torch.logspace(-3, 1, dim)  # of many sizes, so that every rounding is met
    modulation = random(batch, 2, dim).to(device)
    return {
        "x": x.to(device, dtype),
        "y": random(*shape).to(device, dtype),
        "scale": modulation[:, :1],
        "shift": modulation[:, 1:],
        "weight": (1 + 0.1 * random(dim)).to(device, dtype),
        "table": rope_table(Grid(1, 1, tokens), dim // HEADS, device),
    }


def one_by_one(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every function's result before it is rounded."""
    return {
        "norm": fused.norm(t["x"], t["scale"], t["shift"], EPS),
        "add_norm": fused.add_norm(t["x"], t["y"], t["scale"], t["scale"], t["shift"], EPS)[1],
        "norm_rope": fused.norm_rope(t["x"], t["weight"], t["table"], EPS).flatten(2),
        "rms_norm": fused.rms_norm(t["x"], t["weight"], EPS),
        "hold": t["x"],
    }


def together(t: dict[str, torch.Tensor], to: Target) -> dict[str, Held]:
    return {
        "norm": fused8.norm(t["x"], t["scale"], t["shift"], EPS, to),
        "add_norm": fused8.add_norm(t["x"], t["y"], t["scale"], t["scale"], t["shift"], EPS, to)[1],
        "norm_rope": fused8.norm_rope(t["x"], t["weight"], t["table"], EPS, to),
        "rms_norm": fused8.norm_rope(t["x"], t["weight"], None, EPS, to),
        "hold": fused8.hold(t["x"], to),
    }


def expected(x: torch.Tensor, to: Target) -> Held:
    by = to.by
    if isinstance(by, str):
        by = fp8.amax(x, 1 if by == "tensor" else 2)
    return fp8.hold(x, by.reshape(-1, *by.shape[1:] or (1, 1)), to.scale_max)


@pytest.mark.parametrize("scale_max", [15.0, 224.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by", ["tensor", "token", "given"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_are_those_of_the_function_then_rounded(
    shape: tuple[int, int, int], by: str, dtype: torch.dtype, scale_max: float, device: str
) -> None:
    t = inputs(shape, device, dtype)
    with torch.no_grad():
        for name, x in one_by_one(t).items():
            largest = fp8.amax(x, 1) / 1.25  # so that some numbers saturate
            to = Target(scale_max, largest.flatten() if by == "given" else by)
            got, want = together(t, to)[name], expected(x, to)
            assert got.values.dtype is fp8.E4M3
            assert got.inverse.shape == want.inverse.shape, name
            if dtype is torch.float32 and device == "cuda" and name != "hold":
                # A kernel that ends otherwise is compiled otherwise: sums differ in their last bit.
                torch.testing.assert_close(got.inverse, want.inverse, rtol=1e-6, atol=0)
                assert (got.float() - want.float()).norm() <= 2.0**-8 * want.float().norm(), name
                continue
            assert got.values.float().equal(want.values.float()), name
            assert got.inverse.equal(want.inverse), name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gelu(shape: tuple[int, int, int], device: str) -> None:
    """Its kernel has an exponential of its own: a number may fall to the other side of a midpoint."""
    x = inputs(shape, device, torch.bfloat16)["x"]
    with torch.no_grad():
        got, want = fused8.gelu(x, Target(15.0)), expected(F.gelu(x, approximate="tanh"), Target(15.0))
    torch.testing.assert_close(got.inverse, want.inverse, rtol=2.0**-8, atol=0)
    assert (got.float() - want.float()).norm() <= 2.0**-7 * want.float().norm()


def test_the_sum_is_that_of_add_norm(device: str) -> None:
    t = inputs(SHAPES[1], device, torch.bfloat16)
    with torch.no_grad():
        want = fused.add_norm(t["x"], t["y"], None, t["weight"], t["weight"], EPS)[0]
        for by in ("tensor", "token"):
            assert fused8.add_norm(t["x"], t["y"], None, t["weight"], t["weight"], EPS, Target(15.0, by))[0].equal(want)


def test_the_largest_is_everyones(device: str) -> None:
    """Another process may have a larger one."""
    t, seen = inputs(SHAPES[1], device, torch.float32), []

    def reduce(largest: torch.Tensor) -> torch.Tensor:
        seen.append(largest)
        return 2 * largest

    with torch.no_grad():
        got, x = fused8.norm(t["x"], t["scale"], t["shift"], EPS, Target(15.0, reduce=reduce)), one_by_one(t)["norm"]
    assert seen[0].equal(fp8.amax(x, 1).flatten())
    assert got.inverse.equal(2 * expected(x, Target(15.0)).inverse)


@pytest.mark.parametrize("put", [torch.nan, torch.inf])
@pytest.mark.parametrize("function", [fused8.hold, fused8.gelu])
def test_nan_stays_and_infinity_does_not_hide(function: Callable[..., Held], put: float, device: str) -> None:
    x = torch.ones(1, 4, 32, device=device)
    x[0, 2, 5] = put
    with torch.no_grad():
        assert not function(x, Target(15.0)).float()[0, 2, 5].isfinite()
        given = function(x, Target(15.0, torch.ones(1, device=device))).float()[0, 2, 5]
    assert given.isnan() if put != put else abs(given - 28 / 15) < 1e-6


def test_nothing_at_all(device: str) -> None:
    with torch.no_grad():
        assert (
            fused8.hold(torch.zeros(1, 3, 16, device=device), Target(15.0))
            .float()
            .equal(torch.zeros(1, 3, 16, device=device))
        )
        assert fused8.hold(torch.zeros(1, 0, 16, device=device), Target(15.0)).values.shape == (1, 0, 16)
