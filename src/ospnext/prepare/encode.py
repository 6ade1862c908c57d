"""``ospnext data encode``: VAE latents and text embeddings of a store's clips, made once instead of at every step.

    ospnext data encode metafile_or_dir_path=data/clips save_path=data/latents model=checkpoints/Wan2.1-T2V-1.3B
    ospnext data encode ... part=3 parts=8      # one of eight processes, each on a device of its own

Work goes shard by shard, and a shard appears whole or not at all: a run that was stopped goes on where it was. Window w
of a clip is the one that training on videos with the same seed would take in epoch w.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from diffusers import AutoencoderKLWan
from pydantic import Field, model_validator
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from ospnext.checkpoints.components import find_components, pipeline_folder
from ospnext.checkpoints.load import load_text_encoder, load_tokenizer, load_transformer, load_vae
from ospnext.config import Config, ConfigError
from ospnext.data.buckets import Bucket, assign
from ospnext.data.captions import clean
from ospnext.data.dataset import BadClip, ClipDataset, DataError, Sample, SampleSettings
from ospnext.data.latents import (
    EMPTY,
    Encoded,
    module_fingerprint,
    read_said,
    require_same,
    settings_fingerprint,
    shard_name,
    tokenizer_fingerprint,
    write_index,
    write_shard,
    write_tensors,
)
from ospnext.data.loader import naming_dead_workers
from ospnext.data.sampler import Draw
from ospnext.data.store import ClipStore
from ospnext.data.transforms import to_pixel_values
from ospnext.device import resolve_device, resolve_dtype, working_dtype
from ospnext.models.text import encode_tokens
from ospnext.models.video_vae import check_frames, encode_video
from ospnext.sections import DType, TextEncoderConfig, VAEConfig

_TEXTS_AT_ONCE = 16


class EncodeConfig(Config):
    """``ospnext data encode``: latents and embeddings of a store's clips."""

    metafile_or_dir_path: str = Field(min_length=1, description="the store of clips, from data build")
    save_path: str = Field(min_length=1, description="the folder to write; training reads it in place of the store")
    model: str | None = Field(None, description="pipeline folder with VAE and text encoder; default: the sections")
    vae_config: VAEConfig = VAEConfig()
    text_encoder_config: TextEncoderConfig = TextEncoderConfig()
    sample_height: int = Field(480, ge=16, description="pixels, a multiple of 16")
    sample_width: int = Field(832, ge=16, description="pixels, a multiple of 16")
    sample_num_frames: int = Field(49, ge=1, description="frames, 4k+1")
    buckets: tuple[str, ...] = Field((), description="shapes FRAMESxHEIGHTxWIDTH instead of the one above")
    train_fps: float | None = Field(16, gt=0, description="frames per second of training")
    sample_stride: int | None = Field(None, ge=1, description="take every n-th frame, whatever the rate; not train_fps")
    keep_chinese: bool = Field(False, description="leave Chinese characters in captions")
    windows: int = Field(1, ge=1, description="random windows of each clip; training takes one an epoch, in turn")
    latent_dtype: DType = Field("fp32", description="numbers of the latents in the files")
    clips_per_shard: int = Field(64, ge=1, description="clips in one file")
    part: int = Field(0, ge=0, description="which share of the shards this process makes")
    parts: int = Field(1, ge=1, description="processes that share the work")
    num_workers: int = Field(2, ge=0, description="processes that read videos")
    timeout: float = Field(600.0, gt=0, description="seconds that reading a clip may take")
    seed: int = Field(42, ge=0, lt=2**63, description="of the windows")
    device: str = Field("auto", description="auto | cpu | cuda | npu | mps, or one of several as cuda:1")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.part >= self.parts:
            raise ValueError(f"part is {self.part}: parts count from 0 to {self.parts - 1}")
        if self.train_fps is None and self.sample_stride is None:
            raise ValueError("train_fps and sample_stride are both empty: give one")
        self.shapes()
        return self

    def shapes(self) -> tuple[Bucket, ...]:
        """The shapes of samples."""
        if self.buckets:
            return tuple(map(Bucket.parse, self.buckets))
        return (Bucket(self.sample_num_frames, self.sample_height, self.sample_width),)


class Encoders(NamedTuple):
    """What encodes: ``text_len`` is the most tokens of a caption."""

    vae: AutoencoderKLWan
    text_encoder: UMT5EncoderModel
    tokenizer: PreTrainedTokenizerBase
    text_len: int


def run(config: EncodeConfig) -> str:
    """Encode as configured; returns the line to print.

    Raises:
        ValueError: a part is missing, shapes do not fit the VAE, or the folder holds clips of other settings.
        OSError: the folder cannot be written.
    """
    store = ClipStore(config.metafile_or_dir_path)
    device = resolve_device(config.device)
    assigned = assign(store, config.shapes(), config.train_fps, config.sample_stride)
    if not any(map(len, assigned.groups)):
        raise ConfigError(f"none of the {len(store)} clips is long enough for {_names(config.shapes())}")
    encoders = load_encoders(config, device)
    for bucket in config.shapes():
        check_shape(encoders.vae, bucket)
    settings = describe(config, store, encoders)
    folder = Path(config.save_path)
    begin(folder, settings, encoders, device)
    draws = sorted((Draw(0, int(c), place) for place, group in enumerate(assigned.groups) for c in group), key=_clip)
    shares = [draws[first : first + config.clips_per_shard] for first in range(0, len(draws), config.clips_per_shard)]
    dataset = Windows(ClipDataset(store, assigned.groups, sample_settings(config)), config.windows)
    fingerprint = settings_fingerprint(settings)
    todo = [
        n
        for n in range(config.part, len(shares), config.parts)
        if read_said(folder / shard_name(n), fingerprint) is None
    ]
    for number in _progress(todo):
        encode_shard(folder / shard_name(number), shares[number], dataset, encoders, config, fingerprint, device)
    names = [shard_name(number) for number in range(len(shares))]
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        return f"part {config.part} of {config.parts} is done; {len(missing)} of {len(names)} shards are others'"
    clips, bad = write_index(folder, settings, names)
    if not clips:
        raise DataError(f"{folder}: none of the {bad} clips could be read: `ospnext data check` shows why")
    return (
        f"wrote {folder}: {clips} clips in {len(names)} shards; {bad} could not be read, {assigned.left_out} too short"
    )


def load_encoders(config: EncodeConfig, device: torch.device) -> Encoders:
    """VAE, text encoder and tokenizer, from the pipeline folder ``model`` or from their own paths, which win.

    Raises:
        ConfigError: a path is missing.
        CheckpointError: one cannot be loaded.
    """
    text = config.text_encoder_config
    keys = {
        "vae_config.vae_path": config.vae_config.vae_path,
        "text_encoder_config.checkpoint_path": text.checkpoint_path,
        "text_encoder_config.text_tokenizer_path": text.text_tokenizer_path,
    }
    paths: list[Any] = list(keys.values())
    text_len = text.text_len
    if config.model is not None:
        found = find_components(pipeline_folder(config.model))
        paths = [
            own or there for own, there in zip(paths, (found.vae, found.text_encoder, found.tokenizer), strict=True)
        ]
        text_len = text_len or load_transformer(found.transformer, device="meta").config.text_len
    elif missing := [key for key, path in keys.items() if path is None]:
        raise ConfigError(f"{', '.join(missing)} missing: name them, or a whole pipeline folder as model")
    vae_dtype = working_dtype(config.vae_config.dtype, device, asked="dtype" in config.vae_config.model_fields_set)
    text_dtype = working_dtype(text.dtype or "bf16", device, asked=text.dtype is not None)
    vae, encoder = load_vae(paths[0], vae_dtype, device), load_text_encoder(paths[1], text_dtype, device)
    tokenizer = load_tokenizer(paths[2])
    return Encoders(vae.requires_grad_(False), encoder.requires_grad_(False), tokenizer, text_len or 512)


def check_shape(vae: AutoencoderKLWan, bucket: Bucket) -> None:
    """Raise ValueError for a shape that the VAE cannot encode."""
    check_frames(vae, bucket.num_frames)
    unit = vae.config.scale_factor_spatial
    if bucket.height % unit or bucket.width % unit:
        raise ConfigError(f"{_names([bucket])}: height and width must be multiples of {unit} for this VAE")


def describe(config: EncodeConfig, store: ClipStore, encoders: Encoders) -> dict[str, Any]:
    """All that the files depend on, in plain values; training compares those of them that it knows."""
    return {
        "clips": store.fingerprint,
        "buckets": [list(bucket) for bucket in config.shapes()],
        "train_fps": None if config.sample_stride is not None else config.train_fps,
        "sample_stride": config.sample_stride,
        "keep_chinese": config.keep_chinese,
        "windows": config.windows,
        "seed": config.seed,
        "latent_dtype": str(resolve_dtype(config.latent_dtype)).removeprefix("torch."),
        "clips_per_shard": config.clips_per_shard,
        **encoder_settings(encoders),
    }


def encoder_settings(encoders: Encoders) -> dict[str, Any]:
    """What the files depend on of the encoders."""
    return {
        "text_len": encoders.text_len,
        "vae": module_fingerprint(encoders.vae),
        "text_encoder": module_fingerprint(encoders.text_encoder),
        "tokenizer": tokenizer_fingerprint(encoders.tokenizer),
    }


def begin(folder: Path, settings: dict[str, Any], encoders: Encoders, device: torch.device) -> None:
    """Write the embedding of no caption with all settings, or refuse a folder that was begun with others.

    Raises:
        DataError: it was; names the settings that differ.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begun = read_said(folder / EMPTY)
    if begun is None:
        text = embed([""], encoders, device)[0]
        write_tensors(folder / EMPTY, {"text": text}, settings_fingerprint(settings), {"settings": settings})
    else:
        way_out = "give another save_path, or remove the folder"
        require_same(begun["settings"], settings, f"{folder} was begun", way_out)


class Windows(Dataset):
    """The windows of a clip, or why it cannot be read, by ``Draw``."""

    def __init__(self, clips: ClipDataset, windows: int) -> None:
        self.clips, self.windows = clips, windows

    def __getitem__(self, draw: Draw) -> list[Sample] | BadClip:
        samples = []
        for window in range(self.windows):
            found = self.clips.read(draw._replace(epoch=window))
            if isinstance(found, BadClip):
                return found
            samples.append(found)
        return samples


def encode_shard(
    path: Path,
    draws: list[Draw],
    dataset: Windows,
    encoders: Encoders,
    config: EncodeConfig,
    fingerprint: str,
    device: torch.device,
) -> None:
    """Read and encode the clips of one shard and write it."""
    workers: dict[str, Any] = {"num_workers": min(config.num_workers, len(draws))}
    if workers["num_workers"]:
        workers |= {"multiprocessing_context": "forkserver", "prefetch_factor": 2}
    done: list[Encoded] = []
    bad: list[BadClip] = []
    store, dtype = dataset.clips.store, resolve_dtype(config.latent_dtype)
    read = iter(DataLoader(dataset, batch_size=None, sampler=draws, **workers))
    for draw in draws:
        with naming_dead_workers():
            found = next(read)
        if isinstance(found, BadClip):
            bad.append(found)
            continue
        latents = [encode_video(encoders.vae, to_pixel_values(s.video[None].to(device)))[0] for s in found]
        captions = [clean(text, config.keep_chinese) for text in store[draw.clip].captions]
        texts = embed(captions, encoders, device)
        done.append(Encoded(draw.clip, draw.group, [x.to("cpu", dtype) for x in latents], texts))
    write_shard(path, done, bad, fingerprint)


@torch.no_grad()
def embed(captions: list[str], encoders: Encoders, device: torch.device) -> list[torch.Tensor]:
    """Embeddings [l, D] of captions on the CPU, each without its padding."""
    found: list[torch.Tensor] = []
    for first in range(0, len(captions), _TEXTS_AT_ONCE):
        texts = captions[first : first + _TEXTS_AT_ONCE]
        tokens = encoders.tokenizer(
            texts, padding="max_length", truncation=True, max_length=encoders.text_len, return_tensors="pt"
        )
        hidden = encode_tokens(encoders.text_encoder, tokens.input_ids.to(device), tokens.attention_mask.to(device))
        found += [h[:count].cpu() for h, count in zip(hidden, tokens.attention_mask.sum(1).tolist(), strict=True)]
    return found


def sample_settings(config: EncodeConfig) -> SampleSettings:
    """How clips are read."""
    return SampleSettings(
        config.shapes(), config.train_fps, config.sample_stride, 0.0, config.keep_chinese, config.timeout, config.seed
    )


def _clip(draw: Draw) -> int:
    return draw.clip


def _names(buckets: Any) -> str:
    return ", ".join("x".join(map(str, bucket)) for bucket in buckets)


def _progress(numbers: list[int]) -> Iterator[int]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    hidden = not numbers or not console.is_terminal
    return iter(track(numbers, "encoding shards:", console=console, transient=True, disable=hidden))
