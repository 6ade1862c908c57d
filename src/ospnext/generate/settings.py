"""What ``ospnext generate`` can be told, and how its prompts, output folder and sampling values are found."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, ValidationError, model_validator

from ospnext.config import Config, ConfigError, describe_errors
from ospnext.sections import DType, Fps, RunConfig, SchedulerConfig, Shift

Frames = Annotated[int, Field(ge=1)]
Pixels = Annotated[int, Field(ge=16)]
Steps = Annotated[int, Field(ge=1, le=10_000)]
Guidance = Annotated[float, Field(ge=0)]
SamplerName = Literal["euler", "unipc"]

PROMPT = "{prompt}"
_LONGEST_NAME = 40  # characters of a folder named after a prompt


class Sampling(NamedTuple):
    """The values a run samples with."""

    num_frames: int
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    shift: float
    sampler: str


WAN_SAMPLING = Sampling(81, 480, 832, 50, 5.0, 5.0, "euler")
"""What weights that bring no values of their own sample with: what Wan2.1's users expect."""


def _model_or_wan(field: str) -> str:
    """The end of the description of a key that stands for a field of ``Sampling``."""
    return f"default: the model's (Wan: {getattr(WAN_SAMPLING, field)})"


class SamplerConfig(SchedulerConfig):
    """The sampling schedule; None means the model's own value."""

    num_inference_steps: Steps | None = Field(
        default=None, description=f"denoising steps; {_model_or_wan('num_inference_steps')}"
    )
    guidance_scale: Guidance | None = Field(
        default=None, description=f"classifier-free guidance, off up to 1; {_model_or_wan('guidance_scale')}"
    )
    shift: Shift | None = Field(default=None, description=f"shift of the noise levels; {_model_or_wan('shift')}")


class ModelDefaults(Config, extra="ignore"):
    """What a model is sampled with where nobody says: the fields of ``Sampling`` that its folder gives."""

    num_frames: Frames | None = None
    height: Pixels | None = None
    width: Pixels | None = None
    num_inference_steps: Steps | None = None
    guidance_scale: Guidance | None = None
    shift: Shift | None = None
    sampler: SamplerName | None = None


class ModelSettings(Config, extra="ignore"):
    """What model_index.json says besides the parts, as far as a pipeline of ours reads it."""

    negative_prompt: str | None = None
    prompt_cleaning: Literal["wan", "none"] | None = None
    defaults: ModelDefaults = ModelDefaults()


def read_model_settings(settings: Mapping[str, Any], where: str | Path = "model_index.json") -> dict[str, Any]:
    """The settings of ``ModelSettings`` that are given, checked.

    Args:
        settings: what model_index.json holds besides the parts; null means not given.
        where: the file, for messages.

    Raises:
        ConfigError: one is of another type, or out of range.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    try:
        return ModelSettings.model_validate(given).model_dump(exclude_unset=True, exclude_none=True)
    except ValidationError as error:
        raise ConfigError(f"{where}: {describe_errors(ModelSettings, error)}") from error


class GenerateConfig(RunConfig):
    """``ospnext generate``: prompts to videos."""

    alternatives = ("prompt", "prompts", "prompt_txt")

    model: str | None = Field(
        default=None,
        description="a pipeline folder, or 'shapes' (embedded); default: embedded unless model_config has weights",
    )
    lora_path: str | tuple[str, ...] | None = Field(
        default=None, description="a LoRA, a folder or file of any style, or a list of them"
    )
    lora_scale: float | tuple[float, ...] = Field(default=1.0, description="times the LoRA; a list gives each its own")
    prompt: str | tuple[str, ...] | None = Field(default=None, description="one prompt, or a list of prompts")
    prompts: str | None = Field(default=None, description="a file with a prompt per line")
    prompt_txt: str | None = Field(
        default=None, description="a file with a prompt per line (ends in .txt, or exists), else a prompt"
    )
    negative_prompt: str | None = Field(default=None, description="what to avoid; default: the model's own")
    num_videos_per_prompt: int = Field(
        default=1, ge=1, le=10_000, description="videos of each prompt, each with its own seed"
    )
    batch_size: int = Field(default=1, ge=1, description="videos that are denoised together")
    num_frames: Frames | None = Field(default=None, description=f"frames, 4k+1; {_model_or_wan('num_frames')}")
    height: Pixels | None = Field(default=None, description=f"pixels, multiple of 16; {_model_or_wan('height')}")
    width: Pixels | None = Field(default=None, description=f"pixels, multiple of 16; {_model_or_wan('width')}")
    save_fps: Fps = Field(default=16, description="frames per second of the files")
    scheduler_config: SamplerConfig = SamplerConfig()
    sampler: SamplerName | None = Field(default=None, description=f"euler | unipc; {_model_or_wan('sampler')}")
    weight_dtype: DType = Field(
        default="bf16", description="numbers of the transformer and the text encoder; on a CPU fp32 unless given"
    )
    guidance_mode: Literal["batched", "sequential"] = Field(
        default="batched", description="both guidance passes at once, or one after the other in less memory"
    )
    overlap_exchanges: bool = Field(
        default=False, description="send tokens while blocks compute, for links slower than NVLink; not in 8 bits"
    )
    vae_tiling: Literal["auto", "on", "off"] = Field(
        default="auto", description="decode in tiles; auto: when memory is short"
    )
    encoder_cpu_offload: bool = Field(
        default=True, description="move the text encoder off the device once prompts are encoded"
    )
    output_dir: str = Field(
        default=f"outputs/{PROMPT}",
        min_length=1,
        description=f"where the videos go; {PROMPT} stands for the first words of the first prompt",
    )
    overwrite: bool = Field(default=False, description="make videos again that exist in output_dir")

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        weights = self.transformer_config.pretrained_model_dir_or_checkpoint
        if self.model is not None and weights is not None:
            raise ValueError(
                f"model ({self.model}) and model_config.pretrained_model_dir_or_checkpoint ({weights}) both name "
                "weights: keep one"
            )
        if isinstance(self.lora_scale, tuple) and len(self.lora_scale) != len(self.lora_paths):
            raise ValueError(f"lora_scale has {len(self.lora_scale)} numbers for {len(self.lora_paths)} of lora_path")
        return self

    @property
    def lora_paths(self) -> tuple[str, ...]:
        """Every LoRA that is named."""
        return (self.lora_path,) if isinstance(self.lora_path, str) else self.lora_path or ()

    @property
    def lora_scales(self) -> tuple[float, ...]:
        """The scale of each of them."""
        return self.lora_scale if isinstance(self.lora_scale, tuple) else (self.lora_scale,) * len(self.lora_paths)

    @property
    def embedded(self) -> bool:
        """Whether the model is the one the package ships."""
        return self.model == "shapes" or (
            self.model is None and self.transformer_config.pretrained_model_dir_or_checkpoint is None
        )

    def sampling(self, model_defaults: Mapping[str, Any] | None = None) -> Sampling:
        """The values to sample with: this configuration's, else the model's, else ``WAN_SAMPLING``'s.

        Args:
            model_defaults: what the model folder says, by field name of ``Sampling``; None or {} if it says nothing.
        """
        given = self.model_dump(include=set(Sampling._fields), exclude_none=True)
        given |= self.scheduler_config.model_dump(include=set(Sampling._fields), exclude_none=True)
        defaults = {name: value for name, value in (model_defaults or {}).items() if name in Sampling._fields}
        return WAN_SAMPLING._replace(**(defaults | given))


def read_prompts(config: GenerateConfig) -> list[str]:
    """The prompts of a configuration, in order; blank lines of a file are skipped.

    Raises:
        ConfigError: there are none, or the file is empty or not text.
        FileNotFoundError, PermissionError: the file cannot be read.
    """
    if config.prompt is not None:
        prompts = [config.prompt] if isinstance(config.prompt, str) else list(config.prompt)
        if not prompts or not all(prompt.strip() for prompt in prompts):
            raise ConfigError("prompt is empty: give some text")
        return prompts
    if config.prompts is not None:
        return read_prompt_file(config.prompts)
    if config.prompt_txt is None:
        raise ConfigError(
            "no prompt: give --prompt TEXT, --prompts FILE, or one of the keys prompt, prompts, prompt_txt"
        )
    return prompts_in("prompt_txt", config.prompt_txt)


def prompts_in(key: str, text: str) -> list[str]:
    """The prompts of a file that a key names, else the one prompt that it is.

    Raises:
        ConfigError: it is blank, or as ``read_prompt_file``.
        FileNotFoundError, PermissionError: as there.
    """
    if not text.strip():
        raise ConfigError(f"{key} is empty: give a file or a prompt")
    return read_prompt_file(text) if _is_file(text) else [text]


def output_folder(output_dir: str, prompts: Sequence[str]) -> Path:
    """``output_dir`` with ``PROMPT`` replaced by a readable file name made of the first prompt.

    A long prompt is cut and told from others that begin alike by a digest, so that one prompt always means one folder.
    """
    name = "-".join(re.findall(r"\w+", prompts[0].lower())) or "video"
    if len(name) > _LONGEST_NAME:
        digest = hashlib.sha256(prompts[0].encode()).hexdigest()[:6]
        name = f"{name[: _LONGEST_NAME - 7].rstrip('-')}-{digest}"
    return Path(output_dir.replace(PROMPT, name))


def read_prompt_file(path: str | Path) -> list[str]:
    """The non-blank lines of a prompt file, stripped.

    Raises:
        ConfigError: it holds none, is a folder, or is not UTF-8 text.
        FileNotFoundError, PermissionError: it cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except IsADirectoryError as error:
        raise ConfigError(f"prompt file {path} is a folder: give a text file with a prompt per line") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompt file {path} is not text in UTF-8") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"prompt file {path} holds no prompt: write one prompt per line")
    return prompts


def _is_file(text: str) -> bool:
    """Whether a text means a file. A long prompt is no valid file name: then it is a prompt."""
    if text.endswith(".txt"):
        return True
    try:
        return Path(text).exists()
    except OSError:
        return False
