"""FP8 attention: how far its arithmetic is from exact attention of the same numbers, and its kernel from both."""

import pytest
import torch

from ospnext.ops import attention8, fp8
from ospnext.ops.attention import attend
from ospnext.ops.fp8 import Held

reason = attention8.why_not(torch.device("cuda" if torch.cuda.is_available() else "cpu"), 128)
needs_kernel = pytest.mark.skipif(bool(reason), reason=f"FP8 attention: {reason}")

PEAKED = 6.0
"""Factor of the queries, with which one key in hundreds takes nearly all."""


def tensors(
    tokens: tuple[int, int], heads: int, head_dim: int, batch: int = 1, peak: float = 1.0
) -> tuple[Held, Held, Held]:
    generator = torch.Generator().manual_seed(sum(tokens))
    n, m = tokens

    def held(count: int, factor: float) -> Held:
        x = factor * torch.randn(batch, count, heads, head_dim, generator=generator)
        return fp8.hold(x, fp8.amax(x, 1), 15.0)

    return held(n, peak), held(m, 1.0), held(m, 1.0)


def exact(q: Held, k: Held, v: Held, segments: tuple[int, ...] | None = None) -> torch.Tensor:
    return attend(q.float().double(), k.float().double(), v.float().double(), segments)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("peak", [1.0, PEAKED])
@pytest.mark.parametrize("tokens", [(64, 64), (77, 300), (5, 1000)])
def test_its_arithmetic_is_near_exact(tokens: tuple[int, int], peak: float) -> None:
    q, k, v = tensors(tokens, 2, 32, batch=2, peak=peak)
    assert error(attention8.plain(q, k, v).float(), exact(q, k, v)) < 2.0**-4


@needs_kernel
@pytest.mark.parametrize("peak", [1.0, PEAKED])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("tokens", [(64, 64), (77, 300), (1000, 5), (1, 1), (2310, 2310), (1848, 512), (777, 1931)])
def test_the_kernel_is_near_its_arithmetic(tokens: tuple[int, int], head_dim: int, peak: float) -> None:
    q, k, v = (Held(x.values.cuda(), x.inverse.cuda()) for x in tensors(tokens, 3, head_dim, batch=2, peak=peak))
    got = attention8.attend(q, k, v).float()
    assert error(got, exact(q, k, v)) < 2.0**-4
    assert error(got, attention8.plain(q, k, v).float().double()) < 2.0**-4


@needs_kernel
def test_segments() -> None:
    q, k, v = (Held(x.values.cuda(), x.inverse.cuda()) for x in tensors((1337, 1337), 3, 128))
    segments = (400, 400, 300, 237)
    got = attention8.attend(q, k, v, segments).float()
    assert error(got, exact(q, k, v, segments)) < 2.0**-4


def test_where_it_cannot_run_it_says_so() -> None:
    q, k, v = tensors((8, 8), 2, 16)
    with pytest.raises(ValueError, match=r"FP8 attention is unavailable: it needs an NVIDIA GPU .*quant_attn=none"):
        attention8.attend(q, k, v)
