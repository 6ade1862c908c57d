"""The videos of a run, made in rounds: each group of processes that shares a video takes a batch of every round."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from ospnext.assemble import Crew
from ospnext.generate.manifest import Manifest, VideoTask
from ospnext.generate.memory import DECODING
from ospnext.generate.pipeline import OSPNextPipeline
from ospnext.generate.settings import GenerateConfig
from ospnext.generate.sources import Plan
from ospnext.media import write_video
from ospnext.parallel.launch import Launch, agree, gather_objects
from ospnext.parallel.ownership import share

Round = list[Sequence[VideoTask]]
"""The batch of every group, the larger ones first, some perhaps empty."""


def make_rounds(tasks: Sequence[VideoTask], groups: int, batch_size: int) -> list[Round]:
    """All tasks, in order, ``batch_size`` at most for each group and round, near-equal within a round."""
    rounds = []
    for first in range(0, len(tasks), groups * batch_size):
        part = tasks[first : first + groups * batch_size]
        sizes = share(len(part), groups)
        starts = [sum(sizes[:group]) for group in range(groups)]
        rounds.append([part[start : start + size] for start, size in zip(starts, sizes, strict=True)])
    return rounds


def make_videos(
    pipe: OSPNextPipeline,
    config: GenerateConfig,
    plan: Plan,
    tasks: Sequence[VideoTask],
    folder: Path,
    manifest: Manifest | None,
    launch: Launch,
    crew: Crew,
) -> None:
    """Sample and decode in rounds; every video is on disk and in the manifest before the next ones are decoded.

    Args:
        pipe, config, plan, tasks: the same in all processes.
        folder: where videos go; all processes must see the same one.
        manifest: of the folder, in the first process.
        launch, crew: this process, and with whom it shares what.

    Raises:
        ValueError: a video came out as no number.
    """
    pipe.decode_modes = DECODING[config.vae_tiling]
    sizes, copies = plan.sizes
    group = 0 if crew.mesh is None else crew.mesh.group
    # Where groups share weights, one that has nothing to do must still help the others to gather them.
    along = crew.weights is not None and sizes.video % copies.fsdp != 0
    with _progress(len(tasks), plan.sampling.num_inference_steps, shown=launch.first) as bars:
        for batches in make_rounds(tasks, sizes.dp, config.batch_size):
            batch = batches[group]
            bars.batch(sum(map(len, batches)))
            start = time.perf_counter()
            latents = sample(pipe, config, plan, batch or batches[0], bars) if batch or along else torch.empty(0)
            bars.decode()
            sampled = (time.perf_counter() - start) / max(1, len(batch))
            for turn in range(len(batches[0])):
                task = batch[turn] if turn < len(batch) else None
                facts = make_video(pipe, config, plan, task, latents[turn : turn + 1], folder, launch)
                for made in gather_objects(launch, facts and facts | {"seconds": round(facts["seconds"] + sampled, 2)}):
                    if manifest is not None and made is not None:
                        manifest.add(**made)
                        bars.video()


def sample(
    pipe: OSPNextPipeline, config: GenerateConfig, plan: Plan, batch: Sequence[VideoTask], bars: "_Bars"
) -> Tensor:
    """Latents of a batch."""
    (latents,) = pipe(
        [task.prompt for task in batch],
        batch[0].negative_prompt,  # one for all
        **{name: getattr(plan.sampling, name) for name in ("num_frames", "height", "width")},
        num_inference_steps=plan.sampling.num_inference_steps,
        guidance_scale=plan.sampling.guidance_scale,
        generator=[torch.Generator().manual_seed(task.seed) for task in batch],
        output_type="latent",
        callback_on_step_end=bars.step,
        max_sequence_length=config.text_encoder_config.text_len,
        guidance_mode=config.guidance_mode,
        return_dict=False,
    )
    return latents


def make_video(
    pipe: OSPNextPipeline,
    config: GenerateConfig,
    plan: Plan,
    task: VideoTask | None,
    latents: Tensor,
    folder: Path,
    launch: Launch,
) -> dict[str, Any] | None:
    """Decode and write a video, or with ``task`` None nothing; what its process has to say for the manifest.

    Raises:
        ValueError: it came out as no number, in one process or another.
    """
    start = time.perf_counter()
    sound = task is None or bool(latents.isfinite().all())
    frames = pipe.decode(latents, "pt") if task is not None and sound else None

    def write() -> dict[str, Any] | None:
        if task is None:
            return None
        if not sound:
            raise ValueError(f"{task.file} came out as NaN or infinite: {_nan_way_out(plan)}")
        if frames is None:  # another process of this video has it
            return None
        write_video(folder / task.file, to_uint8(frames[0]), config.save_fps)
        return {"task": task, "seconds": time.perf_counter() - start, "decoded": pipe.decode_mode}

    return agree(launch, write)


def to_uint8(frames: Tensor) -> Tensor:
    """Frames [T, 3, H, W] in 0..1 as uint8 [T, H, W, 3], rounded to the nearest."""
    return (frames * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _nan_way_out(plan: Plan) -> str:
    """What to change, by what is most likely to blame."""
    if torch.float16 in plan.dtypes:
        return "float16 overflows, use weight_dtype=bf16"
    return f"use a usual guidance_scale (not {plan.sampling.guidance_scale:g}) and shift (not {plan.sampling.shift:g})"


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
def _progress(videos: int, steps: int, shown: bool) -> Iterator[_Bars]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), disable=not shown) as progress:
        yield _Bars(progress, videos, steps)


def hidden_bars() -> _Bars:
    """Bars that nobody sees, for ``sample``."""
    return _Bars(Progress(disable=True), 1, 1)
