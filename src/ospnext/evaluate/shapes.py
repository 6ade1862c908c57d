"""``ospnext evaluate-shapes``: does a model show what its prompts ask for? Graded from pixels on held-out prompts.

Scenes are drawn from combinations of shape, colour and motion that training never shows; the model gets their captions;
the grader of ``ospnext.shapes`` reads its videos. Figures come with 95% Wilson intervals.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ospnext.checkpoints.lora import describe_adapter
from ospnext.config import Config
from ospnext.device import device_label, dtype_label, resolve_device, working_dtype
from ospnext.generate.manifest import write_text
from ospnext.generate.pipeline import OSPNextPipeline
from ospnext.generate.run import make_folder
from ospnext.generate.settings import Guidance, Steps
from ospnext.generate.videos import to_uint8
from ospnext.media import contact_sheet, write_video
from ospnext.models.video_vae import decode_together
from ospnext.ops.attention import describe_kernel
from ospnext.quant.apply import describe, is_quantised
from ospnext.quant.block import prepare
from ospnext.sections import AttentionKernel, DType
from ospnext.shapes.captions import caption
from ospnext.shapes.grade import ATTRIBUTES, Grade
from ospnext.shapes.grading import grade_all
from ospnext.shapes.share import Share, share
from ospnext.shapes.world import Scene, World, sample_scene


class EvaluateShapesConfig(Config):
    """``ospnext evaluate-shapes``: which model, on how many prompts of which world."""

    model: str = Field("shapes", description="a pipeline folder, or 'shapes' (embedded)")
    lora_path: str | None = Field(None, description="a LoRA on it, a folder or file of any style")
    lora_scale: float = Field(1.0, description="times the LoRA")
    output_dir: str = Field("outputs/evaluation", description="where shapes.json and the first videos go")
    world: Literal["large", "simple", "full"] = Field(
        "large", description="which scenes; the embedded model knows large ones"
    )
    num_prompts: int = Field(512, ge=1, le=10**6, description="held-out prompts")
    seed: int = Field(1, ge=0, lt=2**63, description="of prompts and noise")
    batch_size: int = Field(16, ge=1, description="videos at once")
    num_inference_steps: Steps | None = Field(None, description="default: the model's")
    guidance_scale: Guidance | None = Field(None, description="default: the model's")
    device: str = Field("auto", description="auto | cpu | cuda | npu | mps")
    weight_dtype: DType = Field("bf16", description="numbers of the transformer; a CPU computes in fp32 unless told")
    attention_kernel: AttentionKernel = Field("auto", description="auto picks the fastest that runs here")
    keep_videos: int = Field(16, ge=0, description="how many videos are kept as mp4 and on a contact sheet")


def run(config: EvaluateShapesConfig) -> None:
    """Generate, grade, print a table, and write ``output_dir/shapes.json``.

    Raises:
        ValueError: the model cannot be loaded or the output cannot be written; nothing was generated.
    """
    make_folder(Path(config.output_dir))
    pipe, where = open_pipeline(config, config.model)
    asked = held_out(config.world, config.num_prompts, config.seed)
    videos = generate(pipe, asked.prompts, config)
    grades = grade_all(videos, asked.scenes)
    result = summarise(grades, asked.scenes)
    show(result, f"{config.num_prompts} held-out prompts, {config.world} world, {where}")
    write(config, result, asked.prompts, grades, videos)


class Asked(NamedTuple):
    """What a model is asked for: scenes, and a caption of each."""

    scenes: list[Scene]
    prompts: list[str]


def held_out(world: str, count: int, seed: int) -> Asked:
    """``count`` scenes of a world that training never shows, and a wording of each; a function of the seed."""
    rng = np.random.default_rng(seed)
    chosen: World = getattr(World, world)()
    scenes = [sample_scene(rng, chosen, held_out=True) for _ in range(count)]
    return Asked(scenes, [caption(scene, rng) for scene in scenes])


def open_pipeline(config: EvaluateShapesConfig, model: str, **overrides: Any) -> tuple[OSPNextPipeline, str]:
    """A model that is ready to be asked, and what it runs on in words.

    Args:
        config: device, dtype, kernel and LoRA.
        model: a pipeline's name.
        **overrides: of its transformer, as in ``load_transformer``.

    Raises:
        ValueError: it cannot be loaded.
    """
    device = resolve_device(config.device)
    dtype = working_dtype(config.weight_dtype, device, asked="weight_dtype" in config.model_fields_set)
    kernel = describe_kernel(config.attention_kernel, device, dtype)
    pipe = OSPNextPipeline.from_pretrained(model, torch_dtype=dtype, device=device, **overrides)
    pipe.transformer.set_attention_kernel(config.attention_kernel)
    where = f"{device_label(device)}, {dtype_label(dtype)}, {kernel}"
    if config.lora_path is not None:
        pipe.load_lora_weights(config.lora_path, "lora")
        pipe.set_adapters("lora", config.lora_scale)
        where += f", {describe_adapter(pipe.transformer, 'lora')}, scale {config.lora_scale:g}"
    prepare(pipe.transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe, where + (f", {describe(pipe.transformer, device=device)}" if is_quantised(pipe.transformer) else "")


def generate(pipe: OSPNextPipeline, prompts: Sequence[str], config: EvaluateShapesConfig) -> list[np.ndarray]:
    """A video uint8 ``[T, H, W, 3]`` for every prompt; prompt i has the noise of seed + i."""
    starts = track(range(0, len(prompts), config.batch_size), description="generating", transient=True)
    return [
        video
        for i in starts
        for video in generate_some(
            pipe,
            prompts[i : i + config.batch_size],
            config.seed + i,
            config.num_inference_steps,
            config.guidance_scale,
        )
    ]


def generate_some(
    pipe: OSPNextPipeline, prompts: Sequence[str], seed: int, steps: int | None, guidance_scale: float | None
) -> list[np.ndarray]:
    """Videos uint8 ``[T, H, W, 3]`` of prompts in one batch; the i-th has the noise of ``seed`` + i.

    What is None is the model's own.
    """
    (latents,) = pipe(
        list(prompts),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))],
        output_type="latent",
        return_dict=False,
    )
    with torch.no_grad(), pipe.at_work("vae") as vae:  # videos are small: many are decoded at once
        frames = decode_together(vae, latents).transpose(1, 2) / 2 + 0.5
    return [to_uint8(video).cpu().numpy() for video in frames]


def summarise(grades: Sequence[Grade], scenes: Sequence[Scene]) -> dict[str, Share]:
    """Shares by attribute, and of videos in which everything is right, over all and by count where counts differ."""
    result = {name: share(mark for grade in grades if (mark := grade.marks[name]) is not None) for name in ATTRIBUTES}
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
    """Write the figures with every prompt's grade, and the first videos, in place of an earlier evaluation's."""
    folder = Path(config.output_dir)
    record: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "result": {name: s._asdict() for name, s in result.items()},
        "prompts": [{"prompt": p, "grade": g.marks} for p, g in zip(prompts, grades, strict=True)],
    }
    if (folder / "shapes.json").exists():  # of an earlier evaluation, whose videos would lie beside these figures
        stale = itertools.takewhile(Path.exists, (folder / f"video_{i}.mp4" for i in itertools.count()))
        for path in (*stale, folder / "contact_sheet.png"):
            path.unlink(missing_ok=True)
    for i, video in enumerate(videos[: config.keep_videos]):
        write_video(folder / f"video_{i}.mp4", video)
    if config.keep_videos:
        rows = [
            np.concatenate(list(video[:: max(len(video) // 4, 1)]), axis=1) for video in videos[: config.keep_videos]
        ]
        contact_sheet(np.stack(rows), folder / "contact_sheet.png", columns=1)
    write_text(folder / "shapes.json", json.dumps(record, indent=1) + "\n")
    print(f"saved {folder / 'shapes.json'}")
