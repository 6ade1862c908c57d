"""``ospnext convert SRC DST --to FORMAT``: a transformer checkpoint from any format into any other.

    ospnext convert checkpoints/osp_next_14b out/diffusers --to diffusers
    ospnext convert merged.pt out/osp --to osp model_config.skiparse_model_type=dual_end

Names and files change, numbers do not (unless ``dtype`` is given). Tensors are streamed: memory holds one shard.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from ospnext.checkpoints.fill import match_names
from ospnext.checkpoints.load import open_transformer
from ospnext.checkpoints.quantised import carried, decoded, running_names, said_of
from ospnext.checkpoints.read import CheckpointError
from ospnext.checkpoints.save import Source, check_target, write_checkpoint
from ospnext.config import Config
from ospnext.device import resolve_dtype
from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.sections import DType, ModelConfig


class ConvertConfig(Config):
    """``ospnext convert``: one checkpoint into another format."""

    src: str = Field(min_length=1, description="a checkpoint folder or file, of any format that loads")
    dst: str = Field(min_length=1, description="the folder to write, for pt the file")
    to: Literal["diffusers", "wan", "osp", "pt"] = Field(description="format to write")
    dtype: DType | None = Field(None, description="numbers to write; default: as stored")
    max_shard_size: int = Field(5 * 10**9, ge=1, description="bytes of a shard at most")
    overwrite: bool = Field(False, description="replace a checkpoint that is in dst")
    transformer_config: ModelConfig = Field(
        default_factory=ModelConfig, alias="model_config", description="settings that src does not give itself"
    )


def run(config: ConvertConfig) -> str:
    """Convert as configured; returns the line to print."""
    dtype = None if config.dtype is None else resolve_dtype(config.dtype)
    settings = config.transformer_config.architecture()
    return convert(config.src, config.dst, config.to, dtype, config.max_shard_size, config.overwrite, **settings)


def convert(
    src: str | Path,
    dst: str | Path,
    to: str,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5 * 10**9,
    overwrite: bool = False,
    **overrides: Any,
) -> str:
    """Write the transformer of ``src`` to ``dst`` in the format ``to``.

    Args:
        src, overrides: as in ``load_transformer``.
        dst, to, max_shard_size, overwrite: as in ``save_transformer``.
        dtype: of floating point in the files written; None keeps it.

    Returns:
        One line that says what was written, and what its readers should know.

    Raises:
        CheckpointError: ``src`` cannot be loaded, or ``dst`` must not be written.
    """
    target = Path(dst)
    check_target(target, to, overwrite)
    settings, weights, name_of = open_transformer(src, **overrides)
    if target.resolve() in (weights.source.resolve(), Path(src).resolve()):
        raise CheckpointError(f"{target}: is the source: write somewhere else")
    with torch.device("meta"):
        model = OSPNextTransformer3DModel(**settings)
    said, weights = said_of(weights.source), decoded(weights)
    names = match_names(model, weights, name_of, running_names(weights))
    stored = {names[file]: file for file in weights.tensors if file in names}  # in the order of the files
    tensors = {name: weights.tensors[file_name].cast(dtype) for name, file_name in stored.items()}
    running = carried(weights, to)
    stored, tensors = stored | {name: name for name in running}, tensors | running
    with weights.opened() as read:
        source = Source(settings | said, tensors, lambda name: read(stored[name]).to(tensors[name].dtype))
        write_checkpoint(source, target, to, max_shard_size, overwrite)
    note = f"; {_NOTES[to]}" if to in _NOTES and settings["skiparse_model_type"] != "full" else ""
    return f"wrote {target}: {len(tensors)} tensors, {_size(weights.nbytes(dtype))}{note}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


_NOTES = {
    "diffusers": "sparse settings are kept in config.json, but diffusers itself would run these weights dense",
    "wan": "sparse settings are kept in config.json, but Wan2.1's own code would run these weights dense",
    "pt": "a flat file keeps no settings: name the sparse ones when you load it",
}
