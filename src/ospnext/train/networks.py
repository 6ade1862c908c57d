"""The networks of a training run, loaded, shared and filled as its ``Job`` says, and the feed they encode.

All processes call ``arrange``, ``build`` and ``open_feed`` together, in this order.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from transformers import UMT5EncoderModel

from ospnext.assemble import Crew, assemble_text_encoder, assemble_transformer, join
from ospnext.checkpoints.load import load_text_encoder, load_vae
from ospnext.checkpoints.lora import leave_casting_to_autocast
from ospnext.checkpoints.memory import require_memory
from ospnext.data.sampler import Sampler
from ospnext.device import resolve_dtype, working_dtype
from ospnext.models.text import small_text_encoder
from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.parallel.apply import Options, parallelise
from ospnext.parallel.circle import Circle
from ospnext.parallel.fsdp import Sharding, copies_mesh
from ospnext.quant.apply import quantize
from ospnext.quant.settings import quant_keys, recipe
from ospnext.train.clips import ClipSize, LatentClips, sample_scenes
from ospnext.train.feed import EncodedFeed, Encoders, Feed, RenderedFeed, VideoFeed
from ospnext.train.job import Job, trained_as
from ospnext.train.settings import TrainConfig


class Components(NamedTuple):
    """The networks of a run; which of them are trained is the configuration's choice. None: not needed."""

    transformer: OSPNextTransformer3DModel
    vae: AutoencoderKLWan | None
    text_encoder: UMT5EncoderModel | None


def arrange(config: TrainConfig, job: Job) -> Crew:
    """Arrange the processes: unlike in sampling, they always share gradients."""
    crew = join(config, job.sizes, job.device, config.model_cpu_offload)
    if crew.mesh is None:
        return crew
    weights = crew.weights or copies_mesh(job.sizes.copies, job.device.type)
    dtype = resolve_dtype(config.weight_dtype)
    sharding = Sharding(
        config.reshard_after_forward,
        config.explicit_prefetching_num_blocks,
        config.model_cpu_offload,
        None if dtype == torch.float32 else dtype,
    )
    return replace(crew, weights=weights, sharding=sharding)


def build(config: TrainConfig, job: Job, crew: Crew) -> Components:
    """The networks, loaded or made anew, frozen but for what is trained, each process's part in its place.

    Raises:
        CheckpointError, OutOfMemoryError: as ``checkpoints.load``.
    """
    transformer = build_transformer(config, job, crew).train()
    if job.adapter is None:
        transformer.requires_grad_(True)
    transformer.set_attention_kernel(config.attention_kernel)
    rendered = config.data_config.dataset_name == "shapes"
    if config.data_config.dataset_name == "latents":
        return Components(transformer, None, None)
    device, offload = job.device, config.encoder_cpu_offload and not rendered
    home = torch.device("cpu") if offload else device
    assert job.sources.vae is not None
    vae = load_vae(job.sources.vae, vae_dtype(config, device), home).requires_grad_(False)
    text = config.text_encoder_config
    if job.sources.text_encoder is None:
        assert job.tokenizer is not None
        encoder = small_text_encoder(job.transformer["text_dim"], len(job.tokenizer)).to(device)
    else:
        dtype = torch.float32 if rendered else working_dtype(text.dtype or "bf16", device, text.dtype is not None)
        if shares_text_encoder(config, job):
            alike = replace(crew, sharding=replace(crew.sharding, param_dtype=None))
            encoder = assemble_text_encoder(job.sources.text_encoder, alike, dtype, offload=offload)
        else:
            encoder = load_text_encoder(job.sources.text_encoder, dtype, home)
    encoder.requires_grad_(config.train_text_encoder).train(config.train_text_encoder)
    if config.compile and device.type != "cpu" and config.train_text_encoder:
        encoder.compile(dynamic=False)
    return Components(transformer, vae, encoder)


def shares_text_encoder(config: TrainConfig, job: Job) -> bool:
    """Whether the text encoder is sharded; where clips are rendered it is small, and may be trained."""
    rendered = config.data_config.dataset_name == "shapes"
    return config.text_encoder_config.use_fsdp and job.sizes.copies.fsdp > 1 and not rendered


def build_transformer(config: TrainConfig, job: Job, crew: Crew) -> OSPNextTransformer3DModel:
    """The transformer in float32, or in ``weight_dtype`` below a float32 adapter: this process's part of it."""
    compiled = config.compile and job.device.type != "cpu"
    options = Options(crew.sharding, config.checkpointed, "inductor" if compiled else None)
    if job.sources.transformer is None:
        torch.manual_seed(config.seed)
        model = OSPNextTransformer3DModel(**job.transformer).to(job.device)
        if (eight_bits := recipe(quant_keys(config.transformer_config), job.device)) is not None:
            quantize(model, eight_bits)
        if crew.mesh is not None:
            parallelise(model, crew.mesh, crew.weights, options)
    else:
        dtype = torch.float32 if job.adapter is None else resolve_dtype(config.weight_dtype)
        model = assemble_transformer(
            job.sources.transformer, crew, dtype, options=options, **trained_as(config, job.adapter)
        )
    if crew.mesh is None:  # with shards it is they that are gathered in weight_dtype
        if job.adapter is not None and resolve_dtype(config.weight_dtype) != torch.float32:
            leave_casting_to_autocast(model)
        if config.checkpointed:
            model.checkpoint_blocks(config.checkpointed)
        if compiled:
            model.compile_repeated_blocks(dynamic=False)
    return model


def vae_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The dtype that latents are made in: float32 on a CPU, which takes many times as long for half precision."""
    return torch.float32 if device.type == "cpu" else resolve_dtype(config.vae_config.dtype)


def open_feed(config: TrainConfig, job: Job, parts: Components, crew: Crew) -> Feed:
    """The data of a run.

    Raises:
        OutOfMemoryError: rendered clips do not fit on the device.
    """
    if job.loader is not None and parts.vae is None:
        return EncodedFeed(job.loader, config.seed, job.device, config.scheduler_config)
    assert parts.vae is not None
    assert parts.text_encoder is not None
    if job.loader is not None:
        shared = shares_text_encoder(config, job)
        encoders = Encoders(parts.vae, parts.text_encoder, config.encoder_cpu_offload, shared)
        circle = Circle(crew.mesh)
        return VideoFeed(job.loader, config.seed, job.device, config.scheduler_config, encoders, circle)
    dataset = config.data_config.dataset_config
    need = dataset.num_clips * int(np.prod(job.latents)) * (2 if job.device.type == "cuda" else 4)
    require_memory(need, job.device, f"a pool of {dataset.num_clips} clips", "use a smaller num_clips")
    assert job.tokenizer is not None
    clips = LatentClips(
        parts.vae,
        job.tokenizer,
        sample_scenes(dataset.world, dataset.num_clips, config.seed),
        ClipSize(dataset.sample_num_frames, dataset.sample_height, dataset.sample_width),
        config.seed,
        job.transformer["text_len"],
        dataset.text_drop_ratio,
        job.device,
    )
    sizes = job.sizes.sizes
    rank = 0 if crew.mesh is None else crew.mesh.devices["dp"].get_local_rank()
    data = config.data_config
    order = [np.arange(dataset.num_clips)]
    sampler = Sampler(order, data.batch_size, rank, sizes.dp, config.seed, data.shuffle, drop_last=False)
    return RenderedFeed(clips, sampler, config.seed, config.scheduler_config)
