"""One step of the transformer on one device and on many: time, exposed exchanges, bytes, memory; gradients.

    torchrun --nproc-per-node 2 benchmarks/scaling.py --model 14b --size 720p,768p --layers 5 --compile > scaling.jsonl
    torchrun --nproc-per-node 2 benchmarks/scaling.py --size 720p --layers 5 --overlap both --full
    torchrun --nproc-per-node 4 benchmarks/scaling.py --size 720p --train
    torchrun --nproc-per-node 2 benchmarks/scaling.py --size 480p --layers 5 --check-gradients --dtype bf16

Every case runs on all processes at once: ``one`` on each of them alone, a mesh ``cfg x ssp x ulysses`` on all together.
Weights are random and made on the device. Prints one JSON line a case and a table last, both from the first process.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple
from unittest.mock import patch

import dit_step
import measure
import torch
import torch.distributed as dist  # noqa: TID251 - to count what travels
import torch.nn.functional as F
import work
from dit_step import Setup
from torch import nn
from torch.distributed.distributed_c10d import _resolve_process_group  # noqa: TID251
from torch.distributed.tensor import DTensor  # noqa: TID251
from torch.utils._python_dispatch import TorchDispatchMode

from ospnext.device import resolve_dtype
from ospnext.flow.sample import guided, one_after_the_other
from ospnext.ops.attention import describe_kernel
from ospnext.parallel import guidance, sequence
from ospnext.parallel.apply import Options, apply_sequence_parallel, fit, parallelise
from ospnext.parallel.fsdp import Sharding, copies_mesh
from ospnext.parallel.guidance import SplitGuidance
from ospnext.parallel.launch import Launch, gather_objects, joined, place, read_launch
from ospnext.parallel.mesh import Mesh, build_mesh, fit_sizes
from ospnext.parallel.ownership import segment_count

_COLUMNS = {
    "mesh": "cfg x ssp x ulysses",
    "model": "model",
    "size": "size",
    "layers": "layers",
    "blocks": "blocks",
    "overlap": "overlap",
    "step": "step",
    "ms": "ms",
    "speedup": "× one",
    "efficiency": "efficiency",
    "exposed_ms": "exposed ms",
    "exposed_share": "of step",
    "collectives": "collectives",
    "sent_mb": "MB sent",
    "peak_gb": "peak GB",
    "error": "error",
}
_GRADIENT_COLUMNS = {name: name for name in ("mesh", "model", "size", "layers", "dtype", "fsdp", "loss_error")} | {
    "worst_error": "worst gradient",
    "norm_error": "norm",
    "error": "error",
}
GUIDANCE = 5.0


class Shape(NamedTuple):
    """How many processes share a video, by what they share; ``one`` where they share nothing."""

    cfg: int
    ssp: int
    ulysses: int

    @property
    def name(self) -> str:
        """As on the command line."""
        return "one" if self.processes == 1 else "x".join(map(str, self))

    @property
    def processes(self) -> int:
        """Of one video."""
        return self.cfg * self.ssp * self.ulysses


class Traffic(TorchDispatchMode):
    """Counts the exchanges of this process and the bytes that leave it, as they happen."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.sent = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "all_to_all_single" in str(function):
            rows, _, send, group = args
            self.count += 1
            self.sent += (sum(send) - send[dist.get_rank(_resolve_process_group(group))]) * rows[:1].nbytes
        elif "allgather" in str(function):  # of the halves of guidance
            (results,), (own,) = args[:2]
            self.count += 1
            self.sent += (len(results) - 1) * own.nbytes
        return function(*args, **(kwargs or {}))


@contextmanager
def exchanges_replaced() -> Iterator[None]:
    """Copies of the right shape in place of all exchanges of a step: what is left is computation."""

    def local_rows(rows: torch.Tensor, send: Any, receive: Any, group: str) -> torch.Tensor:
        missing = max(0, sum(receive) - len(rows))
        return torch.cat([rows[: sum(receive)], rows.new_zeros(missing, *rows.shape[1:])]).contiguous()

    def local_halves(own: torch.Tensor, group: Any) -> torch.Tensor:
        return torch.stack([own, own])

    exchanges = {"all_to_all": local_rows, "start_all_to_all": local_rows, "wait_tensor": lambda rows: rows}
    with patch.multiple(sequence, **exchanges), patch.object(guidance, "gather_halves", local_halves):
        yield


def shapes_of(world: int, segments: int) -> list[Shape]:
    """One device, and every way to put all processes on one video."""
    sizes = range(1, world + 1)
    every = [Shape(c, s, world // (c * s)) for c in (1, 2) for s in sizes if world % (c * s) == 0 and segments % s == 0]
    return [Shape(1, 1, 1), *(shape for shape in every if shape.processes > 1)]


@cache
def mesh_of(shape: Shape, world: int, device_type: str, segments: int) -> Mesh:
    """One mesh of each shape in a process."""
    return build_mesh(fit_sizes(world, shape.ssp, shape.ulysses, segments, shape.cfg), device_type)


def segments_of(model: Any) -> int:
    """Attention segments of a model's sparse blocks."""
    return segment_count(model.layouts, model.config.sparse_ratio)


class Case(NamedTuple):
    """One line: a shape of one set-up, run by this process."""

    shape: Shape
    setup: Setup
    launch: Launch
    overlap: bool
    blocks: str = "skiparse"  # or another case of dit_step.py

    def mesh(self, model: Any) -> Mesh | None:
        """The mesh, None for one device."""
        if self.shape.processes == 1:
            return None
        return mesh_of(self.shape, self.launch.world, self.setup.device.type, segments_of(model))


def step_of(case: Case, model: Any, mesh: Mesh | None, train: bool) -> Callable[[], torch.Tensor]:
    """A forward pass; a guided step of two where halves are shared; with ``train`` forward and backward."""
    latents, timestep, text = dit_step.inputs(case.setup)

    def velocity(x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return model(x, t, condition, return_dict=False)[0]

    if train:

        def step() -> torch.Tensor:
            model.zero_grad(set_to_none=True)
            out = velocity(latents, timestep, text)
            out.square().mean().backward()
            return out.detach()

        return step
    if case.shape.cfg == 2:
        assert mesh is not None
        both = guided(velocity, text, -text, GUIDANCE, SplitGuidance(mesh))
        return torch.no_grad()(lambda: both(latents, timestep))
    return torch.no_grad()(lambda: velocity(latents, timestep, text))


def time_step(case: Case, train: bool, outputs: dict[Any, torch.Tensor]) -> dict[str, Any]:
    """Build, count and time one case; the slowest process counts. Outputs of one device are kept to compare with."""
    setup, launch = case.setup, case.launch
    measure.free_all(setup.device)
    model = dit_step.build(case.blocks, setup)
    mesh = case.mesh(model)
    if mesh is not None:
        apply_sequence_parallel(model, mesh, case.overlap)
    if train:
        model.train().enable_gradient_checkpointing()
    step = step_of(case, model, mesh, train)
    error = compare_with_one(case, model, step, outputs)
    with Traffic() as traffic:
        step()
    traffic_of_step = traffic.count, traffic.sent
    if setup.compile:
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    if setup.device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(setup.device)
    timing = measure.time_calls(step, setup.device, warmup=3, repeats=setup.repeats)
    peak = measure.peak_gb(setup.device)
    parts = measure.split_by_kernel(step, setup.device)
    without = None
    if mesh is not None:
        with exchanges_replaced():
            without = measure.time_calls(step, setup.device, warmup=3, repeats=setup.repeats).ms
    mine = [timing.ms, timing.fastest, timing.slowest, without, *traffic_of_step, peak, error]
    ms, fastest, slowest, without, count, sent, peak, error = (
        None if None in column else max(column) for column in zip(*gather_objects(launch, mine), strict=True)
    )
    passes = case.shape.cfg  # that this step has made, on all processes together
    depth = setup.network.num_layers
    record = {
        "step": "train" if train else "forward" if passes == 1 else "guided",
        "ms": ms,
        "fastest": fastest,
        "slowest": slowest,
        "passes": passes,
        "ms_all_layers": ms * depth / setup.layers if setup.layers < depth else None,  # extrapolated
        "guided_ms": None if train else 2 * ms / passes,  # of a guided step: two passes, at once or one after the other
        "without_exchanges_ms": without,
        "exposed_ms": None if without is None else ms - without,
        "exposed_share": None if without is None else (ms - without) / ms,
        "collectives": count,
        "sent_mb": sent / 1e6,
        "peak_gb": peak,
        "error_to_one": error,
    }
    if parts is not None:
        kernels = parts.rest_kernels.items()
        record["collective_kernels_ms"] = sum(v for name, v in kernels if "nccl" in name.lower()) or None
    return record


def compare_with_one(
    case: Case, model: Any, step: Callable[[], torch.Tensor], outputs: dict[Any, torch.Tensor]
) -> float | None:
    """Relative error of a step's output to one device's, whose output is put into ``outputs``."""
    out = step()
    if case.shape.processes > 1:
        expected = outputs.get(case.shape.cfg)
        return None if expected is None else measure.relative_error(out, expected)
    outputs[1] = out
    latents, timestep, text = dit_step.inputs(case.setup)

    def velocity(x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return model(x, t, condition, return_dict=False)[0]

    with torch.no_grad():
        outputs[2] = guided(velocity, text, -text, GUIDANCE, one_after_the_other)(latents, timestep)
    return None


def check_gradients(case: Case, references: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A training step's loss and gradients under FSDP2, checkpointing and the mesh, beside one device's.

    Weights are float32, as in training; with another dtype they are gathered in it, and one device's are cast.
    """
    setup, launch = case.setup, case.launch
    measure.free_all(setup.device)
    in_float = replace(setup, dtype=torch.float32)
    model = dit_step.build("skiparse", in_float).train()
    mesh = case.mesh(model)
    inputs = dit_step.inputs(in_float)
    if mesh is None:
        references |= step_gradients(nn.Module.to(model, setup.dtype), inputs)
        return {"fsdp": 1}
    sizes = fit(launch.world, segments_of(model), case.shape.ssp, case.shape.ulysses, launch.world)
    sharding = Sharding(param_dtype=None if setup.dtype == torch.float32 else setup.dtype)
    parallelise(model, mesh, copies_mesh(sizes.copies, setup.device.type), Options(sharding, checkpointing=True))
    ours = step_gradients(model, inputs)
    errors = {
        name: measure.relative_error(value, references[name].to(value.device))
        for name, value in ours.items()
        if references[name].float().norm() > 0
    }
    loss_error = errors.pop("loss")
    worst = max(errors, key=lambda name: errors[name])
    norms = [
        torch.stack([g.double().norm().cpu() for n, g in one.items() if n != "loss"]) for one in (ours, references)
    ]
    return {
        "fsdp": launch.world,
        "loss_error": loss_error,
        "worst_error": errors[worst],
        "worst_parameter": worst,
        "norm_error": abs(float(norms[0].norm() / norms[1].norm()) - 1),
        "parameters": len(errors),
        "peak_gb": measure.peak_gb(setup.device),
    }


def step_gradients(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """Loss and the whole gradient of every parameter of one step, on the CPU."""
    latents, timestep, text = inputs
    target = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2)).to(latents.device)
    loss = F.mse_loss(model(latents, timestep, text, return_dict=False)[0], target)
    loss.backward()
    results = {"loss": loss.detach().cpu()}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        results[name] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).cpu()
        parameter.grad = None
    return results


def run(arguments: argparse.Namespace, launch: Launch) -> list[dict[str, Any]]:
    """All cases of all sizes, one after the other; a case that fails on all processes is reported, the rest goes on."""
    device = place(launch, arguments.device)
    dtype = resolve_dtype(arguments.dtype or ("fp32" if device.type == "cpu" else "bf16"))
    facts = {**measure.machine(device), "dtype": str(dtype).removeprefix("torch."), "processes": launch.world}
    facts["attention"] = describe_kernel(arguments.attention, device, dtype)
    records = []
    for setup in dit_step.setups(arguments, device, dtype):
        kept: dict[Any, torch.Tensor] = {}
        one = None
        shapes = arguments.meshes or shapes_of(launch.world, setup.network.sparse_ratio**2)
        for shape, overlap, blocks in variants(arguments, shapes):
            about = {"benchmark": "gradients" if arguments.check_gradients else "scaling", "mesh": shape.name}
            about |= {"model": setup.model, "size": setup.size, "tokens": setup.video.grid.tokens}
            about |= {"layers": setup.layers, "layers_in_model": setup.network.num_layers}
            about |= {"compiled": setup.compile, "overlap": overlap, "blocks": blocks}
            case = Case(shape, setup, launch, overlap, blocks)
            if shape.cfg == 2 and (arguments.check_gradients or arguments.train):
                continue  # training has no guidance
            try:
                result = (
                    check_gradients(case, kept) if arguments.check_gradients else time_step(case, arguments.train, kept)
                )
            except RuntimeError as error:  # out of memory, a kernel or a graph that this machine does not take
                result = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"}
            if any("error" in other for other in gather_objects(launch, result)):
                result = {"error": "failed on another process"} | result
            elif "ms" in result:
                one = result["ms"] if shape.processes == 1 else one
                result["speedup"] = one and one * shape.cfg / result["ms"]
                result["efficiency"] = one and result["speedup"] / shape.processes
            record = about | result | facts
            records.append(measure.emit(record) if launch.first else record)
    return records


def variants(arguments: argparse.Namespace, shapes: list[Shape]) -> list[tuple[Shape, bool, str]]:
    """What is timed, in order: shape, whether exchanges overlap, blocks; one device of every kind of blocks first."""
    overlaps = {"off": (False,), "on": (True,), "both": (False, True)}[arguments.overlap]
    sparse = [
        (shape, overlap, "skiparse")
        for shape in shapes
        for overlap in (overlaps if shape.processes > 1 else overlaps[:1])
    ]
    dense = [shape for shape in shapes if shape.ssp == 1] if arguments.full else []
    eight_bits = [(shape, False, blocks) for blocks in arguments.eight_bits for shape in shapes]
    return sparse + [(shape, False, "full") for shape in dense] + eight_bits


def shape(text: str) -> Shape:
    """``one``, or ``cfg x ssp x ulysses`` as in ``1x2x1``."""
    try:
        return Shape(1, 1, 1) if text == "one" else Shape(*map(int, text.split("x")))
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no mesh: write one, or cfg x ssp x ulysses as in 1x2x1"
        ) from error


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    networks, videos = dit_step.one_of(work.NETWORKS), dit_step.one_of(work.VIDEOS)
    parser.add_argument("--model", type=networks, default=["14b"], help=", ".join(work.NETWORKS))
    parser.add_argument("--size", type=videos, default=["720p"], help=", ".join(work.VIDEOS))
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--num-frames", type=int)
    parser.add_argument("--layers", type=int, help="so many layers, with the same share of dense ones")
    parser.add_argument(
        "--meshes",
        type=lambda text: [shape(part) for part in text.split(",")],
        help="of one, CFGxSSPxULYSSES; default: one and all that fit",
    )
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", help="default: bf16, on the CPU fp32")
    parser.add_argument("--compile", action="store_true", help="torch.compile the repeated blocks")
    parser.add_argument(
        "--overlap",
        choices=("off", "on", "both"),
        default="off",
        help="exchange tokens while blocks compute, as overlap_exchanges does",
    )
    parser.add_argument(
        "--eight-bits",
        type=dit_step.one_of(("hif8", "hif8_running")),
        default=[],
        help="also sparse blocks in HiF8 on FP8 tensor cores: hif8, hif8_running",
    )
    parser.add_argument("--full", action="store_true", help="also a model of dense blocks alone, under Ulysses")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--train", action="store_true", help="forward and backward, blocks checkpointed")
    parser.add_argument("--check-gradients", action="store_true", help="of FSDP2 on every mesh, beside one device's")
    arguments = parser.parse_args(namespace=argparse.Namespace(check=False))
    if arguments.overlap != "off" and arguments.compile:
        parser.error("compiled blocks keep their tokens to the end: --overlap is for blocks that are not compiled")
    return arguments


def main() -> int:
    """Run; the exit code is 1 if a case failed."""
    arguments = parse_arguments()
    launch = read_launch(os.environ)  # noqa: TID251 - there is no command line to read it
    with joined(launch):
        lines = run(arguments, launch)
    if launch.first:
        print(measure.table(lines, _GRADIENT_COLUMNS if arguments.check_gradients else _COLUMNS))
    return int(any("error" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
