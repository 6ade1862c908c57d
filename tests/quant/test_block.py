"""A prepared model samples what it sampled before, number for number on a CPU, and falls back where it must."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.ops import attention8, hif8
from ospnext.ops.fp8 import E4M3
from ospnext.quant import block as quant_block
from ospnext.quant.apply import quantize
from ospnext.quant.config import QuantConfig, Scaling
from ospnext.quant.linear import HiF8Linear, HiF8StoredLinear
from ospnext.quant.running import observed

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs FP8 tensor cores"
)
SETTINGS: dict[str, Any] = {"dim": 64, "ffn_dim": 112, "freq_dim": 16, "text_dim": 24, "num_heads": 2, "num_layers": 4}


def made(scaling: Scaling = "tensor", device: str = "cpu", **quant: Any) -> OSPNextTransformer3DModel:
    torch.manual_seed(0)
    model = OSPNextTransformer3DModel(**SETTINGS, skiparse_model_type="uniform")
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.2)
    model.to(device, torch.float32 if device == "cpu" else torch.bfloat16).eval()
    quantize(model, QuantConfig(scaling=scaling, execution="fp8", **quant))
    if scaling == "running":
        with torch.no_grad(), observed(model):
            model(*inputs(device))
    return model


def inputs(device: str = "cpu", batch: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(batch, 16, 2, 6, 10, generator=generator), torch.randn(batch, 7, 24, generator=generator)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return x.to(device, dtype), torch.full((batch,), 300.0, device=device), text.to(device, dtype)


@torch.no_grad()
def sample(model: Any, device: str = "cpu", batch: int = 2) -> torch.Tensor:
    return model(*inputs(device, batch)).sample


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("scaling", ["tensor", "token", "running"])
@pytest.mark.parametrize("batch", [1, 2])
def test_prepared_is_what_it_was(scaling: Scaling, attention: bool, batch: int) -> None:
    model = made(scaling, attention=attention)
    before = sample(model, batch=batch)
    quant_block.prepare(model)
    linears = [m for m in model.modules() if isinstance(m, HiF8StoredLinear)]
    assert len(linears) == 10 * len(model.blocks)
    assert all(m.weight.dtype is E4M3 for m in linears)
    assert all(quant_block.fuses(block) for block in model.blocks)
    torch.testing.assert_close(sample(model, batch=batch), before, rtol=1e-5, atol=1e-5)


@needs_cuda
@pytest.mark.parametrize("scaling", ["tensor", "token", "running"])
def test_on_tensor_cores(scaling: Scaling, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention rounds more there (``ops/attention8.py``); without it a sum's order and GELU are all that differs."""
    monkeypatch.setattr(attention8, "SHORTEST", 0)
    model = made(scaling, "cuda", attention=False)
    before = sample(model, "cuda")
    quant_block.prepare(model)
    after = sample(model, "cuda")
    assert (after - before).norm() < 0.1 * before.norm()
    eight = made(scaling, "cuda")
    quant_block.prepare(eight)
    assert (sample(eight, "cuda") - before).norm() < (0.1 if attention8.why_not(torch.device("cuda"), 32) else 0.2) * (
        before.norm()
    )


def test_kept_layers_and_adapters_take_the_plain_way() -> None:
    model = made(keep=("blocks.1.ffn.0",))
    before = sample(model)
    quant_block.prepare(model)
    assert [quant_block.fuses(block) for block in model.blocks] == [True, False, True, True]
    torch.testing.assert_close(sample(model), before, rtol=1e-5, atol=1e-5)
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["blocks.0.self_attn.q"]))
    assert not quant_block.fuses(model.blocks[0])
    torch.testing.assert_close(sample(adapted), before, rtol=1e-5, atol=1e-5)


def test_running_scales_that_never_ran_are_refused() -> None:
    model = OSPNextTransformer3DModel(**SETTINGS)
    quantize(model, QuantConfig(scaling="running", execution="fp8"))
    with pytest.raises(ValueError, match="no running numbers: train with it, have"):
        quant_block.prepare(model)


def test_emulation_is_left_alone() -> None:
    torch.manual_seed(0)
    model = OSPNextTransformer3DModel(**SETTINGS).eval()
    quantize(model, QuantConfig())
    dtypes = {name: p.dtype for name, p in copy.deepcopy(model).named_parameters()}
    quant_block.prepare(model)
    assert {name: p.dtype for name, p in model.named_parameters()} == dtypes
    assert not any("forward" in vars(block) for block in model.blocks)
    assert sample(model).isfinite().all()


def test_saved_it_is_a_checkpoint_in_8_bits() -> None:
    model, stored = made(), made()
    names = [name for name, module in stored.named_modules() if isinstance(module, HiF8Linear)]
    codes = {name: HiF8StoredLinear(stored.get_submodule(name), stored.get_submodule(name).quant) for name in names}
    quant_block.prepare(model)
    saved = model.state_dict()
    for name, linear in codes.items():
        numbers, want = (hif8.decode(codes) for codes in (saved[f"{name}.weight"], linear.weight))
        assert saved[f"{name}.weight"].dtype is torch.uint8
        assert saved[f"{name}.weight_scale"].equal(linear.weight_scale)
        torch.testing.assert_close(numbers, want, rtol=0, atol=2.0**-14)
