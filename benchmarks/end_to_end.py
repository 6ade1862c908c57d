"""One video from prompt to pixels at a network's real sizes, with random weights: what each phase takes.

    python benchmarks/end_to_end.py --model 14b --size 720p --second-start

A few guided steps are run and the whole of ``--total-steps`` is extrapolated from the median step; the record says so.
The first step of the process is reported apart: kernels are compiled and chosen in it. ``--second-start`` first makes
that step alone in a process with empty caches, so that the second process, which does the rest, finds compiled kernels.
The latents are decoded in every way of ``--decode``. Prints one JSON line a start and a table last.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import measure
import torch
import work
from diffusers import AutoencoderKLWan
from dit_step import Setup, build
from torch import nn
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from ospnext.device import resolve_device, resolve_dtype
from ospnext.generate.pipeline import OSPNextPipeline
from ospnext.generate.sampler import make_scheduler
from ospnext.models.text import WAN_NEGATIVE_PROMPT
from ospnext.models.video_vae import DECODE_MODES
from ospnext.ops.attention import describe_kernel
from ospnext.ops.fused import describe_fused

PROMPTS = ["A paper boat crosses a puddle in the rain.", "An old lighthouse at dawn, waves below."]
_COLUMNS = {
    "start": "start",
    "model": "model",
    "size": "size",
    "build_s": "build s",
    "first_step_s": "first step s",
    "text_s": "text s",
    "step_s": "step s",
    "denoising_gb": "GB over weights",
    "decoded": "decoding",
    "decode_s": "decode s",
    "decode_gb": "GB over weights",
    "total_s": "total s (extrapolated)",
    "decode_share": "decode share",
    "recompiled": "recompiled",
}
_ENCODERS = {  # text_dim -> what makes an encoder of that width
    4096: {"d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 256384},
    32: {"d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 384},
}
_VAES: dict[str, dict[str, Any]] = {"tiny": {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}}


class Phase(NamedTuple):
    """What a call gave, its seconds, and the GB at its peak over what was there before (None on the CPU)."""

    result: Any
    seconds: float
    over_gb: float | None


def random_like(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    """Materialise a module of the meta device with small random weights; norms are one."""
    generator = torch.Generator(device).manual_seed(0)
    nn.Module.to(module, dtype).to_empty(device=device)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.02
            parameter.normal_(float("norm" in name or "gamma" in name), scale, generator=generator)
    return module.eval()


def make_pipeline(setup: Setup) -> OSPNextPipeline:
    """A pipeline at the network's sizes with Wan2.1's autoencoder and a text encoder of the right width."""
    size = setup.network
    with torch.device("meta"):
        vae = AutoencoderKLWan(**_VAES.get(setup.model, {}))
        encoder = UMT5EncoderModel(UMT5Config(d_model=size.text_dim, **_ENCODERS[size.text_dim]))
    return OSPNextPipeline(
        build("skiparse", setup),
        random_like(vae, setup.device, torch.float32),
        random_like(encoder, setup.device, setup.dtype),
        ByT5Tokenizer(),
        make_scheduler("euler", 7.0),
        negative_prompt=WAN_NEGATIVE_PROMPT,
        prompt_cleaning="wan",
    )


def timed(call: Callable[[], Any], device: torch.device) -> Phase:
    """Call, wait, measure."""
    before = 0
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
    results: list[Any] = []
    seconds = measure.host_ms(lambda: results.append(call()), device) / 1e3
    peak = measure.peak_gb(device)
    return Phase(results[0], seconds, None if peak is None else peak - before / 1e9)


def denoise(pipe: OSPNextPipeline, setup: Setup, prompt: str, steps: int) -> dict[str, Any]:
    """Latents of one video, and the seconds of its text and of every guided step."""
    device, video = setup.device, setup.video
    text = timed(lambda: pipe.encode_prompt([prompt, WAN_NEGATIVE_PROMPT], setup.network.text_len), device)
    ends: list[float] = []

    def mark(*_: Any) -> dict[str, Any]:
        measure.synchronize(device)
        ends.append(time.perf_counter())
        return {}

    def sample() -> torch.Tensor:
        return pipe(
            prompt_embeds=text.result[:1],
            negative_prompt_embeds=text.result[1:],
            height=video.height,
            width=video.width,
            num_frames=video.num_frames,
            num_inference_steps=steps,
            guidance_scale=5.0,
            guidance_mode="sequential",
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            callback_on_step_end=mark,
            return_dict=False,
        )[0]

    start = time.perf_counter()
    sampled = timed(sample, device)
    each = [end - begin for begin, end in zip([start, *ends], ends, strict=False)]
    return {"text_s": text.seconds, "steps_s": each, "denoising_gb": sampled.over_gb, "latents": sampled.result}


def decode(pipe: OSPNextPipeline, latents: torch.Tensor, way: str, device: torch.device) -> dict[str, Any]:
    """Seconds and memory of decoding in one way: ``tiled``, ``chunked`` or ``auto``, and the VAE's dtype."""
    mode, _, dtype = way.partition("-")
    nn.Module.to(pipe.vae, resolve_dtype(dtype or "fp32"))
    pipe.decode_modes = DECODE_MODES if mode == "auto" else (mode,)
    decoding = timed(lambda: pipe.decode(latents, "pt"), device)
    finite = bool(torch.as_tensor(decoding.result).isfinite().all())
    about = f"{pipe.decode_mode}, {str(pipe.vae.dtype).removeprefix('torch.')}"
    return {"decoded": about, "decode_s": decoding.seconds, "decode_gb": decoding.over_gb, "decode_finite": finite}


def one_start(arguments: argparse.Namespace, start: str) -> list[dict[str, Any]]:
    """Build everything, make a first step; then, unless only that is asked for, a video decoded in several ways."""
    device = resolve_device(arguments.device)
    dtype = resolve_dtype(arguments.dtype or ("fp32" if device.type == "cpu" else "bf16"))
    changes = {name: getattr(arguments, name) for name in work.Video._fields if getattr(arguments, name)}
    video = work.VIDEOS[arguments.size]._replace(**changes)
    layers = arguments.layers or work.NETWORKS[arguments.model].num_layers
    fixed = (device, dtype, "auto", arguments.compile, 1, False)
    setup = Setup(arguments.model, "x".join(map(str, video)), video, layers, *fixed)
    built = timed(lambda: make_pipeline(setup), device)
    pipe = built.result
    pipe.set_progress_bar_config(disable=True)
    if arguments.compile:
        pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    first = denoise(pipe, setup, PROMPTS[0], 1)
    about = {"benchmark": "end_to_end", "start": start, "model": setup.model, "size": setup.size, "layers": layers}
    about |= {"compiled": arguments.compile, "build_s": built.seconds, "first_step_s": first["steps_s"][0]}
    facts = {"attention": describe_kernel("auto", device, dtype), "fused": describe_fused(device)}
    facts |= measure.machine(device)
    if start == "cold":
        return [measure.emit(about | facts)]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    made = denoise(pipe, setup, PROMPTS[1], arguments.steps)
    latents = made.pop("latents")
    depth = setup.network.num_layers / layers
    step = statistics.median(made["steps_s"]) * depth
    about |= made | {"step_s": step, "finite": bool(latents.isfinite().all()), "total_steps": arguments.total_steps}
    about["recompiled"] = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
    about["total_is"] = f"extrapolated from {arguments.steps} steps" + (f" of {layers} layers" if depth != 1 else "")
    records = []
    for way in arguments.decode.split(","):
        decoded = decode(pipe, latents, way, device)
        total = made["text_s"] + arguments.total_steps * step + decoded["decode_s"]
        share = {"total_s": total, "decode_share": decoded["decode_s"] / total}
        records.append(measure.emit(about | decoded | share | facts))
    return records


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=work.NETWORKS, default="14b")
    parser.add_argument("--size", choices=work.VIDEOS, default="720p")
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--num-frames", type=int)
    parser.add_argument("--layers", type=int, help="run this many layers; steps are scaled up to the whole depth")
    parser.add_argument("--steps", type=int, default=4, help="guided steps to run")
    parser.add_argument("--total-steps", type=int, default=50, help="steps to extrapolate to")
    parser.add_argument("--decode", default="tiled-fp32", help="ways to decode, as tiled-fp32,chunked-bf16,auto-fp32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", help="default: bf16, on the CPU fp32")
    parser.add_argument("--compile", action="store_true", help="compile the repeated blocks")
    parser.add_argument("--second-start", action="store_true", help="before it, a process with empty caches")
    parser.add_argument("--start", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """One start, or two that share their caches."""
    arguments = parse_arguments()
    if not arguments.second_start:
        records = one_start(arguments, arguments.start or "only")
        if not arguments.start:
            print(measure.table(records, _COLUMNS))
        return
    words = [word for word in sys.argv[1:] if word != "--second-start"]
    records = []
    with tempfile.TemporaryDirectory() as cache:
        caches = [f"TORCHINDUCTOR_CACHE_DIR={cache}/inductor", f"TRITON_CACHE_DIR={cache}/triton"]
        for start in ("cold", "cached"):
            command = ["env", *caches, sys.executable, __file__, *words, "--start", start]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            print(done.stdout, end="", flush=True)
            records += [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    print(measure.table(records, _COLUMNS))


if __name__ == "__main__":
    main()
