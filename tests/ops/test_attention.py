"""Attention within segments against dense attention under a mask, and the choice of kernels."""

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from test_layout import AWKWARD, CPU, RATIOS, SPARSE

from ospnext.ops import attention
from ospnext.ops.attention import Attend, attend, available_kernels, describe_kernel, masked_dense_attention
from ospnext.ops.layout import Grid, Layout, Switch, segment_ids


def qkv(grid: Grid, dtype: torch.dtype, heads: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, grid.tokens, heads, 8, generator=generator, dtype=dtype) for _ in range(3))


def sparse_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: Grid, layout: Layout, ratio: int
) -> torch.Tensor:
    """Row-major tokens to the layout, attention inside its segments, and back."""
    plan = Switch().plan(grid, [layout], ratio, CPU)
    there = (plan.scatter(x.flatten(2), layout).view_as(x) for x in (q, k, v))
    out = attend(*there, plan.segments(layout))
    return plan.gather(out.flatten(2), layout).view_as(q)


@pytest.mark.parametrize("grid", AWKWARD, ids=str)
@pytest.mark.parametrize("layout", SPARSE)
@pytest.mark.parametrize("ratio", RATIOS)
def test_segments_equal_a_mask(grid: Grid, layout: Layout, ratio: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        q, k, v = qkv(grid, dtype, heads=1 if grid.tokens > 1000 else 2)
        dense = masked_dense_attention(q, k, v, segment_ids(grid, layout, ratio))
        ours = sparse_attention(q, k, v, grid, layout, ratio)
        torch.testing.assert_close(ours, dense, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("layout", SPARSE)
@pytest.mark.parametrize("ratio", RATIOS)
def test_gradients_equal_those_under_a_mask(layout: Layout, ratio: int) -> None:
    grid = Grid(2, 5, 7)
    weight = torch.randn(1, grid.tokens, 2, 8, dtype=torch.float64)
    gradients = []
    for sparse in (True, False):
        inputs = [x.requires_grad_() for x in qkv(grid, torch.float64)]
        if sparse:
            out = sparse_attention(*inputs, grid, layout, ratio)
        else:
            out = masked_dense_attention(*inputs, segment_ids(grid, layout, ratio))
        gradients.append(torch.autograd.grad((out * weight).sum(), inputs))
    for ours, dense in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, dense, atol=1e-12, rtol=1e-12)


def test_a_batch_is_a_batch() -> None:
    q, k, v = (torch.randn(3, 10, 2, 4) for _ in range(3))
    together = attend(q, k, v, (4, 2, 2, 2))
    one_by_one = torch.cat([attend(q[i : i + 1], k[i : i + 1], v[i : i + 1], (4, 2, 2, 2)) for i in range(3)])
    torch.testing.assert_close(together, one_by_one)


def test_no_segments_is_dense_and_lengths_may_differ() -> None:
    q, k, v = torch.randn(2, 6, 2, 4), torch.randn(2, 9, 2, 4), torch.randn(2, 9, 2, 4)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * 4**-0.5
    expected = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)
    torch.testing.assert_close(attend(q, k, v), expected)


@pytest.mark.parametrize("segments", [(4, 4), (9,), (10, 1), ()])
def test_segments_must_add_up(segments: tuple[int, ...]) -> None:
    q, k, v = (torch.randn(1, 10, 1, 4) for _ in range(3))
    with pytest.raises(ValueError, match="do not add up to the 10 queries"):
        attend(q, k, v, segments)


@pytest.mark.parametrize(("queries", "keys", "segments"), [(0, 0, ()), (0, 5, None)])
def test_nothing_to_attend_still_has_gradients(queries: int, keys: int, segments: tuple[int, ...] | None) -> None:
    q, k, v = (torch.randn(2, n, 3, 4, requires_grad=True) for n in (queries, keys, keys))
    out = attend(q, k, v, segments)
    out.sum().backward()
    assert out.shape == q.shape
    for x in (q, k, v):
        assert x.grad is not None
        assert x.grad.equal(torch.zeros_like(x))


def test_unknown_kernel_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'flash5' is not known: use one of auto, sdpa"):
        Attend("flash5")
    x = torch.randn(1, 4, 1, 4)
    with pytest.raises(ValueError, match="'flash5' is not known"):
        attend(x, x, x, kernel="flash5")


@pytest.mark.parametrize("name", ["cudnn", "flash2", "flash3", "flash4"])
def test_explicit_kernel_on_cpu_is_refused(name: str) -> None:
    x = torch.randn(1, 4, 1, 4)
    with pytest.raises(ValueError, match=rf"attention kernel '{name}' .*use auto"):
        attend(x, x, x, kernel=name)


def test_auto_and_sdpa_serve_every_device() -> None:
    kernels = available_kernels()
    assert list(kernels) == list(attention.KERNEL_NAMES)
    assert kernels["auto"] == kernels["sdpa"] == ""
    if not torch.cuda.is_available():
        assert all(kernels[name] == "needs a CUDA device" for name in ("cudnn", "flash2", "flash3", "flash4"))
    for device in ("cpu", "mps", "privateuseone"):
        assert attention.choose_kernel("auto", torch.device(device), torch.bfloat16) == "sdpa"
    assert describe_kernel("auto", CPU, torch.float32) == "sdpa (auto)"
    assert describe_kernel("sdpa", CPU, torch.float32) == "sdpa"


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A machine that says it has a Hopper GPU, with an empty folder on its module path."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn_interface", raising=False)
    attention.why_not.cache_clear()
    yield tmp_path
    sys.modules.pop("flash_attn_interface", None)
    attention.why_not.cache_clear()


CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    "body",
    [
        "raise ImportError('libcudart.so.11.0: cannot open shared object file')",
        "raise OSError('undefined symbol: _ZN3c104cuda9SetDeviceEi')",
        "raise RuntimeError('built for another torch')",
        "raise TypeError('unsupported compiler version')",
        "import a_dependency_that_is_not_here",
        "",  # imports, but lacks the function
    ],
)
def test_broken_flash_is_reported_not_fatal(hopper: Path, body: str) -> None:
    (hopper / "flash_attn_interface.py").write_text(body)
    reason = available_kernels()["flash3"]
    assert reason.startswith("flash_attn_interface does not import: ")
    assert attention.choose_kernel("auto", CUDA, torch.bfloat16) == "cudnn"
    assert reason in describe_kernel("auto", CUDA, torch.bfloat16)
    with pytest.raises(ValueError, match=r"'flash3' is unavailable: flash_attn_interface does not import.*use auto"):
        attention.choose_kernel("flash3", CUDA, torch.bfloat16)


@pytest.mark.skipif(find_spec("flash_attn_interface") is not None, reason="FlashAttention 3 is installed")
def test_missing_flash_is_no_news(hopper: Path) -> None:
    assert available_kernels()["flash3"] == "flash_attn_interface is not installed"
    assert "flash_attn_interface" not in describe_kernel("auto", CUDA, torch.bfloat16)


def test_working_flash_is_used(hopper: Path) -> None:
    (hopper / "flash_attn_interface.py").write_text("def flash_attn_func(q, k, v):\n    return q + k + v, 'lse'\n")
    assert available_kernels()["flash3"] == ""
    assert describe_kernel("flash3", CUDA, torch.bfloat16) == "flash3"
    x = torch.ones(1, 2, 1, 4)
    assert attention._KERNELS["flash3"](x, x, x).equal(3 * x)
    with pytest.raises(ValueError, match=r"needs bf16 or fp16 on CUDA, not torch\.float32 on cuda"):
        attention.choose_kernel("flash3", CUDA, torch.float32)


def test_auto_by_device(hopper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention.choose_kernel("auto", CUDA, torch.float16) == "cudnn"
    assert attention.choose_kernel("auto", CUDA, torch.float32) == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert attention.choose_kernel("auto", CUDA, torch.float16) in ("sdpa", "flash2")


def test_choice_is_a_constant_of_the_compiled_graph(hopper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which kernel runs is settled while a block is traced: no graph break, though it imports and asks the driver."""
    (hopper / "flash_attn_interface.py").write_text("def flash_attn_func(q, k, v):\n    return q + k + v\n")
    assert available_kernels()["flash3"] == ""
    monkeypatch.undo()  # the compiler itself asks for a real GPU; what was found stays cached

    def run(x: torch.Tensor) -> torch.Tensor:
        return attention._KERNELS[attention.choose_kernel("flash3", CUDA, torch.bfloat16)](x, x, x)

    x = torch.ones(1, 2, 1, 4)
    assert torch.compile(run, backend="eager", fullgraph=True)(x).equal(3 * x)
