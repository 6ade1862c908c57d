"""What the tests of adapters on many processes run in each of them."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sequence_cases import Setting, float64_throughout, mesh_of
from training_cases import weights_of

from ospnext.checkpoints.load import load_transformer
from ospnext.checkpoints.lora import NewAdapter, WithAdapter, adapter_disabled, adapter_of
from ospnext.checkpoints.lora_files import Adapter, read_adapter
from ospnext.parallel.apply import Options, parallelise
from ospnext.parallel.fsdp import Copies, Sharding, shard_of, whole
from ospnext.parallel.mesh import Sizes

NEW = NewAdapter(3, 6.0, ("self_attn.q", "self_attn.o", "cross_attn.k", "cross_attn.v", "ffn.0", "ffn.2"), 7)


class Case(NamedTuple):
    """An adapter on a model from files, on a mesh; without one on one device."""

    setting: Setting
    path: Path
    sizes: Sizes | None = None
    checkpointing: bool = False
    backend: str | None = None
    dtype: torch.dtype = torch.float64
    quant: tuple[tuple[str, Any], ...] = ()
    param_dtype: torch.dtype | None = None
    whole: bool = False  # every process holds all weights

    def model(self, source: NewAdapter | Adapter) -> Any:
        """The model with its adapter, in training mode."""
        shard = None
        if (sizes := self.sizes) is not None:
            options = Options(Sharding(param_dtype=self.param_dtype), self.checkpointing, self.backend)

            copies = Copies(sizes.world, 1) if self.whole else Copies(1, sizes.world)

            def shard(model: Any) -> None:
                parallelise(model, mesh_of(sizes), weights_of(copies), options)

        adapter_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        adapters = [WithAdapter(source, adapter_dtype)]
        model = load_transformer(self.path, dtype=self.dtype, shard=shard, quant=dict(self.quant), adapters=adapters)
        return model.train()


def gradients(rank: int, case: Case, adapter: Path | None) -> dict[str, torch.Tensor]:
    """Output and gradients of the adapter for the mean loss of two videos, as one device has them."""
    exact = case.dtype == torch.float64
    with float64_throughout() if exact else nullcontext():
        model = case.model(NEW if adapter is None else read_adapter(adapter))
        latents, timestep, text = case.setting.inputs()
        mine = slice(None)
        if case.sizes is not None and case.sizes.dp > 1:
            mine = slice(rank, rank + 1)
        if not exact:
            latents, timestep, text = latents.float(), timestep.float(), text.float()
        weight = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2), dtype=latents.dtype)
        out = model(latents[mine], timestep[mine], text[mine]).sample
        (out * weight[mine]).flatten(1).sum(1).mean().backward()
    frozen = [name for name, p in model.named_parameters() if p.grad is not None and ".lora_" not in name]
    assert not frozen, f"gradients of frozen {frozen}"
    found = {name: whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}
    return found | {"output": out.detach()}


def errors_of_stored(rank: int, case: Case, adapter: Path) -> dict[str, float]:
    """How far gradients of an adapter on shared 8-bit weights are from one process's, each process with its own video.

    One process takes the videos one after the other: sums are then in the same order, and all numbers are rounded
    alike.
    """
    inputs = case.setting.inputs()
    shared, alone = (c.model(read_adapter(adapter)) for c in (case, case._replace(sizes=None)))
    for name in ("blocks.0.ffn.0", "blocks.1.self_attn.q"):
        assert shard_of(shared.get_submodule(name).base_layer.weight).values.dtype is torch.uint8
    half = case.param_dtype is not None
    loss = 0.0
    for video in range(2):
        own = [x[video : video + 1].float() for x in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = loss + alone(*own).sample.float().square().mean() / 2
            if video == rank:
                ours = shared(*own).sample.float()
    loss.backward()
    ours.square().mean().backward()
    theirs = {name: p.grad for name, p in alone.named_parameters() if p.requires_grad}
    mine = {name: whole(p.grad) for name, p in shared.named_parameters() if p.requires_grad}
    assert mine.keys() == theirs.keys()
    return {name: float((mine[name] - value).norm() / value.norm()) for name, value in theirs.items()}


def started(rank: int, case: Case) -> dict[str, torch.Tensor]:
    """A and B of a new adapter."""
    return {
        f"{name}.{part}": getattr(pair, part)
        for name, pair in adapter_of(case.model(NEW)).pairs.items()
        for part in ("down", "up")
    }


def check_disabled(rank: int, case: Case, adapter: Path) -> None:
    """Without its adapter a model in shards is its base, and trains on as before."""
    model = case.model(read_adapter(adapter))
    inputs = [x.to(torch.float32) for x in case.setting.inputs()]
    shards = parallelised_base(case)
    with torch.no_grad():
        with adapter_disabled(model):
            off = model(*inputs).sample
        on = model(*inputs).sample
        assert torch.equal(off, shards(*inputs).sample)
        assert not torch.equal(off, on)
    model(*inputs).sample.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def parallelised_base(case: Case) -> Any:
    """The model without an adapter, on the case's mesh."""
    sizes = case.sizes
    assert sizes is not None
    return load_transformer(
        case.path,
        dtype=case.dtype,
        shard=lambda model: parallelise(model, mesh_of(sizes), weights_of(Copies(1, sizes.world)), Options()),
    )
