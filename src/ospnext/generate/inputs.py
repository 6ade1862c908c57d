"""What a call of the pipeline is made of: text embeddings, initial noise, and arguments that go together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, TypeAlias

import torch
from torch import Tensor

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None

OUTPUT_TYPES = ("np", "pt", "pil", "latent")
CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")


@dataclass
class Conditioning:
    """Embeddings [B, L, text_dim] of prompts and, under guidance, negative prompts; step callbacks may change them."""

    cond: Tensor
    uncond: Tensor | None

    def repeated(self, copies: int) -> Self:
        """Every row ``copies`` times, copies next to each other."""
        uncond = None if self.uncond is None else self.uncond.repeat_interleave(copies, dim=0)
        return type(self)(self.cond.repeat_interleave(copies, dim=0), uncond)


def initial_latents(
    batch: int,
    shape: tuple[int, ...],
    generator: Generators = None,
    latents: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The initial noise, float32 [batch, *shape] on ``device``.

    It is drawn on the generator's device, the CPU by default: then a seed means the same video on every device. With a
    list of generators, one a video, a video does not depend on the others of its batch.

    Raises:
        ValueError: the number of generators or the shape of ``latents`` does not fit.
    """
    if latents is not None:
        if latents.shape != (batch, *shape):
            raise ValueError(f"latents are {list(latents.shape)}, but this call needs {[batch, *shape]}")
        return latents.to(device, torch.float32)
    if generator is None or isinstance(generator, torch.Generator):
        return _noise((batch, *shape), generator).to(device)
    if len(generator) != batch:
        raise ValueError(f"{len(generator)} generators for {batch} videos: give one, or one each")
    return torch.stack([_noise(shape, one).to(device) for one in generator])


def _noise(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Standard normal float32, drawn where the generator lives."""
    device = "cpu" if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)


def as_list(text: str | Sequence[str] | None) -> list[str]:
    """One text, several or none, as a list."""
    if text is None:
        return []
    return [text] if isinstance(text, str) else list(text)


def check_call(output_type: str, num_videos_per_prompt: int, tensor_inputs: Sequence[str]) -> None:
    """Raise ValueError on arguments that no call can have."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type {output_type!r} is not known: use one of {', '.join(OUTPUT_TYPES)}")
    if num_videos_per_prompt < 1:
        raise ValueError(f"num_videos_per_prompt is {num_videos_per_prompt}: it must be at least 1")
    unknown = sorted(set(tensor_inputs) - set(CALLBACK_TENSORS))
    if unknown:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs {unknown} are not known: use some of {', '.join(CALLBACK_TENSORS)}"
        )
