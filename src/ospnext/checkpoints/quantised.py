"""Checkpoints in 8 bits: what they look like, how they are read, as 8 bits or plain numbers, and what makes them void.

A stored weight ``NAME.weight`` holds uint8 HiF8 codes, and ``NAME.weight_scale`` beside it one float32 number:
``decode(weight) * weight_scale`` is the weight. All other tensors are as in a plain checkpoint. config.json holds the
recipe's keys (``quant`` ...), so the weights run as HiF8 unless somebody asks for plain numbers.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ospnext.checkpoints.read import CheckpointError, Reader, TensorInfo, WeightFile, Weights, list_names, read_json
from ospnext.config import ConfigError
from ospnext.ops import hif8
from ospnext.parallel.fsdp import shard_of
from ospnext.quant.apply import matching, quantize
from ospnext.quant.config import QuantConfig
from ospnext.quant.linear import SCALE, HiF8StoredLinear
from ospnext.quant.running import AMAX, SEEN, buffers
from ospnext.quant.settings import SAVED, read_keys

_WEIGHT = "weight"


def said_of(place: Path) -> dict[str, Any]:
    """The quantisation keys in the config.json of a checkpoint folder; of a file none.

    Raises:
        CheckpointError: one has no such value.
    """
    if not (place / "config.json").is_file():
        return {}
    try:
        return read_keys(read_json(place / "config.json"), place / "config.json")
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def stored_linears(weights: Weights) -> list[str]:
    """Names of the linears whose weights are stored in 8 bits.

    Raises:
        CheckpointError: codes without their scale, a scale without codes, or either of another shape or kind.
    """
    names = [name.removesuffix(f".{SCALE}") for name in weights.tensors if name.endswith(f".{SCALE}")]
    coded = [n for n, info in weights.tensors.items() if n.endswith(f".{_WEIGHT}") and info.dtype is torch.uint8]
    alone = [name for name in coded if f"{name.removesuffix(_WEIGHT)}{SCALE}" not in weights.tensors]
    if alone:
        raise CheckpointError(f"{weights.source}: 8-bit weights without their {SCALE}: {list_names(alone)}")
    for name in names:
        codes, scale = weights.tensors.get(f"{name}.{_WEIGHT}"), weights.tensors[f"{name}.{SCALE}"]
        if codes is None or codes.dtype is not torch.uint8:
            raise CheckpointError(f"{weights.source}: {name}.{SCALE} is there, but {name}.{_WEIGHT} is not in 8 bits")
        if scale != TensorInfo((), torch.float32):
            raise CheckpointError(f"{weights.source}: {name}.{SCALE} is no single float32 number")
    return names


def decoded(weights: Weights, keep: Collection[str] = ()) -> Weights:
    """The same weights with 8-bit ones in plain numbers, decoded as they are read.

    Args:
        weights: of any kind; plain ones come back as they are.
        keep: names of linears that stay in 8 bits.

    Raises:
        CheckpointError: as ``stored_linears``; and when a tensor is read whose codes or scale are no numbers.
    """
    names = set(stored_linears(weights)) - set(keep)
    if not names:
        return weights
    plain = [i.dtype for n, i in weights.tensors.items() if i.dtype.is_floating_point and not n.endswith(SCALE)]
    dtype = plain[0] if plain else torch.float32
    return Weights(weights.source, [_DecodedFile(file, weights, names, dtype) for file in weights.files])


class _DecodedFile(WeightFile):
    """A file whose 8-bit weights read as plain numbers; a scale may stand in another file of the checkpoint."""

    def __init__(self, file: WeightFile, whole: Weights, names: Collection[str], dtype: torch.dtype) -> None:
        super().__init__(file.path)
        self._file, self._whole, self._names = file, whole, names
        shown = {n: i for n, i in file.tensors.items() if n.removesuffix(f".{SCALE}") not in names}
        coded = {n for n in shown if n.removesuffix(f".{_WEIGHT}") in names}
        self.tensors = {n: i._replace(dtype=dtype) if n in coded else i for n, i in shown.items()}
        self._coded = coded

    @contextmanager
    def opened(self) -> Iterator[Reader]:
        with self._file.opened() as read:

            def decoding(name: str, rows: slice | None = None) -> torch.Tensor:
                if name not in self._coded:
                    return read(name, rows)
                scale = self._scale(f"{name.removesuffix(_WEIGHT)}{SCALE}", read)
                codes = read(name, rows)
                check_codes(name, codes, scale, self._whole.source)
                return (hif8.decode(codes) * scale).to(self.tensors[name].dtype)

            yield decoding

    def _scale(self, name: str, read: Reader) -> torch.Tensor:
        if name in self._file.tensors:
            return read(name)
        with self._whole.place[name].opened() as other:
            return other(name).clone()


def check_codes(name: str, codes: torch.Tensor, scale: torch.Tensor, source: object) -> None:
    """Refuse codes of NaN or infinity, and a scale that is no positive number: they were damaged.

    Raises:
        CheckpointError: names the weight.
    """
    low = codes & 0x7F
    if ((low == 0x6F) | (codes == 0x80)).any():
        raise CheckpointError(f"{source}: {name} holds codes that are no finite number: damaged, make it anew")
    if not bool(scale.isfinite()) or float(scale) <= 0:
        raise CheckpointError(f"{source}: the scale of {name} is {float(scale)}: damaged, make it anew")


def check_stored(model: nn.Module, source: object) -> None:
    """``check_codes`` of every weight that a loaded model holds in 8 bits, ``check_running`` of all running numbers.

    Of weights that are shared a process checks its own rows.
    """
    for name, module in model.named_modules():
        if isinstance(module, HiF8StoredLinear) and not module.weight.is_meta:
            check_codes(f"{name}.{_WEIGHT}", shard_of(module.weight).values, module.get_buffer(SCALE), source)
    for name, numbers in buffers(model).items():
        if not numbers.is_meta:
            check_running(name, numbers, source)


def check_running(name: str, numbers: torch.Tensor, source: object) -> None:
    """Refuse running largest numbers that are none: they were damaged.

    Raises:
        CheckpointError: names them.
    """
    if not bool((numbers.isfinite() & (numbers >= 0)).all()):
        raise CheckpointError(f"{source}: {name} holds {numbers.tolist()}: damaged, make it anew")


def running_names(weights: Weights) -> set[str]:
    """Names of the running largest numbers in the files."""
    return {name for name in weights.tensors if name.rpartition(".")[2] in (AMAX, SEEN)}


def carried(weights: Weights, to: str) -> dict[str, TensorInfo]:
    """The running largest numbers that a copy in the format ``to`` takes along: in float32, and only where its
    config.json says what they are for.
    """
    return {name: weights.tensors[name] for name in sorted(running_names(weights)) if to == "osp"}


class ToFill(NamedTuple):
    """What a model on meta is filled from, names there that it has no place for, and a recipe to put on afterwards."""

    weights: Weights
    ignore: set[str]
    later: QuantConfig | None


def put_recipe(
    model: Any,
    weights: Weights,
    said: Mapping[str, Any],
    config: QuantConfig | None,
    trainable: bool,
    shared: bool,
) -> ToFill:
    """Quantise a model on meta, unless its running numbers begin at nothing, which no file needs to say.

    Args:
        model, weights: what is loaded.
        said: the quantisation keys of the weights' config.json.
        config: the recipe to run.
        trainable: as in ``load_transformer``.
        shared: whether processes share the weights.
    """
    known = running_names(weights)
    later = config is not None and config.scaling == "running" and not known
    if later and (shared or not trainable):
        raise CheckpointError(
            f"{weights.source}: no {AMAX}: quant_scaling running is for weights trained with it, or measured by "
            "`ospnext quantize` (calibration.prompts)"
        )
    if config is None or later:
        weights = decoded(weights)
    else:
        weights = _put_quantisation(model, weights, said, config, in_8_bits=not trainable)
    return ToFill(weights, known - _known_buffers(model, known, weights), config if later else None)


def refuse_idle(given: Mapping[str, Any], weights: Weights) -> None:
    """Refuse keys of a recipe where nobody has asked for one."""
    if not {"quant", "quant_attn"} & given.keys() and (idle := sorted(given.keys() & set(SAVED))):
        what = ", ".join(f"{key} is {given[key]!r}" for key in idle)
        raise CheckpointError(
            f"{weights.source}: {what}, but nothing runs in HiF8: give quant=hif8 and quant_attn=hif8, too, or leave "
            "it out"
        )


def _known_buffers(model: nn.Module, known: Collection[str], weights: Weights) -> set[str]:
    """Names of a model's running numbers, all of which the files have to hold."""
    needed = buffers(model).keys()
    if unknown := [name for name in needed if name not in known]:
        raise CheckpointError(
            f"{weights.source}: no {list_names(unknown, 3)}: quant_scaling running knows only the layers that were "
            "quantised then: keep these in plain numbers (quant_keep, quant_attn=none), use quant_scaling=tensor, or "
            "measure them by `ospnext quantize` (calibration.prompts)"
        )
    return set(needed)


def _put_quantisation(
    model: Any, weights: Weights, said: Mapping[str, Any], config: QuantConfig, in_8_bits: bool
) -> Weights:
    """Quantise a model that is to be filled from ``weights``; returns these as the model wants to read them.

    Args:
        model: on meta.
        weights: of any kind.
        said: the keys of the weights' config.json.
        config: the recipe to run.
        in_8_bits: hold weights in 8 bits that are stored so, where the recipe rounds them in the same way.
    """
    stored: set[str] = set()
    if in_8_bits and said.get("scale_max_forward", config.scale_max_forward) == config.scale_max_forward:
        stored = set(stored_linears(weights)) & set(matching(model, config))
    quantize(model, config, stored)
    return decoded(weights, keep=stored)
