"""How long a step takes on one process of a mesh: every kind of work at its own rate, one after the other.

Fetching weights (FSDP) runs beside the blocks and costs what is longer than they are; exchanges between the processes
of a sequence do not overlap and cost all they take.
"""

from collections import Counter
from functools import lru_cache
from typing import NamedTuple

from ospnext.ops.layout import Layout
from ospnext.prepare.plan_devices import BACKWARD_SHARE, Device
from ospnext.prepare.plan_memory import gathered_of_blocks, held_by_block, held_by_blocks, rows
from ospnext.prepare.plan_mesh import Mesh
from ospnext.prepare.plan_recipe import Recipe
from ospnext.prepare.plan_work import Flops, block_flops, count, decode_flops, encode_flops, ends_flops, sharded

_REDUCED = 4  # bytes of a gradient on its way
_OPTIMISER_PASSES = 4 + 3 + 3  # float32 read and written: weights, gradients, moments, then the average


class Seconds(NamedTuple):
    """One step, by what it is spent on."""

    linears: float
    attention: float
    elementwise: float
    exchanges: float  # between the processes of a sequence
    weights: float  # what of FSDP and DDP is not hidden
    optimiser: float

    @property
    def total(self) -> float:
        """The whole step."""
        return sum(self)


class Sent(NamedTuple):
    """Bytes that the busiest process sends in one step."""

    attends: int  # Ulysses, inside blocks
    switches: int  # between layouts
    gathers: int  # weights
    reductions: int  # gradients

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


class Run(NamedTuple):
    """A whole run: seconds of its parts, and of all."""

    encode: float
    steps: float
    decode: float

    @property
    def total(self) -> float:
        """From the first prompt or step to the last."""
        return sum(self)


def forward_flops(recipe: Recipe, mesh: Mesh) -> dict[str, Flops]:
    """One forward pass of one process, by what runs; a guided step that is not batched has two."""
    sequence, batch = mesh.sequence(recipe), rows(recipe, mesh)
    found = {"dense blocks": Flops(0, 0), "sparse blocks": Flops(0, 0)}
    for layout, number in Counter(sequence.layouts).items():
        name = "dense blocks" if layout is Layout.FULL else "sparse blocks"
        flops = block_flops(recipe.settings, sequence.busiest(layout), batch)
        linear, attention = found[name]
        found[name] = Flops(linear + number * flops.linear, attention + number * flops.attention)
    own = max(sequence.busiest(layout).own_tokens for layout in set(sequence.layouts))
    found["embeddings and head"] = Flops(ends_flops(recipe.settings, recipe.grid.tokens, own, batch), 0)
    return found


def step_flops(recipe: Recipe, mesh: Mesh) -> dict[str, Flops]:
    """All of a step of one process: forward passes by what runs; in training blocks run again, and backward."""
    times = passes(recipe, mesh)
    forward = forward_flops(recipe, mesh)
    found = {name: Flops(times * flops.linear, times * flops.attention) for name, flops in forward.items()}
    if recipe.kind == "train":
        blocks = Flops(*(sum(found[name][i] for name in ("dense blocks", "sparse blocks")) for i in (0, 1)))
        if recipe.checkpointing:
            found["blocks run again"] = Flops(*(int(recipe.checkpointing * flops) for flops in blocks))
        outside = found["embeddings and head"].linear
        # Frozen weights have no gradient, and nothing before the blocks needs one; an adapter's own products are few.
        linear = 2 * (blocks.linear + outside) if recipe.adapter is None else blocks.linear
        # Five products for the two of a forward attention: its scores are made again.
        found["backward"] = Flops(linear, 5 * blocks.attention // 2)
    if recipe.teacher:
        number, batch = len(recipe.transformer.layouts), rows(recipe, mesh)
        dense = block_flops(recipe.settings, mesh.sequence(recipe).busiest(Layout.FULL), batch)
        ends = forward["embeddings and head"].linear
        found["teacher"] = Flops(times * (number * dense.linear + ends), times * number * dense.attention)
    return found


def passes(recipe: Recipe, mesh: Mesh) -> int:
    """Forward passes that one process makes in a step."""
    if recipe.kind == "train":
        return recipe.accumulation
    return 2 if recipe.guided and not recipe.batched and mesh.cfg == 1 else 1


def step_sent(recipe: Recipe, mesh: Mesh) -> Sent:
    """Bytes sent in one step."""
    sequence, settings = mesh.sequence(recipe), recipe.settings
    training, layers = recipe.kind == "train", len(recipe.transformer.layouts)
    ways = 1 + training  # what goes forward comes back as gradients
    taught = layers * sequence.attend_values(Layout.FULL, settings["dim"]) if recipe.teacher else 0
    again = recipe.checkpointing  # attention's exchanges are made again, those between blocks are not
    each = passes(recipe, mesh) * rows(recipe, mesh) * recipe.dtype.itemsize
    blocks = gathered_of_blocks(recipe)
    outside = (count(recipe.transformer) - count(recipe.transformer.blocks)) * recipe.dtype.itemsize
    share = (mesh.fsdp - 1) / mesh.fsdp
    fetched = (blocks * (ways + recipe.teacher) + outside) * share
    reduced = 0.0
    if training:
        own = sharded(recipe.trained, mesh.fsdp)
        reduced = _REDUCED * (count(recipe.trained) * share + 2 * own * (mesh.ddp - 1) / mesh.ddp)
    return Sent(
        int(each * ((ways + again) * sequence.attends(settings["dim"]) + taught)),
        each * ways * sequence.switches(settings["dim"]),
        int(passes(recipe, mesh) * fetched),
        int(reduced),
    )


def step_seconds(recipe: Recipe, mesh: Mesh, device: Device) -> Seconds:
    """One step of sampling, both halves of guidance included, or of the optimiser."""
    training, times = recipe.kind == "train", passes(recipe, mesh)
    flops, sent = step_flops(recipe, mesh), step_sent(recipe, mesh)
    again = recipe.checkpointing
    outside = flops["embeddings and head"].linear
    linears = outside / device.linear(recipe.dtype)
    linears += (sum(part.linear for part in flops.values()) - outside) / device.linear(
        recipe.dtype, recipe.hif8_linears
    )
    slowed = sum(part.attention / (BACKWARD_SHARE if name == "backward" else 1) for name, part in flops.items())
    attention = slowed / device.attention(recipe.kernel, recipe.dtype, recipe.hif8_attention)
    moved = 0
    for held, number in held_by_blocks(recipe, mesh).items():
        moved += number * (int(held.forward_traffic * (1 + again)) + held.backward_traffic)
    if recipe.teacher:
        moved += len(recipe.transformer.layouts) * held_by_block(recipe, mesh, Layout.FULL).forward_traffic
    reordered = 2 * _reordered(recipe, mesh) * (1 + training)
    bandwidth = device.bandwidth(recipe.code, recipe.hif8_linears)
    elementwise = times * (moved / bandwidth + reordered / device.bandwidth("eager"))
    exchanges = (sent.attends + sent.switches) / device.link(mesh.ssp * mesh.ulysses)
    busy = linears + attention + elementwise + exchanges
    fetch = sent.gathers / device.link(mesh.fsdp)
    reduce = sent.reductions / device.link(mesh.fsdp if mesh.ddp == 1 else mesh.world)
    optimiser = 0.0
    if training:
        own = sharded(recipe.trained, mesh.fsdp)
        optimiser = own * 4 * _OPTIMISER_PASSES / device.bandwidth("eager")
    return Seconds(linears, attention, elementwise, exchanges, max(0.0, fetch + reduce - busy), optimiser)


def run_seconds(recipe: Recipe, mesh: Mesh, device: Device, videos: int) -> Run:
    """All of a run: of ``generate`` so many videos, of ``train`` all its steps."""
    step = step_seconds(recipe, mesh, device).total
    if recipe.kind == "train":
        return Run(0.0, recipe.steps * step, 0.0)
    rounds = -(-videos // (mesh.dp * recipe.batch))
    prompts = recipe.batch * (1 + recipe.guided)
    encode = encode_flops(recipe.text_encoder, recipe.settings["text_len"], prompts) / device.linear(recipe.dtype)
    decode = recipe.batch * _decode_flops(recipe, mesh.video) / device.convolution(recipe.vae.dtype)
    return Run(rounds * encode, rounds * recipe.steps * step, rounds * decode)


def _reordered(recipe: Recipe, mesh: Mesh) -> int:
    """Bytes of hidden states that changes of layout copy."""
    layouts = recipe.transformer.layouts
    changes = sum(
        here is not there for here, there in zip((Layout.FULL, *layouts), (*layouts, Layout.FULL), strict=True)
    )
    tokens = recipe.grid.tokens // (mesh.ssp * mesh.ulysses)
    return changes * rows(recipe, mesh) * tokens * recipe.settings["dim"] * recipe.dtype.itemsize


@lru_cache(maxsize=16)
def _decode_flops(recipe: Recipe, team: int) -> int:
    return decode_flops(recipe.vae, recipe.latents, team)
