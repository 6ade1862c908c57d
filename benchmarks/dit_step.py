"""One forward pass of the transformer, ours beside diffusers' Wan: time, memory, and where the time goes.

    python benchmarks/dit_step.py --model 14b --size 720p --cases peer,full,skiparse,skiparse_masked --compile

Weights are random and made on the device; each case is built, timed and freed before the next. Prints one JSON line a
case, the rates behind the floor and a table last. ``--train`` times one block forward and backward instead.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import measure
import torch
import work
from diffusers import WanTransformer3DModel
from diffusers.utils import logging
from padded import pad_and_mask, padded_grid
from torch import nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from ospnext.device import resolve_device, resolve_dtype
from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.ops.attention import choose_kernel, describe_kernel
from ospnext.ops.fused import describe_fused
from ospnext.ops.layout import Layout
from ospnext.ops.rope import rope_table
from ospnext.quant.apply import describe as describe_eight_bits
from ospnext.quant.apply import quantize
from ospnext.quant.block import prepare
from ospnext.quant.config import QuantConfig, Scaling, choose_execution
from ospnext.quant.running import observed

CASES = ("peer", "peer_sdpa", "full", "skiparse", "skiparse_compiled", "skiparse_masked")
EIGHT_BITS = ("hif8_full", "hif8", "hif8_running")  # of dense blocks, of sparse ones, and with running scales
_PEER_BACKENDS = {"sdpa": "native", "cudnn": "_native_cudnn", "flash2": "flash", "flash3": "_flash_3"}
_SDPA_ORDER = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_COLUMNS = {
    "case": "case",
    "model": "model",
    "size": "size",
    "layers": "layers",
    "ms": "ms",
    "speedup": "× peer",
    "tflops": "TFLOP/s",
    "floor_ms": "floor ms",
    "attention_ms": "attention",
    "floor_attention_ms": "(floor)",
    "linears_ms": "linears",
    "floor_linears_ms": "(floor)",
    "rest_ms": "rest",
    "idle_ms": "idle",
    "peak_gb": "peak GB",
    "first_call_s": "first call s",
    "error": "error",
}
_TRAIN_COLUMNS = {
    "case": "case",
    "model": "model",
    "size": "size",
    "layout": "layout",
    "ms": "ms",
    "speedup": "× peer",
    "mfu": "MFU",
    "peak_gb": "peak GB",
    "first_call_s": "first call s",
    "error": "error",
}


@dataclass(frozen=True)
class Setup:
    """What all cases of one table have in common."""

    model: str
    size: str
    video: work.Video
    layers: int
    device: torch.device
    dtype: torch.dtype
    kernel: str
    compile: bool
    repeats: int
    check: bool

    @property
    def network(self) -> work.Network:
        """Sizes of the whole network."""
        return work.NETWORKS[self.model]

    def layouts(self, case: str) -> tuple[Layout, ...]:
        """The layout of every block of a case."""
        sparse = case.startswith("skiparse") or case in ("hif8", "hif8_running")
        return self.network.layouts(self.layers) if sparse else (Layout.FULL,) * self.layers


Ceilings = dict[bool, work.Ceilings]  # whether in 8 bits


def build(case: str, setup: Setup) -> nn.Module:
    """The model of a case with random weights made on the device: equal ones for all of our cases."""
    size, device = setup.network, setup.device
    with torch.device("meta"):
        if case.startswith("peer"):
            model = WanTransformer3DModel(
                num_attention_heads=size.num_heads,
                attention_head_dim=size.dim // size.num_heads,
                in_channels=size.latent_dim,
                out_channels=size.latent_dim,
                text_dim=size.text_dim,
                ffn_dim=size.ffn_dim,
                num_layers=setup.layers,
            )
        else:
            model = OSPNextTransformer3DModel(
                text_len=size.text_len,
                in_dim=size.latent_dim,
                out_dim=size.latent_dim,
                dim=size.dim,
                ffn_dim=size.ffn_dim,
                text_dim=size.text_dim,
                num_heads=size.num_heads,
                num_layers=setup.layers,
                sparse_ratio=size.sparse_ratio,
            )
    fill(model, setup)
    if isinstance(model, WanTransformer3DModel):
        rope = model.rope
        model.rope = type(rope)(rope.attention_head_dim, rope.patch_size, rope.max_seq_len).to(device)
        kernel = choose_kernel(setup.kernel, device, setup.dtype)
        model.set_attention_backend("native" if case == "peer_sdpa" else _PEER_BACKENDS[kernel])
    else:
        model.layouts = setup.layouts(case)
        model.set_attention_kernel(setup.kernel)
        if case == "skiparse_masked":
            pad_and_mask(model, setup.video.grid, device)
        if case in EIGHT_BITS:
            into_eight_bits(model, setup, "running" if case == "hif8_running" else "tensor")
    return model.eval()


@torch.no_grad()
def into_eight_bits(model: OSPNextTransformer3DModel, setup: Setup, scaling: Scaling) -> None:
    """HiF8 linears and attention, ready to sample; running scales are those of one pass."""
    quantize(model, QuantConfig(scaling=scaling, execution=choose_execution("fp8", setup.device)))
    if scaling == "running":
        with observed(model.eval()):
            model(*inputs(setup))
    prepare(model.eval())


@torch.no_grad()
def fill(model: nn.Module, setup: Setup) -> None:
    """Random weights, made where they stay; what diffusers keeps in float32 when it loads weights is float32."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    generator = torch.Generator(setup.device).manual_seed(0)
    nn.Module.to(model, setup.dtype).to_empty(device=setup.device)  # in this order: never float32 on the device
    for name, parameter in model.named_parameters():
        if kept & set(name.split(".")):
            parameter.data = parameter.data.float()
        norm = "norm" in name and name.endswith("weight")
        # Products keep the size of what they are given, so that every part counts in the output.
        std = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.02
        parameter.normal_(float(norm), std, generator=generator)


@contextmanager
def attention_of(case: str, setup: Setup) -> Iterator[None]:
    """For ``peer_sdpa``: plain SDPA told to prefer cuDNN, without the copies of diffusers' own cuDNN backend."""
    if case != "peer_sdpa" or choose_kernel(setup.kernel, setup.device, setup.dtype) != "cudnn":
        yield
        return
    with sdpa_kernel(_SDPA_ORDER, set_priority=True):
        yield


def inputs(setup: Setup) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, timestep and text of a batch of one."""
    size, generator = setup.network, torch.Generator(setup.device).manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator, device=setup.device, dtype=setup.dtype)

    timestep = torch.full((1,), 500.0, device=setup.device)
    return random(size.latent_dim, *setup.video.latents), timestep, random(size.text_len, size.text_dim)


def gains_by_compiling(case: str, device: torch.device) -> bool:
    """Our blocks are not compiled where they have fused kernels of their own, unless the case's name asks for it."""
    return case.startswith("peer") or case.endswith("_compiled") or not describe_fused(device).startswith("triton")


def first_call(call: Callable[[], Any], compile_blocks: Callable[..., None], setup: Setup) -> dict[str, Any]:
    """Compile if asked to, as whole graphs where the code allows it, and time the first call."""
    if not setup.compile:
        return {"compiled": False, "first_call_s": measure.host_ms(call, setup.device) / 1e3}
    compile_blocks(fullgraph=True, dynamic=False)
    start, whole = time.perf_counter(), True
    try:
        measure.host_ms(call, setup.device)
    except Unsupported:
        torch.compiler.reset()
        compile_blocks(fullgraph=False, dynamic=False)
        start, whole = time.perf_counter(), False
        measure.host_ms(call, setup.device)
    return {"compiled": True, "fullgraph": whole, "first_call_s": time.perf_counter() - start}


@torch.no_grad()
def step(case: str, setup: Setup, ceilings: Ceilings, outputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Build and time one case; its output goes into ``outputs`` for those that come after it."""
    setup = replace(setup, compile=setup.compile and gains_by_compiling(case, setup.device))
    counted = work.work_of(setup.network, setup.video.grid, setup.layouts(case))
    floor = ceilings[case in EIGHT_BITS].floor(counted)
    measure.free_all(setup.device)
    counters.clear()
    model, arguments = build(case, setup), inputs(setup)
    eager = model(*arguments, return_dict=False)[0].float() if setup.check and setup.compile else None
    if setup.device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(setup.device)

    def call() -> None:
        outputs[case] = model(*arguments, return_dict=False)[0]

    started = first_call(call, model.compile_repeated_blocks, setup)
    graphs = counters["stats"]["unique_graphs"]
    timing = measure.time_calls(call, setup.device, warmup=2, repeats=setup.repeats)
    recompiled = counters["stats"]["unique_graphs"] - graphs
    peak = measure.peak_gb(setup.device)
    parts = measure.split_by_kernel(call, setup.device)
    out = outputs[case]
    depth = setup.network.num_layers
    record = {
        **timing._asdict(),
        "ms_all_layers": timing.ms * depth / setup.layers if setup.layers < depth else None,  # extrapolated
        "tflops": work.flops(counted) / timing.ms / 1e9,
        "pflop": work.flops(counted) / 1e15,
        "floor_ms": floor.ms,
        "floor_attention_ms": floor.attention,
        "floor_linears_ms": floor.linears,
        "peak_gb": peak,
        **started,
        "graphs": graphs,
        "recompiled": recompiled,
        "finite": bool(out.isfinite().all()),
        "error_to_eager": None if eager is None else measure.relative_error(out, eager),
    }
    if case == "skiparse_masked":
        record["padded_tokens"] = padded_grid(setup.video.grid, setup.network.sparse_ratio).tokens
    if case in EIGHT_BITS:
        record["eight_bits"] = describe_eight_bits(model)
    plain = "full" if case == "hif8_full" else "skiparse"
    if case not in ("skiparse", "full") and plain in outputs and not case.startswith("peer"):
        record[f"error_to_{plain}"] = measure.relative_error(out, outputs[plain])
    if parts is not None:  # otherwise the profiler has seen no kernels here
        busy = parts.attention + parts.linears + parts.rest
        record |= {f"{kind}_ms": value for kind, value in parts._asdict().items() if isinstance(value, float)}
        record |= {"idle_ms": max(timing.ms - busy, 0.0), "parts_from": "torch.profiler"}
        record |= {"attention_kernels": parts.attention_kernels, "rest_kernels": parts.rest_kernels}
    return record


def train(case: str, setup: Setup, peak_tflops: float | None) -> dict[str, Any]:
    """Forward and backward of one block under activation checkpointing; MFU counts no recomputation."""
    setup = replace(setup, layers=setup.network.depths()[0])  # the shallowest model that has such a block
    layout = Layout.TOKEN if case.startswith("skiparse") else Layout.FULL
    counted = work.work_of_block(setup.network, setup.video.grid, layout)
    measure.free_all(setup.device)
    model = build(case, setup)
    block = model.blocks[[*setup.layouts(case)].index(layout)]
    arguments = block_inputs(model, layout, setup)
    gradient = torch.randn_like(arguments[0])
    if setup.device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(setup.device)

    def call() -> None:
        block.zero_grad(set_to_none=True)
        arguments[0].grad = None
        checkpoint(block, *arguments, use_reentrant=False).backward(gradient)

    started = first_call(call, block.compile, setup)
    timing = measure.time_calls(call, setup.device, warmup=2, repeats=setup.repeats)
    tflops = 3 * work.flops(counted) / timing.ms / 1e9
    return {
        "layout": layout.value,
        "layers": 1,
        **timing._asdict(),
        "tflops": tflops,
        "mfu": tflops / peak_tflops if peak_tflops else None,
        "peak_tflops": peak_tflops,
        "peak_gb": measure.peak_gb(setup.device),
        **started,
        "finite": bool(arguments[0].grad is not None and arguments[0].grad.isfinite().all()),
    }


def block_inputs(model: nn.Module, layout: Layout, setup: Setup) -> tuple[Any, ...]:
    """What the model hands a block: random hidden states that want a gradient, time, text and rotary positions."""
    size, grid, device = setup.network, setup.video.grid, setup.device
    text = torch.randn(1, size.text_len, size.dim, device=device, dtype=setup.dtype)
    if isinstance(model, WanTransformer3DModel):
        time_embedding = torch.randn(1, 6, size.dim, device=device, dtype=setup.dtype)
        rest: tuple[Any, ...] = (text, time_embedding, model.rope(inputs(setup)[0]))
        tokens = grid.tokens
    else:
        plan = model.switch.plan(grid, model.layouts, size.sparse_ratio, device)
        rope = plan.scatter(rope_table(grid, size.dim // size.num_heads, device), layout)
        rest = (torch.randn(1, 6, size.dim, device=device), text, rope, plan.segments(layout))
        tokens = len(rope)
    x = torch.randn(1, tokens, size.dim, device=device, dtype=setup.dtype, requires_grad=True)
    return (x, *rest)


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All cases of all sizes, one after the other; a case that fails is reported and the rest goes on."""
    device = resolve_device(arguments.device)
    dtype = resolve_dtype(arguments.dtype or ("fp32" if device.type == "cpu" else "bf16"))
    facts = {**measure.machine(device), "dtype": str(dtype).removeprefix("torch.")}
    facts["attention"] = describe_kernel(arguments.attention, device, dtype)
    facts["fused"] = describe_fused(device)
    peak = arguments.peak_tflops if device.type != "cpu" else None
    ceilings = {bits: work.Ceilings(device, dtype, arguments.attention, bits) for bits in (False, True)}
    records = []
    for setup in setups(arguments, device, dtype):
        outputs: dict[str, torch.Tensor] = {}
        peers: list[float] = []
        for case in arguments.cases:
            about = {"benchmark": "train_block" if arguments.train else "dit_step", "case": case, "model": setup.model}
            about |= {"size": setup.size, "tokens": setup.video.grid.tokens, "layers": setup.layers}
            about |= {"layers_in_model": setup.network.num_layers}
            try:
                with attention_of(case, setup):
                    result = train(case, setup, peak) if arguments.train else step(case, setup, ceilings, outputs)
            except RuntimeError as error:  # out of memory, a kernel or a graph that this machine does not take
                result = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"}
            if "ms" in result:
                if case.startswith("peer"):
                    peers.append(result["ms"])
                result["speedup"] = min(peers) / result["ms"] if peers else None  # beside the fastest peer so far
            records.append(measure.emit(about | result | facts))
    for ceiling in [*ceilings[False].records(), *ceilings[True].records()]:
        measure.emit({"benchmark": "ceiling"} | ceiling | facts)
    return records


def setups(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Iterator[Setup]:
    """One set-up for every network and size asked for."""
    for model in arguments.model:
        for size in arguments.size:
            changes = {name: getattr(arguments, name) for name in work.Video._fields if getattr(arguments, name)}
            video = work.VIDEOS[size]._replace(**changes)
            layers = arguments.layers or work.NETWORKS[model].num_layers
            work.NETWORKS[model].layouts(layers)  # says at once if that number of layers does not do
            label = "x".join(map(str, video)) if changes else size
            fixed = (device, dtype, arguments.attention, arguments.compile, arguments.repeats, arguments.check)
            yield Setup(model, label, video, layers, *fixed)


def one_of(names: Any) -> Callable[[str], list[str]]:
    """A parser of comma-separated lists of known names."""

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := [name for name in chosen if name not in names]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not known: use {', '.join(names)}")
        return chosen

    return parse


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=one_of(work.NETWORKS), default=["14b"], help=", ".join(work.NETWORKS))
    parser.add_argument("--size", type=one_of(work.VIDEOS), default=["720p"], help=", ".join(work.VIDEOS))
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--num-frames", type=int)
    parser.add_argument(
        "--cases",
        type=one_of(CASES + EIGHT_BITS),
        default=["peer", "full", "skiparse"],
        help=", ".join(CASES + EIGHT_BITS),
    )
    parser.add_argument("--layers", type=int, help="time this many layers, with the same share of dense ones")
    parser.add_argument("--attention", default="auto", choices=("auto", *_PEER_BACKENDS), help="kernel of all cases")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", help="default: bf16, on the CPU fp32")
    parser.add_argument("--compile", action="store_true", help="torch.compile the repeated blocks where it helps")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--check", action="store_true", help="compare compiled blocks with eager ones")
    parser.add_argument("--train", action="store_true", help="forward and backward of one block, checkpointed")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="MFU's denominator: dense bf16 of an H100")
    return parser.parse_args()


if __name__ == "__main__":
    parsed = parse_arguments()
    logging.set_verbosity_error()  # that attention backends are experimental, once a case
    lines = run(parsed)
    print(measure.table(lines, _TRAIN_COLUMNS if parsed.train else _COLUMNS))
    sys.exit(any("error" in line for line in lines))
