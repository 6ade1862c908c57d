"""Fill a model that was built without memory (on meta) from weight files: strictly, tensor by tensor.

A model that is sharded already takes from the files only what this process holds of it.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from torch import nn

from ospnext.checkpoints.formats import NameMap
from ospnext.checkpoints.memory import require_memory
from ospnext.checkpoints.read import CheckpointError, Weights, list_names
from ospnext.parallel.fsdp import shard_of
from ospnext.quant.linear import ALWAYS_FLOAT32

ProgressCallback = Callable[[str, int, int], None]
"""Called with what is loaded, bytes done and bytes in all."""


def fill(
    model: nn.Module,
    weights: Weights,
    name_of: NameMap,
    dtype: torch.dtype | None,
    device: torch.device,
    progress: ProgressCallback | None = None,
    keep_fp32: Collection[str] = (),
    ignore: Collection[str] = (),
) -> None:
    """Give every parameter and buffer of ``model`` its tensor on ``device``, one file after the other.

    Args:
        model: on meta; its names are mapped by ``name_of`` to those in the files.
        weights: must hold exactly these names with these shapes.
        name_of: map from the model's names to the files'.
        dtype: of all floating point, or None to keep the files'.
        device: where the tensors go; on meta they have shape and dtype, and no file is read beyond its header.
        progress: told about every tensor.
        keep_fp32: modules (last name of their path) that stay float32 where ``dtype`` is float16.
        ignore: tensors of the files that are not read.

    Raises:
        CheckpointError: names or shapes differ; lists them.
        OutOfMemoryError: it does not fit on the device.
    """
    targets = match_names(model, weights, name_of, ignore)
    wide = {n for n, target in targets.items() if dtype == torch.float16 and target.split(".")[-2] in keep_fp32}
    wide |= {n for n, target in targets.items() if target.rpartition(".")[2] in ALWAYS_FLOAT32}
    infos = {name: weights.tensors[name].cast(torch.float32 if name in wide else dtype) for name in targets}
    if device.type == "meta":
        empty = {
            targets[name]: torch.empty(info.shape, dtype=info.dtype, device=device) for name, info in infos.items()
        }
        model.load_state_dict(empty, strict=False, assign=True)
        return
    label, done, total = type(model).__name__, 0, sum(info.nbytes for info in infos.values())
    require_memory(total, device, f"{label} from {weights.source}")
    for file in weights.files:
        state = {}
        with file.opened() as read:
            for name in (name for name in file.tensors if name in targets):
                info = infos[name]
                state[targets[name]] = read(name).to(device, info.dtype, copy=True)  # never a view of the file
                done += info.nbytes
                if progress is not None:
                    progress(label, done, total)
        model.load_state_dict(state, strict=False, assign=True)  # the names were checked above, all at once
    tied = getattr(model, "_tied_weights_keys", None) or {}
    left = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta and name not in tied]
    assert not left, f"{label}: no weights for {list_names(left)}, which no state dict holds"


def fill_shards(
    model: nn.Module,
    weights: Weights,
    name_of: NameMap,
    device: torch.device,
    progress: ProgressCallback | None = None,
    ignore: Collection[str] = (),
    own: Collection[str] = (),
) -> None:
    """Give a sharded model its numbers; this process reads its own rows of every tensor and nothing else.

    Args:
        model: on meta, in the dtypes it shall have, sharded (``parallel.fsdp``).
        weights, name_of, progress, ignore: as in ``fill``; bytes are those of this process.
        device: where the shards are kept.
        own: tensors of the model that no file holds; they get memory but no numbers.

    Raises:
        CheckpointError, OutOfMemoryError: as in ``fill``, the first on all processes.
    """
    targets = match_names(model, weights, name_of, ignore, own)
    state = model.state_dict()
    buffers = [name for name, _ in model.named_buffers() if name not in state]
    assert not buffers, f"{list_names(buffers)}: no state dict holds them"
    label, done = type(model).__name__.removeprefix("FSDP"), 0
    total = sum(shard_of(state[target]).values.nbytes for target in targets.values())
    require_memory(total, device, f"{label} from {weights.source}")
    model.to_empty(device=device)
    state = model.state_dict()
    for file in weights.files:
        with file.opened() as read:
            for name in (name for name in file.tensors if name in targets):
                rows, values = shard_of(state[targets[name]])
                if values.numel():
                    values.copy_(read(name, rows))
                done += values.nbytes
                if progress is not None:
                    progress(label, done, total)


def match_names(
    model: nn.Module, weights: Weights, name_of: NameMap, ignore: Collection[str] = (), own: Collection[str] = ()
) -> dict[str, str]:
    """The model's name of every tensor in the files; arguments as ``fill_shards``.

    Raises:
        CheckpointError: missing, unexpected or misshaped tensors, or whole numbers for fractions, under the names in
            the files.
    """
    others = {*(getattr(model, "_tied_weights_keys", None) or {}), *own}
    expected = {name_of(name): (name, t) for name, t in model.state_dict().items() if name not in others}
    shapes = {name: tuple(t.shape) for name, (_, t) in expected.items()}
    check_names(type(model).__name__, shapes, weights, ignore)
    strange = [
        f"{name} {str(info.dtype).removeprefix('torch.')}"
        for name, info in weights.tensors.items()
        if name in expected and info.dtype.is_floating_point is not expected[name][1].is_floating_point()
    ]
    if strange:
        raise CheckpointError(f"{weights.source}: numbers of another kind than the model's: {list_names(strange)}")
    return {name: target for name, (target, _) in expected.items()}


def check_names(
    what: str, expected: Mapping[str, tuple[int, ...]], weights: Weights, ignore: Collection[str] = ()
) -> None:
    """Compare what a model expects (shape by name in the file) with what the files hold.

    Raises:
        CheckpointError: they differ; lists the names, ten of each kind and how many more.
    """
    shapes = weights.shapes
    missing = sorted(expected.keys() - shapes.keys())
    unexpected = sorted(shapes.keys() - expected.keys() - set(ignore))
    misshaped = [
        f"{name} {list(shapes[name])} for {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshaped))
    problems = [f"{len(names)} {kind}: {list_names(names)}" for kind, names in kinds if names]
    if problems:
        raise CheckpointError(f"{weights.source}: not the weights of this {what}; {'; '.join(problems)}")


@contextmanager
def progress_bar() -> Iterator[ProgressCallback]:
    """A bar on the terminal, in bytes, for every model that is loaded inside the block."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def show(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(f"loading {label}")
            bars.update(tasks[label], completed=done, total=total)

        yield show
