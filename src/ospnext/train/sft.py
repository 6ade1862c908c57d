"""``ospnext train``: the transformer learns the velocity of the straight path from noise to video latents.

The text encoder may be trained along, which a small byte-level one needs. The run ends with a pipeline folder of the
averaged weights, ready for ``ospnext generate model=...``.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, UMT5EncoderModel

from ospnext.checkpoints.components import load_pipeline_components, pipeline_folder
from ospnext.checkpoints.load import load_text_encoder, load_tokenizer, load_transformer, load_vae
from ospnext.checkpoints.memory import require_memory
from ospnext.device import device_label, dtype_label, resolve_device, resolve_dtype
from ospnext.flow.path import TIMESTEPS, dynamic_shift, interpolate, sample_sigmas
from ospnext.generate.pipeline import OSPNextPipeline
from ospnext.generate.run import make_folder
from ospnext.generate.sampler import make_scheduler
from ospnext.generate.size import size_step
from ospnext.models.text import encode_tokens, small_text_encoder
from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.ops.attention import describe_kernel
from ospnext.quant.apply import describe, quantize
from ospnext.quant.settings import quant_keys, recipe
from ospnext.train.clips import ClipSize, LatentClips, sample_scenes
from ospnext.train.loop import LoopSettings, Losses, fit
from ospnext.train.settings import NoiseConfig, TrainConfig

# How the small models of the shapes world are sampled unless a call says otherwise.
SAMPLING = {"shift": 3.0, "num_inference_steps": 20, "guidance_scale": 4.0}


class Components(NamedTuple):
    """The networks of a run; which of them are trained is the configuration's choice."""

    transformer: OSPNextTransformer3DModel
    vae: AutoencoderKLWan
    text_encoder: UMT5EncoderModel
    tokenizer: PreTrainedTokenizerBase


def run(config: TrainConfig) -> None:
    """Train, then save the averaged weights as ``output_dir/pipeline``.

    Raises:
        ValueError: the configuration asks for what cannot be had, before anything is trained.
    """
    if config.data_config.dataset_name != "shapes":
        raise ValueError(
            f"data_config.dataset_name is {config.data_config.dataset_name!r}: train reads 'shapes', the rendered world"
        )
    make_folder(Path(config.output_dir))
    device = resolve_device(config.device)
    torch.manual_seed(config.seed)
    torch.use_deterministic_algorithms(config.deterministic_training)
    parts = build(config, device)
    check_fit(config, parts)
    trained: dict[str, torch.nn.Module] = {"transformer": parts.transformer.train().requires_grad_(True)}
    if config.train_text_encoder:
        trained["text_encoder"] = parts.text_encoder.train().requires_grad_(True)
    data = make_data(config, parts, device)
    report(config, trained, device, describe(parts.transformer))
    if config.gradient_checkpointing:
        parts.transformer.enable_gradient_checkpointing()
    if config.compile and device.type != "cpu":
        parts.transformer.compile_repeated_blocks(dynamic=False)
        parts.text_encoder.compile(dynamic=False)

    def losses(generator: torch.Generator, step: int) -> Losses:
        latents, tokens = data.draw(config.data_config.batch_size, generator)
        with torch.set_grad_enabled(config.train_text_encoder):
            text = encode_tokens(parts.text_encoder, tokens, tokens != parts.tokenizer.pad_token_id)
        return velocity_loss(parts.transformer, latents, text, config.scheduler_config, generator)

    state = fit(trained, losses, loop_settings(config), device)
    state.average.swap()
    export(config, parts, Path(config.output_dir) / "pipeline")


def build(config: TrainConfig, device: torch.device) -> Components:
    """Load what the configuration names and make the rest anew: transformer and text encoder may start from scratch.

    With ``model`` everything comes from that pipeline folder: how a finished model is trained further.
    """
    if config.model is not None:
        return load_model(config, device)
    if config.vae_config.vae_path is None:
        raise ValueError("vae_config.vae_path is missing: name a trained video VAE (ospnext train-vae makes one)")
    vae = load_vae(config.vae_config.vae_path, dtype=vae_dtype(config, device), device=device)
    weights = config.transformer_config.pretrained_model_dir_or_checkpoint
    if weights is None:
        transformer = OSPNextTransformer3DModel(**config.architecture()).to(device)
        if (eight_bits := recipe(quant_keys(config.transformer_config), device)) is not None:
            quantize(transformer, eight_bits)
    else:
        transformer = load_transformer(weights, dtype=torch.float32, device=device, **trained_as(config))
    transformer.set_attention_kernel(config.attention_kernel)
    text = config.text_encoder_config
    tokenizer = ByT5Tokenizer() if text.text_tokenizer_path is None else load_tokenizer(text.text_tokenizer_path)
    if text.checkpoint_path is not None:
        encoder = load_text_encoder(text.checkpoint_path, dtype=torch.float32, device=device)
    elif config.train_text_encoder:
        encoder = small_text_encoder(transformer.config.text_dim, len(tokenizer)).to(device)
    else:
        raise ValueError(
            "text_encoder_config.checkpoint_path is missing: name a text encoder, or set train_text_encoder"
        )
    return Components(transformer, vae.requires_grad_(False), encoder.requires_grad_(False), tokenizer)


def trained_as(config: TrainConfig) -> dict[str, Any]:
    """How ``load_transformer`` shall make a transformer that is to be trained."""
    return {"trainable": True, "quant": quant_keys(config.transformer_config), **config.architecture()}


def vae_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The dtype that latents are made in: float32 on a CPU, which takes many times as long for half precision."""
    return torch.float32 if device.type == "cpu" else resolve_dtype(config.vae_config.dtype)


def load_model(config: TrainConfig, device: torch.device) -> Components:
    """The components of the pipeline folder ``model``, or of the embedded model."""
    sections = {
        "model_config.pretrained_model_dir_or_checkpoint": config.transformer_config.pretrained_model_dir_or_checkpoint,
        "vae_config.vae_path": config.vae_config.vae_path,
        "text_encoder_config.checkpoint_path": config.text_encoder_config.checkpoint_path,
        "text_encoder_config.text_tokenizer_path": config.text_encoder_config.text_tokenizer_path,
    }
    if unread := [key for key, path in sections.items() if path is not None]:
        print(f"note: every network comes from model={config.model}; not read: {', '.join(unread)}")
    parts = load_pipeline_components(
        pipeline_folder(str(config.model)),
        transformer_dtype=torch.float32,
        vae_dtype=vae_dtype(config, device),
        text_encoder_dtype=torch.float32,
        device=device,
        **trained_as(config),
    )
    parts.transformer.set_attention_kernel(config.attention_kernel)
    encoder = parts.text_encoder.requires_grad_(False)
    return Components(parts.transformer, parts.vae.requires_grad_(False), encoder, parts.tokenizer)


def check_fit(config: TrainConfig, parts: Components) -> None:
    """Find out before anything is rendered whether the networks fit each other, and the clips the networks.

    Raises:
        ValueError: names what does not fit.
    """
    transformer, vae, text = (part.config for part in (parts.transformer, parts.vae, parts.text_encoder))
    for key, wanted, source, given in (
        ("in_dim", transformer.in_dim, "the VAE's latent channels", vae.z_dim),
        ("out_dim", transformer.out_dim, "the VAE's latent channels", vae.z_dim),
        ("text_dim", transformer.text_dim, "the text encoder's width", text.d_model),
    ):
        if wanted != given:
            raise ValueError(f"model_config.{key} is {wanted}, but {source} {given}: they must be equal")
    if len(parts.tokenizer) > text.vocab_size:
        raise ValueError(
            f"the tokenizer knows {len(parts.tokenizer)} tokens, the text encoder {text.vocab_size}: name the "
            "tokenizer it was trained with in text_encoder_config.text_tokenizer_path"
        )
    clip, step = config.data_config.dataset_config, size_step(vae, transformer)
    if (clip.sample_num_frames - 1) % step.frames:
        raise ValueError(f"sample_num_frames is {clip.sample_num_frames}: these networks need {step.frames}k + 1")
    for key, unit in (("sample_height", step.height), ("sample_width", step.width)):
        if getattr(clip, key) % unit:
            raise ValueError(f"{key} is {getattr(clip, key)}: these networks need a multiple of {unit}")


def make_data(config: TrainConfig, parts: Components, device: torch.device) -> LatentClips:
    """The rendered dataset the configuration describes.

    Raises:
        OutOfMemoryError: its latents do not fit on the device.
    """
    dataset = config.data_config.dataset_config
    vae = parts.vae.config
    frames = 1 + (dataset.sample_num_frames - 1) // vae.scale_factor_temporal
    latents = frames * dataset.sample_height * dataset.sample_width // vae.scale_factor_spatial**2 * vae.z_dim
    need = dataset.num_clips * latents * (2 if device.type == "cuda" else 4)
    require_memory(need, device, f"a pool of {dataset.num_clips} clips", "use a smaller num_clips")
    return LatentClips(
        parts.vae,
        parts.tokenizer,
        sample_scenes(dataset.world, dataset.num_clips, config.seed),
        ClipSize(dataset.sample_num_frames, dataset.sample_height, dataset.sample_width),
        config.seed,
        parts.transformer.config.text_len,
        dataset.text_drop_ratio,
        device,
    )


def velocity_loss(
    transformer: torch.nn.Module,
    latents: torch.Tensor,
    text: torch.Tensor,
    noise: NoiseConfig,
    generator: torch.Generator,
) -> Losses:
    """Mean squared error of the velocity at random points of the path from noise to ``latents [B, C, t, h, w]``."""
    shift = noise.shift
    if noise.use_dynamic_shifting:
        tokens = latents.shape[-2] * latents.shape[-1] // 4
        shift = dynamic_shift(tokens, noise.base_image_seq, noise.max_image_seq, noise.base_shift, noise.max_shift)
    sigma = sample_sigmas(
        len(latents),
        generator,
        noise.use_logitnorm_time_sampling,
        shift,
        latents.device,
        logit_mean=noise.logit_mean,
        logit_std=noise.logit_std,
    )
    epsilon = torch.randn(latents.shape, generator=generator, device=latents.device)
    x_t, velocity = interpolate(latents, epsilon, sigma)
    return {"loss": F.mse_loss(transformer(x_t, TIMESTEPS * sigma, text, return_dict=False)[0], velocity)}


def loop_settings(config: TrainConfig) -> LoopSettings:
    """The loop's settings of this recipe."""
    optimiser = config.optimizer_config
    return LoopSettings(
        output_dir=Path(config.output_dir),
        iterations=config.training_iteration,
        lr=optimiser.lr,
        lr_schedule=config.lr_schedule,
        warmup_steps=config.warmup_steps,
        weight_decay=optimiser.weight_decay,
        betas=optimiser.betas,
        eps=optimiser.eps,
        max_grad_norm=config.init_max_grad_norm,
        accumulation_steps=config.gradient_accumulation_steps,
        ema_decay=config.ema_decay,
        ema_update_interval=config.ema_update_interval,
        log_interval=config.log_interval,
        save_interval=config.save_interval,
        time_budget_minutes=config.time_budget_minutes,
        seed=config.seed,
        dtype=resolve_dtype(config.weight_dtype),
    )


def report(config: TrainConfig, trained: dict[str, torch.nn.Module], device: torch.device, eight_bits: str) -> None:
    """Say what will really run."""
    dtype = resolve_dtype(config.weight_dtype)
    sizes = ", ".join(f"{name} {sum(p.numel() for p in m.parameters()) / 1e6:.2f}M" for name, m in trained.items())
    print(
        f"training {sizes} on {device_label(device)}; float32 weights, {dtype_label(dtype)} "
        f"arithmetic; latents in {dtype_label(vae_dtype(config, device))}; "
        f"attention: {describe_kernel(config.attention_kernel, device, dtype)}; 8 bits: {eight_bits}; "
        f"one process, {config.data_config.batch_size * config.gradient_accumulation_steps} clips a step"
    )


def export(config: TrainConfig, parts: Components, to: Path) -> None:
    """Save everything as one pipeline folder that samples as it was trained: the VAE in its own dtype, all else in
    ``weight_dtype``.
    """
    dataset = config.data_config.dataset_config
    dtype = resolve_dtype(config.weight_dtype)
    dtypes = {parts.transformer: dtype, parts.vae: resolve_dtype(config.vae_config.dtype), parts.text_encoder: dtype}
    for module, own in dtypes.items():
        torch.nn.Module.to(module.eval(), own)  # diffusers' own ``to`` warns of layers it would keep in float32
    pipeline = OSPNextPipeline(
        parts.transformer,
        parts.vae,
        parts.text_encoder,
        parts.tokenizer,
        make_scheduler("euler", SAMPLING["shift"]),
        negative_prompt="",  # what the dropped captions of training were
        defaults={
            "height": dataset.sample_height,
            "width": dataset.sample_width,
            "num_frames": dataset.sample_num_frames,
            "num_inference_steps": SAMPLING["num_inference_steps"],
            "guidance_scale": SAMPLING["guidance_scale"],
        },
    )
    pipeline.save_pretrained(to)
    print(f"saved {to}")
