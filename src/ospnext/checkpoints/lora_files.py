"""LoRA files: an adapter, read from every style of key this field has and written in three of them.

    adapter = read_adapter("out/lora-checkpoint-1000-ema")
    write_adapter(adapter, "out/adapter")

``lora_keys`` has the table of styles. Nothing here knows of a model: that an adapter fits one is found out when it is
put on it (``lora``) or merged into it (``merge``).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from ospnext.checkpoints.drafts import new_file, new_folder
from ospnext.checkpoints.formats import diffusers_name
from ospnext.checkpoints.lora_alpha import CONFIG, alpha_of, config_of
from ospnext.checkpoints.lora_keys import (
    ALPHA,
    ALWAYS_WITH_ALPHA,
    BIAS_DIFF,
    DOWN,
    UP,
    WEIGHT_DIFF,
    Keys,
    read_keys,
)
from ospnext.checkpoints.read import CheckpointError, WeightFile, list_names
from ospnext.checkpoints.save import let_others_read, written_safely

WEIGHTS, TORCH_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
WRITTEN = ("peft", "diffusers", "comfyui")
"""Styles that are written."""

_PEFT_FILES = (WEIGHTS, TORCH_WEIGHTS, CONFIG)
_DIFFUSERS = "pytorch_lora_weights.safetensors"
_FOUND = (WEIGHTS, TORCH_WEIGHTS, _DIFFUSERS, "pytorch_lora_weights.bin")


class Size(NamedTuple):
    """Of the adapter of one linear."""

    rank: int
    alpha: float


class Pair(NamedTuple):
    """The adapter of one linear: ``alpha / rank * up @ down`` is added to its weight.

    ``down`` is ``[rank, in]`` (A), ``up`` ``[out, rank]`` (B).
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def size(self) -> Size:
        """Rank and alpha."""
        return Size(len(self.down), self.alpha)

    def delta(self) -> Tensor:
        """What is added to the weight, float32 ``[out, in]``."""
        return self.up.float() @ self.down.float() * (self.alpha / len(self.down))


class Adapter(NamedTuple):
    """A LoRA in host memory.

    Attributes:
        pairs: by the name of the transformer's linear.
        diffs: what is added to other parameters, by their names: some files hold such beside.
        source: where it comes from, for messages.
        style: of the file, see ``lora_keys``.
    """

    pairs: Mapping[str, Pair]
    diffs: Mapping[str, Tensor] = {}
    source: str = "the adapter"
    style: str = "peft"

    def __str__(self) -> str:
        ranks = sorted({len(pair.down) for pair in self.pairs.values()})
        alphas = sorted({pair.alpha for pair in self.pairs.values()})
        more = f", {len(self.diffs)} differences" if self.diffs else ""
        return (
            f"{self.style}'s style, {len(self.pairs)} linears, rank {in_words(ranks)}, alpha {in_words(alphas)}{more}"
        )

    def fingerprint(self) -> str:
        """SHA-256 of what it adds, whatever its file is called, as hexadecimal digits."""
        digest = hashlib.sha256()
        for name, pair in sorted(self.pairs.items()):
            digest.update(f"{name} {pair.alpha} {pair.down.dtype} {list(pair.down.shape)}".encode())
            for tensor in (pair.down, pair.up):
                digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def sizes(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Size]:
        """Rank and alpha by linear, once it is sure that it is an adapter of these.

        Args:
            shapes: ``(out, in)`` of every linear of the model.

        Raises:
            CheckpointError: it is for another model; names what does not fit.
        """
        foreign = [name for name in self.pairs if name not in shapes]
        wrong = [
            f"{name} {[len(pair.up), pair.down.shape[1]]} for {list(shapes[name])}"
            for name, pair in self.pairs.items()
            if name in shapes and (len(pair.up), pair.down.shape[1]) != shapes[name]
        ]
        kinds = (("for linears it does not have", foreign), ("of another shape", wrong))
        problems = [f"{len(names)} {kind}: {list_names(names, 5)}" for kind, names in kinds if names]
        if problems:
            raise CheckpointError(
                f"{self.source}: no adapter of this model; {'; '.join(problems)}; name the model it was trained on"
            )
        return {name: pair.size for name, pair in self.pairs.items()}


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_adapter(path: str | Path, alpha: float | None = None) -> Adapter:
    """An adapter from PEFT's, diffusers', ComfyUI's, kohya's (musubi-tuner's), DiffSynth's or LightX2V's files.

    Args:
        path: a ``.safetensors``, ``.bin``, ``.pt`` or ``.pth`` file, or a folder that holds one. An
            ``adapter_config.json`` beside it is read.
        alpha: of linears of which no file says it. By custom it is the rank, but in PEFT's and kohya's files it is
            never left out.

    Raises:
        CheckpointError: no LoRA, keys that name no part of this family of transformers, parts that do not fit each
            other, or an alpha that is missing.
    """
    file = find_adapter(Path(path))
    config = config_of(file)
    weights = WeightFile(file)
    with weights.opened() as read:
        # The names as they are in the file: what they begin with tells the style.
        names = [weights.prefix + name for name in weights.tensors]
        return _sort_out(str(file), names, lambda key: read(key.removeprefix(weights.prefix)).clone(), config, alpha)


def take_adapter(tensors: Mapping[str, Tensor], alpha: float | None = None) -> Adapter:
    """An adapter from tensors by name, of any style; arguments and errors as ``read_adapter``."""
    return _sort_out("the adapter", list(tensors), lambda key: tensors[key].cpu(), {}, alpha)


def find_adapter(path: Path) -> Path:
    """The weight file of an adapter: ``path`` itself, or in that folder.

    Raises:
        CheckpointError: there is none, or nobody can tell which.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder")
    for name in _FOUND:
        if (path / name).is_file():
            return path / name
    others = sorted(path.glob("*.safetensors"))
    if len(others) == 1:
        return others[0]
    names = list_names([p.name for p in others or sorted(path.iterdir())], 5) or "nothing"
    raise CheckpointError(f"{path}: no {WEIGHTS} in it, but {names}: name the adapter's file")


def _sort_out(
    where: str, names: Sequence[str], get: Callable[[str], Tensor], config: Mapping[str, Any], alpha: float | None
) -> Adapter:
    """All keys first, then the tensors: a file of something else is not read."""
    try:
        keys = read_keys(names)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
    if not keys.parts:
        raise CheckpointError(
            f"{where}: no LoRA: none of its {len(names)} keys is one's"
            + (f", such as {list_names(keys.foreign, 2)}" if keys.foreign else "")
        )
    if keys.foreign:
        raise CheckpointError(
            f"{where}: {len(keys.foreign)} of {len(names)} keys name nothing this model has: "
            f"{list_names(keys.foreign)}; it is an adapter of another model, or of more than the transformer"
        )
    found: dict[str, dict[str, Tensor]] = {}
    for key, part in keys.parts.items():
        if part.part in (parts := found.setdefault(part.module, {})):
            raise CheckpointError(f"{where}: {key} is there twice: it holds several adapters, give one at a time")
        parts[part.part] = get(key)
    return _put_together(where, found, keys, config, alpha)


def _put_together(
    file: str, found: Mapping[str, Mapping[str, Tensor]], keys: Keys, config: Mapping[str, Any], alpha: float | None
) -> Adapter:
    pairs: dict[str, Pair] = {}
    diffs: dict[str, Tensor] = {}
    unknown: list[str] = []
    for module, parts in found.items():
        for part, leaf in ((WEIGHT_DIFF, "weight"), (BIAS_DIFF, "bias")):
            if part in parts:
                diffs[f"{module}.{leaf}"] = _numbers(file, module, parts[part])
        if not {DOWN, UP, ALPHA} & parts.keys():
            continue
        if not {DOWN, UP} <= parts.keys():
            raise CheckpointError(f"{file}: {module} has {' and '.join(sorted(parts))} only: A and B belong together")
        down, up = (_numbers(file, module, parts[part]) for part in (DOWN, UP))
        if down.ndim != 2 or up.ndim != 2 or len(down) != up.shape[1] or not len(down):
            raise CheckpointError(
                f"{file}: A and B of {module} are {list(down.shape)} and {list(up.shape)}: they do not make a "
                "product; the file is damaged"
            )
        own = alpha_of(file, module, len(down), parts, config, alpha)
        if own is None:
            unknown.append(module)
        pairs[module] = Pair(down, up, float(len(down)) if own is None else own)
    if unknown and (keys.style in ALWAYS_WITH_ALPHA or len(unknown) < len(pairs)):
        raise CheckpointError(
            f"{file}: no alpha for {len(unknown)} of {len(pairs)} linears, such as {unknown[0]}: put its {CONFIG} "
            "beside it, or say it: ospnext convert-lora SRC DST --to peft alpha=N"
        )
    return Adapter(pairs, diffs, file, keys.style)


def _numbers(file: str, module: str, tensor: Tensor) -> Tensor:
    """A tensor in plain floating point.

    Raises:
        CheckpointError: whole numbers, NaN or infinity.
    """
    if not tensor.is_floating_point():
        raise CheckpointError(f"{file}: {module} holds {tensor.dtype}: an adapter is of floating point")
    plain = tensor.float() if tensor.dtype.itemsize < 2 else tensor
    if not plain.isfinite().all():
        raise CheckpointError(f"{file}: {module} holds NaN or infinity: damaged, or its training diverged")
    return plain


# ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_adapter(
    adapter: Adapter, path: str | Path, to: str = "peft", base: str | None = None, torch_file: bool = False
) -> Path:
    """Write an adapter, whole or not at all.

    Args:
        adapter: what to write.
        path: for peft a folder, which gets ``adapter_model.safetensors`` and ``adapter_config.json`` and replaces an
            adapter that is there; for diffusers a folder, which gets ``pytorch_lora_weights.safetensors``, or a
            ``.safetensors`` file; for comfyui a ``.safetensors`` file.
        to: one of ``WRITTEN``. In diffusers' style alpha is the rank, and what it was is in B.
        base: peft: the model it belongs to, as a remark in its config.
        torch_file: peft: also write ``adapter_model.bin`` under OSP-Next's names, for its tools.

    Returns:
        The folder or file that was written.

    Raises:
        CheckpointError: no such style, the adapter holds what this style cannot, or the name does not fit it.
        OSError: it cannot be written.
    """
    target = Path(path).absolute()
    if to not in WRITTEN:
        raise CheckpointError(f"style {to!r} is not written: use {', '.join(WRITTEN)}")
    if adapter.diffs and to != "comfyui":
        raise CheckpointError(
            f"{adapter.source}: holds {len(adapter.diffs)} differences beside A and B, such as "
            f"{next(iter(adapter.diffs))}, for which {to} has no keys: write comfyui, or merge it (ospnext merge-lora)"
        )
    if to == "peft":
        if target.is_file() or target.suffix == ".safetensors":
            raise CheckpointError(f"{target}: peft's style is a folder, not a file: give another name")
        foreign = [p.name for p in target.iterdir() if p.name not in _PEFT_FILES] if target.is_dir() else []
        if foreign:
            raise CheckpointError(f"{target}: holds {list_names(foreign, 3)}, no adapter's: name another folder")
        with new_folder(target) as draft:
            write_into(adapter, draft, base, torch_file)
        return target
    if target.suffix != ".safetensors":
        if to == "comfyui" or target.is_file():
            raise CheckpointError(f"{target}: a single file of {to}'s style must end in .safetensors")
        target = target / _DIFFUSERS
    with new_file(target) as draft:
        tensors = _comfyui_tensors(adapter) if to == "comfyui" else _diffusers_tensors(adapter)
        with written_safely():
            save_file(tensors, draft, metadata=_header(adapter, to))
        let_others_read(draft)
    return target


def write_into(adapter: Adapter, folder: Path, base: str | None = None, torch_file: bool = False) -> None:
    """Peft's style into a folder that is there, which the caller makes whole."""
    assert not adapter.diffs, "PEFT has no keys for them"
    with written_safely():
        save_file(_named(adapter, "base_model.model.{}.lora_{}.weight"), folder / WEIGHTS, metadata={"format": "pt"})
    let_others_read(folder / WEIGHTS)
    if torch_file:
        torch.save(_named(adapter, "base_model.model.{}.lora_{}.default.weight"), folder / TORCH_WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(peft_config(adapter, base), indent=2) + "\n", encoding="utf-8")


def peft_config(adapter: Adapter, base: str | None = None) -> dict[str, Any]:
    """What ``peft.LoraConfig`` is made of again."""
    sizes = {name: pair.size for name, pair in adapter.pairs.items()}
    rank = Counter(size.rank for size in sizes.values()).most_common(1)[0][0]
    alpha = Counter(size.alpha for size in sizes.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {name: size.rank for name, size in sizes.items() if size.rank != rank},
        "alpha_pattern": {name: _plain(size.alpha) for name, size in sizes.items() if size.alpha != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(sizes),  # whole names: ends of names would also mean what has no adapter
    }


def _named(adapter: Adapter, pattern: str) -> dict[str, Tensor]:
    """A and B of every linear under the names of a style."""
    named: dict[str, Tensor] = {}
    for name, pair in adapter.pairs.items():
        named |= {pattern.format(name, "A"): pair.down.contiguous(), pattern.format(name, "B"): pair.up.contiguous()}
    return named


def _comfyui_tensors(adapter: Adapter) -> dict[str, Tensor]:
    named = _named(adapter, "diffusion_model.{}.lora_{}.weight")
    named |= {f"diffusion_model.{name}.alpha": torch.tensor(pair.alpha) for name, pair in adapter.pairs.items()}
    ends = {"weight": WEIGHT_DIFF, "bias": BIAS_DIFF}
    for name, diff in adapter.diffs.items():
        module, _, leaf = name.rpartition(".")
        named[f"diffusion_model.{module}.{ends[leaf]}"] = diff.contiguous()
    return named


def _diffusers_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Under diffusers' names, alpha taken into B: not all who read this style look for it anywhere."""
    pairs = {
        diffusers_name(f"{name}.weight").removesuffix(".weight"): pair._replace(
            up=(pair.up.float() * (pair.alpha / len(pair.down))).to(pair.up.dtype), alpha=float(len(pair.down))
        )
        for name, pair in adapter.pairs.items()
    }
    return _named(Adapter(pairs), "transformer.{}.lora_{}.weight")


def _header(adapter: Adapter, to: str) -> dict[str, str]:
    """Rank and alpha for those who read headers: diffusers, and people."""
    ranks = sorted({len(pair.down) for pair in adapter.pairs.values()})
    alphas = ranks if to == "diffusers" else sorted({pair.alpha for pair in adapter.pairs.values()})
    said = {"format": "pt"}
    for key, values in (("rank", ranks), ("alpha", alphas)):
        if len(values) == 1:
            said[key] = f"{values[0]:g}"
    return said


def in_words(values: Sequence[float]) -> str:
    """Sorted numbers as they are said: one, or from the least to the largest."""
    ends = [f"{value:g}" for value in values]
    return "none" if not ends else ends[0] if len(ends) == 1 else f"{ends[0]} to {ends[-1]}"


def _plain(value: float) -> float | int:
    return int(value) if value == int(value) else value
