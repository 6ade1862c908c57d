"""``ospnext generate``: prompts to video files.

    ospnext generate --prompt "a red square moves left"
    ospnext generate configs/generate/osp_14b.yaml seed=7

Everything that can be wrong is found before weights are loaded. Video i has seed ``seed + i`` and is the same alone or
in a batch, on one process or on many, so a run that was interrupted goes on where it stopped.

Of many processes the first one speaks and keeps the folder; each video is written by the first process that shares it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import ospnext
from ospnext.assemble import Crew, join
from ospnext.checkpoints.fill import progress_bar
from ospnext.checkpoints.formats import SPARSE_KEYS
from ospnext.checkpoints.lora_files import Adapter
from ospnext.config import ConfigError, dump_yaml
from ospnext.device import device_label
from ospnext.generate.manifest import Manifest, VideoTask, only_run, write_text
from ospnext.generate.memory import DECODING
from ospnext.generate.settings import GenerateConfig, output_folder, read_prompts
from ospnext.generate.sources import Plan, load_pipeline, make_plan
from ospnext.generate.videos import make_videos
from ospnext.media import video_grid
from ospnext.models.text import WAN_NEGATIVE_PROMPT
from ospnext.ops.attention import describe_kernel
from ospnext.ops.fused import describe_fused
from ospnext.ops.layout import Layout, block_layouts
from ospnext.parallel.apply import describe
from ospnext.parallel.fsdp import Sharding, offload_notice
from ospnext.parallel.launch import Launch, agree, gather_objects, place
from ospnext.quant.settings import SAVED

GRID = "video_grid.mp4"


class Job(NamedTuple):
    """A run, settled and checked."""

    plan: Plan
    device: torch.device
    tasks: list[VideoTask]
    folder: Path
    report: dict[str, str]


class Opened(NamedTuple):
    """The output folder, and which videos are not there yet."""

    manifest: Manifest
    pending: list[VideoTask]


def run(config: GenerateConfig, launch: Launch | None = None) -> str | None:
    """Make the videos a configuration asks for.

    Args:
        config: what is asked for.
        launch: this process among those of the run; all of them call this.

    Returns:
        A line that says where they are; None in all processes but the first.

    Raises:
        ValueError: bad input, in one line; nothing was loaded or written.
        OSError: the output cannot be written.
    """
    launch = launch or Launch()
    job = agree(launch, lambda: settle(config, launch))
    # Memory may be shorter in one place than in another: all keep off the device what one must.
    offload = frozenset().union(*gather_objects(launch, job.plan.offload))
    job = job._replace(plan=job.plan._replace(offload=offload))
    with ExitStack() as folder:
        opened = agree(launch, lambda: open_folder(folder, config, job) if launch.first else None)
        pending: list[VideoTask] = gather_objects(launch, opened and opened.pending)[0]
        if pending:
            crew = arrange(config, job)
            with progress_bar() if launch.first else nullcontext() as progress:
                pipe = agree(launch, lambda: load_pipeline(config, job.plan, crew, progress))
            make_videos(pipe, config, job.plan, pending, job.folder, opened and opened.manifest, launch, crew)
        return None if opened is None else finish(config, job, opened)


def settle(config: GenerateConfig, launch: Launch) -> Job:
    """Everything about a run that can be known before weights are loaded; nothing is written.

    Raises:
        ValueError: bad input.
    """
    prompts = read_prompts(config)
    device = place(launch, config.device)
    plan = make_plan(config, device, launch.world)
    report = describe_run(config, plan, device)
    return Job(plan, device, make_tasks(config, prompts, plan), output_folder(config.output_dir, prompts), report)


def arrange(config: GenerateConfig, job: Job) -> Crew:
    """Arrange the processes; all of them call it together, once."""
    crew = join(config, job.plan.sizes, job.device, "transformer" in job.plan.offload)
    return replace(crew, overlap=config.overlap_exchanges)


def open_folder(stack: ExitStack, config: GenerateConfig, job: Job) -> Opened:
    """Make the output folder this run's until the stack is closed, and say what will run.

    Raises:
        ConfigError: it cannot be written, is another run's, or holds other videos.
    """
    folder = make_folder(job.folder)
    stack.enter_context(only_run(folder))
    manifest = Manifest(folder, shared_settings(config, job.plan), job.report, config.overwrite)
    pending = [task for task in job.tasks if not manifest.has(task)]
    print_report({**job.report, "videos": f"{len(job.tasks)}, of which {len(job.tasks) - len(pending)} are there"})
    write_text(folder / "config.yaml", dump_yaml(config))
    manifest.save()
    return Opened(manifest, pending)


def finish(config: GenerateConfig, job: Job, opened: Opened) -> str:
    """Make the grid of all videos; returns a line that says where they are."""
    tasks, folder, videos = job.tasks, job.folder, opened.manifest.videos
    if opened.pending or not (folder / GRID).exists():
        make_grid([folder / task.file for task in tasks], folder / GRID, config.save_fps)
    ways = sorted({videos[task.file]["decoded"] for task in tasks})
    number = "1 video" if len(tasks) == 1 else f"{len(tasks)} videos"
    watch = folder / (tasks[0].file if len(tasks) == 1 else GRID)
    return f"{number} ({len(opened.pending)} new, decoded {' and '.join(ways)}) in {folder}; watch {watch}"


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
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(f"output_dir {folder} cannot be written ({error.strerror}): choose another") from error
    return folder


def make_grid(videos: Sequence[Path], grid: Path, fps: float) -> None:
    """All videos in one, from their files.

    Raises:
        ConfigError: a file that was finished once is damaged.
    """
    try:
        video_grid(videos, grid, fps)
    except ValueError as error:
        raise ConfigError(f"{error}; remove it and start again to make it anew") from error


# ── what really runs ──────────────────────────────────────────────────────────────────────────────────────────────────


def shared_settings(config: GenerateConfig, plan: Plan) -> dict[str, Any]:
    """All that a video depends on besides its prompt and seed, as JSON values."""
    paths = {name: str(getattr(plan.places, name).resolve()) for name in ("transformer", "vae", "text_encoder")}
    dtypes = {f"{name}_dtype": _short(dtype) for name, dtype in plan.dtypes._asdict().items()}
    sparse = {key: plan.transformer[key] for key in SPARSE_KEYS}  # dense weights may run in any way that is asked for
    eight_bits = {key: plan.transformer[key] for key in SAVED if plan.transformer.get(key) is not None}
    if eight_bits:
        eight_bits["8 bits"] = plan.eight_bits
    text_len = config.text_encoder_config.text_len or plan.transformer["text_len"]
    others: dict[str, Any] = {"text_len": text_len, "save_fps": config.save_fps}
    if plan.adapters:  # by content: training writes a new adapter to the same place
        others["lora"] = [
            {"sha256": adapter.source.fingerprint(), "scale": scale}
            for adapter, scale in zip(plan.adapters, config.lora_scales, strict=True)
            if isinstance(adapter.source, Adapter)
        ]
    return paths | dtypes | sparse | eight_bits | plan.sampling._asdict() | others


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
    idle = offload_notice(Sharding(model_cpu_offload=config.model_cpu_offload), device.type)
    sequence = plan.sizes.sizes.ssp * plan.sizes.sizes.ulysses
    when = "while blocks compute" if config.overlap_exchanges else "after each block"
    exchanges = f"; tokens travel {when}" if sequence > 1 else ""
    notes = [*config.notices, *([] if idle is None else [idle])]
    return {
        "model": "shapes (embedded)" if config.embedded else str(plan.places.transformer),
        **describe_loras(config, plan),
        "device": device_label(device),
        "numbers": ", ".join(
            f"{name.replace('_', ' ')} {_short(dtype)}" for name, dtype in plan.dtypes._asdict().items()
        ),
        "8 bits": plan.eight_bits,
        "attention": describe_kernel(config.attention_kernel, device, plan.dtypes.transformer),
        "norms": describe_fused(device),
        "blocks": f"{dense} dense" + (sparse if layouts else ""),
        "size": f"{sampling.num_frames} frames of {sampling.width} x {sampling.height} at {config.save_fps:g} fps",
        "sampler": f"{sampling.sampler}, {sampling.num_inference_steps} steps, shift {sampling.shift:g}",
        "guidance": f"{sampling.guidance_scale:g}, {config.guidance_mode}" if guided else "off",
        "decoding": " or ".join(DECODING[config.vae_tiling]) + ", by the free memory",
        "idle on the CPU": ", ".join(sorted(plan.offload)).replace("_", " ") or "nothing",
        "parallel": describe(*plan.sizes) + exchanges,
        "notes": "\n".join(notes) or "none",
        "versions": f"ospnext {ospnext.__version__}, torch {torch.__version__}, diffusers {version('diffusers')}",
    }


def describe_loras(config: GenerateConfig, plan: Plan) -> dict[str, str]:
    """What the report says of LoRAs; nothing where there is none."""
    lines = [
        f"{adapter.source.source} ({adapter.source}), scale {scale:g}"
        for adapter, scale in zip(plan.adapters, config.lora_scales, strict=True)
        if isinstance(adapter.source, Adapter)
    ]
    return {"lora": "\n".join(lines)} if lines else {}


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
