"""An adapter merged into weights: W + scale alpha / rank B A, computed in float32 and rounded once to W's dtype.

    merge_transformer("checkpoints/osp_next_14b", read_adapter("out/adapter"), "out/merged")

Weights are streamed: memory holds one shard and the adapter. A checkpoint keeps its format and dtypes.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ospnext.checkpoints.fill import match_names
from ospnext.checkpoints.formats import read_settings
from ospnext.checkpoints.load import load_transformer, open_transformer
from ospnext.checkpoints.lora import linear_shapes
from ospnext.checkpoints.lora_files import Adapter, Pair
from ospnext.checkpoints.quantised import carried, running_names, said_of, stored_linears
from ospnext.checkpoints.read import CheckpointError, Weights, list_names, read_json
from ospnext.checkpoints.save import Source, write_checkpoint
from ospnext.models.transformer import OSPNextTransformer3DModel


def merge_transformer(
    base: str | Path,
    adapter: Adapter,
    dst: str | Path,
    scale: float = 1.0,
    max_shard_size: int = 5 * 10**9,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **overrides: Any,
) -> int:
    """Write a transformer's checkpoint with an adapter merged into it, in the format it has.

    Args:
        base, overrides: as in ``load_transformer``.
        adapter: of ``read_adapter``.
        dst, max_shard_size, overwrite: as in ``save_transformer``; a file where ``base`` is one.
        scale: times the adapter.
        progress: called with tensors done and in all.

    Returns:
        The number of weights that were changed.

    Raises:
        CheckpointError: the base is in 8 bits, the adapter is of another model, or ``dst`` must not be written.
    """
    settings, weights, name_of = open_transformer(base, **overrides)
    refuse_eight_bits(weights)
    with torch.device("meta"):
        model = OSPNextTransformer3DModel(**settings)
    names = match_names(model, weights, name_of, running_names(weights))
    deltas = _deltas(model, adapter, scale)
    stored = {names[file]: file for file in weights.tensors if file in names}
    tensors = {name: weights.tensors[file_name] for name, file_name in stored.items()}
    to = _format_of(weights.source)
    running = carried(weights, to)
    stored, tensors = stored | {name: name for name in running}, tensors | running
    done = 0
    with weights.opened() as read:

        def get(name: str) -> Tensor:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, len(tensors))
            x = read(stored[name])
            return x if name not in deltas else _sum(x, deltas[name]())

        source = Source(settings | said_of(weights.source), tensors, get)
        write_checkpoint(source, dst, to, max_shard_size, overwrite)
    return len(deltas)


def merged_transformer(
    base: Path, adapter: Adapter, dtype: torch.dtype | None, overrides: Mapping[str, Any]
) -> OSPNextTransformer3DModel:
    """The same in memory, in plain numbers of ``dtype``; arguments and errors as ``merge_transformer``."""
    refuse_eight_bits(open_transformer(base, **overrides).weights)
    model = load_transformer(base, quant={"quant": "none", "quant_attn": "none"}, **overrides)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, delta in _deltas(model, adapter, 1.0).items():
            named[name].copy_(_sum(named[name], delta()))
    nn.Module.to(model, dtype)  # not diffusers' own, which warns of a choice that this model does not have
    return model


def refuse_eight_bits(weights: Weights) -> None:
    """What is added to a weight is mostly less than what 8 bits can tell apart.

    Raises:
        CheckpointError: weights are stored in 8 bits; names the way out.
    """
    if stored_linears(weights):
        raise CheckpointError(
            f"{weights.source}: holds 8-bit weights, into which an adapter would be lost: merge it into the weights "
            "they were made of, or make plain ones first (ospnext convert SRC DST --to osp); or load it beside them "
            "(lora_path)"
        )


def _deltas(model: OSPNextTransformer3DModel, adapter: Adapter, scale: float) -> dict[str, Callable[[], Tensor]]:
    """What makes the difference of each parameter that changes, float32.

    Raises:
        CheckpointError: the adapter is of another model.
    """
    adapter.sizes(linear_shapes(model))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    wrong = [
        f"{name} {list(x.shape)} for {list(shapes[name]) if name in shapes else 'nothing'}"
        for name, x in adapter.diffs.items()
        if name not in shapes or x.shape != shapes[name]
    ]
    if wrong:
        raise CheckpointError(f"{adapter.source}: no adapter of this model; differences {list_names(wrong, 5)}")
    found: dict[str, Callable[[], Tensor]] = {}
    for name in shapes:
        pair = adapter.pairs.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if pair is not None or name in adapter.diffs:
            found[name] = partial(_delta, pair, adapter.diffs.get(name), scale)
    return found


def _delta(pair: Pair | None, diff: Tensor | None, scale: float) -> Tensor:
    parts = [*([] if pair is None else [pair.delta()]), *([] if diff is None else [diff.float()])]
    return scale * torch.stack(parts).sum(0)


def _sum(weight: Tensor, delta: Tensor) -> Tensor:
    return (weight.to(torch.promote_types(weight.dtype, torch.float32)) + delta).to(weight.dtype)


def _format_of(place: Path) -> str:
    """The name of a checkpoint's format for ``write_checkpoint``."""
    return "pt" if place.is_file() else read_settings(read_json(place / "config.json"))[0]
