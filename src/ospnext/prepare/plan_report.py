"""A plan as tables for people and as JSON for programs."""

from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ospnext.ops.layout import Layout
from ospnext.prepare.plan_options import Option, Plan
from ospnext.prepare.plan_time import passes, step_flops, step_sent
from ospnext.prepare.plan_traffic import published_edge_values, published_values, ulysses_values
from ospnext.prepare.plan_work import count

_GIB, _MB, _SHOWN = 2**30, 1e6, 12


def block_traffic(plan: Plan, option: Option) -> dict[str, dict[str, float]]:
    """Bytes that the busiest process sends for one block and one video, by kind of block and scheme.

    Without sparse blocks, or on one process a video, there is nothing to compare.
    """
    recipe, sequence = plan.recipe, option.mesh.sequence(plan.recipe)
    dim, item, ranks = recipe.settings["dim"], recipe.dtype.itemsize, sequence.processes
    if ranks == 1:
        return {}
    ulysses = float(item * ulysses_values(recipe.grid.tokens, dim, ranks))
    found = {}
    if Layout.FULL in sequence.layouts:
        ours = float(item * sequence.attend_values(Layout.FULL, dim))
        found["dense block"] = {"ulysses": ulysses, "published": ulysses, "ours": ours}
    pairs = [pair for pair in pairwise(sequence.layouts) if pair[0] is not pair[1]]
    for name, chosen in (
        ("sparse block", [pair for pair in pairs if Layout.FULL not in pair]),
        ("dense-sparse edge", [pair for pair in pairs if Layout.FULL in pair]),
    ):
        if not chosen:
            continue
        switch = max(sequence.switch_values(*pair, dim) for pair in chosen)
        inside = sequence.attend_values(chosen[0][1], dim) if name == "sparse block" else 0
        if name == "sparse block":
            published = published_values(sequence, dim) + inside
        else:
            published = published_edge_values(recipe.grid, dim, ranks)
        row = {"published": float(item * published), "ours": float(item * (switch + inside))}
        found[name] = ({"ulysses": ulysses} if name == "sparse block" else {"ulysses": 0.0}) | row
    return found


def as_json(plan: Plan) -> dict[str, Any]:
    """All that a plan says, in bytes, seconds and FLOPs."""
    recipe = plan.recipe
    return {
        "kind": recipe.kind,
        "world": plan.world,
        "accelerator": {
            "name": plan.device.name,
            "memory": plan.device.memory,
            "rates": {name: rate._asdict() for name, rate in plan.device.rates.items()},
        },
        "video": dict(zip(("frames", "height", "width"), recipe.size, strict=True)),
        "tokens": recipe.grid.tokens,
        "assumed": list(recipe.assumed),
        "chosen": None if plan.chosen is None else _option(plan, plan.chosen, True),
        "refusal": plan.refusal or None,
        "fitting": [_option(plan, option, False) for option in plan.options],
        "meshes_tried": plan.tried,
        "least_memory": _option(plan, plan.least, False),
        "notices": list(plan.notices),
    }


def print_plan(plan: Plan) -> None:
    """Tables: what is planned, memory, traffic, time, and the meshes that fit."""
    console = Console(highlight=False)
    shown = plan.chosen or (plan.options[0] if plan.options else plan.least)
    _print_head(console, plan, shown)
    _print_memory(console, plan, shown)
    _print_work(console, plan, shown)
    _print_traffic(console, plan, shown)
    _print_options(console, plan)
    console.print(verdict(plan), soft_wrap=True)


def verdict(plan: Plan) -> str:
    """One line: does what was asked for fit, and what to use else."""
    room = f"{plan.device.memory / _GIB:.1f} GiB of {plan.device.title}"
    if plan.options:
        way = f"the best that fits is {settings_of(plan.options[0])}"
    else:
        way = f"nothing fits; least takes {settings_of(plan.least)}, {plan.least.peak / _GIB:.1f} GiB"
        if plan.recipe.kind == "train" and not plan.recipe.checkpointing:
            way += "; try gradient_checkpointing=true"
    if plan.chosen is None:
        return f"The configured sizes cannot be used: {plan.refusal}; {way}."
    fits = plan.chosen.peak <= plan.device.memory
    say = "fits" if fits else "does not fit"
    return f"{settings_of(plan.chosen)} {say}: {plan.chosen.peak / _GIB:.1f} of {room}; {way}."


def settings_of(option: Option) -> str:
    """A mesh in the keys of a configuration."""
    mesh = option.mesh
    words = [f"fsdp_size={mesh.fsdp}"]
    if mesh.cfg > 1:
        words.append(f"cfg_parallel_size={mesh.cfg}")
    if mesh.ssp > 1:
        words.append(f"use_skiparse_sequence_parallel=true skiparse_sp_size={mesh.ssp}")
    if mesh.ulysses > 1:
        words.append(f"use_sequence_parallel=true sp_size={mesh.ulysses}")
    return " ".join(words)


def _option(plan: Plan, option: Option, whole: bool) -> dict[str, Any]:
    brief = {
        "mesh": option.mesh._asdict(),
        "settings": settings_of(option),
        "peak": option.peak,
        "fits": option.peak <= plan.device.memory,
        "step_seconds": option.step.total,
        "run_seconds": option.run.total,
    }
    if not whole:
        return brief
    return brief | {
        "phases": [{"name": phase.name, "total": phase.total, "parts": phase.parts} for phase in option.phases],
        "flops_a_step": {name: flops._asdict() for name, flops in step_flops(plan.recipe, option.mesh).items()},
        "forwards_a_step": passes(plan.recipe, option.mesh),
        "sent_a_step": step_sent(plan.recipe, option.mesh)._asdict(),
        "sent_a_block": block_traffic(plan, option),
        "step": option.step._asdict(),
        "run": option.run._asdict(),
    }


_CODES = {"eager": "not compiled", "compiled": "compiled", "kernels": "fused kernels"}


def _print_head(console: Console, plan: Plan, shown: Option) -> None:
    recipe, mesh = plan.recipe, shown.mesh
    frames, height, width = recipe.size
    layouts = recipe.transformer.layouts
    dense = sum(layout is Layout.FULL for layout in layouts)
    named = {"linears": recipe.hif8_linears, "attention": recipe.hif8_attention}
    eight_bits = ", HiF8 " + " and ".join(name for name, on in named.items() if on) if any(named.values()) else ""
    lines = {
        "plan": f"{recipe.kind}, {frames} frames of {width} x {height}: {recipe.grid.tokens:,} tokens, batch "
        f"{recipe.batch}{', guided' if recipe.guided else ''}",
        "model": f"{count(recipe.transformer) / 1e9:.2f} billion parameters, {dense} dense "
        f"and {len(layouts) - dense} sparse blocks, {str(recipe.dtype).removeprefix('torch.')}, "
        f"{_CODES[recipe.code]}{eight_bits}",
        "devices": f"{plan.world} x {plan.device.title}",
        "mesh": f"weights: fsdp {mesh.fsdp} x ddp {mesh.ddp}; work: dp {mesh.dp} x cfg {mesh.cfg} x ssp {mesh.ssp} x "
        f"ulysses {mesh.ulysses}",
        "assumed": "; ".join(recipe.assumed) or "nothing",
        "notes": "\n".join(plan.notices) or "none",
    }
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in lines.items():
        table.add_row(label, escape(value))
    console.print(table)


def _print_memory(console: Console, plan: Plan, shown: Option) -> None:
    table = Table(title="memory of one rank, GiB", title_justify="left", pad_edge=False)
    table.add_column("part")
    peak = max(shown.phases, key=lambda phase: phase.total)
    for phase in shown.phases:
        table.add_column(f"{phase.name}{' (peak)' if phase is peak else ''}", justify="right")
    for name in dict.fromkeys(name for phase in shown.phases for name in phase.parts):
        table.add_row(name, *(_gib(phase.parts.get(name)) for phase in shown.phases))
    table.add_section()
    table.add_row("all", *(_gib(phase.total) for phase in shown.phases))
    console.print(table)


def _print_work(console: Console, plan: Plan, shown: Option) -> None:
    recipe = plan.recipe
    table = Table(title="PFLOP of one rank in one step", title_justify="left", pad_edge=False)
    for column in ("what", "linears", "attention"):
        table.add_column(column, justify="left" if column == "what" else "right")
    flops = step_flops(recipe, shown.mesh)
    for name, part in flops.items():
        table.add_row(name, *(f"{amount / 1e15:.3f}" for amount in part))
    table.add_section()
    table.add_row("all", *(f"{sum(part[i] for part in flops.values()) / 1e15:.3f}" for i in (0, 1)))
    console.print(table)
    table = Table(title="time of one rank", title_justify="left", pad_edge=False)
    for column in ("what", "amount", "seconds"):
        table.add_column(column, justify="left" if column == "what" else "right")
    sent = step_sent(recipe, shown.mesh)
    amounts = {
        "linears": f"{sum(part.linear for part in flops.values()) / 1e15:.3f} PFLOP",
        "attention": f"{sum(part.attention for part in flops.values()) / 1e15:.3f} PFLOP",
        "elementwise": "",
        "exchanges": f"{(sent.attends + sent.switches) / 1e9:.2f} GB sent",
        "weights": f"{(sent.gathers + sent.reductions) / 1e9:.2f} GB sent",
        "optimiser": "",
    }
    for name, seconds in shown.step._asdict().items():
        table.add_row(name + (" (not hidden)" if name == "weights" else ""), amounts[name], f"{seconds:.3f}")
    table.add_section()
    table.add_row("one step", "", f"{shown.step.total:.3f}")
    if recipe.kind == "generate":
        table.add_row(f"{plan.videos} video{'s' if plan.videos > 1 else ''}", f"{recipe.steps} steps each", "")
        for name, seconds in shown.run._asdict().items():
            table.add_row(f"  {name}", "", f"{seconds:.1f}")
        table.add_row("  all", "", f"{shown.run.total:.1f}")
    else:
        table.add_row("the run", f"{recipe.steps} steps", f"{shown.run.total:.0f}")
    console.print(table)


def _print_traffic(console: Console, plan: Plan, shown: Option) -> None:
    rows = block_traffic(plan, shown)
    if not rows:
        return
    table = Table(title="sent by one rank for one block and video, MB", title_justify="left", pad_edge=False)
    for column in ("block", "plain Ulysses", "published sparse scheme", "here"):
        table.add_column(column, justify="left" if column == "block" else "right")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[key] / _MB:.1f}" for key in ("ulysses", "published", "ours")))
    console.print(table)


def _print_options(console: Console, plan: Plan) -> None:
    generate = plan.recipe.kind == "generate"
    title = f"{len(plan.options)} of {plan.tried} meshes fit, best first"
    table = Table(title=title, title_justify="left", pad_edge=False)
    for column in ("", "fsdp x ddp", "dp x cfg x ssp x ulysses", "peak GiB", "step s"):
        table.add_column(column, justify="right")
    table.add_column("run s" if generate else "samples a second", justify="right")
    for place, option in enumerate(plan.options):
        chosen = plan.chosen is not None and option.mesh == plan.chosen.mesh
        if place < _SHOWN or chosen:
            mesh = option.mesh
            samples = mesh.dp * plan.recipe.batch * plan.recipe.accumulation / option.step.total
            table.add_row(
                "chosen" if chosen else "",
                f"{mesh.fsdp} x {mesh.ddp}",
                f"{mesh.dp} x {mesh.cfg} x {mesh.ssp} x {mesh.ulysses}",
                f"{option.peak / _GIB:.1f}",
                f"{option.step.total:.2f}",
                f"{option.run.total:.0f}" if generate else f"{samples:.3f}",
            )
    console.print(table)


def _gib(size: int | None) -> str:
    return "" if size is None else f"{size / _GIB:.2f}"
