"""Clips of the moving-shapes world as training data: rendered once, and kept on the device.

No file is read or written: a pool is a function of its seed, so a resumed run draws from the same clips.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from ospnext.data.sampler import Draw
from ospnext.models.video_vae import encode_whole, normalise
from ospnext.shapes.captions import caption
from ospnext.shapes.render import render
from ospnext.shapes.world import Scene, World, sample_scene


@dataclass(frozen=True)
class ClipSize:
    """Frames, height and width of a clip in pixels."""

    frames: int = 33
    height: int = 128
    width: int = 128


WorldName = Literal["large", "simple", "full", "both"]


def sample_scenes(world: WorldName, count: int, seed: int) -> list[Scene]:
    """``count`` scenes that training may see (none held out); ``both`` takes half of them from each world."""
    worlds = [World.simple(), World.full()] if world == "both" else [getattr(World, world)()]
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, worlds[i * len(worlds) // count], held_out=False) for i in range(count)]


def render_pool(scenes: list[Scene], size: ClipSize, device: torch.device, chunk: int = 64) -> torch.Tensor:
    """All scenes as uint8 ``[N, T, H, W, 3]`` on the device (1.6 MB a clip of 33 x 128 x 128)."""
    pool = torch.empty(len(scenes), size.frames, size.height, size.width, 3, dtype=torch.uint8, device=device)
    for i in track(range(0, len(scenes), chunk), description="rendering", transient=True):
        pool[i : i + chunk] = render(scenes[i : i + chunk], size.frames, size.height, size.width, device)
    return pool


def to_video(frames: torch.Tensor) -> torch.Tensor:
    """uint8 ``[B, T, H, W, 3]`` to float32 ``[B, 3, T, H, W]`` in [-1, 1]."""
    return frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def random_crops(pool: torch.Tensor, count: int, crop: int, generator: torch.Generator) -> torch.Tensor:
    """``count`` clips of the pool, all frames, each cut to a random ``crop`` x ``crop`` window: ``[B, 3, T, c, c]``."""
    number, frames, height, width, _ = pool.shape

    def draw(high: int) -> torch.Tensor:
        return torch.randint(high, (count, 1, 1, 1), generator=generator, device=pool.device)

    # One gather on the device: reading the places on the host would make every step wait for the one before.
    window = torch.arange(crop, device=pool.device)
    clip, y, x = draw(number), draw(height - crop + 1) + window[:, None], draw(width - crop + 1) + window
    return to_video(pool[clip, torch.arange(frames, device=pool.device)[:, None, None], y, x])


class LatentClips:
    """Normalised latents of rendered clips with several captions each, all kept on the device.

    Args:
        vae: its encoder makes the latents (the posterior mean), once.
        tokenizer: of the text encoder.
        scenes, size: what is rendered.
        seed: of the wordings.
        text_len: tokens of a caption; how many captions are cut is said.
        drop: share of captions replaced by the empty one, for guidance.
        captions_per_clip: wordings of one scene.
    """

    def __init__(
        self,
        vae: AutoencoderKLWan,
        tokenizer: PreTrainedTokenizerBase,
        scenes: list[Scene],
        size: ClipSize,
        seed: int,
        text_len: int,
        drop: float,
        device: torch.device,
        captions_per_clip: int = 2,
    ) -> None:
        rng = np.random.default_rng(seed)
        texts = [caption(scene, rng) for scene in scenes for _ in range(captions_per_clip)]
        self.tokens = (
            self._tokenize(tokenizer, texts, text_len).unflatten(0, (len(scenes), captions_per_clip)).to(device)
        )
        self.empty = self._tokenize(tokenizer, [""], text_len)[0].to(device)
        self.drop = drop
        self.latents = self._encode(vae, scenes, size, device)

    @staticmethod
    def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], text_len: int) -> torch.Tensor:
        batch = tokenizer(texts, padding="max_length", max_length=text_len, truncation=True, return_tensors="pt")
        full = [text for text, last in zip(texts, batch.attention_mask[:, -1].tolist(), strict=True) if last]
        if cut := sum(len(tokenizer(text).input_ids) > text_len for text in full):
            print(f"note: {cut} of {len(texts)} captions are longer than text_len {text_len} and are cut: raise it")
        return batch.input_ids.to(torch.int32)

    @staticmethod
    @torch.no_grad()
    def _encode(
        vae: AutoencoderKLWan, scenes: list[Scene], size: ClipSize, device: torch.device, chunk: int = 64
    ) -> torch.Tensor:
        latents = []
        for i in track(range(0, len(scenes), chunk), description="encoding", transient=True):
            video = to_video(render(scenes[i : i + chunk], size.frames, size.height, size.width, device))
            mean = encode_whole(vae, video.to(vae.dtype)).chunk(2, dim=1)[0]
            latents.append(normalise(vae, mean.float()).to(torch.bfloat16 if device.type == "cuda" else torch.float32))
        return torch.cat(latents)

    def take(self, draws: Sequence[Draw], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The samples of some draws: float32 latents ``[B, C, t, h, w]`` and token ids ``[B, text_len]``.

        Which wording, and whether it is left out, is a function of (seed, epoch, clip).
        """
        wordings = []
        for draw in draws:
            rng = np.random.default_rng([seed, draw.epoch, draw.clip])
            dropped = rng.random() < self.drop
            wordings.append(-1 if dropped else int(rng.integers(self.tokens.shape[1])))
        places = torch.tensor([[draw.clip for draw in draws], wordings])
        if self.latents.is_cuda:
            places = places.pin_memory()  # or the host would wait for all that the device has to do
        clip, wording = places.to(self.latents.device, non_blocking=True)
        tokens = torch.where((wording >= 0)[:, None], self.tokens[clip, wording], self.empty)
        return self.latents[clip].float(), tokens.long()
