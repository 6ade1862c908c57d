"""A block that samples in HiF8 on FP8 tensor cores: numbers are rounded where they are made, not once more in between.

``prepare`` puts it on a quantised model from outside. It computes what the block's own ``forward`` computes, number for
number, but for two things: attention runs on FP8 tensor cores too where it can (``ops/attention8.py``), and GELU's
kernel has an exponential of its own.
"""

from functools import partial
from typing import Any, cast

import torch
from torch import nn

from ospnext.ops import attention8, fused, fused8
from ospnext.ops.fp8 import E4M3, Held
from ospnext.ops.fused8 import Target
from ospnext.quant.attention import HiF8Attend
from ospnext.quant.linear import HiF8Linear, HiF8StoredLinear, product
from ospnext.quant.running import AMAX


def prepare(model: Any, device: torch.device | None = None) -> None:
    """Make a quantised model ready to sample fast, in place; its weights can no longer be trained then.

    Weights become eight bits in memory, and blocks that are quantised whole fuse. Does nothing to a model that is not
    quantised, that does not run on FP8 tensor cores, or whose weights are shared among processes.

    Args:
        model: on any device.
        device: where weights are rounded, one after the other; None: where they are.

    Raises:
        ValueError: ``running`` scales have never seen a number.
    """
    for block in model.blocks:
        found = [
            (parent, name, child)
            for parent in block.modules()
            for name, child in parent.named_children()
            if isinstance(child, HiF8Linear) and _whole(child)
        ]
        for parent, name, child in found:
            parent._modules[name] = _ready(child, device)
        for attention in (block.self_attn, block.cross_attn) if found else ():
            _require_numbers(attention, 3)
        if found:
            block.forward = partial(forward, block, block.forward)


def _whole(linear: HiF8Linear) -> bool:
    return linear.quant.execution == "fp8" and type(linear.weight.data) is torch.Tensor


def _ready(linear: HiF8Linear, device: torch.device | None) -> HiF8StoredLinear:
    """The linear with its weight in E4M3, where it was."""
    _require_numbers(linear, 1)
    home = linear.weight.device
    if device is not None:
        linear.weight = nn.Parameter(linear.weight.to(device), requires_grad=False)
    stored = linear if isinstance(linear, HiF8StoredLinear) else HiF8StoredLinear(linear, linear.quant)
    if stored is not linear:
        stored._buffers |= {name: b for name, b in linear._buffers.items() if b is not None}
        stored.reduce_amax = linear.reduce_amax
    stored.unpack()
    stored.to(home)
    return stored


def _require_numbers(module: nn.Module, count: int) -> None:
    """Hold a module to know its first ``count`` running numbers, if it has any."""
    amax = module._buffers.get(AMAX)
    if amax is not None and not bool((amax[:count] > 0).all()):
        raise ValueError(
            "quant_scaling is running, but the weights have no running numbers: train with it, have `ospnext quantize` "
            "measure them (calibration.prompts), or use tensor"
        )


def forward(
    block: Any,
    plain: Any,
    x: torch.Tensor,
    time: torch.Tensor,
    text: torch.Tensor,
    rope: torch.Tensor,
    segments: Any,
    leave: Any = None,
) -> torch.Tensor:
    """See ``TransformerBlock.forward``, which is ``plain`` and runs wherever this one cannot."""
    if torch.is_grad_enabled() or leave is not None or not fuses(block):
        return plain(x, time, text, rope, segments, leave)
    shift1, scale1, gate1, shift2, scale2, gate2 = (block.modulation.float() + time).chunk(6, dim=1)
    attention, cross, (up, _, down), eps = block.self_attn, block.cross_attn, block.ffn, block.eps
    h = fused8.norm(x, 1 + scale1, shift1, eps, target(attention.q))
    y = self_attention(attention, h, x.dtype, rope, segments)
    x, h = fused8.add_norm(x, y, gate1, block.norm3.weight, block.norm3.bias, eps, target(cross.q))
    y = cross_attention(cross, h, text)
    x, h = fused8.add_norm(x, y, None, 1 + scale2, shift2, eps, target(up))
    h = fused8.gelu(linear(up, h, x.dtype), target(down))
    return fused.add(x, linear(down, h, x.dtype), gate2)


def fuses(block: Any) -> bool:
    """Whether all that a block multiplies is quantised and nothing stands in its place, such as an adapter."""
    attentions, ffn = (block.self_attn, block.cross_attn), block.ffn
    linears = [part for a in attentions for part in (a.q, a.k, a.v, a.o)] + [ffn[0], ffn[2]]
    return (
        all(type(part) is HiF8StoredLinear and part.weight.dtype is E4M3 for part in linears)
        and all(isinstance(a.norm_q, nn.RMSNorm) and isinstance(a.norm_k, nn.RMSNorm) for a in attentions)
        and isinstance(block.norm3, nn.LayerNorm)
    )


def target(layer: HiF8Linear) -> Target:
    """How what a linear is given is rounded."""
    config = layer.quant
    if config.scaling == "running":
        running = layer._buffers[AMAX]
        assert running is not None
        return Target(config.scale_max_forward, running[:1] * config.headroom)
    return Target(config.scale_max_forward, config.scaling, layer.reduce_amax)


def attention_targets(inner: HiF8Attend) -> list[Target]:
    """How queries, keys and values are rounded."""
    config, running = inner.quant, inner.owner._buffers.get(AMAX)
    if running is None:
        return [Target(config.scale_max_forward, reduce=inner.reduce_amax)] * 3
    return [Target(config.scale_max_forward, largest) for largest in (running * config.headroom).split(1)]


def linear(layer: HiF8Linear, x: Held, dtype: torch.dtype) -> torch.Tensor:
    """A linear of what is held, ``[B, N, in_features]``."""
    return product(x, layer.held_weight(), layer.quant, dtype, layer.bias)


def self_attention(attention: Any, x: Held, dtype: torch.dtype, rope: torch.Tensor, segments: Any) -> torch.Tensor:
    """See ``models.transformer.SelfAttention.forward``."""
    q, k, v = (linear(layer, x, dtype) for layer in (attention.q, attention.k, attention.v))
    if (inner := eight_bit(attention, q)) is None:
        q, k = (attention.rotated(t, norm, rope) for t, norm in ((q, attention.norm_q), (k, attention.norm_k)))
        out = attention.attend(q, k, attention.heads(v), segments).flatten(-2)
        return linear(attention.o, fused8.hold(out, target(attention.o)), dtype)
    to_q, to_k, to_v = attention_targets(inner)
    held_q = fused8.norm_rope(q, attention.norm_q.weight, rope, attention.norm_q.eps, to_q)
    held_k = fused8.norm_rope(k, attention.norm_k.weight, rope, attention.norm_k.eps, to_k)
    return attended(attention, inner, (held_q, held_k, fused8.hold(v, to_v)), dtype, segments)


def cross_attention(attention: Any, x: Held, text: torch.Tensor) -> torch.Tensor:
    """See ``models.transformer.CrossAttention.forward``."""
    dtype, held_text = text.dtype, fused8.hold(text, target(attention.k)._replace(reduce=None))  # all have all of it
    q, k, v = (linear(*pair, dtype) for pair in ((attention.q, x), (attention.k, held_text), (attention.v, held_text)))
    if (inner := eight_bit(attention, q)) is None:
        q, k = attention.heads(attention.norm_q(q)), attention.heads(attention.norm_k(k))
        out = attention.attend(q, k, attention.heads(v)).flatten(-2)
        return linear(attention.o, fused8.hold(out, target(attention.o)), dtype)
    to_q, to_k, to_v = attention_targets(inner)
    held_q = fused8.norm_rope(q, attention.norm_q.weight, None, attention.norm_q.eps, to_q)
    held_k = fused8.norm_rope(k, attention.norm_k.weight, None, attention.norm_k.eps, to_k._replace(reduce=None))
    return attended(attention, inner, (held_q, held_k, fused8.hold(v, to_v._replace(reduce=None))), dtype)


def attended(
    attention: Any, inner: HiF8Attend, held: tuple[Held, Held, Held], dtype: torch.dtype, *segments: Any
) -> torch.Tensor:
    """Attention of held queries, keys and values ``[B, N, dim]``, and the projection of what it gives."""
    to = target(attention.o)
    if attention.attend is inner:
        q8, k8, v8 = (part._replace(values=attention.heads(part.values)) for part in held)
        lengths = segments[0] if segments else None
        return linear(attention.o, attention8.attend(q8, k8, v8, lengths, dtype).hold(to), dtype)
    inner.scales, inner.dtype = tuple(part.inverse for part in held), dtype
    # As bytes: they may travel between processes on the way, and no library knows what is in them.
    q, k, v = (attention.heads(part.values.view(torch.uint8)) for part in held)
    return linear(attention.o, fused8.hold(attention.attend(q, k, v, *segments).flatten(-2), to), dtype)


def eight_bit(attention: Any, q: torch.Tensor) -> HiF8Attend | None:
    """The quantised attention of a module, however it is wrapped, where it is one for FP8 tensor cores.

    Args:
        attention: the module.
        q: its queries ``[B, N, dim]``.
    """
    if q.shape[1] < attention8.SHORTEST:
        return None
    attend = attention.attend
    while attend is not None and not isinstance(attend, HiF8Attend):
        attend = getattr(attend, "attend", None)
    head_dim = attention.o.in_features // attention.num_heads
    return None if attend is None or attention8.why_not(q.device, head_dim) else cast(HiF8Attend, attend)
