"""A training run of the transformer before its weights are loaded: settled and checked from headers.

``settle`` reads no weights but those of a VAE that encoded clips are held to; all processes call it together.
``networks`` builds what was settled.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, UMT5EncoderModel

from ospnext.assemble import fit_run
from ospnext.checkpoints.components import find_components, pipeline_folder
from ospnext.checkpoints.load import load_text_encoder, load_tokenizer, load_transformer, load_vae
from ospnext.checkpoints.lora import NewAdapter, WithAdapter, asked_for
from ospnext.checkpoints.lora_files import Adapter
from ospnext.config import ConfigError
from ospnext.data.buckets import Bucket
from ospnext.data.dataset import SampleSettings
from ospnext.data.latents import INDEX, LatentDataset, module_fingerprint, open_latent_loader, read_index
from ospnext.data.loader import Loader, open_loader
from ospnext.data.sampler import Draw
from ospnext.device import working_dtype
from ospnext.generate.size import size_step
from ospnext.models.text import small_text_encoder
from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.parallel.apply import Fit
from ospnext.parallel.launch import Launch, place
from ospnext.parallel.ownership import segment_count
from ospnext.quant.settings import SAVED, quant_keys, recipe
from ospnext.train.noise import shift_of
from ospnext.train.settings import TrainConfig


class Sources(NamedTuple):
    """Where the networks are; None: made anew, or not needed."""

    transformer: Path | None
    vae: Path | None
    text_encoder: Path | None
    tokenizer: Path | None


class Job(NamedTuple):
    """A run, settled and checked.

    ``transformer`` are the settings of the network, ``latents`` the shape ``[C, t, h, w]`` of a sample, ``loader`` is
    None where clips are rendered. ``adapter`` is what is trained in place of the network, if so.
    """

    device: torch.device
    sizes: Fit
    sources: Sources
    transformer: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase | None
    latents: tuple[int, int, int, int]
    loader: Loader | None
    notices: list[str]
    adapter: NewAdapter | Adapter | None = None


def settle(config: TrainConfig, launch: Launch) -> Job:
    """Everything about a run that can be known before weights are loaded; nothing is written.

    Raises:
        ValueError: bad input, in one line that names it.
    """
    device = place(launch, config.device)
    sources, notices = find_sources(config)
    if config.train_text_encoder and launch.world > 1:
        raise ConfigError(f"train_text_encoder trains in one process, but {launch.world} were started")
    adapter = find_adapter(config, sources)
    with torch.device("meta"):
        transformer = (
            OSPNextTransformer3DModel(**config.architecture())
            if sources.transformer is None
            else load_transformer(sources.transformer, device="meta", **trained_as(config, adapter, "emulation"))
        )
    if adapter is not None and transformer.config.get("quant_scaling") == "running":
        raise ConfigError(
            "quant_scaling is running, whose numbers follow training and are no part of an adapter: with lora_config "
            "use model_config.quant_scaling=tensor, or token"
        )
    recipe(quant_keys(config.transformer_config), device)  # refuses what this device cannot do
    segments = segment_count(transformer.layouts, transformer.config.sparse_ratio)
    sizes = fit_run(config, launch.world, segments, guided=False)
    rank = launch.rank // sizes.sizes.video
    settings = constructor_settings(transformer.config)
    if config.data_config.dataset_name == "latents":
        loader, latents = open_encoded(config, sources, settings, rank, sizes.sizes.dp)
        return Job(device, sizes, sources, settings, None, latents, loader, notices, adapter)
    assert sources.vae is not None
    vae = load_vae(sources.vae, device="meta")
    tokenizer = ByT5Tokenizer() if sources.tokenizer is None else load_tokenizer(sources.tokenizer)
    if sources.text_encoder is None:
        encoder = small_text_encoder(settings["text_dim"], len(tokenizer))
    else:
        encoder = load_text_encoder(sources.text_encoder, device="meta")
    check_fit(config, settings, vae, encoder, tokenizer)
    latents = latent_shape(config, vae)
    shift_of(latents, config.scheduler_config)  # refuses what leaves no noise levels
    if config.data_config.dataset_name == "shapes":
        return Job(device, sizes, sources, settings, tokenizer, latents, None, notices, adapter)
    loader = open_videos(config, tokenizer, settings["text_len"], rank, sizes.sizes.dp)
    return Job(device, sizes, sources, settings, tokenizer, latents, loader, notices, adapter)


def find_sources(config: TrainConfig) -> tuple[Sources, list[str]]:
    """Where the networks are, and what there is to say of it.

    With ``model`` everything comes from that pipeline folder: how a finished model is trained further.

    Raises:
        ConfigError: one is missing.
    """
    text = config.text_encoder_config
    given = {
        "model_config.pretrained_model_dir_or_checkpoint": config.transformer_config.pretrained_model_dir_or_checkpoint,
        "vae_config.vae_path": config.vae_config.vae_path,
        "text_encoder_config.checkpoint_path": text.checkpoint_path,
        "text_encoder_config.text_tokenizer_path": text.text_tokenizer_path,
    }
    if config.model is not None:
        found = find_components(pipeline_folder(config.model))
        unread = [key for key, path in given.items() if path is not None]
        line = f"every network comes from model={config.model}; not read: {', '.join(unread)}"
        return Sources(found.transformer, found.vae, found.text_encoder, found.tokenizer), [line] if unread else []
    if config.data_config.dataset_name != "latents":
        if config.vae_config.vae_path is None:
            raise ConfigError("vae_config.vae_path is missing: name a trained video VAE (ospnext train-vae makes one)")
        if text.checkpoint_path is None and not config.train_text_encoder:
            raise ConfigError(
                "text_encoder_config.checkpoint_path is missing: name a text encoder, or set train_text_encoder"
            )
    return Sources(*(None if path is None else Path(path) for path in given.values())), []


def find_adapter(config: TrainConfig, sources: Sources) -> NewAdapter | Adapter | None:
    """The adapter to train, new or from a file; None where the whole network is trained.

    Raises:
        ConfigError: there is no model to adapt.
        CheckpointError: as ``checkpoints.lora.asked_for``.
    """
    lora = config.lora_config
    if lora is None:
        return None
    if sources.transformer is None:
        raise ConfigError(
            "lora_config trains an adapter of a model, but none is named: give "
            "model_config.pretrained_model_dir_or_checkpoint (or model)"
        )
    return asked_for(lora, config.seed)


def check_fit(
    config: TrainConfig,
    transformer: dict[str, Any],
    vae: AutoencoderKLWan,
    encoder: UMT5EncoderModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Find out before anything is loaded whether the networks fit each other, and the clips the networks.

    Raises:
        ConfigError: names what does not fit.
    """
    for key, source, given in (
        ("in_dim", "the VAE's latent channels", vae.config.z_dim),
        ("out_dim", "the VAE's latent channels", vae.config.z_dim),
        ("text_dim", "the text encoder's width", encoder.config.d_model),
    ):
        if transformer[key] != given:
            raise ConfigError(f"model_config.{key} is {transformer[key]}, but {source} {given}: they must be equal")
    if len(tokenizer) > encoder.config.vocab_size:
        raise ConfigError(
            f"the tokenizer knows {len(tokenizer)} tokens, the text encoder {encoder.config.vocab_size}: name the "
            "tokenizer it was trained with in text_encoder_config.text_tokenizer_path"
        )
    clip, step = config.data_config.dataset_config, size_step(vae.config, transformer)
    if (clip.sample_num_frames - 1) % step.frames:
        raise ConfigError(f"sample_num_frames is {clip.sample_num_frames}: these networks need {step.frames}k + 1")
    for key, unit in (("sample_height", step.height), ("sample_width", step.width)):
        if getattr(clip, key) % unit:
            raise ConfigError(f"{key} is {getattr(clip, key)}: these networks need a multiple of {unit}")


def latent_shape(config: TrainConfig, vae: AutoencoderKLWan) -> tuple[int, int, int, int]:
    """Shape ``[C, t, h, w]`` of a sample's latents."""
    clip, scale = config.data_config.dataset_config, vae.config
    frames = 1 + (clip.sample_num_frames - 1) // scale.scale_factor_temporal
    space = scale.scale_factor_spatial
    return scale.z_dim, frames, clip.sample_height // space, clip.sample_width // space


def open_encoded(
    config: TrainConfig, sources: Sources, transformer: dict[str, Any], rank: int, ranks: int
) -> tuple[Loader, tuple[int, int, int, int]]:
    """The loader of encoded clips, and the shape of its largest latents.

    Raises:
        ValueError: the folder is not finished, or was made for other networks or sizes.
    """
    data = config.data_config
    clip = data.dataset_config
    sized = {"sample_num_frames", "sample_height", "sample_width"} & clip.model_fields_set
    assert clip.metafile_or_dir_path is not None
    expected: dict[str, Any] = {"text_len": transformer["text_len"]}
    if sized:
        expected["buckets"] = [[clip.sample_num_frames, clip.sample_height, clip.sample_width]]
    if sources.vae is not None:
        dtype = working_dtype(
            config.vae_config.dtype, torch.device("cpu"), "dtype" in config.vae_config.model_fields_set
        )
        expected["vae"] = vae_fingerprint(sources.vae, dtype, Path(clip.metafile_or_dir_path))
    loader = open_latent_loader(
        clip.metafile_or_dir_path,
        expected,
        data.batch_size,
        rank,
        ranks,
        seed=config.seed,
        text_drop_ratio=clip.text_drop_ratio,
        shuffle=data.shuffle,
        drop_last=data.drop_last,
        num_workers=data.num_workers,
        pin_memory=data.pin_memory,
    )
    dataset = loader.dataset
    assert isinstance(dataset, LatentDataset)
    firsts = [Draw(0, int(group[0]), place) for place, group in enumerate(dataset.groups) if len(group)]
    samples = [dataset[draw] for draw in firsts]
    for sample in samples:
        shift_of(sample.latents.shape, config.scheduler_config)  # refuses what leaves no noise levels
        for key, what, found in (
            ("in_dim", "latent channels", sample.latents.shape[0]),
            ("out_dim", "latent channels", sample.latents.shape[0]),
            ("text_dim", "width of embeddings", sample.text.shape[-1]),
        ):
            if transformer[key] != found:
                raise ConfigError(
                    f"model_config.{key} is {transformer[key]}, but the {what} in {clip.metafile_or_dir_path} {found}: "
                    "they must be equal"
                )
    largest = max((tuple(sample.latents.shape) for sample in samples), key=np.prod)
    return loader, (largest[0], largest[1], largest[2], largest[3])


def vae_fingerprint(path: Path, dtype: torch.dtype, clips: Path) -> str:
    """A VAE's fingerprint: in the numbers that these encoded clips were made in if it made them, else in ``dtype``."""
    made = read_index(clips)["settings"].get("vae") if (clips / INDEX).is_file() else None
    own = module_fingerprint(load_vae(path, dtype))
    if made is None or own == made:
        return own
    others = (torch.float32, torch.bfloat16, torch.float16)
    return next((made for other in others if module_fingerprint(load_vae(path, other)) == made), own)


def open_videos(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, text_len: int, rank: int, ranks: int
) -> Loader:
    """The loader of videos, or of noise.

    Raises:
        ValueError: there is no such store, or no clip of it is long enough.
    """
    data = config.data_config
    clip = data.dataset_config
    samples = SampleSettings(
        (Bucket(clip.sample_num_frames, clip.sample_height, clip.sample_width),),
        None if clip.sample_stride is not None else clip.train_fps,
        clip.sample_stride,
        clip.text_drop_ratio,
        clip.keep_chinese,
        clip.timeout,
        config.seed,
    )
    return open_loader(
        data.dataset_name,
        clip.metafile_or_dir_path,
        samples,
        tokenizer,
        text_len,
        data.batch_size,
        rank,
        ranks,
        shuffle=data.shuffle,
        drop_last=data.drop_last,
        num_workers=data.num_workers,
        pin_memory=data.pin_memory,
    )


def trained_as(
    config: TrainConfig, adapter: NewAdapter | Adapter | None = None, execution: str | None = None
) -> dict[str, Any]:
    """How ``load_transformer`` shall make a transformer that is to be trained, or an adapter of it.

    ``execution`` wins over the keys.
    """
    quant = quant_keys(config.transformer_config)
    if execution is not None:
        quant["quant_execution"] = execution
    adapters = [] if adapter is None else [WithAdapter(adapter)]
    return {
        "trainable": adapter is None,
        "adapters": adapters,
        "relayout": config.convert_layouts,
        "quant": quant,
        **config.architecture(),
    }


def constructor_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A transformer's config without what diffusers adds and what says how it runs in 8 bits."""
    return {key: value for key, value in config.items() if not key.startswith("_") and key not in SAVED}
