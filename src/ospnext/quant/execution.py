"""HiF8 tensors in the form that multiplies them, and their products: emulated, on FP8 tensor cores, or on Ascend.

A tensor is held as numbers of eight bits' worth and a scale to multiply them by. Emulation holds bfloat16, which has
every HiF8 number, and multiplies in float32; the others hold eight bits.
"""

import torch

from ospnext.ops import fp8, hif8
from ospnext.ops.fp8 import Held
from ospnext.quant import ascend
from ospnext.quant.config import Execution, QuantConfig, ReduceAmax


def amax(x: torch.Tensor, first: int, reduce: ReduceAmax | None = None) -> torch.Tensor:
    """The largest absolute number along all axes from ``first`` on, which stay with size 1; float32, NaN if any is.

    Args:
        x, first: as ``fp8.amax``.
        reduce: the largest over the processes that share x.
    """
    largest = fp8.amax(x, first)
    return largest if reduce is None else reduce(largest)


def hold(x: torch.Tensor, largest: torch.Tensor, scale_max: float, execution: Execution) -> Held:
    """``x`` scaled so that ``largest`` becomes ``scale_max``, and rounded to HiF8.

    What is larger still (a running largest number may be out of date) saturates where E4M3 does, in every execution.
    """
    if execution == "fp8":
        return fp8.hold(x, largest, scale_max)
    scale, inverse = fp8.scales(largest, scale_max)
    limit = fp8.E4M3_MAX / fp8.headroom(scale_max)
    scaled = (x.detach().float() * scale).clamp(-limit, limit)
    if execution == "ascend":
        return Held(ascend.cast(scaled), inverse)
    return Held(hif8.round(scaled).bfloat16(), inverse)


def hold_codes(codes: torch.Tensor, inverse: torch.Tensor, config: QuantConfig) -> Held:
    """The same of HiF8 codes, or of E4M3 made of them, that were made with ``scale_max_forward``.

    Codes may come as whole numbers in a floating dtype: FSDP2 of torch 2.11 gathers every parameter in ``param_dtype``,
    and each of them has all 256.
    """
    if codes.dtype is fp8.E4M3:
        return Held(codes, inverse / fp8.headroom(config.scale_max_forward))
    codes = codes.to(torch.uint8)
    if config.execution == "fp8":
        factor = fp8.headroom(config.scale_max_forward)
        return Held(fp8.codes_to_e4m3(codes, config.scale_max_forward), inverse / factor)
    if config.execution == "ascend":
        return Held(codes, inverse)
    return Held(hif8.decode(codes).bfloat16(), inverse)


def matmul(
    a: Held,
    b: Held,
    execution: Execution,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    fast: bool = False,
) -> torch.Tensor:
    """``a @ b.T + bias`` of what is meant by ``a [M, K]``, one scale or ``[M, 1]``, and ``b [N, K]``, one scale.

    ``fast`` is of ``fp8.scaled_mm``.
    """
    if execution == "fp8":
        return fp8.scaled_mm(a.values, b.values, a.inverse, b.inverse, dtype, bias, fast)
    if execution == "ascend":
        out = ascend.matmul(a.values, b.values, a.inverse, b.inverse, dtype)
        return out if bias is None else out + bias
    with torch.autocast(a.values.device.type, enabled=False):  # it would multiply in half precision
        out = a.values.float() @ b.values.float().t() * (a.inverse * b.inverse)
        return (out if bias is None else out + bias).to(dtype)
