"""Wan2.1's video autoencoder and text encoder files, for diffusers' ``AutoencoderKLWan`` and transformers' UMT5.

Like ``formats``: pure functions from a name of the model's to the name in a native file, and from the shapes in a file
to the settings of the model.
"""

import math
from collections.abc import Mapping
from typing import Any

from ospnext.checkpoints.formats import NameMap, native_name

Shapes = Mapping[str, tuple[int, ...]]

_RESIDUAL = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
_VAE_TOP = {"quant_conv": "conv1", "post_quant_conv": "conv2"}
_VAE_ENDS = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}
_VAE_MIDDLE = {("resnets", "0"): "0", ("attentions", "0"): "1", ("resnets", "1"): "2"}

_T5_TOP = {"shared": "token_embedding", "encoder.final_layer_norm": "norm"}
_T5_BLOCK = {
    "layer.0.layer_norm": "norm1",
    "layer.0.SelfAttention.q": "attn.q",
    "layer.0.SelfAttention.k": "attn.k",
    "layer.0.SelfAttention.v": "attn.v",
    "layer.0.SelfAttention.o": "attn.o",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.1.layer_norm": "norm2",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
}


def vae_native_name(name: str, num_res_blocks: int = 2) -> str:
    """The name in ``Wan2.1_VAE.pth`` of a parameter of diffusers' ``AutoencoderKLWan``.

    The native decoder numbers residual blocks and upsamplers in one row: each level has ``num_res_blocks + 1`` of the
    first and, but for the last, one of the second.
    """
    side, *rest = name.split(".")
    if side in _VAE_TOP:
        return ".".join([_VAE_TOP[side], *rest])
    part, *rest = rest
    if part in _VAE_ENDS:
        return ".".join([side, _VAE_ENDS[part], *rest])
    if part == "mid_block":
        kind, index, *rest = rest
        return ".".join([side, "middle", _VAE_MIDDLE[kind, index], *_residual(rest)])
    if part == "down_blocks":
        index, *rest = rest
        return ".".join([side, "downsamples", index, *_residual(rest)])
    level, kind, index, *rest = rest
    place = int(level) * (num_res_blocks + 2) + (int(index) if kind == "resnets" else num_res_blocks + 1)
    return ".".join([side, "upsamples", str(place), *_residual(rest)])


def vae_settings(shapes: Shapes) -> tuple[NameMap, dict[str, Any]]:
    """Name map and ``AutoencoderKLWan`` settings of a video autoencoder file, with native or diffusers' names.

    Raises:
        ValueError: it is no autoencoder of Wan2.1's design.
    """
    native = "encoder.conv1.weight" in shapes
    down = "encoder.downsamples." if native else "encoder.down_blocks."
    if not native and "encoder.conv_in.weight" not in shapes:
        raise ValueError("no encoder.conv1 or encoder.conv_in: these are not the weights of a Wan2.1 video autoencoder")
    if any(name.startswith((f"{down}0.downsamples.", f"{down}0.resnets.")) for name in shapes):
        raise ValueError("this is Wan2.2's autoencoder: use Wan2.1_VAE.pth")
    samplers = sorted({int(name.split(".")[2]) for name in shapes if name.startswith(down) and ".resample." in name})
    if not samplers:
        raise ValueError("the encoder has no down-sampling block: these are not the weights of a Wan2.1 autoencoder")
    blocks = samplers[0]

    def name_of(name: str) -> str:
        return vae_native_name(name, blocks) if native else native_name(name)

    def width(name: str, axis: int = 0) -> int:
        if name_of(name) not in shapes:
            raise ValueError(f"{name_of(name)} is missing: these are not the weights of a Wan2.1 video autoencoder")
        return shapes[name_of(name)][axis]

    base, latent = width("encoder.conv_in.weight"), width("post_quant_conv.weight")
    if latent != 16:
        raise ValueError(
            f"{latent} latent channels: Wan2.1's has 16; load others from a diffusers folder (config.json)"
        )
    levels = range(len(samplers) + 1)
    mult = [width(f"encoder.down_blocks.{level * (blocks + 1)}.conv2.weight") // base for level in levels]
    in_channels = width("encoder.conv_in.weight", 1)
    patch = math.isqrt(in_channels // 3)
    temporal = [name_of(f"encoder.down_blocks.{index}.time_conv.weight") in shapes for index in samplers]
    return name_of, {
        "base_dim": base,
        "decoder_base_dim": width("decoder.norm_out.gamma") // mult[0],
        "z_dim": latent,
        "dim_mult": mult,
        "num_res_blocks": blocks,
        "temperal_downsample": temporal,
        "in_channels": in_channels,
        "out_channels": width("decoder.conv_out.weight"),
        "patch_size": patch if patch > 1 else None,
        "scale_factor_temporal": 2 ** sum(temporal),
        "scale_factor_spatial": patch * 2 ** len(samplers),
    }


def t5_native_name(name: str) -> str:
    """The name in ``models_t5_umt5-xxl-enc-bf16.pth`` of a parameter of transformers' ``UMT5EncoderModel``."""
    module, _, leaf = name.rpartition(".")
    if module in _T5_TOP:
        return f"{_T5_TOP[module]}.{leaf}"
    _, _, index, *rest = module.split(".")
    return f"blocks.{index}.{_T5_BLOCK['.'.join(rest)]}.{leaf}"


def t5_settings(shapes: Shapes) -> dict[str, Any]:
    """``UMT5Config`` settings of a native text encoder file; what shapes cannot tell is UMT5's, the same in all sizes.

    Raises:
        ValueError: it is no encoder of Wan2.1's design.
    """
    needed = ("token_embedding", "blocks.0.attn.q", "blocks.0.pos_embedding.embedding", "blocks.0.ffn.fc1")
    missing = [f"{name}.weight" for name in needed if f"{name}.weight" not in shapes]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing: these are not the weights of Wan2.1's UMT5 text encoder")
    vocab_size, d_model = shapes["token_embedding.weight"]
    buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    blocks = {int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")}
    return {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_kv": shapes["blocks.0.attn.q.weight"][0] // heads,
        "d_ff": shapes["blocks.0.ffn.fc1.weight"][0],
        "num_layers": max(blocks) + 1,
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


def _residual(parts: list[str]) -> list[str]:
    """The inside of a residual block renamed; other blocks call their layers the same."""
    return [_RESIDUAL.get(parts[0], parts[0]), *parts[1:]]
