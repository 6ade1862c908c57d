"""FP8 attention: how far its arithmetic is from exact attention of the same numbers, and its kernel from both."""

import pytest
import torch

from ospnext.ops import attention8, fp8
from ospnext.ops.attention import attend
from ospnext.ops.attention8 import Attended, Part
from ospnext.ops.fp8 import Held
from ospnext.ops.fused8 import Target

reason = attention8.why_not(torch.device("cuda" if torch.cuda.is_available() else "cpu"), 128)
needs_kernel = pytest.mark.skipif(bool(reason), reason=f"FP8 attention: {reason}")

BOUND = 2.0**-4
"""Of the norm: between the kernel, its arithmetic and exact attention, whatever is rounded."""

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
    assert error(attention8.plain(q, k, v).float(), exact(q, k, v)) < BOUND


def test_two_parts_are_one() -> None:
    """Results of attention to some of the keys and to the rest, weighed by their sums: attention to all."""
    q, k, v = tensors((33, 70), 2, 32, peak=PEAKED)
    one = v._replace(inverse=torch.ones(1, 1, 1, 1))

    def of(keys: slice) -> tuple[torch.Tensor, torch.Tensor]:
        near, value = (t._replace(values=t.values[:, keys]) for t in (k, one))
        scores = torch.einsum("bnhd,bmhd->bhnm", q.float(), near.float()) * 32**-0.5
        return exact(q, near, value).float(), scores.logsumexp(-1)

    part = Part(0, slice(None), *of(slice(None, 50)), of(slice(50, None)))
    whole = Attended([part], v.inverse, q.values.shape, torch.float32).whole()
    torch.testing.assert_close(whole, exact(q, k, v).float().flatten(2), rtol=1e-4, atol=1e-5)
    held = Attended([part], v.inverse, q.values.shape, torch.float32).hold(Target(15.0))
    assert held.values.float().equal(Target(15.0).hold(whole).values.float())


@needs_kernel
@pytest.mark.parametrize("peak", [1.0, PEAKED])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "tokens", [(64, 64), (77, 300), (1000, 5), (1, 1), (2310, 2310), (1848, 512), (777, 1931), (300, 4111), (9, 8192)]
)
def test_the_kernel_is_near_its_arithmetic(tokens: tuple[int, int], head_dim: int, peak: float) -> None:
    q, k, v = (Held(x.values.cuda(), x.inverse.cuda()) for x in tensors(tokens, 3, head_dim, batch=2, peak=peak))
    attended = attention8.attend(q, k, v, None, torch.bfloat16)
    got = attended.whole().unflatten(-1, (3, head_dim))
    assert error(got, exact(q, k, v)) < BOUND
    assert error(got, attention8.plain(q, k, v).float().double()) < BOUND
    for to in (Target(15.0), Target(15.0, "token"), Target(15.0, torch.full((2,), 3.0, device="cuda"))):
        held, want = attended.hold(to), to.hold(attended.whole())
        assert held.values.float().equal(want.values.float())
        assert held.inverse.equal(want.inverse)


@needs_kernel
def test_segments() -> None:
    q, k, v = (Held(x.values.cuda(), x.inverse.cuda()) for x in tensors((18000, 18000), 3, 128))
    segments = (4100, 4100, 300, 5000, 4500)
    got = attention8.attend(q, k, v, segments, torch.bfloat16).whole().unflatten(-1, (3, 128))
    assert error(got, exact(q, k, v, segments)) < BOUND


def test_where_it_cannot_run_it_says_so() -> None:
    q, k, v = tensors((8, 8), 2, 16)
    with pytest.raises(ValueError, match=r"FP8 attention is unavailable: it needs an NVIDIA GPU .*quant_attn=none"):
        attention8.attend(q, k, v, None, torch.float32)
