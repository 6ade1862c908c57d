"""What a configuration of ``generate`` or ``train`` asks for, as far as memory and time depend on it.

Nothing is loaded. Sizes come from the configuration, from config.json or the header of a file where a path exists, and
else from Wan2.1; what was assumed is said.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from diffusers import AutoencoderKLWan
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from ospnext.checkpoints.components import EMBEDDED, pipeline_folder
from ospnext.checkpoints.formats import DEFAULTS, read_settings
from ospnext.checkpoints.load import find_transformer, load_text_encoder, load_vae, open_transformer
from ospnext.checkpoints.lora import NewAdapter, linear_shapes
from ospnext.checkpoints.quantised import said_of, stored_linears
from ospnext.checkpoints.read import open_weights, read_json
from ospnext.config import PLACEHOLDER, Config, ConfigError, config_keys, load_config, read_yaml
from ospnext.config_keys import key_rules
from ospnext.device import resolve_dtype
from ospnext.generate.settings import GenerateConfig, read_model_settings
from ospnext.generate.size import SizeStep, VideoSize, fit_size
from ospnext.models.text import small_text_encoder
from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.ops.layout import Grid
from ospnext.prepare.plan_devices import Code, Device
from ospnext.quant.settings import quant_keys
from ospnext.sections import RunConfig
from ospnext.train.settings import TrainConfig

Kind = Literal["generate", "train"]
M = TypeVar("M", bound=nn.Module)

WAN = {
    "14B": {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40},
    "1.3B": {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30},
}
"""Sizes of Wan2.1's two text-to-video transformers."""

SPARSE = {"skiparse_model_type": "dual_end", "sparse_ratio": 2, "num_full_blocks": 8}
"""What OSP-Next adds to them."""

UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
BYTE_VOCABULARY = 384  # of the byte-level tokenizer that training starts from


@dataclass(frozen=True, eq=False)
class Recipe:
    """One run, on any number of devices.

    Attributes:
        kind: what it does.
        transformer, vae, text_encoder: on the meta device, each in the dtype it is loaded in.
        grid: tokens of one video.
        latents: of one video ``(C, T, H, W)``.
        size: pixels ``(frames, height, width)`` of one video.
        batch: videos of one forward pass of one sequence.
        dtype: of the arithmetic.
        steps: of sampling, or of training in all.
        kernel: attention kernel asked for.
        code: how blocks run.
        hif8_linears, hif8_attention: sampled in HiF8 on FP8 tensor cores.
        stored: the files hold the linears' weights in 8 bits, and they stay so: they are sampled with, or frozen.
        assumed: what nobody said and was taken for granted.
        guided: whether a step asks the model twice.
        batched: both at once.
        offload_text: the text encoder leaves the device once prompts are encoded.
        tiling: ``vae_tiling`` of generate.
        train_text: the text encoder is trained along.
        share_text: training shares it among the processes that share the weights.
        checkpointing: share of the blocks that training recomputes.
        accumulation: of training.
        adapter: what is trained in place of the transformer, on the meta device; None where that is trained.
        teacher: whether a frozen teacher, taken to be dense and of the same size, stands beside what is trained.
    """

    kind: Kind
    transformer: OSPNextTransformer3DModel
    vae: AutoencoderKLWan
    text_encoder: UMT5EncoderModel
    grid: Grid
    latents: tuple[int, int, int, int]
    size: tuple[int, int, int]
    batch: int
    dtype: torch.dtype
    steps: int
    kernel: str
    code: Code
    hif8_linears: bool
    hif8_attention: bool
    stored: bool
    assumed: tuple[str, ...]
    # of sampling
    guided: bool = False
    batched: bool = False
    offload_text: bool = False
    tiling: str = "auto"
    # of training
    train_text: bool = False
    share_text: bool = False
    checkpointing: float = 0.0
    accumulation: int = 1
    adapter: nn.Module | None = None
    teacher: bool = False

    @property
    def trained(self) -> nn.Module:
        """What has gradients."""
        return self.transformer if self.adapter is None else self.adapter

    @property
    def settings(self) -> dict[str, Any]:
        """The transformer's settings."""
        return dict(self.transformer.config)


def read_config(path: str, overrides: Sequence[str], kind: Kind | None) -> RunConfig:
    """The configuration in a YAML file of either command, with placeholders left in.

    Raises:
        ConfigError: it is of neither or of both, or no sound configuration.
        FileNotFoundError: no such file.
    """
    given = {*read_yaml(path), *(word.partition("=")[0].partition(".")[0].strip() for word in overrides)}
    kind = kind or _kind(path, given)
    cls: type[RunConfig] = GenerateConfig if kind == "generate" else TrainConfig
    return load_config(cls, path, overrides, key_rules(kind))


def make_recipe(config: RunConfig, device: Device) -> Recipe:
    """What a configuration asks for on a kind of device.

    Raises:
        ValueError: sizes that do not go together, or a checkpoint that is none.
    """
    assumed: list[str] = []
    home = _home(config)
    with torch.device("meta"):
        transformer = _cast(OSPNextTransformer3DModel(**_transformer_settings(config, home, assumed)), _kept(config))
    vae = _vae(config, home, assumed)
    text = _text_encoder(config, home, transformer.config, assumed)
    hif8 = _hif8(config, home, device, assumed)
    step = _size_step(vae, transformer)
    if isinstance(config, GenerateConfig):
        asked = _sampling(config, home, step)
    else:
        assert isinstance(config, TrainConfig)
        asked = _training(config, transformer)
    latents = _latents(asked["size"], step, vae, transformer)
    return Recipe(
        transformer=transformer,
        vae=vae,
        text_encoder=text,
        grid=Grid(*(n // p for n, p in zip(latents[1:], transformer.config.patch_size, strict=True))),
        latents=latents,
        dtype=resolve_dtype(config.weight_dtype),
        kernel=config.attention_kernel,
        code=_code(config, device),
        hif8_linears=hif8[0],
        hif8_attention=hif8[1],
        stored=_stays_in_8_bits(config, home),
        assumed=tuple(assumed),
        **asked,
    )


def _sampling(config: GenerateConfig, home: Path | None, step: SizeStep) -> dict[str, Any]:
    """The fields of a ``Recipe`` that are a sampling run's own."""
    said = read_model_settings(read_json(home / "model_index.json")) if home and _is_pipeline(home) else {}
    sampling = config.sampling(said.get("defaults"))
    return {
        "kind": "generate",
        "size": fit_size(VideoSize(sampling.num_frames, sampling.height, sampling.width), step),
        "batch": config.batch_size,
        "guided": sampling.guidance_scale > 1,
        "batched": config.guidance_mode == "batched",
        "steps": sampling.num_inference_steps,
        "offload_text": config.encoder_cpu_offload,
        "tiling": config.vae_tiling,
    }


def _training(config: TrainConfig, transformer: OSPNextTransformer3DModel) -> dict[str, Any]:
    """The fields of a ``Recipe`` that are a training run's own."""
    clip = config.data_config.dataset_config
    return {
        "kind": "train",
        "size": (clip.sample_num_frames, clip.sample_height, clip.sample_width),
        "batch": config.data_config.batch_size,
        "steps": config.training_iteration,
        "train_text": config.train_text_encoder,
        "share_text": config.text_encoder_config.use_fsdp,
        "checkpointing": config.checkpointed,
        "accumulation": config.gradient_accumulation_steps,
        "adapter": _adapter(config, transformer),
        "teacher": config.distillation_config.weight > 0,
    }


def _kept(config: RunConfig) -> torch.dtype:
    """The transformer's dtype in memory: training has a float32 copy, frozen weights are in ``weight_dtype``."""
    whole = isinstance(config, TrainConfig) and config.lora_config is None
    return torch.float32 if whole else resolve_dtype(config.weight_dtype)


def _adapter(config: TrainConfig, transformer: OSPNextTransformer3DModel) -> nn.Module | None:
    """A and B of the adapter that is trained, if one is; of one that is started from a file, as the keys say it is."""
    if config.lora_config is None:
        return None
    shapes = linear_shapes(transformer)
    sizes = NewAdapter.of(config.lora_config, config.seed).sizes(shapes)
    with torch.device("meta"):
        pairs = (((s.rank, shapes[name][1]), (shapes[name][0], s.rank)) for name, s in sizes.items())
        return nn.ParameterList(nn.Parameter(torch.empty(shape)) for pair in pairs for shape in pair)


def _hif8(config: RunConfig, home: Path | None, device: Device, assumed: list[str]) -> tuple[bool, bool]:
    """Whether linears and attention are sampled in HiF8; in training they are counted as in plain numbers."""
    keys = _quant(config, home)
    asked = keys.get("quant") == "hif8", keys.get("quant_attn") == "hif8"
    if not any(asked):
        return False, False
    if not isinstance(config, GenerateConfig) or not device.eight_bits or keys.get("quant_execution") == "emulation":
        why = "in training" if isinstance(config, TrainConfig) else f"on {device.name}, or emulated,"
        assumed.append(f"HiF8: {why} there are no rates for it; counted in {config.weight_dtype}")
        return False, False
    return asked


def _quant(config: RunConfig, home: Path | None) -> dict[str, Any]:
    """The keys of the recipe that runs: the configuration's, and the checkpoint's where that says nothing."""
    said = {} if home is None else said_of(find_transformer(home))
    return said | quant_keys(config.transformer_config)


def _stays_in_8_bits(config: RunConfig, home: Path | None) -> bool:
    trained = isinstance(config, TrainConfig) and config.lora_config is None
    if home is None or trained or _quant(config, home).get("quant") != "hif8":
        return False
    return bool(stored_linears(open_weights(find_transformer(home))))


def _code(config: RunConfig, device: Device) -> Code:
    if isinstance(config, TrainConfig):
        return "compiled" if config.compile else "eager"
    return "kernels" if device.fuses else "eager"


def _kind(path: str, given: set[str]) -> Kind:
    """The command whose keys a file has."""
    tops = {kind: _top_keys(cls) for kind, cls in (("generate", GenerateConfig), ("train", TrainConfig))}
    only_train, only_generate = given & (tops["train"] - tops["generate"]), given & (tops["generate"] - tops["train"])
    if only_train and only_generate:
        raise ConfigError(
            f"{path}: {min(only_train)} is a key of train, {min(only_generate)} of generate: say for=train or "
            "for=generate"
        )
    return "train" if only_train else "generate"


def _top_keys(cls: type[Config]) -> set[str]:
    return {key.partition(".")[0] for key, _ in config_keys(cls)}


def _home(config: RunConfig) -> Path | None:
    """The folder or file the transformer comes from, if it is there."""
    assert isinstance(config, GenerateConfig | TrainConfig)
    weights = config.transformer_config.pretrained_model_dir_or_checkpoint
    if config.model is not None:
        home = pipeline_folder(config.model)
    elif weights is not None:
        home = Path(weights)
    elif isinstance(config, GenerateConfig) and not config.architecture():
        home = EMBEDDED
    else:
        return None
    return home if home.exists() else None


def _is_pipeline(home: Path | None) -> bool:
    return home is not None and (home / "model_index.json").is_file()


def _transformer_settings(config: RunConfig, home: Path | None, assumed: list[str]) -> dict[str, Any]:
    """Every setting of the transformer."""
    given = config.architecture()
    if home is not None:
        place = find_transformer(home)
        if place.is_file():
            return open_transformer(place, isinstance(config, TrainConfig) and config.convert_layouts, **given).settings
        _, said = read_settings(read_json(place / "config.json"))
        return DEFAULTS | said | given
    weights = config.transformer_config.pretrained_model_dir_or_checkpoint or ""
    named = next((name for name, sizes in WAN.items() if sizes["dim"] == given.get("dim")), None)
    if "dim" not in given:
        named = "1.3B" if "1.3b" in weights.lower().replace("_", ".") else "14B"
        assumed.append(f"transformer: Wan2.1 {named}, for the configuration does not say its sizes")
        given = WAN[named] | given
    if named and weights and config.model_name == "osp_next" and "skiparse_model_type" not in given:
        assumed.append("transformer: OSP-Next's sparse blocks (dual_end, P = 2, 8 dense)")
        given = SPARSE | given
    return DEFAULTS | given


def _vae(config: RunConfig, home: Path | None, assumed: list[str]) -> AutoencoderKLWan:
    """The autoencoder that the configuration names, else Wan2.1's."""
    path, dtype = config.vae_config.vae_path, resolve_dtype(config.vae_config.dtype)
    place = _existing(path) or (home if path is None and _is_pipeline(home) else None)
    if place is not None:
        return load_vae(place, dtype, "meta")
    assumed.append("autoencoder: Wan2.1's")
    with torch.device("meta"):
        return _cast(AutoencoderKLWan(), dtype)


def _text_encoder(
    config: RunConfig, home: Path | None, transformer: Mapping[str, Any], assumed: list[str]
) -> UMT5EncoderModel:
    """The text encoder that the configuration names, else one that fits: UMT5-XXL for Wan2.1's width."""
    text = config.text_encoder_config
    if isinstance(config, TrainConfig):
        rendered = config.data_config.dataset_name == "shapes"
        dtype = torch.float32 if rendered else resolve_dtype(text.dtype or "bf16")
    else:
        dtype = resolve_dtype(text.dtype or config.weight_dtype)
    place = _existing(text.checkpoint_path) or (home if text.checkpoint_path is None and _is_pipeline(home) else None)
    if place is not None:
        return load_text_encoder(place, dtype, "meta")
    with torch.device("meta"):
        if transformer["text_dim"] == UMT5_XXL["d_model"]:
            assumed.append("text encoder: UMT5-XXL")
            return _cast(UMT5EncoderModel(UMT5Config(**UMT5_XXL, feed_forward_proj="gated-gelu")), dtype)
        assumed.append("text encoder: two layers of the transformer's text_dim")
        return _cast(small_text_encoder(transformer["text_dim"], BYTE_VOCABULARY), dtype)


def _cast(module: M, dtype: torch.dtype) -> M:
    return nn.Module.to(module, dtype).eval()  # diffusers' own ``to`` warns of layers it would keep in float32


def _existing(path: str | None) -> Path | None:
    """A path that is there; a placeholder or one of another machine is not."""
    return None if path is None or path.startswith(PLACEHOLDER) or not Path(path).exists() else Path(path)


def _size_step(vae: AutoencoderKLWan, transformer: OSPNextTransformer3DModel) -> SizeStep:
    """What sizes of video these networks make."""
    time, height, width = transformer.config.patch_size
    space = vae.config.scale_factor_spatial
    return SizeStep(vae.config.scale_factor_temporal * time, space * height, space * width)


def _latents(
    size: tuple[int, int, int], step: SizeStep, vae: AutoencoderKLWan, transformer: OSPNextTransformer3DModel
) -> tuple[int, int, int, int]:
    """Latents ``(C, T, H, W)`` of a video.

    Raises:
        ConfigError: these networks make no video of that size.
    """
    frames, height, width = size
    if (frames - 1) % step.frames or height % step.height or width % step.width:
        raise ConfigError(
            f"a video of {frames} frames of {width} x {height}: these networks need {step.frames}k + 1 frames, heights "
            f"that are multiples of {step.height} and widths of {step.width}"
        )
    time, space = vae.config.scale_factor_temporal, vae.config.scale_factor_spatial
    return transformer.config.in_dim, (frames - 1) // time + 1, height // space, width // space
