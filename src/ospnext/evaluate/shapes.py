"""``ospnext evaluate-shapes``: does a model show what its prompts ask for? Graded from pixels on held-out prompts.

Scenes are drawn from combinations of shape, colour and motion that training never shows; the model gets their captions;
the grader of ``ospnext.shapes`` reads its videos. Figures come with 95% Wilson intervals.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ospnext.config import Config
from ospnext.device import device_label, dtype_label, resolve_device, working_dtype
from ospnext.generate.manifest import write_text
from ospnext.generate.pipeline import OSPNextPipeline
from ospnext.generate.run import make_folder
from ospnext.generate.settings import Guidance, Steps
from ospnext.media import contact_sheet, write_video
from ospnext.ops.attention import describe_kernel
from ospnext.quant.apply import describe, is_quantised
from ospnext.sections import AttentionKernel, DType
from ospnext.shapes.captions import caption
from ospnext.shapes.grade import Grade
from ospnext.shapes.grading import grade_all
from ospnext.shapes.world import Scene, World, sample_scene

ATTRIBUTES = ("count", "shape", "colour", "motion", "relation", "pan")


class EvaluateShapesConfig(Config):
    """``ospnext evaluate-shapes``: which model, on how many prompts of which world."""

    model: str = Field("shapes", description="a pipeline folder, or 'shapes' (embedded)")
    output_dir: str = Field("outputs/evaluation", description="where shapes.json and the first videos go")
    world: Literal["large", "simple", "full"] = Field(
        "large", description="which scenes; the embedded model knows large ones"
    )
    num_prompts: int = Field(512, ge=1, le=10**6, description="held-out prompts")
    seed: int = Field(1, ge=0, description="of prompts and noise")
    batch_size: int = Field(16, ge=1, description="videos at once")
    num_inference_steps: Steps | None = Field(None, description="default: the model's")
    guidance_scale: Guidance | None = Field(None, description="default: the model's")
    device: str = Field("auto", description="auto | cpu | cuda | npu | mps")
    weight_dtype: DType = Field("bf16", description="numbers of the transformer; a CPU computes in fp32 unless told")
    attention_kernel: AttentionKernel = Field("auto", description="auto picks the fastest that runs here")
    keep_videos: int = Field(16, ge=0, description="how many videos are kept as mp4 and on a contact sheet")


class Share(NamedTuple):
    """How many of those asked were right, with the bounds of a 95% Wilson interval."""

    right: int
    asked: int
    low: float
    high: float


def share(marks: Iterable[bool]) -> Share:
    """The share of true marks; an empty one is 0 of 0 and could be anything."""
    values = list(marks)
    n, k, z = len(values), sum(values), 1.959964
    if not n:
        return Share(0, 0, 0.0, 1.0)
    centre = (k + z * z / 2) / (n + z * z)
    reach = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return Share(k, n, max(centre - reach, 0.0), min(centre + reach, 1.0))


def run(config: EvaluateShapesConfig) -> None:
    """Generate, grade, print a table, and write ``output_dir/shapes.json``.

    Raises:
        ValueError: the model cannot be loaded or the output cannot be written; nothing was generated.
    """
    make_folder(Path(config.output_dir))
    device = resolve_device(config.device)
    dtype = working_dtype(config.weight_dtype, device, asked="weight_dtype" in config.model_fields_set)
    kernel = describe_kernel(config.attention_kernel, device, dtype)
    pipe = OSPNextPipeline.from_pretrained(config.model, torch_dtype=dtype, device=device)
    pipe.transformer.set_attention_kernel(config.attention_kernel)
    pipe.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(config.seed)
    world: World = getattr(World, config.world)()
    scenes = [sample_scene(rng, world, held_out=True) for _ in range(config.num_prompts)]
    prompts = [caption(scene, rng) for scene in scenes]
    videos = generate(pipe, prompts, config)
    grades = grade_all(videos, scenes)
    result = summarise(grades, scenes)
    where = f"{device_label(device)}, {dtype_label(dtype)}, {kernel}"
    if is_quantised(pipe.transformer):
        where += f", {describe(pipe.transformer)}"
    show(result, f"{config.num_prompts} held-out prompts, {config.world} world, {where}")
    write(config, result, prompts, grades, videos)


def generate(pipe: OSPNextPipeline, prompts: Sequence[str], config: EvaluateShapesConfig) -> list[np.ndarray]:
    """A video uint8 ``[T, H, W, 3]`` for every prompt; prompt i has the noise of seed + i."""
    videos = []
    starts = range(0, len(prompts), config.batch_size)
    for i in track(starts, description="generating", transient=True):
        some = list(prompts[i : i + config.batch_size])
        (frames,) = pipe(
            some,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            generator=[torch.Generator().manual_seed(config.seed + i + k) for k in range(len(some))],
            return_dict=False,
        )
        videos += list((frames * 255 + 0.5).astype(np.uint8))
    return videos


def summarise(grades: Sequence[Grade], scenes: Sequence[Scene]) -> dict[str, Share]:
    """Shares by attribute, and of videos in which everything is right, over all and by count where counts differ."""
    result = {
        name: share(mark for grade in grades if (mark := getattr(grade, name)) is not None) for name in ATTRIBUTES
    }
    result["everything"] = share(grade.all_right for grade in grades)
    counts = sorted({len(scene.things) for scene in scenes})
    for count in counts if len(counts) > 1 else ():
        chosen = [g.all_right for g, s in zip(grades, scenes, strict=True) if len(s.things) == count]
        result[f"everything, {count} object{'s' * (count > 1)}"] = share(chosen)
    return {name: value for name, value in result.items() if value.asked}


def show(result: dict[str, Share], title: str) -> None:
    """Print the table."""
    table = Table("asked", "right", "of", "share", "95% interval", title=title)
    for name, s in result.items():
        table.add_row(name, str(s.right), str(s.asked), f"{s.right / s.asked:.1%}", f"{s.low:.1%} to {s.high:.1%}")
    Console().print(table)


def write(
    config: EvaluateShapesConfig,
    result: dict[str, Share],
    prompts: Sequence[str],
    grades: Sequence[Grade],
    videos: Sequence[np.ndarray],
) -> None:
    """Write the figures with every prompt's grade, and the first videos to look at."""
    folder = Path(config.output_dir)
    record: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "result": {name: s._asdict() for name, s in result.items()},
        "prompts": [{"prompt": p, "grade": asdict(g)} for p, g in zip(prompts, grades, strict=True)],
    }
    for i, video in enumerate(videos[: config.keep_videos]):
        write_video(folder / f"video_{i}.mp4", video)
    if config.keep_videos:
        rows = [
            np.concatenate(list(video[:: max(len(video) // 4, 1)]), axis=1) for video in videos[: config.keep_videos]
        ]
        contact_sheet(np.stack(rows), folder / "contact_sheet.png", columns=1)
    write_text(folder / "shapes.json", json.dumps(record, indent=1) + "\n")
    print(f"saved {folder / 'shapes.json'}")
