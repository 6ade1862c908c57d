"""What stands between a block's products and its attention: a plain form of each, and one pass over memory on CUDA.

=================  ==========================================================
function           computes
=================  ==========================================================
``norm``           layer norm, then scale and shift
``add``            the residual: x + y · gate
``add_norm``       both: the residual and its norm
``rms_norm``       RMS norm over all heads together
``norm_rope``      the same, then rotary positions
``linear_gelu``    a linear layer, then GELU
``embed_patches``  latents to tokens
=================  ==========================================================

The plain forms run on any device and have gradients; torch.compile fuses what it can of them. For sampling on CUDA
there are Triton kernels (``triton_kernels.py``) and, for ``linear_gelu``, the product's own epilogue: they need no
compilation of the model. All compute in float32 whatever the dtype in memory; ``describe_fused`` says which form runs.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn

from ospnext.ops.rope import apply_rope

TRITON = find_spec("triton") is not None
_as_in_training = False  # see ``as_in_training``
if TRITON:
    from ospnext.ops import triton_kernels


def norm(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
    """Layer norm over the last axis, then ``· scale + shift``.

    Args:
        x: ``[B, N, dim]``.
        scale, shift: ``[B, 1, dim]``, or ``[dim]`` for all.
        eps: of the norm.

    Returns:
        Like ``x``.
    """
    if sampling(x):
        return triton_kernels.add_norm(x.contiguous(), None, None, scale, shift, eps)[1]
    normed = F.layer_norm(x.float(), (x.shape[-1],), eps=eps)
    return (normed * scale.float() + shift.float()).type_as(x)


def add(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    """The residual ``x + y · gate``: ``x, y [B, N, dim]``, ``gate [B, 1, dim]`` or none."""
    if sampling(x):
        return triton_kernels.add_norm(x.contiguous(), y.contiguous(), gate, None, None, 0.0)[0]
    return x + y if gate is None else (x.float() + y.float() * gate).type_as(x)


def add_norm(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None, scale: torch.Tensor, shift: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``add(x, y, gate)``, rounded to x's dtype, and ``norm`` of it."""
    if sampling(x):
        return triton_kernels.add_norm(x.contiguous(), y.contiguous(), gate, scale, shift, eps)
    x = add(x, y, gate)
    return x, norm(x, scale, shift, eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of ``x [B, N, dim]`` over the last axis, times ``weight [dim]``."""
    if sampling(x):
        return triton_kernels.norm_rope(x.contiguous(), weight, None, eps)
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).type_as(x)


def norm_rope(x: torch.Tensor, weight: torch.Tensor, table: torch.Tensor, eps: float) -> torch.Tensor:
    """``rms_norm``, heads apart, rotation: what queries and keys go through before attention.

    Args:
        x: ``[B, N, heads * head_dim]``.
        weight: ``[dim]`` of the norm.
        table: ``[N, head_dim]`` of ``ops.rope.rope_table``, in the tokens' order.
        eps: of the norm.

    Returns:
        ``[B, N, heads, head_dim]`` in x's dtype.
    """
    head_dim = table.shape[-1]
    if sampling(x):
        rotated = triton_kernels.norm_rope(x.contiguous(), weight, table.contiguous(), eps)
        return rotated.unflatten(-1, (-1, head_dim))
    return apply_rope(rms_norm(x, weight, eps).unflatten(-1, (-1, head_dim)), table)


def linear_gelu(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """GELU (tanh) of a linear layer's output.

    Args:
        x: ``[B, N, inputs]``.
        layer: ``nn.Linear``, or a layer that stands in its place, which is then called as it is.
    """
    plain = type(layer) is nn.Linear and layer.bias is not None and layer.weight.dtype == x.dtype  # not under autocast
    if plain and x.is_cuda and not torch.is_grad_enabled() and not _as_in_training:
        return _linear_gelu(x, layer.weight, layer.bias)
    return F.gelu(layer(x), approximate="tanh")


def embed_patches(latents: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """Tokens of a latent video: a convolution whose kernel is its stride, and so one product.

    Args:
        latents: ``[B, C, T, H, W]``, whole patches.
        layer: ``nn.Conv3d``, or a layer that stands in its place, which is then called as it is.

    Returns:
        ``[B, N, dim]``, row-major and contiguous.
    """
    if type(layer) is not nn.Conv3d:
        return layer(latents).flatten(2).transpose(1, 2).contiguous()
    (batch, channels, *sizes), patch = latents.shape, layer.kernel_size
    split = [n for size, p in zip(sizes, patch, strict=True) for n in (size // p, p)]
    x = latents.reshape(batch, channels, *split).permute(0, 2, 4, 6, 1, 3, 5, 7)  # [B, t, h, w, C, pt, ph, pw]
    patches = x.reshape(batch, -1, channels * math.prod(patch))
    return F.linear(patches, layer.weight.flatten(1), layer.bias)


def describe_fused(device: torch.device) -> str:
    """Which form runs when sampling on a device, for the report."""
    if device.type != "cuda":
        return "plain"
    return "triton, fused" if TRITON else "plain, and slower: Triton is not installed"


def sampling(x: torch.Tensor) -> bool:
    """Whether the kernels run on a tensor: sampling on CUDA."""
    return TRITON and x.is_cuda and not torch.is_grad_enabled() and x.numel() > 0 and not _as_in_training


@contextmanager
def as_in_training(on: bool = True) -> Iterator[None]:
    """Inside, the plain forms run without gradients, too: sampling then rounds as training does. In one thread."""
    global _as_in_training
    before, _as_in_training = _as_in_training, on
    try:
        yield
    finally:
        _as_in_training = before


# An operator of its own: the compiler would take the product and its activation apart again.
@torch.library.custom_op("ospnext::linear_gelu", mutates_args=())
def _linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    out = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return out.view(*x.shape[:-1], -1)


@_linear_gelu.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))
