"""All parts of a text-to-video pipeline from one folder: ours, diffusers' Wan folder, or Wan2.1's own.

parts = load_pipeline_components("checkpoints/Wan2.1-T2V-1.3B", transformer_dtype=torch.bfloat16, device="cuda")
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

import ospnext
from ospnext.checkpoints.drafts import new_folder
from ospnext.checkpoints.fill import ProgressCallback
from ospnext.checkpoints.load import (
    TEXT_ENCODER_FILE,
    TOKENIZER_FOLDER,
    VAE_FILE,
    load_text_encoder,
    load_tokenizer,
    load_transformer,
    load_vae,
)
from ospnext.checkpoints.read import CheckpointError, read_json, sound_settings
from ospnext.models.transformer import OSPNextTransformer3DModel

EMBEDDED = Path(ospnext.__file__).parent / "assets" / "shapes"
"""The pipeline folder of the model that comes with the package."""

Scheduler: TypeAlias = FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler

_PIPELINES = ("OSPNextPipeline", "WanPipeline")
_PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
_SCHEDULERS: dict[str, Any] = {
    "FlowMatchEulerDiscreteScheduler": FlowMatchEulerDiscreteScheduler,
    "UniPCMultistepScheduler": UniPCMultistepScheduler,
}


def pipeline_folder(name: str | Path) -> Path:
    """The folder a pipeline's name means: ``shapes`` is the embedded model (a folder of that name is ``./shapes``)."""
    return EMBEDDED if str(name) == "shapes" else Path(name)


@contextmanager
def pipeline_beside(source: Path, target: Path, overwrite: bool) -> Iterator[Path]:
    """A draft of a pipeline folder in which the block writes ``transformer/``; all else is copied from another.

    Args:
        source: a pipeline folder.
        target: where the draft goes when the block ends well; there is nothing of it when not.
        overwrite: replace a pipeline folder that is there.

    Raises:
        CheckpointError: no pipeline folder, or something is in the way.
    """
    find_components(source)
    if target.exists() and not (overwrite and (target / "model_index.json").is_file()):
        way = "choose another folder" if not overwrite else "it is no pipeline folder: choose another"
        raise CheckpointError(f"{target}: exists; {way}" + ("" if overwrite else ", or set overwrite=true"))
    with new_folder(target) as folder:
        yield folder
        for part in sorted(source.iterdir()):
            if part.is_dir() and part.name != "transformer":
                shutil.copytree(part, folder / part.name)
            elif part.is_file():
                shutil.copy2(part, folder / part.name)


def not_inside(target: Path, source: Path) -> None:
    """Refuse to write into what is read.

    Raises:
        CheckpointError: ``target`` is ``source``, in it or around it.
    """
    target, source = target.resolve(), source.resolve()
    if target == source or target in source.parents or source in target.parents:
        raise CheckpointError(f"{target}: is the source, or in it: write somewhere else")


class ComponentPaths(NamedTuple):
    """Where the parts of a pipeline are; ``scheduler`` is None in Wan2.1's native folder, which has none."""

    transformer: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path
    scheduler: Path | None
    settings: dict[str, Any]
    """What model_index.json holds besides the parts, such as ``negative_prompt``."""


class Components(NamedTuple):
    """The loaded parts of a pipeline, and what its model_index.json holds besides them.

    ``scheduler`` is None in Wan2.1's native folder, which has none.
    """

    transformer: OSPNextTransformer3DModel
    vae: AutoencoderKLWan
    text_encoder: UMT5EncoderModel
    tokenizer: PreTrainedTokenizerBase
    scheduler: Scheduler | None
    settings: dict[str, Any]


def find_components(path: str | Path) -> ComponentPaths:
    """Where the parts of a pipeline folder are; nothing is loaded, but every part must be there.

    Raises:
        CheckpointError: no pipeline folder, one of another kind, or a part is missing.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json")
        settings = _check_index(folder, index)
        found = ComponentPaths(**{part: folder / part for part in _PARTS}, settings=settings)
    elif (folder / VAE_FILE).is_file() or (folder / TEXT_ENCODER_FILE).is_file():
        found = ComponentPaths(
            folder, folder / VAE_FILE, folder / TEXT_ENCODER_FILE, folder / TOKENIZER_FOLDER, None, {}
        )
    else:
        raise CheckpointError(f"{folder}: no pipeline: neither model_index.json nor Wan2.1's {VAE_FILE} is there")
    missing = [str(part) for part in found if isinstance(part, Path) and not part.exists()]
    if missing:
        raise CheckpointError(f"{folder}: missing {', '.join(missing)}")
    return found


def load_pipeline_components(
    path: str | Path,
    *,
    transformer_dtype: torch.dtype | None = None,
    vae_dtype: torch.dtype | None = torch.float32,
    text_encoder_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    encoder_device: str | torch.device | None = None,
    progress: ProgressCallback | None = None,
    **overrides: Any,
) -> Components:
    """Load every part of a pipeline folder, each strictly and in its own dtype.

    Args:
        path: a folder with model_index.json (ours or diffusers' ``WanPipeline``), or Wan2.1's native folder.
        transformer_dtype, vae_dtype, text_encoder_dtype: None keeps the files'.
        device: of the transformer and the autoencoder.
        encoder_device: of the text encoder; None for ``device``.
        progress: as in ``load_transformer``.
        **overrides: of the transformer, as in ``load_transformer``.

    Raises:
        CheckpointError, OutOfMemoryError: as in ``load_transformer`` and ``find_components``.
    """
    places = find_components(path)
    text_device = device if encoder_device is None else encoder_device
    return Components(
        load_transformer(places.transformer, dtype=transformer_dtype, device=device, progress=progress, **overrides),
        load_vae(places.vae, vae_dtype, device, progress),
        load_text_encoder(places.text_encoder, text_encoder_dtype, text_device, progress),
        load_tokenizer(places.tokenizer),
        None if places.scheduler is None else load_scheduler(places.scheduler),
        places.settings,
    )


def load_scheduler(folder: Path) -> Scheduler:
    """The scheduler a folder describes.

    Raises:
        CheckpointError: missing, or not one of the two that flow matching here knows.
    """
    raw = read_json(folder / "scheduler_config.json")
    name = str(raw.get("_class_name"))
    if name not in _SCHEDULERS:
        raise CheckpointError(f"{folder}: scheduler {name!r} is not known: use {' or '.join(_SCHEDULERS)}")
    if name == "UniPCMultistepScheduler" and not raw.get("use_flow_sigmas"):
        raise CheckpointError(f"{folder}: this UniPCMultistepScheduler is not for flow matching: set use_flow_sigmas")
    with sound_settings(folder):
        return _SCHEDULERS[name].from_config(raw)


def _check_index(folder: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a model_index.json, once it is known to be of a pipeline that runs here."""
    name = index.get("_class_name")
    name = name[-1] if isinstance(name, list) and name else name
    if name not in _PIPELINES:
        raise CheckpointError(f"{folder}: a {name}; only {' and '.join(_PIPELINES)} can be loaded")
    parts = {key for key, value in index.items() if _is_part(value) and not key.startswith("_")}
    further = sorted(key for key in parts - set(_PARTS) if index[key][1] is not None)
    if further:
        raise CheckpointError(f"{folder}: has {', '.join(further)} too (Wan2.2 or image-to-video): not supported")
    return {key: value for key, value in index.items() if key not in parts and not key.startswith("_")}


def _is_part(value: Any) -> bool:
    """Whether a value of model_index.json names a part: its library and class, both None for one left out."""
    return isinstance(value, list) and len(value) == 2 and all(name is None or isinstance(name, str) for name in value)
