"""What says the alpha of a LoRA: a tensor in the file, PEFT's config beside it, the file's header, or the user."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ospnext.checkpoints.lora_keys import ALPHA
from ospnext.checkpoints.read import CheckpointError, WeightFile, read_json

CONFIG = "adapter_config.json"
_METADATA = "lora_adapter_metadata"  # diffusers' name for PEFT's config in a file's header


def alpha_of(
    file: str, module: str, rank: int, parts: Mapping[str, Tensor], config: Mapping[str, Any], default: float | None
) -> float | None:
    """Alpha of a linear: the file's own, that of its config, or ``default``.

    Raises:
        CheckpointError: the config is of another rank, or alpha is no number above zero.
    """
    alpha = default
    if ALPHA in parts:
        if parts[ALPHA].numel() != 1:
            raise CheckpointError(f"{file}: alpha of {module} is no single number, but {list(parts[ALPHA].shape)}")
        alpha = float(parts[ALPHA])
    elif "lora_alpha" in config:
        said = _by_pattern(config.get("rank_pattern"), module, config.get("r", rank))
        if said != rank:
            raise CheckpointError(f"{file}: A of {module} has rank {rank}, but r is {said} in its config")
        alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
        if not isinstance(alpha, int | float):
            raise CheckpointError(f"{file}: lora_alpha is {alpha!r} in its config: it should be a number")
        alpha = float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1)
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise CheckpointError(f"{file}: alpha of {module} is {alpha:g}: it should be above zero")
    return alpha


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that a name ends with."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"^(.*\.)?({pattern})$", module):
            return value
    return default


def config_of(file: Path) -> dict[str, Any]:
    """PEFT's config of an adapter: the file beside it, else what its header says; empty where there is none.

    Raises:
        CheckpointError: it cannot be read, or is of another method than LoRA.
    """
    place = file.with_name(CONFIG)
    if place.is_file():
        config = read_json(place)
    else:
        config, place = _header_config(file), file
    if (method := config.get("peft_type", "LORA")) != "LORA":
        raise CheckpointError(f"{place}: peft_type is {method}: only LORA is supported")
    for key in ("use_dora", "modules_to_save", "layers_pattern", "trainable_token_indices", "lora_bias"):
        if config.get(key):
            raise CheckpointError(f"{place}: {key} is {config[key]!r}, which is not supported: merge it with PEFT")
    return config


def _header_config(file: Path) -> dict[str, Any]:
    if file.suffix != ".safetensors":
        return {}
    _ = WeightFile(file).tensors  # refuses what is no safetensors file in our words
    with safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get(_METADATA)
    if text is None:
        return {}
    try:
        said = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{file}: {_METADATA} in its header is not valid JSON ({error})") from error
    return {key.removeprefix("transformer."): value for key, value in said.items()} if isinstance(said, dict) else {}
