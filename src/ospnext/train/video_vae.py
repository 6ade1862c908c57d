"""``ospnext train-vae``: a video VAE trained by reconstruction on the moving-shapes world.

The whole clip goes through the network in one pass at its full length: causal convolutions trained on shorter clips
meet, in longer ones, a history they have never seen. Space may be cropped for most of the run without harm.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from pydantic import Field, model_validator

from ospnext.checkpoints.drafts import new_folder
from ospnext.checkpoints.memory import require_memory
from ospnext.checkpoints.save import saving
from ospnext.config import Config
from ospnext.device import device_label, resolve_device, resolve_dtype
from ospnext.generate.run import make_folder
from ospnext.models.video_vae import decode_whole, encode_whole
from ospnext.sections import DType
from ospnext.train.clips import ClipSize, WorldName, random_crops, render_pool, sample_scenes, to_video
from ospnext.train.log import Losses
from ospnext.train.loop import LoopSettings, fit
from ospnext.train.settings import LearningRate


class VAEArchitecture(Config):
    """Sizes of diffusers' AutoencoderKLWan; the defaults compress 8 x 8 in space and 4 in time."""

    base_dim: int = Field(24, ge=8, description="channels at the finest level")
    dim_mult: tuple[int, ...] = Field((1, 2, 4), description="channels of each level, in base_dim")
    num_res_blocks: int = Field(1, ge=1, description="residual blocks of a level")
    z_dim: int = Field(16, ge=1, description="latent channels")
    temperal_downsample: tuple[bool, ...] = Field((True, True), description="levels that halve time")
    patch_size: int = Field(2, ge=1, description="pixels folded into channels before the first level")

    @property
    def space(self) -> int:
        """Pixels of a latent's side."""
        return self.patch_size * 2 ** (len(self.dim_mult) - 1)

    @property
    def time(self) -> int:
        """Frames of a latent frame, but for the first, which is one of its own."""
        return 2 ** sum(self.temperal_downsample)

    @model_validator(mode="after")
    def _levels_fit(self) -> Self:
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"temperal_downsample has {len(self.temperal_downsample)} entries for {len(self.dim_mult)} levels of "
                f"dim_mult: it needs one less than there are levels"
            )
        return self

    def build(self) -> AutoencoderKLWan:
        """A new VAE with random weights."""
        return AutoencoderKLWan(
            **{key: list(v) if isinstance(v, tuple) else v for key, v in self.model_dump().items()},
            in_channels=3 * self.patch_size**2,
            out_channels=3 * self.patch_size**2,
            scale_factor_spatial=self.space,
            scale_factor_temporal=self.time,
            latents_mean=[0.0] * self.z_dim,
            latents_std=[1.0] * self.z_dim,
        )


class VAETrainConfig(Config):
    """``ospnext train-vae``: what to train, on what, for how long."""

    output_dir: str = Field("./runs/shapes_vae", description="states while training, the VAE in vae/ at the end")
    seed: int = Field(42, ge=0, description="of weights, clips and noise")
    device: str = Field("auto", description="auto | cpu | cuda | npu | mps")
    autocast_dtype: DType = Field("bf16", description="numbers of the forward pass; the weights are float32")
    compile: bool = Field(True, description="torch.compile encoder and decoder, on accelerators")
    architecture: VAEArchitecture = VAEArchitecture()
    world: WorldName = Field("both", description="which scenes are rendered; both: half each")
    num_clips: int = Field(6000, ge=1, le=10**6, description="clips of the pool, kept on the device")
    num_frames: int = Field(33, ge=1, description="frames of a clip, 4k+1")
    height: int = Field(128, ge=16, description="pixels")
    width: int = Field(128, ge=16, description="pixels")
    crop: int = Field(64, ge=16, description="side of the crops, in pixels")
    crop_batch_size: int = Field(48, ge=1, description="crops of a step")
    batch_size: int = Field(12, ge=1, description="whole clips of a step")
    whole_from: float = Field(0.6, ge=0, le=1, description="share of the run after which whole clips are used")
    training_iteration: int = Field(8000, ge=1, description="optimiser steps in all")
    time_budget_minutes: float | None = Field(None, gt=0, description="save and stop after it; start again to go on")
    lr: LearningRate = Field(1e-3, description="peak learning rate")
    warmup_steps: int = Field(200, ge=0, description="steps in which the learning rate rises")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="decay of the averaged weights")
    edge_weight: float = Field(4.0, ge=0, description="how much more an edge counts than a flat place")
    kl_weight: float = Field(3e-5, ge=0, description="of the divergence from a standard normal, per latent value")
    log_interval: int = Field(50, ge=1, description="steps between log lines")
    save_interval: int = Field(2000, ge=1, description="steps between states")

    @model_validator(mode="after")
    def _clips_fit(self) -> Self:
        time, space = self.architecture.time, self.architecture.space
        if (self.num_frames - 1) % time:
            raise ValueError(f"num_frames is {self.num_frames}: this architecture needs {time}k + 1")
        for name in ("height", "width", "crop"):
            if getattr(self, name) % space:
                raise ValueError(f"{name} is {getattr(self, name)}: this architecture needs a multiple of {space}")
        if self.crop > min(self.height, self.width):
            raise ValueError(f"crop is {self.crop}, larger than a frame of {self.height} x {self.width}")
        return self


def run(config: VAETrainConfig) -> None:
    """Train, measure the latents' statistics, and save the averaged VAE as ``output_dir/vae``.

    Raises:
        ValueError: the output cannot be written, or see ``loop.fit``.
    """
    make_folder(Path(config.output_dir))
    device = resolve_device(config.device)
    torch.manual_seed(config.seed)
    vae = channels_last(config.architecture.build().to(device))
    print(f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f}M parameters on {device_label(device)}")
    size = ClipSize(config.num_frames, config.height, config.width)
    require_memory(
        3 * config.num_clips * size.frames * size.height * size.width,
        device,
        f"a pool of {config.num_clips} clips",
        "use a smaller num_clips",
    )
    pool = render_pool(sample_scenes(config.world, config.num_clips, config.seed), size, device)
    encode, decode = encode_whole, decode_whole
    if config.compile and device.type != "cpu":
        encode, decode = torch.compile(encode_whole, dynamic=False), torch.compile(decode_whole, dynamic=False)

    def losses(generator: torch.Generator, step: int) -> Losses:
        if step < config.whole_from * config.training_iteration:
            video = random_crops(pool, config.crop_batch_size, config.crop, generator)
        else:
            chosen = torch.randint(len(pool), (config.batch_size,), generator=generator, device=device)
            video = to_video(pool[chosen])
        moments = encode(vae, video)
        noise = torch.randn(moments.chunk(2, dim=1)[0].shape, generator=generator, device=device)
        return reconstruction_losses(vae, video, moments, noise, decode, config.edge_weight, config.kl_weight)

    state = fit({"vae": vae}, losses, loop_settings(config), device)
    if state.terminated:
        return
    state.average.swap()
    finish(vae, pool, Path(config.output_dir))


def channels_last(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Convolution kernels in channels-last memory, in place: what tensor cores read."""
    for p in vae.parameters():
        if p.ndim in (4, 5):
            p.data = p.data.contiguous(memory_format=torch.channels_last if p.ndim == 4 else torch.channels_last_3d)
    return vae


def loop_settings(config: VAETrainConfig) -> LoopSettings:
    """The loop's settings of this recipe."""
    return LoopSettings(
        output_dir=Path(config.output_dir),
        iterations=config.training_iteration,
        lr=config.lr,
        lr_schedule="cosine",
        warmup_steps=config.warmup_steps,
        betas=(0.9, 0.99),
        max_grad_norm=config.max_grad_norm,
        ema_decay=config.ema_decay,
        log_interval=config.log_interval,
        save_interval=config.save_interval,
        time_budget_minutes=config.time_budget_minutes,
        seed=config.seed,
        dtype=resolve_dtype(config.autocast_dtype),
    )


def reconstruction_losses(
    vae: AutoencoderKLWan,
    video: torch.Tensor,
    moments: torch.Tensor,
    noise: torch.Tensor,
    decode: Callable[[AutoencoderKLWan, torch.Tensor], torch.Tensor] = decode_whole,
    edge_weight: float = 4.0,
    kl_weight: float = 3e-5,
) -> Losses:
    """Edge-weighted L1 and squared error of a sampled reconstruction, and the divergence of the posterior.

    Args:
        video: ``[B, 3, T, H, W]`` in [-1, 1].
        moments: ``[B, 2 z_dim, t, h, w]`` of ``encode_whole``.
        noise: standard normal, shaped like half the moments.
        decode: ``decode_whole`` or a compiled one.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    log_variance = log_variance.clamp(-30, 20)
    error = decode(vae, mean + noise * (0.5 * log_variance).exp()).float() - video
    weight = 1 + edge_weight * edges(video)
    weight = weight / weight.mean()
    squared = error.square()
    l1, mse = (weight * error.abs()).mean(), (weight * squared).mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return {"loss": l1 + 2 * mse + kl_weight * kl, "l1": l1, "mse": squared.mean(), "kl": kl}


def edges(video: torch.Tensor) -> torch.Tensor:
    """1 within two pixels of a spatial edge, 0 where the picture is flat: ``[B, 1, T, H, W]``.

    Shapes live in few pixels; without this the error of the background outweighs them.
    """
    dx = F.pad((video[..., 1:] - video[..., :-1]).abs().amax(1, keepdim=True), (0, 1))
    dy = F.pad((video[..., 1:, :] - video[..., :-1, :]).abs().amax(1, keepdim=True), (0, 0, 0, 1))
    return F.max_pool3d((torch.maximum(dx, dy) > 0.1).float(), (1, 5, 5), stride=1, padding=(0, 2, 2))


@torch.no_grad()
def finish(vae: AutoencoderKLWan, pool: torch.Tensor, output_dir: Path, clips: int = 256) -> None:
    """Write the latents' mean and deviation per channel into the VAE's config, report PSNR, and save it."""
    vae.eval()
    means, squared = [], []
    for i in range(0, min(clips, len(pool)), 8):
        video = to_video(pool[i : i + 8])
        mean = encode_whole(vae, video).chunk(2, dim=1)[0]
        means.append(mean)
        squared.append((decode_whole(vae, mean).clamp(-1, 1) - video).square().mean((1, 2, 3, 4)))
    latents = torch.cat(means)
    vae.register_to_config(
        latents_mean=latents.mean((0, 2, 3, 4)).tolist(), latents_std=latents.std((0, 2, 3, 4)).tolist()
    )
    psnr = 10 * torch.log10(4 / torch.cat(squared)).mean()
    with new_folder((output_dir / "vae").resolve()) as draft, saving(draft):
        vae.to(memory_format=torch.contiguous_format).save_pretrained(draft)
    print(f"PSNR {psnr:.2f} dB on {len(latents)} clips of the pool; saved {output_dir / 'vae'}")
