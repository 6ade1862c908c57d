"""Adapters on a model: what they change, and what they are refused for."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ospnext.checkpoints.load import load_transformer
from ospnext.checkpoints.lora import (
    NewAdapter,
    WithAdapter,
    adapter_disabled,
    adapter_names,
    adapter_of,
    leave_casting_to_autocast,
    linear_shapes,
    put_adapter,
)
from ospnext.checkpoints.lora_files import Adapter, Pair, read_adapter, write_adapter
from ospnext.checkpoints.read import CheckpointError
from ospnext.checkpoints.save import save_transformer
from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.prepare.quantize import quantize_transformer
from ospnext.quant.config import QuantConfig
from ospnext.sections import LoraConfig

TARGETS = ("self_attn.q", "cross_attn.v", "ffn.2")
NEW = NewAdapter(4, 8.0, TARGETS, 3)


def filled(model: OSPNextTransformer3DModel, new: NewAdapter = NEW) -> Adapter:
    """A random adapter for a model."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    shapes = linear_shapes(model)
    sizes = new.sizes(shapes)
    return Adapter(
        {n: Pair(randn(s.rank, shapes[n][1]), randn(shapes[n][0], s.rank), s.alpha) for n, s in sizes.items()}
    )


def inputs() -> tuple[torch.Tensor, ...]:
    """Latents, timesteps, text."""
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(1, 16, 2, 8, 12, generator=generator),
        torch.tensor([300.0]),
        torch.randn(1, 5, 24, generator=generator),
    )


def velocity(model: OSPNextTransformer3DModel) -> torch.Tensor:
    """What a model makes of the inputs."""
    with torch.no_grad():
        return model(*inputs()).sample


@pytest.fixture
def folder(transformer: OSPNextTransformer3DModel, tmp_path: Path) -> Path:
    """The model in files."""
    save_transformer(transformer, tmp_path / "base")
    return tmp_path / "base"


def load(folder: Path, source: NewAdapter | Adapter | None = None, **options: object) -> OSPNextTransformer3DModel:
    return load_transformer(folder, adapters=[] if source is None else [WithAdapter(source)], **options)


def test_a_new_adapter_changes_nothing_and_is_all_that_is_trained(folder: Path) -> None:
    model = load(folder, NEW)
    assert torch.equal(velocity(model), velocity(load(folder)))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == adapter_names(model)
    assert len(trained) == 2 * 4 * len(TARGETS)
    model.train()(*inputs()).sample.square().sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert with_gradient == {name for name in trained if ".lora_B." in name}  # A's is zero while B is


def test_an_adapter_adds_its_product(folder: Path, transformer: OSPNextTransformer3DModel) -> None:
    adapter = filled(transformer)
    by_hand = load(folder)
    with torch.no_grad():
        for name, pair in adapter.pairs.items():
            by_hand.get_submodule(name).weight += 8 / 4 * pair.up @ pair.down
    model = load(folder, adapter)
    assert torch.allclose(velocity(model), velocity(by_hand), atol=2e-5)
    with adapter_disabled(model):
        assert torch.equal(velocity(model), velocity(load(folder)))
    assert not torch.allclose(velocity(model), velocity(load(folder)), atol=1e-2)


def test_ranks_and_alphas_of_their_own(folder: Path, transformer: OSPNextTransformer3DModel, tmp_path: Path) -> None:
    one, other = filled(transformer), filled(transformer, NewAdapter(2, 1.0, ("ffn.0",), 0))
    mixed = Adapter({**one.pairs, **other.pairs})
    model = load(folder, mixed)
    write_adapter(adapter_of(model), tmp_path / "lora")
    again = read_adapter(tmp_path / "lora")
    assert again.pairs.keys() == mixed.pairs.keys()
    for name, pair in again.pairs.items():
        assert torch.equal(pair.down, mixed.pairs[name].down)
        assert torch.equal(pair.up, mixed.pairs[name].up)
        assert pair.alpha == mixed.pairs[name].alpha
    assert torch.equal(velocity(load(folder, again)), velocity(model))


@pytest.mark.parametrize("stored", [False, True], ids=["rounded in each pass", "stored in 8 bits"])
def test_hif8_below_it(stored: bool, folder: Path, transformer: OSPNextTransformer3DModel, tmp_path: Path) -> None:
    options: dict[str, object] = {"quant": {"quant": "hif8"}}
    if stored:
        quantize_transformer(folder, tmp_path / "eight", QuantConfig())
        folder = tmp_path / "eight"
    base, model = load(folder, **options), load(folder, filled(transformer), **options)
    assert torch.equal(velocity(load(folder, NEW, **options)), velocity(base))
    with adapter_disabled(model):
        assert torch.equal(velocity(model), velocity(base))
    assert not torch.equal(velocity(model), velocity(base))
    if stored:
        assert model.blocks[0].self_attn.q.base_layer.weight.dtype == torch.uint8
    model.train()(*inputs()).sample.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


def test_checkpointed_and_compiled(folder: Path, transformer: OSPNextTransformer3DModel) -> None:
    def gradients(model: OSPNextTransformer3DModel) -> dict[str, torch.Tensor]:
        model.train()(*inputs()).sample.square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    adapter = filled(transformer)
    plain, other = load(folder, adapter), load(folder, adapter)
    other.enable_gradient_checkpointing()
    for block in other.blocks[:2]:
        block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
    ours, theirs = gradients(other), gradients(plain)
    with adapter_disabled(other):  # what is compiled looks whether it is on
        assert torch.allclose(velocity(other), velocity(load(folder)), atol=1e-5)
    assert torch.allclose(velocity(other), velocity(plain), atol=1e-5)
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], rtol=1e-4, atol=1e-4 * float(theirs[name].abs().max())), name


def test_casting_may_be_left_to_autocast(folder: Path, transformer: OSPNextTransformer3DModel) -> None:
    """The same to bfloat16's rounding as PEFT's own float32 products; weights and gradients stay float32."""

    def ran(model: OSPNextTransformer3DModel, autocast: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            sample = model.train()(*inputs()).sample
        sample.square().sum().backward()
        return sample.detach(), [p.grad for p in model.parameters() if p.requires_grad]

    def distance(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one - other).norm() / other.norm())

    adapter = filled(transformer)
    other = load(folder, adapter, dtype=torch.bfloat16)
    leave_casting_to_autocast(other)
    (exact, exactly), (plain, gradients), (ours, own) = (
        ran(load(folder, adapter), autocast=False),
        ran(load(folder, adapter, dtype=torch.bfloat16), autocast=False),
        ran(other, autocast=True),
    )
    assert not torch.equal(ours, plain)
    assert distance(ours, exact) < 1.5 * distance(plain, exact)
    for one, usual, right in zip(own, gradients, exactly, strict=True):
        assert one.dtype == torch.float32
        assert distance(one, right) < 3 * distance(usual, right)


def test_the_configuration_is_osp_next_s() -> None:
    config = LoraConfig()
    assert (config.rank, config.alpha, len(config.target_modules)) == (32, 64, 8)
    assert NewAdapter.of(config, 5) == NewAdapter(32, 64, config.target_modules, 5)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (("self_attn.q", "attn.to_q"), r"target_modules: no linear .* called attn.to_q; its blocks have self_attn.q,"),
        (("attn.q",), "no linear of this model is called attn.q"),
    ],
)
def test_targets_that_are_not_there(targets: Sequence[str], words: str, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=words):
        load(folder, NEW._replace(targets=tuple(targets)))


def test_another_model_s_adapter(folder: Path, transformer: OSPNextTransformer3DModel) -> None:
    wider = OSPNextTransformer3DModel(dim=64, ffn_dim=80, num_heads=2, num_layers=6, text_dim=24, freq_dim=32)
    words = r"no adapter of this model; 6 for linears it does not have: blocks.4.self_attn.q, .*; 12 of another shape: "
    with pytest.raises(CheckpointError, match=words + r"blocks.0.self_attn.q \[64, 64\] for \[48, 48\]"):
        put_adapter(transformer, filled(wider))
    assert not adapter_names(transformer)


def test_a_lora_is_no_model(folder: Path, transformer: OSPNextTransformer3DModel, tmp_path: Path) -> None:
    file = write_adapter(filled(transformer), tmp_path / "x.safetensors", "comfyui")
    with pytest.raises(CheckpointError, match=r"x.safetensors: a LoRA, not the weights .*: name it as lora_path, and"):
        load(file)
    save_file(load(folder, NEW).state_dict(), tmp_path / "both.safetensors")
    with pytest.raises(CheckpointError, match=r"holds a LoRA beside the weights .*: save the model with it merged in"):
        load(tmp_path / "both.safetensors")


def test_no_adapter_to_take_off(transformer: OSPNextTransformer3DModel) -> None:
    with pytest.raises(CheckpointError, match="carries no adapter 'default'"):
        adapter_of(transformer)
