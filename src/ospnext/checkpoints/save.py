"""Write transformer weights in any of the formats, whole or not at all.

    save_transformer(model, "out/transformer", to="diffusers")

A folder gets config.json, safetensors shards and their index; ``pt`` is one flat file and keeps no settings.
"""

import errno
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers.utils import logging as transformers_logging

from ospnext.checkpoints.drafts import new_file, new_folder
from ospnext.checkpoints.formats import DEFAULTS, NameMap, name_map, native_name, write_settings
from ospnext.checkpoints.read import SUFFIXES, CheckpointError, TensorInfo
from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.quant.running import AMAX, SEEN
from ospnext.quant.settings import SAVED

TARGETS = ("diffusers", "wan", "osp", "pt")
_STEM = "diffusion_pytorch_model"


class Source(NamedTuple):
    """Tensors to write: what they are, by name of the transformer's, and how to get one (on any device)."""

    settings: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    get: Callable[[str], torch.Tensor]


def save_transformer(
    model: OSPNextTransformer3DModel,
    path: str | Path,
    to: str = "osp",
    max_shard_size: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Write a transformer's weights.

    Args:
        model: without LoRA adapters.
        path: a folder, or for ``pt`` a file ending in .pt, .pth or .safetensors.
        to: one of ``TARGETS``.
        max_shard_size: bytes of a shard at most, unless one tensor is larger.
        overwrite: replace a checkpoint that is there; a folder that holds anything else is never replaced.

    Raises:
        CheckpointError: an adapter is loaded, or something is in the way.
        OSError: the place cannot be written.
    """
    state = model.state_dict()
    adapters = [name for name in state if "lora_" in name or ".base_layer." in name]
    if adapters:
        raise CheckpointError(f"the model holds a LoRA adapter ({adapters[0]} ...): merge and unload it, then save")
    if to != "osp":  # what only our own training reads
        state = {name: t for name, t in state.items() if name.rpartition(".")[2] not in (AMAX, SEEN)}
    tensors = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in state.items()}
    settings = {key: model.config[key] for key in (*DEFAULTS, *SAVED) if key in model.config}
    write_checkpoint(Source(settings, tensors, state.__getitem__), path, to, max_shard_size, overwrite)


def write_checkpoint(
    source: Source, path: str | Path, to: str, max_shard_size: int = 5 * 10**9, overwrite: bool = False
) -> None:
    """Write tensors in a format; arguments and errors as ``save_transformer``. Host memory: one shard (``pt``: all)."""
    if to not in TARGETS:
        raise CheckpointError(f"format {to!r} is not known: use {', '.join(TARGETS)}")
    target = Path(path).absolute()
    check_target(target, to, overwrite)
    if to != "osp" and any(info.dtype is torch.uint8 for info in source.tensors.values()):
        raise CheckpointError(f"{target}: 8-bit weights are written in the osp format only: use that, or plain numbers")
    if to == "pt":
        _write_file(source, target)
        return
    with new_folder(target) as folder:
        config = write_settings(source.settings, to)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _write_shards(source, folder, target, name_map(to), max_shard_size)


def check_target(path: Path, to: str, overwrite: bool) -> None:
    """Refuse a place that must not be written, before any work is done.

    Raises:
        CheckpointError: something is there that must stay, or the name does not fit the format.
    """
    if to == "pt":
        if path.suffix not in SUFFIXES:
            raise CheckpointError(f"{path}: a single file of weights must end in {', '.join(SUFFIXES)}")
        if path.exists() and not (overwrite and path.is_file()):
            raise CheckpointError(f"{path}: exists; choose another name, or set overwrite=true")
        return
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path}: is a file; {to} needs a folder")
    inside = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    foreign = [name for name in inside if name != "config.json" and not name.startswith(_STEM)]
    if foreign:
        raise CheckpointError(
            f"{path}: holds {', '.join(foreign[:5])}, which is no checkpoint's: choose another folder"
        )
    if inside and not overwrite:
        raise CheckpointError(f"{path}: holds a checkpoint; choose another folder, or set overwrite=true")


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Around other libraries' ``save_pretrained``: no progress bar for a moment's work, and files others may read.

    Raises:
        OSError: as ``written_safely``.
    """
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with written_safely():
            yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
    for path in folder.rglob("*.safetensors"):
        let_others_read(path)


@contextmanager
def written_safely() -> Iterator[None]:
    """Around safetensors' writing: a full disk is the system's error, to which drafts give the name of their place.

    Raises:
        OSError: what safetensors says in an error of its own, which is not even a ValueError.
    """
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise OSError(errno.EIO, " ".join(str(error).split())[:160]) from error
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def let_others_read(path: Path) -> None:
    """Give a file the mode that new files have here; safetensors makes its files private."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def plan_shards(tensors: Mapping[str, TensorInfo], max_shard_size: int) -> list[list[str]]:
    """Names in order, cut into groups of at most ``max_shard_size`` bytes (a larger tensor stands alone)."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, info in tensors.items():
        if shards[-1] and size + info.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += info.nbytes
    return shards


def _write_shards(source: Source, folder: Path, target: Path, name_of: NameMap, max_shard_size: int) -> None:
    shards = plan_shards(source.tensors, max_shard_size)
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        part = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
        file = f"{_STEM}{part}.safetensors"
        state = {name_of(name): source.get(name).to("cpu").contiguous() for name in names}
        _write(state, folder / file, target)
        places |= dict.fromkeys(state, file)
    if len(shards) > 1:
        total = sum(info.nbytes for info in source.tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (folder / f"{_STEM}.safetensors.index.json").write_text(text, encoding="utf-8")


def _write_file(source: Source, path: Path) -> None:
    state = {native_name(name): source.get(name).to("cpu").contiguous() for name in source.tensors}
    with new_file(path) as draft:
        _write(state, draft, path, _save_safely if path.suffix == ".safetensors" else torch.save)


def _save_safely(state: dict[str, torch.Tensor], path: Path) -> None:
    """safetensors, marked as transformers and diffusers want it."""
    save_file(state, path, metadata={"format": "pt"})


def _write(
    state: dict[str, torch.Tensor], path: Path, target: Path, save: Callable[..., object] = _save_safely
) -> None:
    """Tensors to a new file that will be ``target`` or part of it; ``save`` gives it its format.

    Raises:
        CheckpointError: it cannot be written; names ``target``.
    """
    try:
        save(state, path)
        let_others_read(path)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch says RuntimeError where a disk is full
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{target}: cannot be written, is there room? ({reason})") from error
