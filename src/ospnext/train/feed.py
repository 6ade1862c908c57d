"""Where micro-batches come from: rendered clips, encoded clips, or videos that are encoded on the way.

All draw in the order of a ``data.sampler``, whose progress is their state: the same on all processes, good for any
number of them. The processes that share a video get the same micro-batch; where videos are encoded on the way they
take turns, each encoding every n-th of the n of them, and hand it round.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from transformers import UMT5EncoderModel

from ospnext.data.dataset import Batch, DataError
from ospnext.data.loader import Loader
from ospnext.data.sampler import Progress, Sampler
from ospnext.data.store import StoreError
from ospnext.models.text import encode_tokens
from ospnext.models.video_vae import encode_video
from ospnext.parallel.circle import Circle
from ospnext.train.clips import LatentClips
from ospnext.train.loop import seed_of
from ospnext.train.noise import Noisy, add_noise
from ospnext.train.settings import NoiseConfig


class Fed(NamedTuple):
    """A micro-batch on the device.

    Attributes:
        noisy: normalised latents on their way to noise, ``[B, C, t, h, w]``.
        text: embeddings ``[B, L, D]``, or token ids ``[B, L]`` that are still to be encoded.
    """

    noisy: Noisy
    text: Tensor

    @property
    def shape(self) -> torch.Size:
        """Of the latents."""
        return self.noisy.x_t.shape


class Feed(Protocol):
    """Endless micro-batches, with a state as ``train.state.Data``."""

    def take(self) -> Fed:
        """The next one."""

    def prepare(self) -> None:
        """Do what the host can do for it while the device is busy; the state stays that of the last one taken."""

    def state_dict(self) -> dict[str, Any]:
        """Where the last one left off."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after ``state``."""


class RenderedFeed:
    """Clips of the shapes world that lie on the device, in token ids.

    Args:
        clips: all of them.
        sampler: of this rank's share.
        seed: of wordings and noise.
        noise: how noise levels are drawn.
    """

    def __init__(self, clips: LatentClips, sampler: Sampler, seed: int, noise: NoiseConfig) -> None:
        self.clips, self.sampler, self.seed, self.noise = clips, sampler, seed, noise
        self.progress = sampler.start
        self._ahead: tuple[Fed, Progress] | None = None

    def take(self) -> Fed:
        """The next micro-batch."""
        (fed, self.progress), self._ahead = self._ahead or self._draw(), None
        return fed

    def prepare(self) -> None:
        """Draw the next micro-batch: seeding each of some hundred clips' numbers takes the host many milliseconds."""
        self._ahead = self._ahead or self._draw()

    def _draw(self) -> tuple[Fed, Progress]:
        draws, progress = self.sampler.step(self.progress)
        latents, ids = self.clips.take(draws, self.seed)
        seeds = [seed_of(self.seed, draw.epoch, draw.clip) for draw in draws]
        return Fed(add_noise(latents, seeds, self.noise), ids), progress

    def state_dict(self) -> dict[str, Any]:
        """Where the last one left off."""
        return self.sampler.state_dict(self.progress)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after ``state``; raises ValueError where it is of other clips."""
        self.progress, self._ahead = self.sampler.load_state_dict(state), None


class LoaderFeed:
    """What a loader reads; the state is the loader's. Its workers read ahead."""

    def __init__(self, loader: Loader, seed: int, device: torch.device, noise: NoiseConfig) -> None:
        self.loader, self.seed, self.device, self.noise = loader, seed, device, noise

    def prepare(self) -> None:
        """Nothing."""

    def noisy(self, latents: Tensor, clips: Sequence[int]) -> Noisy:
        """The clips of the loader's last step, on their way to noise."""
        return add_noise(latents, [seed_of(self.seed, self.loader.epoch, clip) for clip in clips], self.noise)

    def state_dict(self) -> dict[str, Any]:
        """Where the last one left off."""
        return self.loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after ``state``; raises ValueError where it is of other data."""
        self.loader.load_state_dict(state)


class EncodedFeed(LoaderFeed):
    """Clips that were encoded beforehand: every process reads its own micro-batch."""

    def __init__(self, loader: Loader, seed: int, device: torch.device, noise: NoiseConfig) -> None:
        super().__init__(loader, seed, device, noise)
        self._batches: Iterator[Any] | None = None

    def take(self) -> Fed:
        """The next micro-batch."""
        if self._batches is None:
            self._batches = iter(self.loader)  # not earlier: a state may be loaded first
        batch = next(self._batches)
        return Fed(self.noisy(batch.latents.to(self.device), batch.clips), batch.text.to(self.device))


class Encoders(NamedTuple):
    """VAE and text encoder, frozen.

    ``offload`` keeps them in host memory between uses; a text encoder that is ``shared`` sees to that itself, and all
    processes encode together.
    """

    vae: AutoencoderKLWan
    text_encoder: UMT5EncoderModel
    offload: bool
    shared: bool = False


class _Turn(NamedTuple):
    """What a process says of the micro-batch it encoded."""

    shapes: tuple[torch.Size, torch.Size]
    clips: list[int]


class VideoFeed(LoaderFeed):
    """Videos that are read and encoded on the way; the processes of a video take turns.

    Args:
        loader: of the rank's share, the same for all processes of the video.
        seed: of the noise.
        device: of this process.
        noise: how noise levels are drawn.
        encoders: on ``device``, or in host memory to be fetched.
        circle: the processes of the video.
    """

    def __init__(
        self,
        loader: Loader,
        seed: int,
        device: torch.device,
        noise: NoiseConfig,
        encoders: Encoders,
        circle: Circle,
    ) -> None:
        super().__init__(loader, seed, device, noise)
        self.encoders, self.circle = encoders, circle
        self._batches: Iterator[Batch] | None = None
        self._own: tuple[Tensor, Tensor] | None = None
        self._turns: list[_Turn] = []

    def take(self) -> Fed:
        """The next micro-batch.

        Raises:
            DataError: one of the processes cannot read its videos.
        """
        if not self._turns:
            self._turns = self._encode_all()
        owner = self.circle.count - len(self._turns)
        turn = self._turns.pop(0)
        dtypes = (torch.float32, self.encoders.text_encoder.dtype)
        own = self._own if owner == self.circle.place else None
        latents, text = self.circle.hand_round(owner, own, turn.shapes, dtypes, self.device)
        self.loader.advance()
        return Fed(self.noisy(latents, turn.clips), text)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after ``state``; raises ValueError where it is of other data."""
        super().load_state_dict(state)
        self._batches, self._turns = None, []

    def _encode_all(self) -> list[_Turn]:
        """Encode this process's next micro-batch; what all of them did."""
        problem, batch = "", None
        try:
            if self._batches is None:
                self._batches = self.loader.share(self.circle.place, self.circle.count)
            batch = next(self._batches)
        except (DataError, StoreError, OSError) as error:
            problem = str(error)
        # Before anybody encodes: a shared encoder would wait for the one that has nothing to encode.
        if problem := next(filter(None, self.circle.gather(problem)), ""):
            raise DataError(problem)
        assert batch is not None
        self._own = self.encode(batch)
        return self.circle.gather(_Turn((self._own[0].shape, self._own[1].shape), batch.clips))

    @torch.no_grad()
    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Latents, float32, and text embeddings of a batch."""
        vae, text_encoder, offload, shared = self.encoders
        with torch.autocast(self.device.type, enabled=False):
            if offload:
                vae.to(self.device)
            latents = encode_video(vae, batch.pixel_values(self.device)).float()
            if offload:
                vae.to("cpu")
            if offload and not shared:
                text_encoder.to(self.device)
            text = encode_tokens(text_encoder, batch.ids.to(self.device), batch.mask.to(self.device))
            if offload and not shared:
                text_encoder.to("cpu")
        return latents, text
