"""``ospnext compare-shapes``: what does another setting cost? Two settings on the same prompts and seeds.

    ospnext compare-shapes other.quant=hif8
    ospnext compare-shapes model=runs/shapes_dense/pipeline other.model=runs/shapes_dense_to_sparse/pipeline
    ospnext compare-shapes other.lora_path=runs/shapes_lora/adapter

The first setting is told as for ``evaluate-shapes``; ``other`` says what is different in the second one. Both get the
same prompts and the same noise, so that the difference of their scores is paired (``paired.paired_difference``), and
their videos can be compared pixel by pixel.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ospnext.config import ConfigError
from ospnext.evaluate.paired import Difference, Mean, mean_of, paired_difference, psnr, ssim
from ospnext.evaluate.shapes import EvaluateShapesConfig, generate_some, held_out, open_pipeline
from ospnext.generate.manifest import write_text
from ospnext.generate.pipeline import OSPNextPipeline
from ospnext.generate.run import make_folder
from ospnext.generate.settings import Guidance, Steps
from ospnext.quant.settings import quant_keys
from ospnext.sections import AttentionKernel, DType, QuantKeys
from ospnext.shapes.grade import Grade
from ospnext.shapes.grading import VIDEOS_PER_PROCESS, Graders, cores


class OtherSetting(QuantKeys):
    """What is different in the second setting; None: as in the first."""

    model: str | None = Field(None, description="a pipeline folder, or 'shapes'")
    lora_path: str | None = Field(None, description="a LoRA on it")
    lora_scale: float | None = Field(None, description="times the LoRA")
    num_inference_steps: Steps | None = Field(None, description="sampling steps")
    guidance_scale: Guidance | None = Field(None, description="guidance")
    weight_dtype: DType | None = Field(None, description="numbers of the transformer")
    attention_kernel: AttentionKernel | None = Field(None, description="attention kernel")
    skiparse_model_type: Literal["full", "dual_end", "uniform"] | None = Field(
        None, description="other layouts for the same weights"
    )
    sparse_ratio: int | None = Field(None, ge=1, description="P of those layouts")
    num_full_blocks: int | None = Field(None, ge=0, description="dense blocks among them")


class CompareShapesConfig(EvaluateShapesConfig):
    """``ospnext compare-shapes``: two settings on the same prompts and seeds."""

    output_dir: str = Field("outputs/comparison", description="where compare.json goes")
    other: OtherSetting = OtherSetting()


class Comparison(NamedTuple):
    """Figures of two settings: shares' difference, and how alike their videos are."""

    score: Difference
    psnr: Mean
    ssim: Mean
    equal: int  # videos that are the same in every pixel


def run(config: CompareShapesConfig) -> None:
    """Generate, grade and compare; print a table, and write ``output_dir/compare.json``.

    Raises:
        ValueError: a model cannot be loaded or the output cannot be written; nothing was generated.
    """
    make_folder(Path(config.output_dir))
    second = other_config(config)
    pipes, said = [], []
    for own, overrides in ((config, {}), (second, other_layouts(config.other))):
        pipe, where = open_pipeline(own, own.model, **overrides)
        pipes.append(pipe)
        said.append(f"{own.model}, {where}")
    check_sizes(pipes[0], pipes[1], config.model, second.model)
    asked = held_out(config.world, config.num_prompts, config.seed)
    likeness: list[tuple[float, float]] = []
    gradings: tuple[list, list] = ([], [])
    workers = min(cores(), 2 * config.num_prompts // VIDEOS_PER_PROCESS)
    with Graders(max(1, workers)) as graders:
        for i in track(range(0, config.num_prompts, config.batch_size), description="generating", transient=True):
            some = slice(i, i + config.batch_size)
            videos = [
                generate_some(pipe, asked.prompts[some], config.seed + i, own.num_inference_steps, own.guidance_scale)
                for pipe, own in zip(pipes, (config, second), strict=True)
            ]
            for kept, made in zip(gradings, videos, strict=True):
                kept.extend(graders.begin(made, asked.scenes[some]))
            likeness += [(psnr(a, b), ssim(a, b, pipes[0].device)) for a, b in zip(*videos, strict=True)]
        grades = [[grading.result() for grading in kept] for kept in gradings]
    result = compare(grades[0], grades[1], likeness)
    show(result, said, f"{config.num_prompts} held-out prompts, {config.world} world")
    write(config, said, result, asked.prompts, grades)


def check_sizes(first: OSPNextPipeline, second: OSPNextPipeline, *names: str) -> None:
    """Find out before anything is generated whether two models' videos can be compared.

    Raises:
        ConfigError: they differ in size.
    """
    keys = ("num_frames", "height", "width")
    sizes = [tuple(pipe.sampling_defaults[key] for key in keys) for pipe in (first, second)]
    if sizes[0] != sizes[1]:
        each = [f"{name} makes {n} frames of {w} x {h}" for name, (n, h, w) in zip(names, sizes, strict=True)]
        raise ConfigError(f"other.model: {', but '.join(each)}: name models of one size, pixels are compared")


def other_config(config: CompareShapesConfig) -> EvaluateShapesConfig:
    """The second setting, told as for ``evaluate-shapes``."""
    names = (
        "model",
        "lora_path",
        "lora_scale",
        "num_inference_steps",
        "guidance_scale",
        "weight_dtype",
        "attention_kernel",
    )
    changed = {name: value for name in names if (value := getattr(config.other, name)) is not None}
    return config.model_copy(update=changed)


def other_layouts(other: OtherSetting) -> dict[str, Any]:
    """How the second setting's transformer is loaded otherwise than its folder says."""
    names = ("skiparse_model_type", "sparse_ratio", "num_full_blocks")
    layouts = {name: value for name in names if (value := getattr(other, name)) is not None}
    return {"quant": quant_keys(other), "relayout": bool(layouts), **layouts}


def compare(first: Sequence[Grade], second: Sequence[Grade], likeness: Sequence[tuple[float, float]]) -> Comparison:
    """The figures of two settings, from every video's grades and its (PSNR, SSIM)."""
    peak, structure = (list(values) for values in zip(*likeness, strict=True))
    return Comparison(
        paired_difference((g.all_right for g in first), (g.all_right for g in second)),
        mean_of(peak),
        mean_of(structure),
        int(np.isinf(peak).sum()),
    )


def show(result: Comparison, said: Sequence[str], title: str) -> None:
    """Print the table."""
    score = result.score
    table = Table("what", "figure", "95% interval", title=title)
    for name, setting, right in zip(("first", "second"), said, (score.first, score.second), strict=True):
        table.add_row(f"{name}: {setting}", f"{right} of {score.asked} right in everything", "")
    table.add_row(
        "second minus first, in points", f"{100 * score.difference:+.2f}", _interval(score.low, score.high, 100)
    )
    table.add_row("right in one only", f"first {score.only_first}, second {score.only_second}", "")
    table.add_row("PSNR between their videos, dB", f"{result.psnr.value:.2f}", _interval(*result.psnr[1:]))
    table.add_row("SSIM between their videos", f"{result.ssim.value:.4f}", _interval(*result.ssim[1:]))
    table.add_row("videos equal in every pixel", str(result.equal), "")
    Console().print(table)


def _interval(low: float, high: float, times: float = 1) -> str:
    return f"{times * low:+.3f} to {times * high:+.3f}"


def write(
    config: CompareShapesConfig,
    said: Sequence[str],
    result: Comparison,
    prompts: Sequence[str],
    grades: Sequence[Sequence[Grade]],
) -> None:
    """Write the figures, and for every prompt whether each setting was right in everything."""
    record = {
        "config": config.model_dump(mode="json"),
        "settings": list(said),
        "score": result.score._asdict(),
        "psnr": result.psnr._asdict(),
        "ssim": result.ssim._asdict(),
        "equal": result.equal,
        "interval": "of the score: Newcombe 1998, paired, method 10; of PSNR and SSIM: normal",
        "prompts": [
            {"prompt": prompt, "first": a.all_right, "second": b.all_right}
            for prompt, a, b in zip(prompts, *grades, strict=True)
        ],
    }
    path = Path(config.output_dir) / "compare.json"
    write_text(path, json.dumps(record, indent=1) + "\n")
    print(f"saved {path}")
