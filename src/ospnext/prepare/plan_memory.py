"""Bytes on one process, phase by phase: the peak is the largest phase, and phases do not add up.

Under FSDP a process holds its shard of the transformer and, while a block runs, that block and the next one whole;
what stands outside blocks stays whole. Autoencoder and text encoder are whole everywhere.
"""

import math
from collections import Counter
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn

from ospnext.generate.memory import DECODING
from ospnext.models.video_vae import DecodeMode, decode_bytes
from ospnext.ops.layout import Layout
from ospnext.prepare.plan_devices import Device
from ospnext.prepare.plan_mesh import Mesh
from ospnext.prepare.plan_recipe import Recipe
from ospnext.prepare.plan_trace import Held, Shared, trace_block, trace_head
from ospnext.prepare.plan_work import count, nbytes, sharded
from ospnext.quant.config import LINEARS

_GATHERED_BLOCKS = 2  # the one that runs and the one fetched meanwhile
_FLOAT32 = 4


class Phase(NamedTuple):
    """One phase of a run and what is there in it, by name, in bytes."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())


def phases(recipe: Recipe, mesh: Mesh, device: Device) -> tuple[Phase, ...]:
    """Every phase of a recipe on one process of a mesh."""
    return _generate(recipe, mesh, device) if recipe.kind == "generate" else _train(recipe, mesh)


def held_by_blocks(recipe: Recipe, mesh: Mesh) -> Counter[Held]:
    """What each block holds and moves on the busiest process, and how many blocks are like it."""
    found: Counter[Held] = Counter()
    for layout, number in Counter(recipe.transformer.layouts).items():
        found[held_by_block(recipe, mesh, layout)] += number
    return found


def held_by_block(recipe: Recipe, mesh: Mesh, layout: Layout) -> Held:
    """The same of one block."""
    return _traced(recipe, mesh.sequence(recipe).busiest(layout), rows(recipe, mesh))


def rows(recipe: Recipe, mesh: Mesh) -> int:
    """Sequences of one forward pass on one process: guidance's two halves together, unless they are apart."""
    return recipe.batch * (2 if recipe.guided and recipe.batched and mesh.cfg == 1 else 1)


def decode_mode(recipe: Recipe, team: int, free: int) -> DecodeMode:
    """The way the autoencoder decodes in so many free bytes where ``team`` processes share a video."""
    modes = DECODING[recipe.tiling]
    return next((mode for mode in modes if decode_peak(recipe, mode, team) <= free), modes[-1])


@lru_cache(maxsize=64)
def decode_peak(recipe: Recipe, mode: DecodeMode, team: int) -> int:
    """Bytes that decoding one video takes on top of the weights, on one of ``team`` processes."""
    z = torch.empty(1, *recipe.latents, device="meta")
    return decode_bytes(recipe.vae, z, mode, team)


def _generate(recipe: Recipe, mesh: Mesh, device: Device) -> tuple[Phase, ...]:
    settings = recipe.settings
    own = _frozen(recipe, mesh)
    if recipe.hif8_linears and not recipe.stored and mesh.fsdp == 1:  # shards stay as in the files
        own -= quantised_numbers(recipe.transformer) * (recipe.dtype.itemsize - 1)
    text = nbytes(recipe.text_encoder) // mesh.fsdp
    resting = {"transformer": own, "autoencoder": nbytes(recipe.vae)}
    if not recipe.offload_text:
        resting["text encoder"] = text
    config = recipe.text_encoder.config
    prompts = recipe.batch * (2 if recipe.guided else 1)
    item = recipe.text_encoder.dtype.itemsize
    encoding = prompts * settings["text_len"] * (3 * config.d_ff + 6 * config.d_model) * item
    decoding = decode_mode(recipe, mesh.video, device.memory - sum(resting.values()))
    return (
        Phase("encode prompts", resting | {"text encoder": text, "activations": encoding}),
        Phase(
            "denoise",
            resting
            | {"gathered weights": _gathered(recipe, mesh)}
            | _inference_activations(recipe, mesh)
            | {"latents and tables": _tables(recipe, mesh)},
        ),
        Phase(
            f"decode ({decoding})",
            resting | {"activations": decode_peak(recipe, decoding, mesh.video), "latents": _latents(recipe)},
        ),
    )


def _train(recipe: Recipe, mesh: Mesh) -> tuple[Phase, ...]:
    own = sharded(recipe.trained, mesh.fsdp) * _FLOAT32
    frozen = 0 if recipe.adapter is None else _frozen(recipe, mesh)
    state = {
        "frozen weights": frozen,
        "master weights": own,
        "gradients": own,
        "optimiser": 2 * own,
        "EMA": own,
        "text encoder": nbytes(recipe.text_encoder)
        * (5 if recipe.train_text else 1)
        // (mesh.fsdp if recipe.share_text else 1),
        "autoencoder": nbytes(recipe.vae),
    }
    if not frozen:
        del state["frozen weights"]
    if recipe.teacher:
        state["teacher"] = sharded(recipe.transformer, mesh.fsdp) * recipe.dtype.itemsize
    half = recipe.dtype is not torch.float32
    if mesh.fsdp > 1:
        blocks = recipe.transformer.blocks
        reduced = count(blocks[0]) if recipe.adapter is None else count(recipe.adapter) // len(blocks)
        gathered = _gathered(recipe, mesh) + _FLOAT32 * reduced
    else:  # autocast keeps a copy of every weight it has cast until the pass is over
        gathered = count(recipe.trained) * recipe.dtype.itemsize if half else 0
    step = {"gathered weights": gathered} | _training_activations(recipe, mesh)
    step["latents and tables"] = _tables(recipe, mesh)
    return Phase("forward and backward", state | step), Phase("optimiser step", state)


def _inference_activations(recipe: Recipe, mesh: Mesh) -> dict[str, int]:
    """While a block or the head runs, or while the video is embedded: whole on every process, then its share."""
    whole = rows(recipe, mesh) * recipe.grid.tokens * recipe.settings["dim"] * recipe.dtype.itemsize
    entry = _entry(recipe, mesh)
    peak = max(whole + entry, _head(recipe, mesh).peak, *(held.peak for held in held_by_blocks(recipe, mesh)))
    return {"activations": entry, "temporaries": peak - entry}


def _training_activations(recipe: Recipe, mesh: Mesh) -> dict[str, int]:
    """What blocks, head and embedding keep for the backward pass, and what more that needs, the head first."""
    blocks, entry, head = held_by_blocks(recipe, mesh), _entry(recipe, mesh), _head(recipe, mesh)
    share, whole = recipe.checkpointing, sum(held.saved * number for held, number in blocks.items())
    kept = int(share * blocks.total() * entry + (1 - share) * whole)
    more = max(held.backward_peak - (entry if share else held.saved) for held in blocks)
    settings = recipe.settings
    patch = settings["in_dim"] * math.prod(settings["patch_size"])
    kept += rows(recipe, mesh) * recipe.grid.tokens * patch * recipe.dtype.itemsize  # what is embedded, for its weight
    return {"activations": kept + head.saved, "temporaries": max(more, head.backward_peak) - head.saved}


def _head(recipe: Recipe, mesh: Mesh) -> Held:
    tokens = _own_tokens(recipe, mesh)
    return _traced_head(recipe, tokens, rows(recipe, mesh))


@lru_cache(maxsize=512)
def _traced_head(recipe: Recipe, tokens: int, batch: int) -> Held:
    fused = recipe.code == "kernels"  # the head is never compiled
    return trace_head(recipe.settings, tokens, batch, recipe.dtype, recipe.kind == "train", fused)


def _own_tokens(recipe: Recipe, mesh: Mesh) -> int:
    """Tokens of the process that has most of a video."""
    sequence = mesh.sequence(recipe)
    return max(sequence.busiest(layout).own_tokens for layout in set(sequence.layouts))


def _entry(recipe: Recipe, mesh: Mesh) -> int:
    """Hidden states between two blocks."""
    return rows(recipe, mesh) * _own_tokens(recipe, mesh) * recipe.settings["dim"] * recipe.dtype.itemsize


def quantised_numbers(transformer: nn.Module, ranks: int = 1) -> int:
    """Numbers in the weights of the linears that HiF8 means, on one of ``ranks`` processes that share them."""
    linears = (m for name, m in transformer.named_modules() if any(fnmatchcase(name, p) for p in LINEARS))
    weights = (linear.weight for linear in linears if isinstance(linear, nn.Linear))
    return sum(-(-weight.shape[0] // ranks) * weight.shape[1] for weight in weights)


def gathered_of_blocks(recipe: Recipe) -> int:
    """Bytes of all blocks' weights as FSDP gathers them."""
    saved = quantised_numbers(recipe.transformer) * (recipe.dtype.itemsize - 1) if recipe.stored else 0
    return count(recipe.transformer.blocks) * recipe.dtype.itemsize - saved


def _frozen(recipe: Recipe, mesh: Mesh) -> int:
    """Bytes of weights that are not trained, on one process."""
    saved = quantised_numbers(recipe.transformer, mesh.fsdp) * (recipe.dtype.itemsize - 1) if recipe.stored else 0
    return sharded(recipe.transformer, mesh.fsdp) * recipe.dtype.itemsize - saved


def _gathered(recipe: Recipe, mesh: Mesh) -> int:
    """Weights that FSDP holds whole for a while."""
    if mesh.fsdp == 1:
        return 0
    blocks = recipe.transformer.blocks
    outside = count(recipe.transformer) - count(blocks)
    block = gathered_of_blocks(recipe) // len(blocks)
    return outside * recipe.dtype.itemsize + min(_GATHERED_BLOCKS, len(blocks)) * block


def _tables(recipe: Recipe, mesh: Mesh) -> int:
    """Rotary tables in float32, of the whole grid and of each layout's share, and the latents."""
    head = recipe.settings["dim"] // recipe.settings["num_heads"]
    sequence = mesh.sequence(recipe)
    tokens = recipe.grid.tokens + sum(sequence.busiest(layout).own_tokens for layout in set(sequence.layouts))
    return tokens * head * _FLOAT32 + _latents(recipe)


def _latents(recipe: Recipe) -> int:
    """Latents of a batch in float32: state, velocity, and both halves' in and out."""
    channels, frames, height, width = recipe.latents
    return 6 * recipe.batch * channels * frames * height * width * _FLOAT32


@lru_cache(maxsize=512)
def _traced(recipe: Recipe, shared: Shared, batch: int) -> Held:
    training = recipe.kind == "train"
    return trace_block(recipe.settings, shared, batch, recipe.dtype, training, recipe.code != "eager")
