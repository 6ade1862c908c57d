"""A whole model with HiF8 put on it: which layers, what they compute, and what stays."""

import pytest
import torch
from peft import LoraConfig
from torch import nn

from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.ops import hif8
from ospnext.ops.attention import Attend, attend
from ospnext.parallel.fsdp import unsound
from ospnext.quant.apply import NonFiniteError, describe, matching, quantize
from ospnext.quant.attention import HiF8Attend
from ospnext.quant.config import QuantConfig, choose_execution
from ospnext.quant.linear import HiF8Linear, HiF8StoredLinear
from ospnext.quant.report import error_table, layer_errors
from ospnext.quant.running import AMAX, SEEN, advance, observed

SETTINGS = {
    "in_dim": 4,
    "out_dim": 4,
    "dim": 32,
    "ffn_dim": 64,
    "freq_dim": 16,
    "text_dim": 24,
    "num_heads": 2,
    "num_layers": 3,
    "skiparse_model_type": "uniform",
}


def make(seed: int = 0) -> OSPNextTransformer3DModel:
    torch.manual_seed(seed)
    model = OSPNextTransformer3DModel(**SETTINGS)
    nn.init.normal_(model.head.head.weight, std=0.1)
    return model.eval()


def arguments(batch: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(batch, 4, 2, 8, 12, generator=generator)
    return latents, torch.full((batch,), 600.0), torch.randn(batch, 6, 24, generator=generator)


def loss(model: nn.Module, batch: int = 1) -> torch.Tensor:
    return model(*arguments(batch)).sample.square().mean()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_the_blocks_linears_and_attentions_and_nothing_else() -> None:
    model, plain = make(), make()
    names = quantize(model, QuantConfig())
    linears = [name for name, module in model.named_modules() if isinstance(module, HiF8Linear)]
    each = ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k"]
    each += ["cross_attn.v", "cross_attn.o", "ffn.0", "ffn.2"]
    assert linears == [f"blocks.{i}.{name}" for i in range(3) for name in each]
    assert len(names) == 30 + 6
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(model.state_dict()[name].equal(value) for name, value in plain.state_dict().items())
    assert (
        describe(model) == "hif8: 30 linears (emulation, scale by tensor), 6 attentions (inputs rounded, plain kernel)"
    )
    assert describe(plain) == "none"
    with torch.no_grad():
        error = (model(*arguments()).sample - plain(*arguments()).sample).norm() / plain(*arguments()).sample.norm()
    assert 0.005 < error < 0.2


def test_filters_keep_and_refuse() -> None:
    model = make()
    names = quantize(model, QuantConfig(keep=("blocks.0.*", "blocks.*.ffn.2"), attention=False))
    assert not any(name.startswith("blocks.0.") or name.endswith("ffn.2") for name in names)
    assert len(names) == 2 * 9
    assert isinstance(model.blocks[1].self_attn.attend, Attend)
    assert not isinstance(model.blocks[1].self_attn.attend, HiF8Attend)
    with pytest.raises(ValueError, match="already"):
        quantize(model, QuantConfig())
    with pytest.raises(ValueError, match=r"block\.9"):
        quantize(make(), QuantConfig(keep=("block.9*",)))
    attentions = [f"blocks.{i}.{kind}_attn" for i in range(3) for kind in ("self", "cross")]
    assert matching(make(), QuantConfig(linears=())) == attentions
    with pytest.raises(ValueError, match="scale_max_forward"):
        QuantConfig(scale_max_forward=0)


def test_attention_rounds_its_inputs_and_their_gradients() -> None:
    torch.manual_seed(0)
    q, k, v, gradient = (torch.randn(2, 12, 2, 8) for _ in range(4))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    HiF8Attend(Attend(), QuantConfig())(*leaves, segments=(4, 8)).backward(gradient)

    def whole(x: torch.Tensor, scale_max: float) -> torch.Tensor:
        largest = x.abs().amax((1, 2, 3), keepdim=True).float()
        return hif8.round(x.float() * (scale_max / largest)).double() * (largest / scale_max).double()

    plain = [whole(t, 15.0).requires_grad_() for t in (q, k, v)]
    out = attend(*plain, segments=(4, 8))
    torch.testing.assert_close(
        HiF8Attend(Attend(), QuantConfig())(q, k, v, (4, 8)).double(), out.detach(), rtol=1e-5, atol=1e-5
    )
    out.backward(gradient.double())
    for leaf, reference in zip(leaves, plain, strict=True):
        expected = whole(reference.grad, 224.0)
        off = (leaf.grad.double() - expected).abs() > 1e-4 * expected.abs().max()
        assert off.float().mean() < 0.01  # a rounding of float32 moves a number across a midpoint now and then


@pytest.mark.parametrize("scaling", ["tensor", "running"])
@pytest.mark.parametrize("way", ["checkpointed", pytest.param("compiled", marks=pytest.mark.long)])
def test_checkpointed_and_compiled_blocks_have_the_same_gradients(way: str, scaling: str) -> None:
    results = []
    for changed in (False, True):
        model = make().train()
        quantize(model, QuantConfig(scaling=scaling))
        if changed and way == "checkpointed":
            model.enable_gradient_checkpointing()
        elif changed:
            model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        for _ in range(2):  # of running numbers the second step uses the first one's
            model.zero_grad()
            loss(model).backward()
        results.append(gradients(model))
    assert len(results[0]) == len(make().state_dict())
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_running_numbers_advance_with_training_passes_only() -> None:
    model = make().train()
    quantize(model, QuantConfig(scaling="running"))
    loss(model).backward()
    layer, attention = model.blocks[1].ffn[0], model.blocks[1].self_attn
    seen, three = layer.get_buffer(SEEN).clone(), attention.get_buffer(SEEN).clone()
    assert (seen > 0).all()
    assert (three > 0).all()
    assert layer.get_buffer(AMAX).equal(torch.zeros(2))
    advance(model, 0.5)
    assert layer.get_buffer(AMAX).equal(seen)
    assert attention.get_buffer(AMAX).equal(three)
    model.eval()
    with torch.no_grad():
        model(*arguments())
    assert layer.get_buffer(AMAX).equal(seen)
    assert layer.get_buffer(SEEN).equal(torch.zeros(2))
    advance(model, 0.5)
    assert layer.get_buffer(AMAX).equal(seen / 2)


def test_observed_numbers_are_the_largest_of_all_passes() -> None:
    model = make().eval()
    quantize(model, QuantConfig(scaling="running"))
    x, *rest = arguments()
    attention = model.blocks[1].self_attn
    given: list[list[torch.Tensor]] = []
    inner = attention.attend
    attention.attend = lambda *qkv_segments: given.append(list(qkv_segments[:3])) or inner(*qkv_segments)
    with torch.no_grad(), observed(model):
        before = model(x, *rest)[0]
        model(x / 4, *rest)
    attention.attend = inner
    assert not any(module.training for module in model.modules())
    assert attention.get_buffer(AMAX).equal(torch.stack([torch.stack(t).abs().max() for t in zip(*given, strict=True)]))
    tensor = make().eval()
    quantize(tensor, QuantConfig())
    with torch.no_grad():
        torch.testing.assert_close(before, tensor(x, *rest)[0])  # while they look, layers scale as without them
        after = model(x, *rest)[0]
    plain = make().eval()(x, *rest)[0].detach()
    assert not after.equal(before)  # there is headroom now
    assert (after - plain).norm() < 2 * (before - plain).norm()


def test_adapters_train_on_a_quantised_model() -> None:
    for stored in (False, True):
        model = make().train()
        quantize(model, QuantConfig(), stored=matching(model, QuantConfig()) if stored else ())
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=2, target_modules=r"blocks\.\d\.self_attn\.[qkvo]", init_lora_weights=False))
        before = loss(model)
        before.backward()
        found = gradients(model)
        assert len(found) == 3 * 4 * 2
        assert all(gradient.norm() > 0 for gradient in found.values())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in found:
                    parameter -= 0.01 * found[name] / found[name].norm()
            assert loss(model) < before


def test_training_lowers_the_loss_of_both() -> None:
    """HiF8 and plain numbers go the same way: a few steps on one sample."""
    curves = []
    for quantised in (False, True):
        model = make().train()
        if quantised:
            quantize(model, QuantConfig())
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
        curve = []
        for _ in range(12):
            optimiser.zero_grad()
            value = (model(*arguments()).sample - arguments()[0]).square().mean()
            value.backward()
            optimiser.step()
            curve.append(float(value.detach()))
        curves.append(curve)
    assert curves[1][-1] < 0.8 * curves[1][0]
    assert abs(curves[1][-1] - curves[0][-1]) < 0.1 * curves[0][0]


def test_nan_is_traced_to_its_layer() -> None:
    model = make()
    quantize(model, QuantConfig())
    with torch.no_grad():
        model.blocks[1].ffn[0].weight[3, 4] = torch.nan
        with pytest.raises(NonFiniteError, match=r"blocks\.1\.ffn\.0: its weight holds NaN"):
            model(*arguments())
    latents, *rest = arguments()
    latents[0, 0, 0, 0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"blocks\.0\.self_attn\.q: its input"):
        make_quantised()(latents, *rest)
    model = make_quantised().train()
    loss(model).backward()
    assert unsound(dict(model.named_parameters())) == ""
    model.blocks[2].self_attn.o.weight.grad[0, 0] = torch.inf
    assert unsound(dict(model.named_parameters())) == "blocks.2.self_attn.o.weight"


def make_quantised() -> OSPNextTransformer3DModel:
    model = make()
    quantize(model, QuantConfig())
    return model


def test_the_report_names_the_worst_layers() -> None:
    model = make()
    with torch.no_grad():
        model.blocks[2].ffn[0].weight[0, 0] = 200.0  # an outlier, for which all others pay
    quantize(model, QuantConfig())
    attends = [block.self_attn.attend for block in model.blocks]
    errors = layer_errors(model, lambda: model(*arguments()))
    assert len(errors) == 36
    worst = max(errors, key=lambda error: error.relative)
    assert all(0 < error.relative < 1 for error in errors)
    table = error_table(errors, worst=5).splitlines()
    assert len(table) == 7
    assert table[1].startswith(worst.name)
    assert table[-1].startswith("36 layers")
    assert [block.self_attn.attend for block in model.blocks] == attends
    with pytest.raises(ValueError, match="no quantised layer"):
        layer_errors(make(), lambda: None)


def test_stored_models_are_half_as_large_and_the_same() -> None:
    plain, stored = make_quantised(), make()
    quantize(stored, QuantConfig(), stored=matching(stored, QuantConfig()))
    assert sum(isinstance(module, HiF8StoredLinear) for module in stored.modules()) == 30
    with torch.no_grad():
        assert stored(*arguments()).sample.equal(plain(*arguments()).sample)


def test_execution_is_chosen_by_device() -> None:
    assert choose_execution("auto", torch.device("cpu")) == "emulation"
    assert choose_execution("fp8", torch.device("cpu")) == "fp8"
    with pytest.raises(ValueError, match="Ascend"):
        choose_execution("ascend", torch.device("cpu"))
