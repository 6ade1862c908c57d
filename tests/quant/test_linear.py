"""HiF8 linears against the recipe written down, in every execution, and under what training puts around them."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from ospnext.ops import hif8
from ospnext.quant.config import QuantConfig
from ospnext.quant.execution import hold_codes, matmul
from ospnext.quant.linear import SCALE, HiF8Linear, HiF8StoredLinear
from ospnext.quant.running import AMAX, SEEN, advance

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs FP8 tensor cores"
)
SHAPES = [(3, 20, 48), (1, 33, 64), (7, 32)]


def rounded(x: torch.Tensor, largest: torch.Tensor, scale_max: float) -> torch.Tensor:
    """Scaled, rounded and scaled back, in float64 after the rounding."""
    return hif8.round(x.float() * (scale_max / largest)).double() * (largest / scale_max).double()


def recipe(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, gradient: torch.Tensor
) -> dict[str, torch.Tensor]:
    """OSP-Next's recipe as it is written down: output and gradients, for the largest number of each sample."""
    axes = (-1, -2)
    qx = rounded(x, x.abs().amax(axes, keepdim=True).float(), 15.0)
    qw = rounded(weight, weight.abs().amax().float(), 15.0)
    qg = rounded(gradient, gradient.abs().amax(axes, keepdim=True).float(), 224.0)
    flat = (qg.reshape(-1, qg.shape[-1]), qx.reshape(-1, qx.shape[-1]))
    return {
        "y": qx @ qw.t() + bias.double(),
        "x": qg @ qw,
        "weight": flat[0].t() @ flat[1],
        "bias": flat[0].sum(0),
    }


def make(width: int, seed: int = 0, dtype: torch.dtype = torch.float32, outputs: int = 24) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(width, outputs, dtype=dtype)


def inputs(kind: str, *shape: int) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    if kind == "outliers":
        x.flatten()[::97] *= 300
    return x * {"random": 1.0, "outliers": 1.0, "tiny": 1e-12}[kind]


def run(layer: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(gradient.to(y))
    return {"y": y.detach(), "x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}


def check(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], near: float) -> None:
    for name, value in expected.items():
        error = (got[name].double().cpu() - value.double()).norm() / value.double().norm()
        assert error < near, f"{name}: {error:.2e}"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["random", "outliers", "tiny"])
def test_emulation_is_the_recipe(shape: tuple[int, ...], kind: str) -> None:
    linear = make(shape[-1])
    x, gradient = inputs(kind, *shape), inputs(kind, *shape[:-1], 24)
    got = run(HiF8Linear(linear, QuantConfig()), x, gradient)
    check(got, recipe(x, linear.weight.detach(), linear.bias.detach(), gradient), 1e-6)


def test_half_precision_is_rounded_once_at_the_end() -> None:
    linear = make(48, dtype=torch.bfloat16)
    x, gradient = inputs("random", 2, 20, 48).bfloat16(), inputs("random", 2, 20, 24).bfloat16()
    got = run(HiF8Linear(linear, QuantConfig()), x, gradient)
    expected = recipe(x, linear.weight.detach(), linear.bias.detach(), gradient)
    for name, value in expected.items():
        assert got[name].dtype is torch.bfloat16
        torch.testing.assert_close(got[name].double(), value, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("scaling", ["tensor", "token", "running"])
@pytest.mark.parametrize("kind", ["random", "outliers", "tiny"])
def test_fp8_is_emulation_to_the_rounding_of_sums(kind: str, scaling: str, device: str) -> None:
    """The bound: 2^-10 of the norm in float32 (2^-8 by token, whose product is bfloat16), 1e-4 where sums are exact."""
    x, gradient = inputs(kind, 3, 20, 48).to(device), inputs(kind, 3, 20, 24).to(device)
    results = [
        run(HiF8Linear(make(48).to(device), QuantConfig(scaling=scaling, execution=execution)), x, gradient)
        for execution in ("emulation", "fp8")
    ]
    near = 2.0**-8 if scaling == "token" else 1e-4 if device == "cpu" else 2.0**-10
    check(results[1], {name: value.cpu() for name, value in results[0].items()}, near)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    x = torch.cat([inputs("random", 1, 20, 48), 100 * inputs("outliers", 1, 20, 48)])
    layer = HiF8Linear(make(48), QuantConfig())
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("execution", ["emulation", "fp8"])
def test_many_small_samples_share_their_products(execution: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch for all, with the results of one for each."""
    x = torch.cat([inputs("random", 3, 20, 48), 100 * inputs("outliers", 2, 20, 48)]).to(device, torch.bfloat16)
    gradient = inputs("random", 5, 20, 24).to(device, torch.bfloat16)

    def layer() -> HiF8Linear:
        return HiF8Linear(make(48, dtype=torch.bfloat16).to(device), QuantConfig(execution=execution))

    launched: list[int] = []

    def counted(*given: Any, **more: Any) -> torch.Tensor:
        launched.append(1)
        return matmul(*given, **more)

    monkeypatch.setattr("ospnext.quant.linear.matmul", counted)
    together = run(layer(), x, gradient)
    assert len(launched) == 2
    monkeypatch.setattr("ospnext.quant.linear.FEW_ROWS", 0)
    apart = run(layer(), x, gradient)
    assert len(launched) == 2 + 3 * 5
    for name, value in apart.items():
        near = 1e-4 * float(value.abs().max())
        torch.testing.assert_close(together[name].float(), value.float(), rtol=2**-7, atol=near)


def test_each_token_has_its_scale() -> None:
    x = inputs("random", 2, 20, 48)
    x[:, ::2] *= 1e4
    linear = make(48)
    by_token = HiF8Linear(linear, QuantConfig(scaling="token"))
    expected = rounded(x, x.abs().amax(-1, keepdim=True), 15.0)
    weight = rounded(linear.weight.detach(), linear.weight.detach().abs().max(), 15.0)
    torch.testing.assert_close(by_token(x).double(), expected @ weight.t() + linear.bias.double(), rtol=1e-5, atol=1e-5)
    exact = linear(x)[:, 1::2]
    error, plain = ((layer(x)[:, 1::2] - exact).norm() for layer in (by_token, HiF8Linear(linear, QuantConfig())))
    assert error < plain / 2  # small tokens do not pay for large ones


def test_running_largest_numbers() -> None:
    config = QuantConfig(scaling="running", headroom=2.0, decay=0.5)
    layer = HiF8Linear(make(48), config).train()
    x, gradient = inputs("random", 2, 20, 48), inputs("random", 2, 20, 24)
    first = run(layer, x, gradient)
    check(first, recipe(x.flatten(0, 1), layer.weight.detach(), layer.bias.detach(), gradient.flatten(0, 1))
          | {"y": first["y"], "x": first["x"]}, 1e-6)  # nothing known yet: this tensor's own  # fmt: skip
    seen = layer.get_buffer(SEEN).clone()
    assert seen.equal(torch.stack([x.abs().max(), gradient.abs().max()]))
    assert layer.get_buffer(AMAX).equal(torch.zeros(2))
    advance(layer, config.decay)
    assert layer.get_buffer(AMAX).equal(seen)
    layer(x / 8)
    advance(layer, config.decay)
    assert layer.get_buffer(AMAX).equal(seen / 2)
    # In use: twice the running number is scaled to 15, and what is far larger saturates at 28/15 of that.
    layer.eval()
    running = layer.get_buffer(AMAX)[0]
    expected = rounded(x.clamp(-running * 2 * 28 / 15, running * 2 * 28 / 15), 2 * running, 15.0)
    weight = rounded(layer.weight.detach(), layer.weight.detach().abs().max(), 15.0)
    torch.testing.assert_close(layer(x).double(), expected @ weight.t() + layer.bias.double(), rtol=1e-5, atol=1e-5)
    assert layer.get_buffer(SEEN).equal(torch.zeros(2))  # sampling notes nothing
    other = HiF8Linear(make(48), config)
    other.load_state_dict(layer.state_dict())
    assert other.eval()(x).equal(layer(x))


@pytest.mark.parametrize("scaling", ["tensor", "token", "running"])
def test_checkpointing_and_compiling_change_nothing(scaling: str) -> None:
    x, gradient = inputs("random", 2, 20, 48), inputs("random", 2, 20, 24)

    def fresh() -> HiF8Linear:
        layer = HiF8Linear(make(48), QuantConfig(scaling=scaling)).train()
        if scaling == "running":
            layer.get_buffer(AMAX).fill_(1.5)
        return layer

    plain = run(fresh(), x, gradient)
    repeated, compiled = fresh(), fresh()
    y = checkpoint(repeated, x, use_reentrant=False)
    y.backward(gradient)
    assert y.detach().equal(plain["y"])
    assert repeated.weight.grad.equal(plain["weight"])
    compiled.forward = torch.compile(compiled.forward, backend="aot_eager", fullgraph=True)
    got = run(compiled, x, gradient)
    for name, value in plain.items():
        assert got[name].equal(value), name
    if scaling == "running":
        for layer in (repeated, compiled):
            assert layer.get_buffer(SEEN).equal(torch.stack([x.abs().max(), gradient.abs().max()]))


@pytest.mark.parametrize("kind", [HiF8Linear, HiF8StoredLinear])
def test_adapters_stand_on_it(kind: type[HiF8Linear]) -> None:
    linear = make(48)
    model = nn.ModuleDict({"q": kind(linear, QuantConfig())})
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["q"], init_lora_weights=False), model)
    x, gradient = inputs("random", 2, 20, 48).requires_grad_(), inputs("random", 2, 20, 24)
    layer = model["q"]
    y = layer(x)
    base = HiF8Linear(linear, QuantConfig())(x)
    down, up = layer.lora_A["default"], layer.lora_B["default"]
    scaling = layer.scaling["default"]
    torch.testing.assert_close(y, base + scaling * up(down(x)), rtol=1e-5, atol=1e-5)
    y.backward(gradient)
    assert layer.base_layer.weight.grad is None
    expected = recipe(x.detach(), linear.weight.detach(), linear.bias.detach(), gradient)["x"]
    expected = expected + scaling * (gradient @ up.weight @ down.weight).detach().double()
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=1e-4)
    assert down.weight.grad.norm() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("execution", ["emulation", "fp8"])
def test_a_stored_weight_is_what_is_rounded_each_time(dtype: torch.dtype, execution: str) -> None:
    linear = make(48, dtype=dtype)
    config = QuantConfig(execution=execution)
    plain, stored = HiF8Linear(linear, config), HiF8StoredLinear(linear, config)
    x = inputs("random", 2, 20, 48).to(dtype).requires_grad_()
    assert stored(x).equal(plain(x))
    gradients = [torch.autograd.grad(layer(x).sum(), x)[0] for layer in (plain, stored)]
    assert gradients[0].equal(gradients[1])
    assert stored.weight.dtype is torch.uint8
    scale = stored.get_buffer(SCALE).clone()
    stored.to(torch.float16)
    assert stored.get_buffer(SCALE).equal(scale)
    assert stored.bias.dtype is torch.float16


@pytest.mark.parametrize("execution", ["emulation", "fp8", "ascend"])
def test_codes_may_come_in_another_dtype(execution: str) -> None:
    codes, scale = torch.arange(256, dtype=torch.uint8).view(16, 16), torch.tensor(0.5)
    codes = torch.where(hif8.decode(codes).abs() <= 15, codes, 0)
    config = QuantConfig(execution=execution)
    expected = hold_codes(codes, scale, config)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        held = hold_codes(codes.to(dtype), scale, config)
        assert held.values.dtype is expected.values.dtype
        assert held.values.float().equal(expected.values.float())
        assert held.inverse.equal(expected.inverse)


@pytest.mark.parametrize("execution", ["emulation", "fp8"])
def test_autocast_changes_the_outputs_dtype_alone(execution: str) -> None:
    layer, x = HiF8Linear(make(48), QuantConfig(execution=execution)), inputs("random", 2, 20, 48)
    gradient = inputs("random", 2, 20, 24).bfloat16()
    plain = run(layer, x, gradient)
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(leaf)
    assert y.dtype is torch.bfloat16
    # FP8's product is rounded before the bias is added to it, too.
    twice = 2**-8 * float(plain["y"].abs().max()) if execution == "fp8" else 1e-6
    torch.testing.assert_close(y.float(), plain["y"], rtol=2**-8, atol=twice)
    y.backward(gradient)
    torch.testing.assert_close(leaf.grad, plain["x"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad, plain["weight"], rtol=1e-5, atol=1e-5)


def test_names_are_a_linears_and_memory_is_shared() -> None:
    linear = make(48)
    layer = HiF8Linear(linear, QuantConfig())
    assert list(layer.state_dict()) == list(linear.state_dict())
    assert layer.weight is linear.weight
    layer(inputs("random", 2, 48)).sum().backward()
    assert linear.weight.grad is not None
    assert "hif8 emulation" in repr(layer)


def test_other_processes_numbers_count() -> None:
    linear, x = make(48), inputs("random", 1, 20, 48)
    x[0, 7] *= 50
    whole = HiF8Linear(linear, QuantConfig())(x)
    for rows in (slice(0, 5), slice(5, 20), slice(20, 20)):
        layer = HiF8Linear(linear, QuantConfig())
        layer.reduce_amax = lambda largest: torch.maximum(largest, x.abs().max())
        torch.testing.assert_close(layer(x[:, rows]), whole[:, rows], rtol=1e-6, atol=1e-6)


def test_nothing_and_nan() -> None:
    layer = HiF8Linear(make(48), QuantConfig())
    assert layer(torch.zeros(2, 3, 48)).equal(layer.bias.expand(2, 3, 24))
    assert layer(torch.zeros(1, 0, 48)).shape == (1, 0, 24)
    x = inputs("random", 2, 5, 48)
    x[0, 1, 2] = torch.inf
    assert layer(x)[0].isnan().any()
    assert layer(x)[1].isfinite().all()
    linear = make(48)
    nn.init.constant_(linear.weight, torch.nan)
    with pytest.raises(ValueError, match="NaN or infinity"):
        HiF8StoredLinear(linear, QuantConfig())
