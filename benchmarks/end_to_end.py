"""One video from prompt to pixels at a network's real sizes, with random weights: what each phase takes.

    python benchmarks/end_to_end.py --model 14b --size 720p --compile --second-start

A few guided steps are run and the whole of ``--total-steps`` is extrapolated from the median step; the record says so.
The first step is reported apart: it compiles. ``--second-start`` runs the same again in a new process that finds the
first one's compiled kernels. Prints one JSON line a start and a table last.
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
from ospnext.ops.attention import describe_kernel

PROMPTS = ["A paper boat crosses a puddle in the rain.", "An old lighthouse at dawn, waves below."]
_COLUMNS = {
    "start": "start",
    "model": "model",
    "size": "size",
    "text_s": "text s",
    "first_step_s": "first step s",
    "step_s": "step s",
    "decode_s": "decode s",
    "decoded": "decoded",
    "total_s": "total s (extrapolated)",
    "decode_share": "decode share",
    "peak_gb": "peak GB",
    "decode_gb": "of which decoding",
    "recompiled": "recompiled",
}
_ENCODERS = {  # text_dim -> what makes an encoder of that width
    4096: {"d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 256384},
    32: {"d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 384},
}
_VAES: dict[str, dict[str, Any]] = {"tiny": {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}}


class Phase(NamedTuple):
    """Seconds, GB at the peak, and GB over what was there before; None where memory is not counted."""

    seconds: float
    peak_gb: float | None
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


def make_pipeline(setup: Setup, vae_dtype: torch.dtype) -> OSPNextPipeline:
    """A pipeline at the network's sizes with Wan2.1's autoencoder and a text encoder of the right width."""
    size = setup.network
    with torch.device("meta"):
        vae = AutoencoderKLWan(**_VAES.get(setup.model, {}))
        encoder = UMT5EncoderModel(UMT5Config(d_model=size.text_dim, **_ENCODERS[size.text_dim]))
    return OSPNextPipeline(
        build("skiparse", setup),
        random_like(vae, setup.device, vae_dtype),
        random_like(encoder, setup.device, setup.dtype),
        ByT5Tokenizer(),
        make_scheduler("euler", 7.0),
        negative_prompt=WAN_NEGATIVE_PROMPT,
        prompt_cleaning="wan",
    )


def timed(call: Callable[[], Any], device: torch.device) -> tuple[Any, Phase]:
    """What a call returns, with its time and its peak of memory."""
    before = 0
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
    results: list[Any] = []
    seconds = measure.host_ms(lambda: results.append(call()), device) / 1e3
    peak = measure.peak_gb(device)
    return results[0], Phase(seconds, peak, None if peak is None else peak - before / 1e9)


def generate(pipe: OSPNextPipeline, setup: Setup, prompt: str, steps: int) -> dict[str, Any]:
    """One video, phase by phase: seconds of the text, of every step and of the decoding."""
    device, video = setup.device, setup.video
    pipe.encode_prompt(["warm"], setup.network.text_len)
    embeddings, text = timed(lambda: pipe.encode_prompt([prompt, WAN_NEGATIVE_PROMPT], setup.network.text_len), device)
    ends: list[float] = []

    def mark(*_: Any) -> dict[str, Any]:
        measure.synchronize(device)
        ends.append(time.perf_counter())
        return {}

    measure.synchronize(device)
    start = time.perf_counter()
    latents, denoising = timed(
        lambda: pipe(
            prompt_embeds=embeddings[:1],
            negative_prompt_embeds=embeddings[1:],
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
        )[0],
        device,
    )
    frames, decoding = timed(lambda: pipe.decode(latents, "pt"), device)
    each = [end - begin for begin, end in zip([start, *ends], ends, strict=False)]
    return {
        "text_s": text.seconds,
        "first_step_s": each[0],
        "step_s": statistics.median(each[1:] or each),
        "steps_run": steps,
        "peak_gb": max(phase.peak_gb or 0.0 for phase in (text, denoising, decoding)) or None,
        "denoising_gb": denoising.over_gb,
        "decode_s": decoding.seconds,
        "decode_gb": decoding.over_gb,
        "decoded": pipe.decode_mode,
        "finite": bool(latents.isfinite().all() and torch.as_tensor(frames).isfinite().all()),
    }


def one_start(arguments: argparse.Namespace, start: str) -> dict[str, Any]:
    """Build everything, make two videos of one size, report the second; the first one's first step compiles."""
    device = resolve_device(arguments.device)
    dtype = resolve_dtype(arguments.dtype or ("fp32" if device.type == "cpu" else "bf16"))
    changes = {name: getattr(arguments, name) for name in work.Video._fields if getattr(arguments, name)}
    video = work.VIDEOS[arguments.size]._replace(**changes)
    layers = arguments.layers or work.NETWORKS[arguments.model].num_layers
    fixed = (device, dtype, "auto", arguments.compile, 1, False)
    setup = Setup(arguments.model, "x".join(map(str, video)), video, layers, *fixed)
    built = time.perf_counter()
    pipe = make_pipeline(setup, resolve_dtype(arguments.vae_dtype))
    pipe.set_progress_bar_config(disable=True)
    measure.synchronize(device)
    built = time.perf_counter() - built
    pipe.decode_modes = {"auto": pipe.decode_modes, "tiled": ("tiled",)}[arguments.decode]
    if arguments.compile:
        pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    first = generate(pipe, setup, PROMPTS[0], 2)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    second = generate(pipe, setup, PROMPTS[1], arguments.steps)
    depth = setup.network.num_layers / layers
    step = second["step_s"] * depth
    total = second["text_s"] + arguments.total_steps * step + second["decode_s"]
    return {
        "benchmark": "end_to_end",
        "start": start,
        "model": setup.model,
        "size": setup.size,
        "layers": layers,
        "compiled": arguments.compile,
        "build_s": built,
        **second,
        "first_step_s": first["first_step_s"],
        "step_s": step,
        "total_steps": arguments.total_steps,
        "total_s": total,
        "total_is": f"extrapolated from {arguments.steps} steps" + (f" of {layers} layers" if depth != 1 else ""),
        "decode_share": second["decode_s"] / total,
        "recompiled": torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs,
        "attention": describe_kernel("auto", device, dtype),
        **measure.machine(device),
    }


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
    parser.add_argument("--decode", choices=("auto", "tiled"), default="tiled")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", help="default: bf16, on the CPU fp32")
    parser.add_argument("--vae-dtype", default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--second-start", action="store_true", help="run again in a new process, compiled code cached")
    parser.add_argument("--start", default="cold", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run one start, or two that share a cache."""
    arguments = parse_arguments()
    if not arguments.second_start:
        measure.emit(one_start(arguments, arguments.start))
        return
    words = [word for word in sys.argv[1:] if word != "--second-start"]
    records = []
    with tempfile.TemporaryDirectory() as cache:
        for start in ("cold", "cached"):
            command = ["env", f"TORCHINDUCTOR_CACHE_DIR={cache}", sys.executable, __file__, *words, "--start", start]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            print(done.stdout, end="", flush=True)
            records += [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    print(measure.table(records, _COLUMNS))


if __name__ == "__main__":
    main()
