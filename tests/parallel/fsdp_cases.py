"""What the tests of sharded weights run in every process."""

from pathlib import Path
from typing import Any

import torch
from sequence_cases import Setting, mesh_of
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from training_cases import weights_of, whole_state

from ospnext.checkpoints.load import load_text_encoder, load_transformer
from ospnext.parallel.apply import Options, parallelise
from ospnext.parallel.fsdp import Copies, Sharding, forget_gathered, shard_text_encoder, shard_transformer
from ospnext.parallel.mesh import Sizes


def load_sharded(rank: int, path: Path, copies: Copies, dtype: torch.dtype | None, **overrides: int) -> Any:
    """A transformer whose weights all processes of a copy share."""
    return load_transformer(
        path,
        dtype=dtype,
        shard=lambda model: shard_transformer(model, weights_of(copies), Sharding(), 1),
        **overrides,
    )


def check_loaded(rank: int, path: Path, copies: Copies, dtype: torch.dtype | None) -> None:
    """A model that was loaded in shards is the one that is loaded whole."""
    overrides = {} if path.is_dir() else {"num_heads": 2}  # which a flat file does not say
    ours = load_sharded(rank, path, copies, dtype, **overrides)
    theirs = load_transformer(path, dtype=dtype, **overrides)
    assert not ours.training
    expected = dict(theirs.named_parameters())
    assert all(isinstance(p, DTensor) for p in ours.parameters())
    whole = whole_state(ours)
    assert whole.keys() == expected.keys()
    for name, value in whole.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


def message_of_loading(rank: int, path: Path, copies: Copies) -> str:
    """What is said of a checkpoint that does not fit."""
    try:
        load_sharded(rank, path, copies, None)
    except ValueError as error:
        return str(error)
    return ""


def touched(path: Path) -> int:
    """Bytes of a mapped file that this process has looked at."""
    total = inside = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def bytes_read(rank: int, path: Path, copies: Copies) -> tuple[int, int]:
    """Bytes this process maps in from a file while loading, and bytes it says it reads."""
    seen = [(0, 0)]

    def look(label: str, done: int, total: int) -> None:
        seen.append((touched(path), total) if done == total else seen[-1])

    load_transformer(
        path,
        progress=look,
        num_heads=2,
        shard=lambda model: shard_transformer(model, weights_of(copies), Sharding(), 1),
    )
    return seen[-1]


def check_fresh(rank: int, setting: Setting, reshard: bool | None) -> None:
    """A model that has sampled samples with new weights once they are changed."""
    model = setting.model()
    parallelise(model, mesh_of(Sizes(1, 1, 2, 1)), weights_of(Copies(1, 2)), Options(Sharding(reshard)))
    shards = list(model.parameters())
    with torch.no_grad():
        before = model(*setting.inputs()).sample
        for shard in shards:
            shard.mul_(0)
        if reshard is False:
            forget_gathered(model)
        after = model(*setting.inputs()).sample
    assert before.abs().max() > 0
    assert after.abs().max() == 0


def check_bfloat16(rank: int, setting: Setting) -> None:
    """Float32 weights that compute in bfloat16 give what bfloat16 weights do; their gradients are float32."""
    model = setting.model().float()
    parallelise(
        model, mesh_of(Sizes(2, 1, 1, 1)), weights_of(Copies(1, 2)), Options(Sharding(param_dtype=torch.bfloat16))
    )
    rounded = setting.model().bfloat16()
    ours, theirs = (m(*setting.inputs()).sample for m in (model, rounded))
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs)
    for out in (ours, theirs):
        out.square().mean().backward()
    for (name, p), reference in zip(model.named_parameters(), rounded.parameters(), strict=True):
        assert p.dtype == p.grad.dtype == torch.float32, name
        # Both processes have the same video: their mean is the gradient of either.
        gradient = p.grad.full_tensor()
        if name.startswith("text_embedding"):  # all blocks read the text: their shares are added up in another order
            assert (gradient - reference.grad).norm() < 0.01 * reference.grad.norm(), name
        else:
            assert torch.equal(gradient, reference.grad.float()), name


class Gathers(TorchDispatchMode):
    """Counts the all-gathers of this process as they are started."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "allgather" in str(function)
        return function(*args, **(kwargs or {}))


def count_gathers(rank: int, setting: Setting, sharding: Sharding) -> tuple[list[int], list[int]]:
    """All-gathers started before every block computes in the forward pass, and before it is done in the backward."""
    model = setting.model()
    forward, backward = [], []
    with Gathers() as gathers:
        parallelise(model, mesh_of(Sizes(2, 1, 1, 1)), weights_of(Copies(1, 2)), Options(sharding))
        for block in model.blocks:  # the first thing that a block computes, and so the last in the backward pass
            block.self_attn.q.register_forward_pre_hook(lambda *_: forward.append(gathers.count))
            block.self_attn.q.register_full_backward_pre_hook(lambda *_: backward.append(gathers.count))
        before = gathers.count
        out = model(*setting.inputs()).sample
        between = gathers.count
        out.sum().backward()
    return [count - before for count in forward], [count - between for count in backward]


def report(rank: int, setting: Setting) -> list[str]:
    """What is said of a model that shall be kept in host memory, on a CPU; it still runs."""
    model, options = setting.model(), Options(Sharding(model_cpu_offload=True))
    lines = parallelise(model, mesh_of(Sizes(1, 1, 2, 1)), weights_of(Copies(1, 2)), options)
    model(*setting.inputs()).sample.sum().backward()
    return lines


def check_text_encoder(rank: int, path: Path, copies: Copies, ids: torch.Tensor) -> None:
    """An encoder in shards encodes as the whole one; its embedding, known under two names, is one parameter."""
    whole = load_text_encoder(path, torch.float32)
    ours = load_text_encoder(
        path, torch.float32, shard=lambda model: shard_text_encoder(model, weights_of(copies), Sharding())
    )
    assert isinstance(ours.shared.weight, DTensor)
    assert ours.shared.weight is ours.encoder.embed_tokens.weight
    with torch.no_grad():
        for _ in range(2):
            mask = torch.ones_like(ids)
            assert torch.equal(ours(ids, mask).last_hidden_state, whole(ids, mask).last_hidden_state)
