"""Put HiF8 on a finished model, from outside and by name; nothing in ``models`` knows of it.

    quantize(model, QuantConfig(keep=("blocks.0.*",)))

Before adapters, sharding and compilation, which all take the new linears for plain ones.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ospnext.ops.attention import Attend
from ospnext.ops.attention8 import SHORTEST, why_not
from ospnext.quant.attention import HiF8Attend
from ospnext.quant.config import Execution, QuantConfig
from ospnext.quant.linear import HiF8Linear, HiF8StoredLinear
from ospnext.quant.running import advance
from ospnext.quant.settings import saved_keys

_WAY_OUT = "keep that layer in plain numbers (model_config.quant_keep) or look at what it is given"


class NonFiniteError(ValueError):
    """A quantised model met NaN or infinity; the message names the layer where."""


def quantize(model: Any, config: QuantConfig, stored: Collection[str] = ()) -> list[str]:
    """Replace linears and attention by their HiF8 forms, in place; names and numbers of the parameters stay.

    Args:
        model: on any device, or on meta; without adapters.
        config: which and how.
        stored: names of linears whose weights are held as eight bits, for sampling or below adapters; they are not
            trained then.

    Returns:
        Names of the linears and attention modules that were replaced.

    Raises:
        ValueError: a pattern matches nothing, a model is quantised already, or a weight is NaN or infinite.
    """
    if is_quantised(model):
        raise ValueError("the model is quantised already: load it anew to change how")
    names = matching(model, config)
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            try:
                linear = (HiF8StoredLinear if name in stored else HiF8Linear)(module, config)
            except ValueError as error:
                raise ValueError(f"{name}: its weight {error}") from error
            model.get_submodule(parent)._modules[child] = linear
        else:
            holder: Any = module
            holder.attend = HiF8Attend(holder.attend, config, holder)
    if config.scaling == "running":
        # Not in a layer's own pass, which activation checkpointing repeats.
        model.register_forward_pre_hook(lambda m, args: advance(m, config.decay) if m.training else None)
    model.register_forward_hook(_Watch(), with_kwargs=True)
    if hasattr(model, "register_to_config"):
        model.register_to_config(**saved_keys(config))  # a checkpoint of it says how it ran
    return names


def matching(model: nn.Module, config: QuantConfig) -> list[str]:
    """Names of the linears and attention modules that a recipe means.

    Raises:
        ValueError: a pattern matches nothing.
    """
    found: list[str] = []
    unused = set(config.keep) | set(config.linears)
    for name, module in model.named_modules():
        wanted = type(module) is nn.Linear and _matches(name, config.linears, unused)
        wanted = wanted or (config.attention and type(getattr(module, "attend", None)) is Attend)
        if wanted and not _matches(name, config.keep, unused):
            found.append(name)
    if unused:
        raise ValueError(f"{', '.join(sorted(unused))}: no linear or attention of this model has such a name")
    return found


def _matches(name: str, patterns: Sequence[str], unused: set[str]) -> bool:
    """Whether a name fits one of the patterns, which are then used."""
    fits = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
    unused.difference_update(fits)
    return bool(fits)


def quantised(model: nn.Module) -> Iterator[tuple[str, HiF8Linear | HiF8Attend]]:
    """Every quantised linear and attention with its name, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, HiF8Linear):
            yield name, module
        elif (inner := _inner_attend(module)) is not None:
            yield name, inner


def _inner_attend(module: nn.Module) -> HiF8Attend | None:
    """The quantised attention of a module, also where it is wrapped in what shares heads among processes."""
    attend = getattr(module, "attend", None)
    while attend is not None and not isinstance(attend, HiF8Attend):
        attend = getattr(attend, "attend", None)
    return attend


def is_quantised(model: nn.Module) -> bool:
    """Whether anything of a model runs in HiF8."""
    return next(quantised(model), None) is not None


def describe(model: nn.Module, execution: Execution | None = None, device: torch.device | None = None) -> str:
    """What runs in HiF8, for a report.

    Args:
        model: any; on meta what it will be.
        execution: what will run, where the model is on meta so far.
        device: that a model will sample on once it is prepared (``quant.block``); None: it will not be.
    """
    linears = [module for _, module in quantised(model) if isinstance(module, HiF8Linear)]
    attentions = sum(isinstance(module, HiF8Attend) for _, module in quantised(model))
    if not linears and not attentions:
        return "none"
    kinds = Counter(
        f"{execution or module.quant.execution}, scale by {module.quant.scaling}"
        + (", weights stored in 8 bits" if isinstance(module, HiF8StoredLinear) else "")
        for module in linears
    )
    parts = [f"{count} linears ({kind})" for kind, count in kinds.items()]
    if attentions:
        how = "inputs rounded, plain kernel"
        executions = {execution or module.quant.execution for _, module in quantised(model)}
        if device is not None and device.type == "cuda" and executions == {"fp8"}:
            head_dim = model.config.dim // model.config.num_heads  # type: ignore[union-attr, operator]
            reason = why_not(device, head_dim)
            how = f"{how}: {reason}" if reason else f"fp8: cuDNN, from {SHORTEST:,} tokens on"
        parts.append(f"{attentions} attentions ({how})")
    return f"hif8: {', '.join(parts)}"


class _Watch:
    """A hook on a whole model: looks once a pass whether NaN or infinity comes out, and if so, where it began."""

    def __init__(self) -> None:
        self.again = False

    def __call__(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Runs the pass again to find the layer.

        Raises:
            NonFiniteError: names it.
        """
        tensors = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else (output,)
        sound = all(t.isfinite().all() for t in tensors if isinstance(t, torch.Tensor) and not t.is_meta)
        if self.again or sound:
            return
        found: list[str] = []
        self.again = True
        try:
            with torch.no_grad(), _observed(model, found):
                model(*args, **kwargs)
        finally:
            self.again = False
        raise NonFiniteError(f"{found[0] if found else 'the output holds NaN or infinity'}; {_WAY_OUT}")


@contextmanager
def _observed(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Note, while the block runs, every linear of the model that gets or makes NaN or infinity, in order."""

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            for what, tensor in (("input", args[0]), ("weight", module.weight), ("output", output)):
                if isinstance(tensor, torch.Tensor) and not tensor.isfinite().all():
                    found.append(f"{name}: its {what} holds NaN or infinity")
                    return

        return hook

    handles = [
        module.register_forward_hook(look(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
