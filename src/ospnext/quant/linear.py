"""Linears whose inputs, weights and gradients are rounded to HiF8.

    y  = Q(x) Q(W)^T + b                forward, Q of scale_max_forward
    dx = Q(dy) Q(W)                     backward, Q(dy) of scale_max_backward; x and W as the forward pass rounded them
    dW = Q(dy)^T Q(x),  db = sum Q(dy)

That is OSP-Next's recipe. Both classes are ``nn.Linear``, so that PEFT and name filters take them for one. Between the
passes eight bits' worth of x is kept, and nothing of a frozen weight's x.
"""

from typing import Any

import torch
from torch import nn

from ospnext.ops import hif8
from ospnext.ops.fp8 import E4M3, codes_to_e4m3, headroom
from ospnext.quant import running
from ospnext.quant.config import QuantConfig, ReduceAmax
from ospnext.quant.execution import Held, amax, hold, hold_codes, matmul
from ospnext.quant.running import AMAX, SEEN, Running

SCALE = "weight_scale"
"""Buffer of a stored weight: what its codes' numbers are to be multiplied by."""

ALWAYS_FLOAT32 = (AMAX, SEEN, SCALE)

FEW_ROWS = 2048  # of a sample: its own product would be over before the next one is launched


class HiF8Linear(nn.Linear):
    """A linear that rounds to HiF8 what it multiplies; its parameters are those of the linear it replaces.

    Args:
        linear: what it replaces; weight and bias are shared with it, not copied.
        config: how to round.
    """

    def __init__(self, linear: nn.Linear, config: QuantConfig) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.quant = config
        self.reduce_amax: ReduceAmax | None = None
        if config.scaling == "running":
            running.start(self, 2, linear.weight.device)  # of activations and of gradients
        self.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, x's dtype; the first of three or more axes is samples."""
        return _Product.apply(
            x, self.weight, self.bias, self._buffers.get(SCALE), *running.of(self), self.quant, self.reduce_amax
        )

    def held_weight(self) -> Held:
        """The weight ``[out_features, in_features]`` as the products take it."""
        return _hold_weight(self.weight, self._buffers.get(SCALE), self.quant)

    def extra_repr(self) -> str:
        """As it is printed."""
        return f"{super().extra_repr()}, hif8 {self.quant.execution}"


class HiF8StoredLinear(HiF8Linear):
    """The same for sampling and for adapters, with a weight of eight bits in memory, which is not trained itself.

    Its ``weight`` holds uint8 codes and its buffer ``weight_scale`` one float32: ``decode(weight) * weight_scale``.
    ``unpack`` makes E4M3 of the codes, once for all products; saving makes codes of it again.

    Args:
        linear: gives sizes, bias and, unless it is on meta, the weight.
        config: how to round.
    """

    def __init__(self, linear: nn.Linear, config: QuantConfig) -> None:
        super().__init__(linear, config)
        codes, scale = encode_weight(linear.weight, config.scale_max_forward)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer(SCALE, scale)

    def unpack(self) -> None:
        """Hold the weight as FP8 tensor cores take it. Numbers below some millionths of the largest lose their code."""
        if self.weight.dtype is torch.uint8:
            values = codes_to_e4m3(self.weight, self.quant.scale_max_forward)
            self.weight = nn.Parameter(values, requires_grad=False)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight.dtype is E4M3:
            numbers = self.weight.float() / headroom(self.quant.scale_max_forward)
            destination[f"{prefix}weight"] = hif8.encode(numbers)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves as usual; a cast leaves the scale float32."""
        scale = self._buffers[SCALE]
        assert scale is not None
        super()._apply(fn, recurse)
        moved = self._buffers[SCALE]
        if moved is not None and moved.dtype is not torch.float32:
            self._buffers[SCALE] = moved.float() if moved.is_meta else scale.to(moved.device)
        return self


def encode_weight(weight: torch.Tensor, scale_max: float) -> tuple[torch.Tensor, torch.Tensor]:
    """HiF8 codes of a weight and the float32 number that turns what they mean back into it.

    They are what ``HiF8Linear`` rounds the weight to in every pass.

    Raises:
        ValueError: the weight holds NaN or infinity.
    """
    if weight.is_meta:
        return torch.empty_like(weight, dtype=torch.uint8), torch.empty((), device="meta")
    largest = amax(weight, 0)
    if not largest.isfinite():
        raise ValueError("holds NaN or infinity")
    held = hold(weight, largest, scale_max, "emulation")
    return hif8.encode(held.values), held.inverse.reshape(())


class _Product(torch.autograd.Function):
    """The three products of the module's text."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scale: torch.Tensor | None,
        largest: torch.Tensor | None,
        seen: torch.Tensor | None,
        config: QuantConfig,
        reduce: ReduceAmax | None,
    ) -> torch.Tensor:
        held_x = _hold_rows(_samples(x), 0, Running(largest, seen), config, reduce)
        held_w = _hold_weight(weight, scale, config)
        out = product(held_x, held_w, config, _out_dtype(x), bias)
        keep_x = held_x if weight.requires_grad else Held(x.new_empty(0), x.new_empty(0))
        ctx.save_for_backward(*keep_x, weight, scale)
        ctx.running = Running(largest, seen)  # as they are then, not now
        ctx.config, ctx.reduce = config, reduce
        ctx.shape, ctx.dtype, ctx.bias_dtype = x.shape, x.dtype, None if bias is None else bias.dtype
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values, inverse, weight, scale = ctx.saved_tensors
        config: QuantConfig = ctx.config
        held_g = _hold_rows(_samples(gradients[0]), 1, ctx.running, config, ctx.reduce)
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            held_w = _hold_weight(weight, scale, config)
            across = Held(held_w.values.t(), held_w.inverse)
            products = [matmul(part, across, config.execution, ctx.dtype) for part in _parts(held_g, ctx.dtype)]
            to_x = torch.cat(products).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            to_weight = _weight_gradient(held_g, Held(values, inverse), config, ctx.dtype).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            to_bias = held_g.float().sum((0, 1)).to(ctx.bias_dtype)
        return to_x, to_weight, to_bias, None, None, None, None, None


def product(x: Held, weight: Held, config: QuantConfig, dtype: torch.dtype, bias: torch.Tensor | None) -> torch.Tensor:
    """The forward product of activations ``[S, M, K]`` and a weight ``[N, K]``: ``[S, M, N]`` in dtype."""
    parts = [matmul(part, weight, config.execution, dtype, bias, fast=True) for part in _parts(x, dtype)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(*x.values.shape[:-1], len(weight.values))


def _samples(x: torch.Tensor) -> torch.Tensor:
    """``[S, M, K]``: samples, rows, columns."""
    return x.unsqueeze(0) if x.ndim == 2 else x.reshape(len(x) if x.ndim > 2 else 1, -1, x.shape[-1])


def _hold_rows(
    rows: torch.Tensor, which: int, numbers: Running, config: QuantConfig, reduce: ReduceAmax | None
) -> Held:
    """Activations (``which`` 0) or gradients (1) ``[S, M, K]``, scaled as configured and rounded."""
    scale_max = (config.scale_max_forward, config.scale_max_backward)[which]
    if numbers.amax is not None:
        largest = running.largest(rows, which, numbers, config, reduce).reshape(1, 1, 1)
    else:
        by_token = config.scaling == "token" and which == 0
        largest = amax(rows, 2) if by_token else amax(rows, 1, reduce)
    return hold(rows, largest, scale_max, config.execution)


def _hold_weight(weight: torch.Tensor, scale: torch.Tensor | None, config: QuantConfig) -> Held:
    if scale is not None:
        return hold_codes(weight, scale, config)
    return hold(weight, amax(weight, 0), config.scale_max_forward, config.execution)


def _parts(held: Held, dtype: torch.dtype) -> list[Held]:
    """``[S, M, K]`` as matrices that have one scale each or one for every row, for products in dtype."""
    samples, rows, columns = held.values.shape
    if held.inverse.numel() == 1 or held.inverse.shape[1] == rows > 1:
        return [Held(held.values.reshape(-1, columns), held.inverse.reshape(-1, 1))]
    # Products with a scale for every row are slower and round to bfloat16 on CUDA, but many samples need only one.
    if rows < FEW_ROWS and (dtype is torch.bfloat16 or not held.values.is_cuda):
        return [Held(held.values.reshape(-1, columns), held.inverse.expand(-1, rows, -1).reshape(-1, 1))]
    return [Held(held.values[i], held.inverse[i]) for i in range(samples)]


def _weight_gradient(held_g: Held, held_x: Held, config: QuantConfig, dtype: torch.dtype) -> torch.Tensor:
    """``sum Q(dy)^T Q(x)`` over samples and rows ``[N, K]``."""
    if held_x.inverse.numel() > 1 and held_x.inverse.shape[1] > 1:
        # Scales along the axis that is summed over: no 8-bit product has them.
        return held_g.float().flatten(0, 1).to(dtype).t() @ held_x.float().flatten(0, 1).to(dtype)
    samples, rows, _ = held_g.values.shape
    if samples > 1 and rows < FEW_ROWS:  # float32 has every number of eight bits: exact but for the order of sums
        with torch.autocast(held_g.values.device.type, enabled=False):
            each = torch.bmm(held_g.numbers().transpose(1, 2), held_x.numbers())
            return (each * (held_g.inverse * held_x.inverse)).sum(0)
    total: torch.Tensor | None = None
    for i in range(len(held_g.values)):
        g = Held(held_g.values[i].t(), held_g.inverse[min(i, len(held_g.inverse) - 1)])
        x = Held(held_x.values[i].t(), held_x.inverse[min(i, len(held_x.inverse) - 1)])
        part = matmul(g, x, config.execution, torch.float32)
        total = part if total is None else total + part
    assert total is not None
    return total


def _out_dtype(x: torch.Tensor) -> torch.dtype:
    """A linear's: its input's, or autocast's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
