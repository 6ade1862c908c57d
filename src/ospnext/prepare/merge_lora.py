"""``ospnext merge-lora BASE ADAPTER DST``: a model with a LoRA in its weights; ``convert-lora``: other programs' names.

    ospnext merge-lora checkpoints/osp_next_14b runs/lora/adapter out/merged
    ospnext convert-lora runs/lora/adapter out/style.safetensors --to comfyui

Rank and alpha are the adapter's own. BASE is a pipeline folder, a transformer's folder or a file; DST is of its kind.
Weights are streamed: memory holds one shard and the adapter.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field
from rich.progress import Progress

from ospnext.checkpoints.components import not_inside, pipeline_beside, pipeline_folder
from ospnext.checkpoints.lora_files import read_adapter, write_adapter
from ospnext.checkpoints.merge import merge_transformer
from ospnext.checkpoints.read import CheckpointError
from ospnext.config import Config
from ospnext.sections import ModelConfig


class MergeLoraConfig(Config):
    """``ospnext merge-lora``: a LoRA into weights."""

    base: str = Field(min_length=1, description="a pipeline folder, a transformer's folder or file, or 'shapes'")
    adapter: str = Field(min_length=1, description="the LoRA, a folder or a file of any style")
    dst: str = Field(min_length=1, description="the folder to write, or the file where base is one")
    scale: float = Field(1.0, description="times the adapter")
    alpha: float | None = Field(None, gt=0, description="where the adapter's files do not say it")
    max_shard_size: int = Field(5 * 10**9, ge=1, description="bytes of a shard at most")
    overwrite: bool = Field(False, description="replace a checkpoint that is in dst")
    transformer_config: ModelConfig = Field(
        default_factory=ModelConfig, alias="model_config", description="settings that base does not give itself"
    )


class ConvertLoraConfig(Config):
    """``ospnext convert-lora``: a LoRA in another style."""

    src: str = Field(min_length=1, description="the LoRA, a folder or a file of any style")
    dst: str = Field(min_length=1, description="the folder to write (peft, diffusers) or file (comfyui, diffusers)")
    to: Literal["peft", "diffusers", "comfyui"] = Field(description="style to write")
    alpha: float | None = Field(None, gt=0, description="where the adapter's files do not say it")
    overwrite: bool = Field(False, description="replace what is in dst")


def run(config: MergeLoraConfig) -> str:
    """Merge as configured; returns the line to print.

    Raises:
        CheckpointError: as ``checkpoints.merge.merge_transformer``.
    """
    base, target = pipeline_folder(config.base), Path(config.dst).absolute()
    not_inside(target, base)
    adapter = read_adapter(config.adapter, config.alpha)
    settings = config.transformer_config.architecture()
    with Progress(transient=True) as bar:
        task = bar.add_task("merging", total=None)

        def merge(source: Path, to: Path, overwrite: bool) -> int:
            return merge_transformer(
                source,
                adapter,
                to,
                config.scale,
                config.max_shard_size,
                overwrite,
                lambda done, total: bar.update(task, completed=done, total=total),
                **settings,
            )

        if (base / "model_index.json").is_file():
            with pipeline_beside(base, target, config.overwrite) as folder:
                changed = merge(base / "transformer", folder / "transformer", False)
                bar.update(task, description="copying the other parts", total=None)
        else:
            changed = merge(base, target, config.overwrite)
    return f"wrote {target}: {changed} weights changed by {adapter.source} ({adapter}), scale {config.scale:g}"


def convert(config: ConvertLoraConfig) -> str:
    """Convert as configured; returns the line to print.

    Raises:
        CheckpointError: the LoRA cannot be read, or ``dst`` is there already.
    """
    target = Path(config.dst).absolute()
    adapter = read_adapter(config.src, config.alpha)
    if target.exists() and not config.overwrite and (target.is_file() or any(target.iterdir())):
        raise CheckpointError(f"{target}: exists; choose another name, or set overwrite=true")
    not_inside(target, Path(adapter.source))
    written = write_adapter(adapter, target, config.to)
    return f"wrote {written}: {len(adapter.pairs)} linears, from {adapter.style}'s style to {config.to}'s"
