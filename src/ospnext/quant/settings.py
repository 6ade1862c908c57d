"""The keys that turn HiF8 on (``sections.QuantKeys``), in a configuration and in a checkpoint's config.json alike.

``quant``, ``quant_attn``, ``scale_max_forward`` and ``scale_max_backward`` are OSP-Next's and mean what they do there.
"""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError

from ospnext.config import ConfigError, describe_errors
from ospnext.quant.config import LINEARS, QuantConfig, choose_execution
from ospnext.sections import QuantKeys

SAVED = tuple(key for key in QuantKeys.model_fields if key != "quant_execution")
"""The keys that stand in a config.json."""


def quant_keys(config: QuantKeys) -> dict[str, Any]:
    """The keys that were given."""
    return config.model_dump(include=set(QuantKeys.model_fields), exclude_none=True)


def read_keys(raw: Mapping[str, Any], where: object = "config.json") -> dict[str, Any]:
    """The keys that a config.json gives, checked.

    Raises:
        ConfigError: one has no such value; names it and ``where`` it stands.
    """
    given = {key: raw[key] for key in SAVED if raw.get(key) is not None}
    try:
        return quant_keys(QuantKeys.model_validate(given))
    except ValidationError as error:
        raise ConfigError(f"{where}: {describe_errors(QuantKeys, error)}") from error


def recipe(keys: Mapping[str, Any], device: torch.device) -> QuantConfig | None:
    """The recipe that keys ask for on a device; None where they ask for none.

    Raises:
        ValueError: the device cannot do what ``quant_execution`` asks for.
    """
    linears, attention = (keys.get(key) == "hif8" for key in ("quant", "quant_attn"))
    if not linears and not attention:
        return None
    plain = QuantConfig()
    return QuantConfig(
        linears=LINEARS if linears else (),
        attention=attention,
        keep=tuple(keys.get("quant_keep", ())),
        scale_max_forward=keys.get("scale_max_forward", plain.scale_max_forward),
        scale_max_backward=keys.get("scale_max_backward", plain.scale_max_backward),
        scaling=keys.get("quant_scaling", plain.scaling),
        execution=choose_execution(keys.get("quant_execution", "auto"), device),
    )


def saved_keys(config: QuantConfig) -> dict[str, Any]:
    """What a config.json says of a recipe; the inverse of ``recipe``."""
    chosen: dict[str, Any] = {
        "quant": "hif8" if config.linears else None,
        "quant_attn": "hif8" if config.attention else None,
        "scale_max_forward": config.scale_max_forward,
        "scale_max_backward": config.scale_max_backward,
    }
    if config.keep:
        chosen["quant_keep"] = list(config.keep)
    if config.scaling != "tensor":
        chosen["quant_scaling"] = config.scaling
    return chosen
