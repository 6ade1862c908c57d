"""What a forward pass computes, in closed form, on the process with most to do; and what parameters weigh.

FLOPs count a multiplication and an addition as two. The tests hold the forms to torch's own count.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKLWan
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import UMT5EncoderModel

from ospnext.models.vae_pieces import MARGIN, Piece, area, decode_piece, split
from ospnext.prepare.plan_trace import Shared


class Flops(NamedTuple):
    """FLOPs by kind."""

    linear: int
    attention: int


def block_flops(settings: dict[str, Any], shared: Shared, batch: int) -> Flops:
    """One block's forward pass on one process."""
    dim, ffn, text = settings["dim"], settings["ffn_dim"], settings["text_len"]
    tokens = shared.own_tokens
    per_token = 4 * dim * dim + 2 * dim * dim + 2 * dim * ffn  # self-attention, cross-attention's q and o, feed-forward
    linear = 2 * (tokens * per_token + text * 2 * dim * dim)
    heads = dim // settings["num_heads"] * shared.own_heads
    attention = 4 * (sum(n * n for n in shared.segments) * heads + tokens * text * dim)
    return Flops(batch * linear, batch * attention)


def ends_flops(settings: dict[str, Any], tokens: int, own_tokens: int, batch: int) -> int:
    """Embeddings and head: every process embeds the whole video and projects back its own tokens."""
    dim, text = settings["dim"], settings["text_len"]
    patch = 1
    for size in settings["patch_size"]:
        patch *= size
    embed = tokens * patch * settings["in_dim"] * dim + text * (settings["text_dim"] + dim) * dim
    time = (settings["freq_dim"] + dim + 6 * dim) * dim
    return 2 * batch * (embed + time + own_tokens * dim * patch * settings["out_dim"])


def encode_flops(text_encoder: UMT5EncoderModel, text_len: int, prompts: int) -> int:
    """Encoding prompts: two FLOPs a weight and token, the embedding table aside."""
    vocabulary, width = text_encoder.config.vocab_size, text_encoder.config.d_model
    return 2 * (count(text_encoder) - vocabulary * width) * text_len * prompts


def decode_flops(vae: AutoencoderKLWan, latents: tuple[int, int, int, int], team: int = 1) -> int:
    """Decoding one video, or the largest piece of it that one of a team takes, counted by torch on the meta device."""
    z = torch.empty(1, *latents, dtype=vae.dtype, device="meta")
    height, width = z.shape[-2:]

    def cost(piece: Piece) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            decode_piece(vae, z, piece)
        return counter.get_total_flops()

    # Of pieces alike, those farthest from an edge have most margin.
    pieces = sorted(split(height, width, team), key=lambda piece: -area(piece.grown(MARGIN, height, width)))
    return cost(pieces[0])


@lru_cache(maxsize=64)
def count(module: nn.Module) -> int:
    """Numbers in a module's parameters."""
    return sum(p.numel() for p in module.parameters())


def nbytes(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(p.numel() * p.itemsize for p in module.parameters())


@lru_cache(maxsize=64)
def sharded(module: nn.Module, ranks: int) -> int:
    """Numbers that one of ``ranks`` processes holds of a module under FSDP2.

    Every parameter is cut along its first axis into near-equal chunks, and the shorter ones are padded.
    """
    return sum(-(-p.shape[0] // ranks) * (p.numel() // p.shape[0]) for p in module.parameters())
