"""What a pipeline's layers meet while it samples: the numbers by which ``quant_scaling: running`` scales.

``ospnext quantize`` asks for them. A few prompts do: a layer's largest number is a matter of the noise level more than
of what is drawn, and every level is met on the way from noise to latents.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from rich.progress import track
from torch import Tensor

from ospnext.config import Config
from ospnext.device import resolve_device, working_dtype
from ospnext.generate.pipeline import OSPNextPipeline
from ospnext.generate.settings import Guidance, Pixels, Steps, prompts_in
from ospnext.quant.apply import quantize
from ospnext.quant.config import QuantConfig, choose_execution
from ospnext.quant.running import buffers, observed
from ospnext.sections import DType


class CalibrationConfig(Config):
    """What is sampled to see what layers meet. Sizes, steps and guidance are the model's own unless named."""

    prompts: str | None = Field(
        None, description="a file with a prompt per line (ends in .txt, or exists), else a prompt"
    )
    num_prompts: int = Field(4, ge=1, description="how many of the file's")
    height: Pixels | None = Field(None, description="pixels")
    width: Pixels | None = Field(None, description="pixels")
    num_frames: int | None = Field(None, ge=1, description="frames, 4k+1")
    num_inference_steps: Steps | None = Field(None, description="denoising steps")
    guidance_scale: Guidance | None = Field(None, description="classifier-free guidance")
    seed: int = Field(0, ge=0, lt=2**63, description="of the noise; prompt i has that of seed + i")
    device: str = Field("auto", description="auto | cpu | cuda | npu | mps")
    weight_dtype: DType = Field("bf16", description="numbers of the transformer; a CPU computes in fp32 unless told")
    model_cpu_offload: bool = Field(False, description="keep components in host memory while they are idle")

    @model_validator(mode="after")
    def _of_something(self) -> Self:
        if self.prompts is None and self.model_fields_set - {"prompts"}:
            raise ValueError(f"{', '.join(sorted(self.model_fields_set))} without prompts: give calibration.prompts")
        return self


def read_prompts(config: CalibrationConfig) -> list[str]:
    """The prompts to sample.

    Raises:
        ConfigError, OSError: as ``generate.settings.prompts_in``.
    """
    assert config.prompts is not None
    return prompts_in("calibration.prompts", config.prompts)[: config.num_prompts]


def calibrate(
    source: Path, prompts: Sequence[str], config: CalibrationConfig, recipe: QuantConfig, settings: dict[str, Any]
) -> dict[str, Tensor]:
    """Running numbers of a transformer's layers, by the names of their buffers, on the CPU.

    Args:
        source: a pipeline folder.
        prompts: of ``read_prompts``.
        config: how they are sampled.
        recipe: of the layers, scaling ``running``.
        settings: of the transformer that the folder leaves open.

    Raises:
        ValueError: the pipeline cannot be loaded, or NaN or infinity was met; names the layer.
    """
    device = resolve_device(config.device)
    dtype = working_dtype(config.weight_dtype, device, asked="weight_dtype" in config.model_fields_set)
    home = "cpu" if config.model_cpu_offload else device
    plain = {"quant": "none", "quant_attn": "none"}
    pipe = OSPNextPipeline.from_pretrained(source, torch_dtype=dtype, device=home, quant=plain, **settings)
    if config.model_cpu_offload:
        pipe.enable_model_cpu_offload(device=device)
    quantize(pipe.transformer, replace(recipe, execution=choose_execution("auto", device)))
    pipe.set_progress_bar_config(disable=True)
    with observed(pipe.transformer):
        for i, prompt in enumerate(track(prompts, "calibrating", transient=True)):
            pipe(
                prompt,
                height=config.height,
                width=config.width,
                num_frames=config.num_frames,
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.guidance_scale,
                generator=torch.Generator().manual_seed(config.seed + i),
                output_type="latent",
            )
    return {name: buffer.cpu() for name, buffer in buffers(pipe.transformer).items()}
