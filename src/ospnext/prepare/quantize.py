"""``ospnext quantize SRC DST``: a checkpoint whose blocks' weights take 8 bits, on disk and in memory.

    ospnext quantize checkpoints/osp_next_14b checkpoints/osp_next_14b_hif8
    ospnext quantize shapes outputs/shapes_hif8 model_config.quant_keep='[blocks.0.*]'
    ospnext quantize shapes outputs/fast model_config.quant_scaling=running calibration.prompts="a red star"

SRC is a transformer in any format, or a whole pipeline folder, whose other parts are copied. What is written runs in
HiF8 unless ``model_config.quant: none`` asks for plain numbers, and gives exactly what SRC gives with ``quant: hif8``.
Tensors are streamed: memory holds one shard.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field
from rich.progress import track
from torch import nn

from ospnext.checkpoints.components import not_inside, pipeline_beside, pipeline_folder
from ospnext.checkpoints.fill import match_names
from ospnext.checkpoints.load import open_transformer
from ospnext.checkpoints.quantised import check_running, decoded, running_names, said_of
from ospnext.checkpoints.read import CheckpointError, Reader, TensorInfo, Weights, list_names
from ospnext.checkpoints.save import Source, check_target, write_checkpoint
from ospnext.config import Config
from ospnext.device import resolve_dtype
from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.ops import hif8
from ospnext.prepare.calibrate import CalibrationConfig, calibrate, read_prompts
from ospnext.quant.apply import matching, quantize
from ospnext.quant.config import QuantConfig
from ospnext.quant.linear import SCALE, encode_weight
from ospnext.quant.running import buffers
from ospnext.quant.settings import quant_keys, recipe, saved_keys
from ospnext.sections import DType, ModelConfig


class QuantizeConfig(Config):
    """``ospnext quantize``: a checkpoint in 8 bits."""

    src: str = Field(min_length=1, description="a transformer's folder or file, a pipeline folder, or 'shapes'")
    dst: str = Field(min_length=1, description="the folder to write")
    dtype: DType | None = Field(None, description="numbers of all other weights; default: as stored")
    max_shard_size: int = Field(5 * 10**9, ge=1, description="bytes of a shard at most")
    overwrite: bool = Field(False, description="replace a checkpoint that is in dst")
    transformer_config: ModelConfig = Field(
        default_factory=ModelConfig, alias="model_config", description="settings that src does not give, and the recipe"
    )
    calibration: CalibrationConfig = CalibrationConfig()


Measure = Callable[[], Mapping[str, torch.Tensor]]
"""Gives running numbers by name."""


class Written(NamedTuple):
    """What was written: bytes before and after, linears in 8 bits, and the error of each weight, largest first."""

    before: int
    after: int
    errors: list[tuple[str, float]]


def run(config: QuantizeConfig) -> str:
    """Quantise as configured; returns the lines to print."""
    source, target = pipeline_folder(config.src), Path(config.dst).absolute()
    whole = (source / "model_index.json").is_file()
    keys = said_of(source / "transformer" if whole else source) | {"quant": "hif8", "quant_attn": "hif8"}
    keys |= quant_keys(config.transformer_config)
    chosen = recipe(keys | {"quant_execution": "emulation"}, torch.device("cpu"))
    if chosen is None or not chosen.linears:
        raise CheckpointError("model_config.quant is none: there is nothing to quantise, use ospnext convert")
    not_inside(target, source)
    settings = config.transformer_config.architecture()
    measure: Measure | None = None
    if config.calibration.prompts is not None:
        if chosen.scaling != "running":
            raise CheckpointError("calibration.prompts is of model_config.quant_scaling=running: name both, or neither")
        if not whole:
            raise CheckpointError(f"{source}: calibration samples, and so needs a pipeline folder (model_index.json)")
        prompts = read_prompts(config.calibration)
        measure = partial(calibrate, source, prompts, config.calibration, chosen, settings)
    dtype = None if config.dtype is None else resolve_dtype(config.dtype)
    options = (chosen, dtype, config.max_shard_size)
    if whole:
        with pipeline_beside(source, target, config.overwrite) as folder:
            written = quantize_transformer(
                source / "transformer", folder / "transformer", *options, measure=measure, **settings
            )
    else:
        check_target(target, "osp", config.overwrite)
        written = quantize_transformer(source, target, *options, config.overwrite, **settings)
    return _summary(target, written)


def quantize_transformer(
    source: Path,
    target: Path,
    config: QuantConfig,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5 * 10**9,
    overwrite: bool = False,
    measure: Measure | None = None,
    **overrides: Any,
) -> Written:
    """Write a transformer's checkpoint with the recipe's linears in 8 bits.

    Args:
        source, overrides: as in ``load_transformer``; weights that are in 8 bits already are decoded and rounded anew,
            which changes nothing where the recipe is the same.
        target, max_shard_size, overwrite: as in ``save_transformer``.
        config: the recipe.
        dtype: of all other floating point; None keeps it.
        measure: where the recipe scales so, gives the running numbers by name, and is asked once all else is known to
            be right; None takes those that ``source`` was trained with.

    Raises:
        CheckpointError: ``source`` cannot be loaded, ``target`` must not be written, a weight is NaN or infinite, or
            the recipe keeps all linears.
        ValueError: a pattern of the recipe matches nothing.
    """
    settings, weights, name_of = open_transformer(source, **overrides)
    before = weights.nbytes()
    weights = decoded(weights)
    with torch.device("meta"):
        model = OSPNextTransformer3DModel(**settings)
    names = match_names(model, weights, name_of, running_names(weights))
    linears = {name for name in matching(model, config) if isinstance(model.get_submodule(name), nn.Linear)}
    if not linears:
        raise CheckpointError(
            f"model_config.quant_keep ({', '.join(config.keep)}) keeps every linear: there is nothing to quantise, use "
            "ospnext convert"
        )
    quantize(model, config)
    running = _running(buffers(model), weights, measure)
    tensors: dict[str, TensorInfo] = {}
    stored: dict[str, str] = {}
    for file_name in (name for name in weights.tensors if name in names):
        name, info = names[file_name], weights.tensors[file_name]
        stored[name] = file_name
        linear = name.removesuffix(".weight")
        if name.endswith(".weight") and linear in linears:
            tensors[name] = TensorInfo(info.shape, torch.uint8)
            tensors[f"{linear}.{SCALE}"] = TensorInfo((), torch.float32)
        else:
            tensors[name] = info.cast(dtype)
    with weights.opened() as read:
        encoder = _Encoder(read, stored, tensors, config, weights.source)
        tensors |= {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in running.items()}
        get = _counted(lambda name: running[name] if name in running else encoder.get(name), len(tensors))
        write_checkpoint(Source(settings | saved_keys(config), tensors, get), target, "osp", max_shard_size, overwrite)
    after = sum(info.nbytes for info in tensors.values())
    return Written(before, after, sorted(encoder.errors.items(), key=lambda item: -item[1]))


def _running(needed: Mapping[str, torch.Tensor], weights: Weights, measure: Measure | None) -> dict[str, torch.Tensor]:
    """The running numbers to be written: as measured, else the file's own.

    Args:
        needed: their names and shapes; none where the recipe needs none.
        weights: the source's.
        measure: as ``quantize_transformer``.

    Raises:
        CheckpointError: nobody has them, or they are damaged.
    """
    if measure is not None:
        return dict(measure())
    if unknown := [name for name in needed if name not in weights.tensors]:
        raise CheckpointError(
            f"{weights.source}: quant_scaling is running, but nothing is known of its layers' numbers (no "
            f"{list_names(unknown, 3)}): name calibration.prompts to measure them, or use quant_scaling=tensor"
        )
    found = {}
    with weights.opened() as read:
        for name, like in needed.items():
            found[name] = read(name).float()
            check_running(name, found[name], weights.source)
            if found[name].shape != like.shape:
                raise CheckpointError(f"{weights.source}: {name} holds {found[name].tolist()}, not {len(like)} numbers")
    return found


class _Encoder:
    """Gives every tensor as it is written; a weight and its scale, which are asked for in turn, are made once."""

    def __init__(
        self,
        read: Reader,
        stored: Mapping[str, str],
        tensors: Mapping[str, TensorInfo],
        config: QuantConfig,
        source: Path,
    ) -> None:
        self._read, self._stored, self._tensors, self._config, self._source = read, stored, tensors, config, source
        self._scales: dict[str, torch.Tensor] = {}
        self.errors: dict[str, float] = {}

    def get(self, name: str) -> torch.Tensor:
        linear, _, leaf = name.rpartition(".")
        if leaf == SCALE:
            if linear not in self._scales:
                self.get(f"{linear}.weight")
            return self._scales[linear]
        x = self._read(self._stored[name])
        info = self._tensors[name]
        if info.dtype is not torch.uint8:
            return x.to(info.dtype)
        try:
            codes, self._scales[linear] = encode_weight(x, self._config.scale_max_forward)
        except ValueError as error:
            raise CheckpointError(f"{self._source}: {name} {error}") from error
        back, plain = hif8.decode(codes) * self._scales[linear], x.float()
        self.errors[linear] = float((back - plain).norm() / plain.norm().clamp(min=1e-30))
        return codes


def _counted(get: Callable[[str], torch.Tensor], total: int) -> Callable[[str], torch.Tensor]:
    """The same, with a bar that moves at every tensor."""
    steps = iter(track(range(total), "quantising", transient=True))

    def counting(name: str) -> torch.Tensor:
        next(steps, None)
        return get(name)

    return counting


def _summary(target: Path, written: Written) -> str:
    errors = written.errors
    worst = ", ".join(f"{name} {error:.2%}" for name, error in errors[:3])
    middle = errors[len(errors) // 2][1]
    return (
        f"wrote {target}: {written.after / 1e6:.2f} MB of weights, {written.after / written.before:.0%} of "
        f"{written.before / 1e6:.2f} MB; {len(errors)} linears in 8 bits\n"
        f"error of a weight (norm): {middle:.2%} in the middle, most in {worst}"
    )
