"""Where a run's weights are, what it samples with and where its parts will live: all known before they are loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

import ospnext
from ospnext.checkpoints.components import ComponentPaths, find_components, load_scheduler
from ospnext.checkpoints.fill import ProgressCallback
from ospnext.checkpoints.load import (
    TEXT_ENCODER_FILE,
    TOKENIZER_FOLDER,
    VAE_FILE,
    load_text_encoder,
    load_tokenizer,
    load_transformer,
    load_vae,
    open_transformer,
)
from ospnext.checkpoints.memory import OutOfMemoryError, checkpoint_bytes
from ospnext.checkpoints.read import read_json
from ospnext.device import free_memory, resolve_dtype
from ospnext.generate.pipeline import OSPNextPipeline, size_step
from ospnext.generate.sampler import Scheduler, make_scheduler, sampler_name, sampler_shift
from ospnext.generate.settings import GenerateConfig, Sampling
from ospnext.generate.size import SizeStep, VideoSize, fit_size

EMBEDDED = Path(ospnext.__file__).parent / "assets" / "shapes"
_GIB = 2**30


class Dtypes(NamedTuple):
    """Numbers of each component's weights."""

    transformer: torch.dtype
    vae: torch.dtype
    text_encoder: torch.dtype


class Plan(NamedTuple):
    """What a run will do: where its components are, the transformer's settings, every component's dtype, sampling
    values, and which components stay on the CPU while idle."""

    places: ComponentPaths
    transformer: dict[str, Any]
    dtypes: Dtypes
    sampling: Sampling
    offload: frozenset[str]


def make_plan(config: GenerateConfig, device: torch.device) -> Plan:
    """Settle everything about a run from headers and small files.

    Raises:
        ValueError: something is missing, impossible or too large; one line that names it and the way out.
    """
    places = find_sources(config)
    dtypes = choose_dtypes(config, device)
    settings, weights, _ = open_transformer(places.transformer, **config.architecture())
    step = size_step(_vae_scales(places.vae), settings)
    sampling = choose_sampling(config, places, step)
    sizes = {
        "transformer": weights.nbytes(dtypes.transformer)
        + _working_bytes(config, settings, sampling, step, dtypes.transformer),
        "vae": checkpoint_bytes(places.vae, dtypes.vae),
        "text_encoder": checkpoint_bytes(places.text_encoder, dtypes.text_encoder),
    }
    return Plan(places, settings, dtypes, sampling, choose_offload(sizes, device, asked=config.encoder_cpu_offload))


def find_sources(config: GenerateConfig) -> ComponentPaths:
    """Where every component of a run is: in one folder, or at paths of their own, which win.

    Raises:
        ValueError: a path is missing or not given; names the key.
    """
    if config.embedded and not EMBEDDED.is_dir():
        raise ValueError(f"the embedded model is not in this installation ({EMBEDDED}): give model=FOLDER")
    weights = config.transformer_config.pretrained_model_dir_or_checkpoint
    key = "model" if config.model is not None else "model_config.pretrained_model_dir_or_checkpoint"
    home = EMBEDDED if config.embedded else Path(config.model or weights or "")
    if not home.exists():
        raise ValueError(f"{key}: {home} does not exist")
    settings: dict[str, Any] = {}
    scheduler = None
    if (home / "model_index.json").is_file():
        _, _, _, _, scheduler, settings = find_components(home)
    vae, text, near = config.vae_config, config.text_encoder_config, home if home.is_dir() else home.parent
    return ComponentPaths(
        home,
        _find(vae.vae_path, near, ("vae", VAE_FILE), "vae_config.vae_path"),
        _find(text.checkpoint_path, near, ("text_encoder", TEXT_ENCODER_FILE), "text_encoder_config.checkpoint_path"),
        _find(
            text.text_tokenizer_path, near, ("tokenizer", TOKENIZER_FOLDER), "text_encoder_config.text_tokenizer_path"
        ),
        scheduler,
        settings,
    )


def _find(given: str | None, near: Path, names: tuple[str, str], key: str) -> Path:
    """A component under one of its usual names, in the ``given`` folder or the one ``near``, or ``given`` itself."""
    root = near if given is None else Path(given)
    if not root.exists():
        raise ValueError(f"{key}: {root} does not exist")
    for name in names:
        if (root / name).exists():
            return root / name
    if given is None:
        raise ValueError(f"{key} is not set, and {root} holds neither {names[0]}/ nor {names[1]}: set it")
    return root


def choose_dtypes(config: GenerateConfig, device: torch.device) -> Dtypes:
    """The numbers of each component. A CPU computes in float32 unless told otherwise: bfloat16 is slow on most."""
    told = "weight_dtype" in config.model_fields_set or device.type != "cpu"
    weights = resolve_dtype(config.weight_dtype) if told else torch.float32
    text = config.text_encoder_config.dtype
    return Dtypes(weights, resolve_dtype(config.vae_config.dtype), resolve_dtype(text) if text else weights)


def choose_sampling(config: GenerateConfig, places: ComponentPaths, step: SizeStep) -> Sampling:
    """The configuration's values, else the model's, else Wan's; the size rounded to one the model can make.

    Raises:
        ValueError: a size that cannot be made.
    """
    defaults: Mapping[str, Any] = places.settings.get("defaults") or {}
    if places.scheduler is not None:
        scheduler = load_scheduler(places.scheduler)
        defaults = {**defaults, "shift": sampler_shift(scheduler), "sampler": sampler_name(scheduler)}
    sampling = config.sampling(defaults)
    size = fit_size(VideoSize(sampling.num_frames, sampling.height, sampling.width), step)
    return sampling._replace(**size._asdict())


def choose_offload(sizes: Mapping[str, int], device: torch.device, asked: bool) -> frozenset[str]:
    """The fewest components that must leave the device between uses, at least the encoders if ``asked``.

    Args:
        sizes: bytes by component.
        device: where the run computes.
        asked: keep the text encoder and the autoencoder off the device in any case.

    Raises:
        OutOfMemoryError: it does not fit in any way.
    """
    host = torch.device("cpu")
    encoders = frozenset(("vae", "text_encoder"))
    ways = {
        frozenset[str](): sum(sizes.values()),
        encoders: sizes["transformer"] + max(sizes["vae"], sizes["text_encoder"]),
        encoders | {"transformer"}: max(sizes.values()),
    }
    if device == host:
        return _fitting({frozenset[str](): sum(sizes.values())}, host)
    if asked:
        ways.pop(frozenset())
    offload = _fitting(ways, device)
    _fitting({offload: sum(sizes[name] for name in offload)}, host)
    return offload


def _vae_scales(path: Path) -> dict[str, int]:
    """Compression of a VAE by the names of its config; Wan2.1's file, which has none, compresses 4 by 8 by 8."""
    said = read_json(path / "config.json") if path.is_dir() else {}
    return {"scale_factor_temporal": 4, "scale_factor_spatial": 8} | said


def _working_bytes(
    config: GenerateConfig, settings: Mapping[str, Any], sampling: Sampling, step: SizeStep, dtype: torch.dtype
) -> int:
    """What one call of the transformer takes besides its weights: some ten hidden states and two feed-forward ones."""
    tokens = (1 + (sampling.num_frames - 1) // step.frames) * (sampling.height // step.height)
    tokens *= sampling.width // step.width
    passes = config.batch_size * (2 if sampling.guidance_scale > 1 and config.guidance_mode == "batched" else 1)
    return passes * tokens * (10 * settings["dim"] + 2 * settings["ffn_dim"]) * dtype.itemsize


def _fitting(ways: Mapping[frozenset[str], int], device: torch.device) -> frozenset[str]:
    """The first way whose bytes are free."""
    free = free_memory(device)
    for way, need in ways.items():
        if need <= free:
            return way
    raise OutOfMemoryError(
        f"this run needs {min(ways.values()) / _GIB:.1f} GiB on {device}, but {free / _GIB:.1f} GiB are free: use a "
        "smaller weight_dtype (bf16), batch_size or size of video, guidance_mode=sequential, or another device"
    )


def load_pipeline(
    config: GenerateConfig, plan: Plan, device: torch.device, progress: ProgressCallback | None = None
) -> OSPNextPipeline:
    """The pipeline of a run, every component in its dtype and place.

    Raises:
        CheckpointError, OutOfMemoryError: as ``checkpoints.load``.
    """
    places, dtypes = plan.places, plan.dtypes

    def home(name: str) -> torch.device:
        return torch.device("cpu") if name in plan.offload else device

    transformer = load_transformer(
        places.transformer,
        dtype=dtypes.transformer,
        device=home("transformer"),
        progress=progress,
        **config.architecture(),
    )
    transformer.set_attention_kernel(config.attention_kernel)
    pipe = OSPNextPipeline.from_parts(
        transformer,
        load_vae(places.vae, dtypes.vae, home("vae"), progress),
        load_text_encoder(places.text_encoder, dtypes.text_encoder, home("text_encoder"), progress),
        load_tokenizer(places.tokenizer),
        _scheduler(config, plan),
        places.settings,
    )
    pipe.place(device, plan.offload)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _scheduler(config: GenerateConfig, plan: Plan) -> Scheduler:
    """The model's own scheduler, with all it is set to, unless the configuration asks for another."""
    if plan.places.scheduler is not None and config.sampler is None and config.scheduler_config.shift is None:
        return load_scheduler(plan.places.scheduler)
    return make_scheduler(plan.sampling.sampler, plan.sampling.shift)
