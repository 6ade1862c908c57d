"""``ospnext generate``: prompts to video files.

    ospnext generate --prompt "a red square moves left"
    ospnext generate configs/generate/osp_14b.yaml seed=7

Everything that can be wrong is found before weights are loaded. Video i has seed ``seed + i`` and is the same alone or
in a batch, so a run that was interrupted goes on where it stopped.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

import ospnext
from ospnext.checkpoints.fill import progress_bar
from ospnext.checkpoints.formats import SPARSE_KEYS
from ospnext.config import ConfigError, dump_yaml
from ospnext.device import device_label, resolve_device
from ospnext.generate.manifest import Manifest, VideoTask, only_run, write_text
from ospnext.generate.pipeline import OSPNextPipeline
from ospnext.generate.settings import GenerateConfig, output_folder, read_prompts
from ospnext.generate.sources import DECODING, Plan, load_pipeline, make_plan
from ospnext.media import video_grid, write_video
from ospnext.models.text import WAN_NEGATIVE_PROMPT
from ospnext.ops.attention import describe_kernel
from ospnext.ops.fused import describe_fused
from ospnext.ops.layout import Layout, block_layouts

GRID = "video_grid.mp4"


def run(config: GenerateConfig) -> str:
    """Make the videos a configuration asks for; returns a line that says where they are.

    Raises:
        ValueError: bad input, in one line; nothing was loaded or written.
        OSError: the output cannot be written.
    """
    prompts = read_prompts(config)
    device = resolve_device(config.device)
    plan = make_plan(config, device)
    report = describe_run(config, plan, device)
    tasks = make_tasks(config, prompts, plan)
    folder = make_folder(output_folder(config.output_dir, prompts))
    with only_run(folder):
        return fill_folder(folder, config, plan, tasks, report, device)


def fill_folder(
    folder: Path,
    config: GenerateConfig,
    plan: Plan,
    tasks: Sequence[VideoTask],
    report: Mapping[str, str],
    device: torch.device,
) -> str:
    """Make the videos that are not there yet, and the grid of all; returns a line that says where they are."""
    manifest = Manifest(folder, shared_settings(config, plan), report, config.overwrite)
    pending = [task for task in tasks if not manifest.has(task)]
    print_report({**report, "videos": f"{len(tasks)}, of which {len(tasks) - len(pending)} are there"})
    write_text(folder / "config.yaml", dump_yaml(config))
    manifest.save()
    if pending:
        with progress_bar() as progress:
            pipe = load_pipeline(config, plan, device, progress)
        make_videos(pipe, config, plan, pending, manifest)
    if pending or not (folder / GRID).exists():
        make_grid([folder / task.file for task in tasks], folder / GRID, config.save_fps)
    ways = sorted({manifest.videos[task.file]["decoded"] for task in tasks})
    videos = "1 video" if len(tasks) == 1 else f"{len(tasks)} videos"
    watch = folder / (tasks[0].file if len(tasks) == 1 else GRID)
    return f"{videos} ({len(pending)} new, decoded {' and '.join(ways)}) in {folder}; watch {watch}"


def make_tasks(config: GenerateConfig, prompts: Sequence[str], plan: Plan) -> list[VideoTask]:
    """Every video of a run: the videos of a prompt next to each other, each with the next seed."""
    negative = config.negative_prompt
    if negative is None:
        negative = plan.places.settings.get("negative_prompt", WAN_NEGATIVE_PROMPT)
    if plan.sampling.guidance_scale <= 1:
        negative = None
    each = [prompt for prompt in prompts for _ in range(config.num_videos_per_prompt)]
    return [VideoTask(i, prompt, negative, config.seed + i) for i, prompt in enumerate(each)]


def make_folder(folder: Path) -> Path:
    """The output folder, made if need be.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / ".writable", "")
        (folder / ".writable").unlink()
    except OSError as error:
        raise ConfigError(f"output_dir {folder} cannot be written ({error.strerror}): choose another") from error
    return folder


def make_videos(
    pipe: OSPNextPipeline, config: GenerateConfig, plan: Plan, tasks: Sequence[VideoTask], manifest: Manifest
) -> None:
    """Sample and decode in batches; every video is on disk and in the manifest before the next one is decoded."""
    pipe.decode_modes = DECODING[config.vae_tiling]
    size = {name: getattr(plan.sampling, name) for name in ("num_frames", "height", "width")}
    with _progress(len(tasks), plan.sampling.num_inference_steps) as bars:
        for first in range(0, len(tasks), config.batch_size):
            batch = tasks[first : first + config.batch_size]
            bars.batch(len(batch))
            start = time.perf_counter()
            (latents,) = pipe(
                [task.prompt for task in batch],
                batch[0].negative_prompt,  # one for all
                **size,
                num_inference_steps=plan.sampling.num_inference_steps,
                guidance_scale=plan.sampling.guidance_scale,
                generator=[torch.Generator().manual_seed(task.seed) for task in batch],
                output_type="latent",
                callback_on_step_end=bars.step,
                max_sequence_length=config.text_encoder_config.text_len,
                guidance_mode=config.guidance_mode,
                return_dict=False,
            )
            bars.decode()
            sampled = (time.perf_counter() - start) / len(batch)
            for task, one in zip(batch, latents.split(1), strict=True):
                start = time.perf_counter()
                if not one.isfinite().all():
                    raise ValueError(f"{task.file} came out as NaN or infinite: {_nan_way_out(plan)}")
                frames = pipe.decode(one, "pt")[0]
                write_video(manifest.folder / task.file, to_uint8(frames), config.save_fps)
                seconds = round(sampled + time.perf_counter() - start, 2)
                manifest.add(task, seconds=seconds, decoded=pipe.decode_mode)
                bars.video()


def make_grid(videos: Sequence[Path], grid: Path, fps: float) -> None:
    """All videos in one, from their files.

    Raises:
        ConfigError: a file that was finished once is damaged.
    """
    try:
        video_grid(videos, grid, fps)
    except ValueError as error:
        raise ConfigError(f"{error}; remove it and start again to make it anew") from error


def _nan_way_out(plan: Plan) -> str:
    """What to change, by what is most likely to blame."""
    if torch.float16 in plan.dtypes:
        return "float16 overflows, use weight_dtype=bf16"
    return f"use a usual guidance_scale (not {plan.sampling.guidance_scale:g}) and shift (not {plan.sampling.shift:g})"


def to_uint8(frames: Tensor) -> Tensor:
    """Frames [T, 3, H, W] in 0..1 as uint8 [T, H, W, 3], rounded to the nearest."""
    return (frames * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


class _Bars:
    """Three bars: videos done, and of the present batch the steps and the decoded videos."""

    def __init__(self, progress: Progress, videos: int, steps: int) -> None:
        self._progress = progress
        self._videos = progress.add_task("videos", total=videos)
        self._steps = progress.add_task("steps", total=steps)
        self._decoding = progress.add_task("decoding", visible=False)

    def batch(self, videos: int) -> None:
        """The next batch begins."""
        self._progress.reset(self._steps)
        self._progress.reset(self._decoding, total=videos, visible=False)

    def decode(self) -> None:
        """A batch is sampled."""
        self._progress.reset(self._decoding, visible=True)

    def step(self, pipe: Any, step: int, timestep: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """The pipeline's callback."""
        self._progress.update(self._steps, completed=step + 1)

    def video(self) -> None:
        """One video is on disk."""
        self._progress.advance(self._videos)
        self._progress.advance(self._decoding)


@contextmanager
def _progress(videos: int, steps: int) -> Iterator[_Bars]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress:
        yield _Bars(progress, videos, steps)


# ── what really runs ──────────────────────────────────────────────────────────────────────────────────────────────────


def shared_settings(config: GenerateConfig, plan: Plan) -> dict[str, Any]:
    """All that a video depends on besides its prompt and seed, as JSON values."""
    paths = {name: str(getattr(plan.places, name).resolve()) for name in ("transformer", "vae", "text_encoder")}
    dtypes = {f"{name}_dtype": _short(dtype) for name, dtype in plan.dtypes._asdict().items()}
    sparse = {key: plan.transformer[key] for key in SPARSE_KEYS}  # dense weights may run in any way that is asked for
    text_len = config.text_encoder_config.text_len or plan.transformer["text_len"]
    return paths | dtypes | sparse | plan.sampling._asdict() | {"text_len": text_len, "save_fps": config.save_fps}


def describe_run(config: GenerateConfig, plan: Plan, device: torch.device) -> dict[str, str]:
    """What really runs, by label.

    Raises:
        ValueError: the attention kernel cannot run here.
    """
    sampling, settings = plan.sampling, plan.transformer
    layouts = Counter(block_layouts(settings["num_layers"], *(settings[key] for key in SPARSE_KEYS)))
    dense = layouts.pop(Layout.FULL, 0)
    sparse = f", {layouts.total()} sparse ({settings['skiparse_pattern']}, P = {settings['sparse_ratio']})"
    guided = sampling.guidance_scale > 1
    return {
        "model": "shapes (embedded)" if config.embedded else str(plan.places.transformer),
        "device": device_label(device),
        "numbers": ", ".join(
            f"{name.replace('_', ' ')} {_short(dtype)}" for name, dtype in plan.dtypes._asdict().items()
        ),
        "attention": describe_kernel(config.attention_kernel, device, plan.dtypes.transformer),
        "norms": describe_fused(device),
        "blocks": f"{dense} dense" + (sparse if layouts else ""),
        "size": f"{sampling.num_frames} frames of {sampling.width} x {sampling.height} at {config.save_fps:g} fps",
        "sampler": f"{sampling.sampler}, {sampling.num_inference_steps} steps, shift {sampling.shift:g}",
        "guidance": f"{sampling.guidance_scale:g}, {config.guidance_mode}" if guided else "off",
        "decoding": " or ".join(DECODING[config.vae_tiling]) + ", by the free memory",
        "idle on the CPU": ", ".join(sorted(plan.offload)).replace("_", " ") or "nothing",
        "parallel": "one process",
        "notes": "\n".join(config.notices) or "none",
        "versions": f"ospnext {ospnext.__version__}, torch {torch.__version__}, diffusers {version('diffusers')}",
    }


def print_report(report: Mapping[str, str]) -> None:
    """One table of labels and values."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in report.items():
        table.add_row(label, escape(value))
    Console(highlight=False).print(table)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
