"""The sparse transformer against a mask, against diffusers' Wan, and as a citizen of torch, diffusers and PEFT."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig

from ospnext import OSPNextModel, OSPNextTransformer3DModel
from ospnext.models.transformer import sinusoid
from ospnext.ops.attention import masked_dense_attention
from ospnext.ops.layout import Layout, segment_ids

SIZES: dict[str, Any] = {
    "text_len": 7,
    "in_dim": 4,
    "out_dim": 4,
    "dim": 24,
    "ffn_dim": 40,
    "freq_dim": 16,
    "text_dim": 12,
    "num_heads": 2,
    "num_layers": 4,
}
SPARSE: dict[str, Any] = {**SIZES, "skiparse_model_type": "dual_end"}


def build(config: dict[str, Any], **changes: Any) -> OSPNextTransformer3DModel:
    """A model whose every parameter is random: the zero head of a fresh one would hide the rest."""
    torch.manual_seed(0)
    model = OSPNextTransformer3DModel(**{**config, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def inputs(shape: tuple[int, int, int] = (2, 10, 14), batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple:
    """Latents, timesteps and text; (2, 10, 14) is a grid of 2 x 5 x 7 tokens."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, *shape, generator=generator, dtype=dtype)
    text = torch.randn(batch, 7, 12, generator=generator, dtype=dtype)
    return latents, torch.linspace(50, 950, batch), text


def outputs_and_gradients(
    model: torch.nn.Module, arguments: tuple
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    latents, timestep, text = (x.clone() for x in arguments)
    latents.requires_grad_()
    model.zero_grad()
    out = model(latents, timestep, text, return_dict=False)[0]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    (out * weight).sum().backward()
    assert latents.grad is not None
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing
    return out.detach(), latents.grad, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: tuple, theirs: tuple, tolerance: float) -> None:
    torch.testing.assert_close(ours[0], theirs[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(ours[1], theirs[1], atol=tolerance, rtol=tolerance)
    assert ours[2].keys() == theirs[2].keys()
    for name, gradient in ours[2].items():
        scale = theirs[2][name].abs().max().clamp(min=1)
        torch.testing.assert_close(gradient / scale, theirs[2][name] / scale, atol=tolerance, rtol=tolerance, msg=name)


def masked_twin(model: OSPNextTransformer3DModel, shape: tuple[int, int, int]) -> OSPNextTransformer3DModel:
    """The same weights with tokens always in row-major order and every block's attention dense under a mask."""
    twin = copy.deepcopy(model)
    grid = twin.grid(torch.empty(1, 1, *shape))
    for block, layout in zip(twin.blocks, model.layouts, strict=True):
        ids = segment_ids(grid, layout, model.config.sparse_ratio)
        block.self_attn.attend = lambda q, k, v, segments, ids=ids: masked_dense_attention(q, k, v, ids)
    twin.layouts = (Layout.FULL,) * len(model.layouts)
    return twin


@pytest.mark.parametrize("shape", [(2, 10, 14), (1, 18, 20), (3, 2, 2), (2, 4, 2)], ids=str)
@pytest.mark.parametrize("changes", [{}, {"sparse_ratio": 3}, {"skiparse_pattern": "1d"}], ids=str)
def test_sparse_model_equals_masked_attention(shape: tuple[int, int, int], changes: dict) -> None:
    model = build(SPARSE, **changes).double()
    arguments = inputs(shape, dtype=torch.float64)
    ours = outputs_and_gradients(model, arguments)
    # Norms and the time embedding are float32 by definition: float64 inputs still agree only to its rounding.
    assert_same(ours, outputs_and_gradients(masked_twin(model, shape), arguments), 2e-6)


def test_sparse_model_equals_masked_attention_with_dense_ends_at_video_size() -> None:
    model = build(SPARSE, num_layers=8, num_full_blocks=4, num_heads=1, dim=12)
    assert [layout.value for layout in model.layouts] == ["full"] * 2 + ["token", "group"] * 2 + ["full"] * 2
    shape = (1, 90, 160)  # 45 x 80 tokens: 720P
    arguments = inputs(shape, batch=1)
    with torch.no_grad():
        torch.testing.assert_close(
            model(*arguments).sample, masked_twin(model, shape)(*arguments).sample, atol=1e-5, rtol=1e-5
        )


def test_sparsity_is_not_the_dense_model() -> None:
    dense, sparse = build(SIZES), build(SPARSE)
    with torch.no_grad():
        assert (dense(*inputs()).sample - sparse(*inputs()).sample).abs().max() > 1e-2


WAN_NAMES = [  # Wan2.1's name -> diffusers' name
    (r"text_embedding\.0", "condition_embedder.text_embedder.linear_1"),
    (r"text_embedding\.2", "condition_embedder.text_embedder.linear_2"),
    (r"time_embedding\.0", "condition_embedder.time_embedder.linear_1"),
    (r"time_embedding\.2", "condition_embedder.time_embedder.linear_2"),
    (r"time_projection\.1", "condition_embedder.time_proj"),
    (r"head\.modulation", "scale_shift_table"),
    (r"head\.head", "proj_out"),
    (r"\.modulation", ".scale_shift_table"),
    (r"\.norm3\.", ".norm2."),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"(attn\d)\.([qkv])\.", r"\1.to_\2."),
    (r"(attn\d)\.o\.", r"\1.to_out.0."),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
]


def diffusers_name(name: str) -> str:
    for pattern, replacement in WAN_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def test_all_full_is_diffusers_wan() -> None:
    model = build(SIZES)
    wan = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=16,
        ffn_dim=40,
        num_layers=4,
    )
    wan.load_state_dict({diffusers_name(name): value for name, value in model.state_dict().items()})
    ours = outputs_and_gradients(model, inputs())
    out, on_input, gradients = outputs_and_gradients(wan, inputs())
    assert_same(ours, (out, on_input, {name: gradients[diffusers_name(name)] for name in ours[2]}), 1e-5)


def test_parameter_names_are_wans() -> None:
    names = {re.sub(r"blocks\.\d+", "blocks.i", name) for name in build(SPARSE).state_dict()}
    attention = [f"{x}.{y}" for x in "qkvo" for y in ("weight", "bias")] + ["norm_q.weight", "norm_k.weight"]
    pairs = [
        f"{x}.{y}" for x in ("patch_embedding", "text_embedding.0", "text_embedding.2") for y in ("weight", "bias")
    ]
    pairs += [
        f"{x}.{y}" for x in ("time_embedding.0", "time_embedding.2", "time_projection.1") for y in ("weight", "bias")
    ]
    block = ["modulation", *(f"{x}.{y}" for x in ("norm3", "ffn.0", "ffn.2") for y in ("weight", "bias"))]
    block += [f"{x}.{y}" for x in ("self_attn", "cross_attn") for y in attention]
    assert names == {*pairs, "head.modulation", "head.head.weight", "head.head.bias", *(f"blocks.i.{x}" for x in block)}
    assert not list(build(SPARSE).buffers())


def test_sizes_of_the_published_models() -> None:
    with torch.device("meta"):
        small = OSPNextModel(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
        large = OSPNextModel(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
    assert sum(p.numel() for p in small.parameters()) == 1_418_996_800
    assert sum(p.numel() for p in large.parameters()) == 14_288_491_584


@pytest.fixture
def poisoned_memory() -> Any:
    """Fresh tensors hold NaN until somebody writes to them."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.parametrize("from_meta", [False, True])
def test_every_parameter_is_initialised(poisoned_memory: None, from_meta: bool) -> None:
    if from_meta:
        with torch.device("meta"):
            model = OSPNextTransformer3DModel(**SPARSE)
        model.to_empty(device="cpu")
        assert all(p.isnan().all() for p in model.parameters())
        model.init_weights()
    else:
        model = OSPNextTransformer3DModel(**SPARSE)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if name.endswith("bias") or name == "head.head.weight":
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert 0.01 < parameter.std() < 0.5, name
    assert not model(*inputs()).sample.any()  # zero velocity at the start


def test_a_fresh_model_learns() -> None:
    torch.manual_seed(0)
    model = OSPNextTransformer3DModel(**SPARSE)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    latents, timestep, text = inputs()
    losses = []
    for _ in range(12):
        loss = (model(latents, timestep, text).sample - latents).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_gradient_checkpointing_changes_nothing() -> None:
    model = build(SPARSE)
    plain = outputs_and_gradients(model, inputs())
    model.enable_gradient_checkpointing()
    calls = []
    handles = [block.register_forward_pre_hook(lambda *_: calls.append(1)) for block in model.blocks]
    checkpointed = outputs_and_gradients(model, inputs())
    for handle in handles:
        handle.remove()
    assert len(calls) == 2 * len(model.blocks)  # every block ran again in the backward pass
    assert checkpointed[0].equal(plain[0])
    assert all(gradient.equal(plain[2][name]) for name, gradient in checkpointed[2].items())


def test_sampling_first_then_training() -> None:
    model = build(SPARSE)
    arguments = inputs((1, 22, 26), batch=1)  # a grid of no other test: nothing is cached yet
    with torch.inference_mode():
        sampled = model(*arguments).sample
    assert outputs_and_gradients(model, arguments)[0].equal(sampled)


def test_bf16_is_close_to_fp32() -> None:
    model = build(SPARSE)
    with torch.no_grad():
        exact = model(*inputs()).sample
        half = model.bfloat16()(*inputs()).sample
    assert half.dtype is torch.float32
    assert (half - exact).norm() / exact.norm() < 0.03


def test_autocast_is_close_to_fp32() -> None:
    model = build(SPARSE)
    exact = outputs_and_gradients(model, inputs())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = outputs_and_gradients(model, inputs())
    assert mixed[0].dtype is torch.float32
    assert (mixed[0] - exact[0]).norm() / exact[0].norm() < 0.03
    assert (mixed[1] - exact[1]).norm() / exact[1].norm() < 0.05


def test_samples_of_a_batch_do_not_meet() -> None:
    model = build(SPARSE)
    latents, timestep, text = inputs(batch=3)
    with torch.no_grad():
        together = model(latents, timestep, text).sample
        alone = model(latents[1:2], timestep[1:2], text[1:2]).sample
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)


def test_patches_may_span_frames() -> None:
    model = build(SPARSE, patch_size=(2, 1, 3))
    latents, timestep, text = inputs((4, 3, 6))
    assert model(latents, timestep, text).sample.shape == latents.shape


@pytest.mark.parametrize("shape", [(2, 9, 14), (2, 10, 13), (0, 10, 14)])
def test_latents_that_are_no_whole_patches_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"latents of {shape} (T, H, W) are no multiple of the patch")):
        build(SPARSE)(*inputs(shape))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_heads": 5},
        {"dim": 22, "num_heads": 2},
        {"num_layers": 5},
        {"freq_dim": 15},
        {"patch_size": (1, 2, 0)},
        {"patch_size": (-1, 2, 2)},
    ],
)
def test_sizes_that_do_not_go_together_are_refused(changes: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        OSPNextTransformer3DModel(**{**SPARSE, **changes})


def test_config_and_weights_survive_a_folder(tmp_path: Path) -> None:
    model = build(SPARSE, num_layers=8, num_full_blocks=4, sparse_ratio=3, skiparse_pattern="1d", patch_size=(1, 2, 1))
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["_class_name"] == "OSPNextTransformer3DModel"
    again, info = OSPNextTransformer3DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    plain = {k: v for k, v in json.loads(model.to_json_string()).items() if not k.startswith("_")}
    assert {k: v for k, v in json.loads(again.to_json_string()).items() if not k.startswith("_")} == plain
    assert again.layouts == model.layouts
    for name, value in model.state_dict().items():
        assert again.state_dict()[name].equal(value), name
    half = OSPNextTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_released_name_is_the_same_class() -> None:
    assert OSPNextModel is OSPNextTransformer3DModel


def test_a_copy_is_independent() -> None:
    model = build(SPARSE)
    twin = copy.deepcopy(model)
    twin.set_attention_kernel("sdpa")
    assert (model.attention_kernel, twin.attention_kernel) == ("auto", "sdpa")
    with torch.no_grad():
        assert twin(*inputs()).sample.equal(model(*inputs()).sample)
        twin.head.head.bias.add_(1)
        assert not twin(*inputs()).sample.equal(model(*inputs()).sample)


def test_kernels_are_chosen_by_name() -> None:
    model = build(SPARSE)
    model.set_attention_kernel("sdpa")
    kernels = {a.attend.kernel for block in model.blocks for a in (block.self_attn, block.cross_attn)}
    assert kernels == {"sdpa"}
    with pytest.raises(ValueError, match="'flash9' is not known"):
        model.set_attention_kernel("flash9")
    assert model.attention_kernel == "sdpa"
    model.set_attention_kernel("flash2")
    with pytest.raises(ValueError, match=r"'flash2' .*use auto"):
        model(*inputs())


def test_lora_trains_saves_and_loads(tmp_path: Path) -> None:
    base = build(SPARSE)
    model = copy.deepcopy(base)
    targets = [f"{attention}.{x}" for attention in ("self_attn", "cross_attn") for x in "qkvo"]
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights="gaussian"))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 8 * len(model.blocks)
    assert all(".lora_" in name for name in trainable)
    with torch.no_grad():
        before = base(*inputs()).sample
        assert model(*inputs()).sample.equal(before)  # B starts at zero
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        adapted = model(*inputs()).sample
    assert not adapted.equal(before)
    model.save_lora_adapter(tmp_path, weight_name="lora.safetensors")
    base.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True, weight_name="lora.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(base(*inputs()).sample, adapted, atol=1e-6, rtol=1e-6)
        base.disable_lora()
        torch.testing.assert_close(base(*inputs()).sample, before)


@pytest.fixture
def fresh_compiler() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_blocks_compile_whole(fresh_compiler: None) -> None:
    """One block is one graph, without a break; its gradients are the eager ones."""
    model = build(SPARSE)
    eager = outputs_and_gradients(model, inputs())
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert_same(outputs_and_gradients(model, inputs()), eager, 1e-6)


def test_blocks_compile_once_a_layout(fresh_compiler: None) -> None:
    """TOKEN and GROUP of whole tiles have the same segments: one graph serves all sparse blocks."""
    graphs = []

    def count(graph: torch.fx.GraphModule, example_inputs: list) -> Any:
        graphs.append(graph)
        return graph.forward

    model = build(SPARSE, num_layers=8, num_full_blocks=4)
    model.compile_repeated_blocks(backend=count, fullgraph=True)
    with torch.no_grad():
        model(*inputs((1, 16, 16)))
        assert len(graphs) == 2  # dense and sparse
        model(*inputs((1, 16, 16)))
    assert len(graphs) == 2


def test_sinusoid_is_cosines_then_sines() -> None:
    out = sinusoid(torch.tensor([0.0, 10.0]), 4)
    expected = torch.tensor([[1.0, 1.0, 0.0, 0.0], [10.0, 0.1, 10.0, 0.1]])
    expected[1] = torch.cat([expected[1, :2].cos(), expected[1, 2:].sin()])
    torch.testing.assert_close(out, expected)
    assert out.dtype is torch.float32
