"""Where a run's weights are, what it samples with and where its parts will live: all known before they are loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKLWan
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from ospnext.assemble import Crew, assemble_text_encoder, assemble_transformer, fit_run
from ospnext.checkpoints.components import EMBEDDED, ComponentPaths, find_components, load_scheduler
from ospnext.checkpoints.fill import ProgressCallback
from ospnext.checkpoints.load import (
    TEXT_ENCODER_FILE,
    TOKENIZER_FOLDER,
    VAE_FILE,
    load_text_encoder,
    load_tokenizer,
    load_transformer,
    load_vae,
)
from ospnext.checkpoints.lora import WithAdapter
from ospnext.checkpoints.lora_files import read_adapter
from ospnext.device import resolve_dtype, working_dtype
from ospnext.generate.memory import asked_offload, choose_offload, footprints
from ospnext.generate.pipeline import OSPNextPipeline
from ospnext.generate.sampler import Scheduler, make_sampler, make_scheduler, sampler_name, sampler_shift
from ospnext.generate.settings import GenerateConfig, Sampling, read_model_settings
from ospnext.generate.size import SizeStep, VideoSize, fit_size, size_step
from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.parallel.apply import Fit
from ospnext.parallel.guidance import SplitGuidance
from ospnext.parallel.ownership import segment_count
from ospnext.parallel.team import VideoTeam
from ospnext.quant.apply import describe, is_quantised
from ospnext.quant.block import prepare
from ospnext.quant.config import Execution, choose_execution
from ospnext.quant.settings import quant_keys


class Dtypes(NamedTuple):
    """Numbers of each component's weights."""

    transformer: torch.dtype
    vae: torch.dtype
    text_encoder: torch.dtype


class Plan(NamedTuple):
    """What a run will do: where its components are, the transformer's settings, every component's dtype, sampling
    values, which components stay on the CPU while idle, who shares what, what runs in 8 bits (in words, as keys), and
    the LoRAs, read."""

    places: ComponentPaths
    transformer: dict[str, Any]
    dtypes: Dtypes
    sampling: Sampling
    offload: frozenset[str]
    sizes: Fit
    eight_bits: str
    quant: dict[str, Any]
    adapters: tuple[WithAdapter, ...]


def make_plan(config: GenerateConfig, device: torch.device, world: int = 1) -> Plan:
    """Settle and check everything about a run from headers and small files; no tensor is read.

    Args:
        config: what is asked for.
        device: of this process.
        world: processes in all.

    Raises:
        ValueError: something is missing, impossible or too large; one line that names it and the way out.
    """
    places = find_sources(config)
    dtypes = choose_dtypes(config, device)
    quant = quant_keys(config.transformer_config)
    adapters = tuple(
        WithAdapter(read_adapter(path), dtypes.transformer, f"lora_{number}", trained=False)
        for number, path in enumerate(config.lora_paths)
    )
    transformer = load_transformer(
        places.transformer,
        dtype=dtypes.transformer,
        device="meta",
        adapters=adapters,
        quant=quant | {"quant_execution": "emulation"},
        **config.architecture(),
    )
    execution = None
    if is_quantised(transformer):
        execution = quant["quant_execution"] = _execution_of(config, quant, device)
    vae = load_vae(places.vae, dtypes.vae, "meta")
    text_encoder = load_text_encoder(places.text_encoder, dtypes.text_encoder, "meta")
    check_fit(transformer, vae, text_encoder, load_tokenizer(places.tokenizer))
    sampling = choose_sampling(config, places, size_step(vae.config, transformer.config))
    make_sampler(choose_scheduler(config, places, sampling), sampling.num_inference_steps, 1, torch.device("cpu"))
    segments = segment_count(transformer.layouts, transformer.config.sparse_ratio)
    sizes = fit_run(config, world, segments, guided=sampling.guidance_scale > 1)
    parts = footprints(config, transformer, vae, text_encoder, sampling, sizes)
    offload = choose_offload(parts, device, asked_offload(config))
    eight_bits = describe(transformer, execution, device if sizes.copies.fsdp == 1 else None)
    return Plan(places, dict(transformer.config), dtypes, sampling, offload, sizes, eight_bits, quant, adapters)


def _execution_of(config: GenerateConfig, quant: Mapping[str, Any], device: torch.device) -> Execution:
    """How 8-bit products are computed.

    Raises:
        ValueError: not as asked for on this device, or together with what cuts their tokens up.
    """
    execution = choose_execution(quant.get("quant_execution", "auto"), device)
    if config.overlap_exchanges:
        raise ValueError(
            "overlap_exchanges is true, but the transformer runs in 8 bits, whose linears scale by all tokens at "
            "once: leave it out"
        )
    return execution


def check_fit(
    transformer: OSPNextTransformer3DModel,
    vae: AutoencoderKLWan,
    text_encoder: UMT5EncoderModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Raise ValueError on components that were not made for each other; they may be on meta."""
    latents = transformer.config.in_dim, transformer.config.out_dim
    if latents != (vae.config.z_dim, vae.config.z_dim):
        raise ValueError(
            f"the transformer goes from {latents[0]} latent channels to {latents[1]}, but the autoencoder has "
            f"{vae.config.z_dim}: use the ones that belong together"
        )
    if transformer.config.text_dim != text_encoder.config.d_model:
        raise ValueError(
            f"the transformer reads text of width {transformer.config.text_dim}, but the text encoder makes "
            f"{text_encoder.config.d_model}: use the ones that belong together"
        )
    if len(tokenizer) > text_encoder.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but the text encoder {text_encoder.config.vocab_size}: use "
            "the ones that belong together"
        )


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
        _, _, _, _, scheduler, said = find_components(home)
        settings = read_model_settings(said, home / "model_index.json")
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
        raise ValueError(
            f"{key} is not set, and {root} holds neither {names[0]}/ nor {names[1]}: set it, or name a whole pipeline "
            "folder as model"
        )
    return root


def choose_dtypes(config: GenerateConfig, device: torch.device) -> Dtypes:
    """The numbers of each component. A CPU computes in float32 unless told otherwise: bfloat16 is slow on most."""
    weights = working_dtype(config.weight_dtype, device, asked="weight_dtype" in config.model_fields_set)
    text = config.text_encoder_config.dtype
    return Dtypes(weights, resolve_dtype(config.vae_config.dtype), resolve_dtype(text) if text else weights)


def choose_sampling(config: GenerateConfig, places: ComponentPaths, step: SizeStep) -> Sampling:
    """The configuration's values, else the model's, else Wan's; the size rounded to one the model can make.

    Raises:
        ValueError: a size that cannot be made.
    """
    defaults = dict(places.settings.get("defaults", {}))
    if places.scheduler is not None:
        scheduler = load_scheduler(places.scheduler)
        own = {"shift": sampler_shift(scheduler), "sampler": sampler_name(scheduler)}
        defaults |= read_model_settings({"defaults": own}, places.scheduler)["defaults"]
    sampling = config.sampling(defaults)
    size = fit_size(VideoSize(sampling.num_frames, sampling.height, sampling.width), step)
    return sampling._replace(**size._asdict())


def load_pipeline(
    config: GenerateConfig, plan: Plan, crew: Crew, progress: ProgressCallback | None = None
) -> OSPNextPipeline:
    """The pipeline of a run, every component in its dtype and place, shared as the crew shares it.

    Raises:
        CheckpointError, OutOfMemoryError: as ``checkpoints.load``.
    """
    places, dtypes = plan.places, plan.dtypes

    def home(name: str) -> torch.device:
        return torch.device("cpu") if name in plan.offload else crew.device

    transformer = assemble_transformer(
        places.transformer,
        crew,
        dtypes.transformer,
        home("transformer"),
        progress=progress,
        quant=plan.quant,
        adapters=plan.adapters,
        **config.architecture(),
    )
    transformer.set_attention_kernel(config.attention_kernel)
    if crew.weights is None:
        prepare(transformer, crew.device)
    offload_text = "text_encoder" in plan.offload
    pipe = OSPNextPipeline.from_parts(
        transformer,
        load_vae(places.vae, dtypes.vae, home("vae"), progress),
        assemble_text_encoder(
            places.text_encoder, crew, dtypes.text_encoder, home("text_encoder"), offload_text, progress
        ),
        load_tokenizer(places.tokenizer),
        choose_scheduler(config, places, plan.sampling),
        places.settings,
    )
    pipe.set_adapters([adapter.name for adapter in plan.adapters], config.lora_scales)
    if crew.weights is not None:
        pipe.sharded = frozenset(("transformer", "text_encoder"))
    if crew.mesh is not None:
        pipe.team = VideoTeam(crew.mesh)
        if crew.mesh.sizes.cfg == 2:
            pipe.halves = SplitGuidance(crew.mesh)
    pipe.place(crew.device, plan.offload)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def choose_scheduler(config: GenerateConfig, places: ComponentPaths, sampling: Sampling) -> Scheduler:
    """The model's own scheduler, with all it is set to, unless the configuration asks for another."""
    if places.scheduler is not None and config.sampler is None and config.scheduler_config.shift is None:
        return load_scheduler(places.scheduler)
    return make_scheduler(sampling.sampler, sampling.shift)
