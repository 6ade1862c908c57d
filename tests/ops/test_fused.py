"""The plain forms hold to float64, the fused ones to the plain ones, and a model to itself with either."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.ops import fused
from ospnext.ops.layout import Grid
from ospnext.ops.rope import apply_rope, rope_table

SHAPES = [(1, 7, 48), (2, 3 * 5 * 7, 96), (3, 33, 1536)]  # batch, tokens, dim: none of them a power of two
HEADS = 2
EPS = 1e-6
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="the fused forms run on CUDA")


def tensors(batch: int, tokens: int, dim: int, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    modulation = random(batch, 6, dim).to(device)  # a chunk of it is strided, as in the model
    shift, scale, gate = modulation.chunk(6, dim=1)[:3]
    table = rope_table(Grid(1, 1, tokens), dim // HEADS, device)
    x, y = (3 * random(batch, tokens, dim) + 1).to(device, dtype), random(batch, tokens, dim).to(device, dtype)
    weight = (1 + 0.1 * random(dim)).to(device, dtype)
    return {"x": x, "y": y, "shift": shift, "scale": scale, "gate": gate, "weight": weight, "table": table}


def results(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Everything of ``ops.fused`` on one set of tensors."""
    x, y, weight = t["x"], t["y"], t["weight"]
    gated, gated_norm = fused.add_norm(x, y, t["gate"], t["scale"], t["shift"], EPS)
    plain, plain_norm = fused.add_norm(x, y, None, weight, 0.5 * weight, EPS)
    layer = nn.Linear(x.shape[-1], 24, device=x.device, dtype=x.dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.sin(torch.arange(layer.weight.numel())).view_as(layer.weight) / 7)
        layer.bias.copy_(torch.cos(torch.arange(24)))
    return {
        "norm": fused.norm(x, t["scale"], t["shift"], EPS),
        "add": fused.add(x, y),
        "add gated": fused.add(x, y, t["gate"]),
        "add_norm: sum": gated,
        "add_norm: norm": gated_norm,
        "add_norm of vectors: sum": plain,
        "add_norm of vectors: norm": plain_norm,
        "rms_norm": fused.rms_norm(x, weight, EPS),
        "norm_rope": fused.norm_rope(x, weight, t["table"], EPS).flatten(-2),
        "linear_gelu": fused.linear_gelu(x, layer),
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_forms_equal_float64(shape: tuple[int, int, int]) -> None:
    t = tensors(*shape, "cpu", torch.float32)
    got = results(t)
    x, y, weight = t["x"].double(), t["y"].double(), t["weight"].double()
    shift, scale, gate = (t[name].double() for name in ("shift", "scale", "gate"))
    dim = (shape[-1],)
    normed = F.rms_norm(x, dim, weight, EPS)
    expected = {
        "norm": F.layer_norm(x, dim, eps=EPS) * scale + shift,
        "add": x + y,
        "add gated": x + y * gate,
        "add_norm: sum": x + y * gate,
        "add_norm: norm": F.layer_norm(x + y * gate, dim, eps=EPS) * scale + shift,
        "add_norm of vectors: sum": x + y,
        "add_norm of vectors: norm": F.layer_norm(x + y, dim, weight, 0.5 * weight, EPS),
        "rms_norm": normed,
        "norm_rope": apply_rope(normed.float().unflatten(-1, (HEADS, -1)), t["table"]).flatten(-2).double(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-5, atol=1e-5, msg=name)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 130, 5120)])
def test_fused_forms_equal_the_plain_ones(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    t = tensors(*shape, "cuda", dtype)
    plain = results(t)  # gradients are on
    with torch.no_grad():
        got = results(t)
    for name, value in plain.items():
        assert got[name].dtype is value.dtype, name
        assert got[name].shape == value.shape, name
        # One rounding to the dtype where the plain form has two; a product in tf32 or bf16 adds up in another order.
        near = 2 * torch.finfo(dtype).eps if name != "linear_gelu" else max(2e-3, 4 * torch.finfo(dtype).eps)
        error = (got[name].double() - value.double()).norm() / value.double().norm()
        assert error < near, f"{name}: {error:.2e}"


@needs_cuda
@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_samples_what_it_was_trained_as(compiled: bool) -> None:
    torch.manual_seed(0)
    model = OSPNextTransformer3DModel(
        in_dim=4, out_dim=4, dim=96, ffn_dim=160, freq_dim=32, text_dim=24, num_heads=2, num_layers=8,
        skiparse_model_type="dual_end", num_full_blocks=4,
    )  # fmt: skip
    nn.init.normal_(model.head.head.weight, std=0.1)
    model.to("cuda", torch.bfloat16)
    latents, text = torch.randn(2, 4, 3, 10, 14, device="cuda"), torch.randn(2, 6, 24, device="cuda")
    arguments = (latents, torch.tensor([700.0, 30.0], device="cuda"), text)
    plain = model(*arguments).sample.detach()
    if compiled:
        model.compile_repeated_blocks(fullgraph=True)
    with torch.no_grad():
        sampled = model(*arguments).sample
    assert (sampled - plain).norm() / plain.norm() < 1e-2


@pytest.mark.parametrize(("patch", "sizes"), [((1, 2, 2), (3, 6, 10)), ((2, 1, 3), (4, 5, 9))])
def test_patches_are_the_convolutions(patch: tuple[int, int, int], sizes: tuple[int, int, int]) -> None:
    layer = nn.Conv3d(5, 7, patch, patch)
    latents = torch.randn(2, 5, *sizes)
    tokens = fused.embed_patches(latents, layer)
    torch.testing.assert_close(tokens, layer(latents).flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)
    assert tokens.is_contiguous()
    assert fused.embed_patches(latents, nn.Sequential(layer)).equal(layer(latents).flatten(2).transpose(1, 2))


def test_a_layer_in_a_linears_place_is_called() -> None:
    class Doubling(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    layer, x = Doubling(6, 5), torch.randn(2, 3, 6)
    with torch.no_grad():
        assert fused.linear_gelu(x, layer).equal(F.gelu(layer(x), approximate="tanh"))


def test_the_report_names_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused.describe_fused(torch.device("cpu")) == "plain"
    monkeypatch.setattr(fused, "TRITON", True)
    assert fused.describe_fused(torch.device("cuda")) == "triton, fused"
    monkeypatch.setattr(fused, "TRITON", False)
    assert "Triton is not installed" in fused.describe_fused(torch.device("cuda"))
