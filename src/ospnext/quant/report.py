"""How far each quantised layer is from plain numbers, on the inputs it really gets.

    errors = layer_errors(model, lambda: pipe("a red star", num_inference_steps=4))
    print(error_table(errors))

Every layer is compared on its own: with what it is given in the quantised model, not with what a plain one would give.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ospnext.ops import hif8
from ospnext.ops.attention import Attend
from ospnext.quant.apply import quantised
from ospnext.quant.attention import HiF8Attend
from ospnext.quant.linear import SCALE, HiF8Linear


class LayerError(NamedTuple):
    """One layer's error.

    Attributes:
        name: of the linear or attention module.
        relative: norm of the difference of the outputs, by the norm of the plain one.
        spread: largest input by the root of its mean square: what a scale for the whole tensor suffers from.
    """

    name: str
    relative: float
    spread: float


class _Sums:
    """What is added up of a layer over its calls."""

    def __init__(self) -> None:
        self.error = self.plain = self.spread = 0.0

    def add(self, got: torch.Tensor, plain: torch.Tensor, x: torch.Tensor) -> None:
        self.error += float((got.float() - plain.float()).square().sum())
        self.plain += float(plain.float().square().sum())
        self.spread = max(self.spread, float(x.abs().max() / x.float().square().mean().sqrt().clamp(min=1e-30)))


class _Observed(Attend):
    """A quantised attention that is compared with the plain one at every call."""

    def __init__(self, attend: HiF8Attend, sums: _Sums) -> None:
        self.attend, self.sums = attend, sums

    def __call__(self, q: Any, k: Any, v: Any, segments: tuple[int, ...] | None = None) -> torch.Tensor:
        out = self.attend(q, k, v, segments)
        self.sums.add(out, self.attend.attend(q, k, v, segments), q)
        return out


@torch.no_grad()
def layer_errors(model: nn.Module, run: Callable[[], object]) -> list[LayerError]:
    """The error of every quantised linear and attention while ``run`` uses the model, in the model's order.

    Args:
        model: quantised, uncompiled, on one device. Of weights that are stored in 8 bits the error is not seen: there
            is nothing to compare them with.
        run: calls the model, as often as it likes.

    Raises:
        ValueError: the model has no quantised layer, or ``run`` used none.
    """
    with _watched(model) as sums:
        run()
    used = {name: s for name, s in sums.items() if s.plain > 0}
    if not used:
        raise ValueError("no quantised layer was used: quantise the model first, and have it run")
    return [LayerError(name, math.sqrt(s.error / s.plain), s.spread) for name, s in used.items()]


def error_table(errors: Sequence[LayerError], worst: int = 20) -> str:
    """The layers of largest error, largest first, as lines of text, and the middle one of all."""
    ordered = sorted(errors, key=lambda error: -error.relative)
    shown = ordered[:worst]
    width = max(len("layer"), *(len(error.name) for error in shown))
    lines = [f"{'layer':<{width}}  error   largest / rms of input"]
    lines += [f"{error.name:<{width}}  {error.relative:6.2%}  {error.spread:.1f}" for error in shown]
    middle = ordered[len(ordered) // 2]
    return "\n".join([*lines, f"{len(ordered)} layers, error of the middle one {middle.relative:.2%}"])


@contextmanager
def _watched(model: nn.Module) -> Iterator[dict[str, _Sums]]:
    sums = {name: _Sums() for name, _ in quantised(model)}
    handles, holders = [], []
    for name, module in list(quantised(model)):
        if isinstance(module, HiF8Linear):
            handles.append(module.register_forward_hook(_compare(sums[name])))
        else:
            holder: Any = model.get_submodule(name)
            holders.append((holder, holder.attend))
            holder.attend = _Observed(module, sums[name])
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
        for holder, attend in holders:
            holder.attend = attend


def _compare(sums: _Sums) -> Callable[..., None]:
    def hook(module: HiF8Linear, args: Any, output: torch.Tensor) -> None:
        (x,) = args
        scale = module._buffers.get(SCALE)
        weight = module.weight if scale is None else (hif8.decode(module.weight) * scale).to(x.dtype)
        sums.add(output, F.linear(x, weight, module.bias), x)

    return hook
