"""What the components of a run take on the device, and which of them must leave it between uses."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLWan
from torch import nn
from transformers import UMT5EncoderModel

from ospnext.checkpoints.memory import OutOfMemoryError
from ospnext.device import free_memory
from ospnext.generate.settings import GenerateConfig, Sampling
from ospnext.generate.size import size_step
from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.models.video_vae import DECODE_MODES, DecodeMode, decode_bytes
from ospnext.parallel.apply import Fit

DECODING: dict[str, tuple[DecodeMode, ...]] = {"auto": DECODE_MODES, "on": ("tiled",), "off": ("whole", "chunked")}
"""Ways the autoencoder may decode, best first, by ``vae_tiling``."""

_GIB = 2**30


class Footprint(NamedTuple):
    """Bytes that a component takes: its weights, and what else while it works."""

    weights: int
    work: int


def footprints(
    config: GenerateConfig,
    transformer: OSPNextTransformer3DModel,
    vae: AutoencoderKLWan,
    text_encoder: UMT5EncoderModel,
    sampling: Sampling,
    sizes: Fit,
) -> dict[str, Footprint]:
    """What every component takes on one process; they are on meta, in the dtypes they run in."""
    shards = sizes.copies.fsdp
    gathered = 0 if shards == 1 else gathered_bytes(config, transformer)
    return {
        "transformer": Footprint(
            _nbytes(transformer) // shards, gathered + transformer_bytes(config, transformer, vae, sampling, sizes)
        ),
        "vae": Footprint(_nbytes(vae), vae_bytes(config, vae, sampling, sizes)),
        "text_encoder": Footprint(_nbytes(text_encoder) // shards, 0),
    }


def asked_offload(config: GenerateConfig) -> frozenset[str]:
    """The components that are to leave the device between uses in any case."""
    asked = {"transformer"} if config.model_cpu_offload else set()
    return frozenset(asked | {"vae", "text_encoder"} if config.encoder_cpu_offload else asked)


def choose_offload(parts: Mapping[str, Footprint], device: torch.device, asked: frozenset[str]) -> frozenset[str]:
    """The fewest components that must leave the device between uses, at least those ``asked``.

    Args:
        parts: by component.
        device: where the run computes.
        asked: components to keep off the device in any case.

    Raises:
        OutOfMemoryError: it does not fit in any way.
    """
    host = torch.device("cpu")
    encoders = frozenset(("vae", "text_encoder"))
    ways = list(dict.fromkeys(asked | way for way in (frozenset[str](), encoders, encoders | {"transformer"})))
    if device == host:
        ways = [frozenset()]
    offload = _fitting({way: device_bytes(parts, way) for way in ways}, device)
    if offload:
        _fitting({offload: sum(parts[name].weights for name in offload)}, host)
    return offload


def device_bytes(parts: Mapping[str, Footprint], offload: frozenset[str]) -> int:
    """Peak bytes on the device: what stays there all the time, and the component at work."""
    resident = sum(part.weights for name, part in parts.items() if name not in offload)
    return max(resident + part.work + (part.weights if name in offload else 0) for name, part in parts.items())


def transformer_bytes(
    config: GenerateConfig,
    transformer: OSPNextTransformer3DModel,
    vae: AutoencoderKLWan,
    sampling: Sampling,
    sizes: Fit,
) -> int:
    """What one call of the transformer takes besides its weights: some ten hidden states and two feed-forward ones."""
    settings = transformer.config
    step = size_step(vae.config, settings)
    tokens = (1 + (sampling.num_frames - 1) // step.frames) * (sampling.height // step.height)
    tokens *= sampling.width // step.width
    own = -(-tokens // (sizes.sizes.ssp * sizes.sizes.ulysses))
    both = sampling.guidance_scale > 1 and config.guidance_mode == "batched" and sizes.sizes.cfg == 1
    passes = config.batch_size * (2 if both else 1)
    return passes * own * (10 * settings.dim + 2 * settings.ffn_dim) * transformer.dtype.itemsize


def gathered_bytes(config: GenerateConfig, transformer: OSPNextTransformer3DModel) -> int:
    """Whole weights that a process holds beside its shards: of the block at work and those gathered ahead."""
    blocks = len(transformer.blocks)
    ahead = blocks if config.reshard_after_forward is False else 2 + config.explicit_prefetching_num_blocks
    block = _nbytes(transformer.blocks[0])
    return min(ahead, blocks) * block + _nbytes(transformer) - blocks * block


def vae_bytes(config: GenerateConfig, vae: AutoencoderKLWan, sampling: Sampling, sizes: Fit) -> int:
    """What decoding one clip takes besides the weights, in the way of least memory that is allowed."""
    scales = vae.config.scale_factor_temporal, vae.config.scale_factor_spatial
    frames = 1 + (sampling.num_frames - 1) // scales[0]
    latents = torch.empty(
        1, vae.config.z_dim, frames, sampling.height // scales[1], sampling.width // scales[1], device="meta"
    )
    return decode_bytes(vae, latents, DECODING[config.vae_tiling][-1], sizes.sizes.video)


def _nbytes(module: nn.Module) -> int:
    """Bytes of a module's tensors, also on meta; tied ones count once."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _fitting(ways: Mapping[frozenset[str], int], device: torch.device) -> frozenset[str]:
    """The first way whose bytes are free."""
    free = free_memory(device)
    for way, need in ways.items():
        if need <= free:
            return way
    raise OutOfMemoryError(
        f"this run needs {min(ways.values()) / _GIB:.1f} GiB on {device}, but {free / _GIB:.1f} GiB are free: use a "
        "smaller weight_dtype (bf16), batch_size or size of video, guidance_mode=sequential, or another device"
    )
