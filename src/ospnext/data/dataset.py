"""Samples by ``Draw``: videos of a store (``wan_t2v``), or noise to try a run with (``t2v_random``).

All that is random about a sample (window, caption, whether it is dropped) is a function of (seed, epoch, index). So a
resumed run sees what the uninterrupted one would have, whatever the number of workers. A clip that cannot be read is
replaced by another of its group, drawn from the same numbers, a bounded number of times.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ospnext.data.buckets import Bucket
from ospnext.data.captions import choose, clean
from ospnext.data.frames import decode, frame_numbers
from ospnext.data.guard import Guard, Stuck
from ospnext.data.probe import ProbeError
from ospnext.data.records import ClipRecord
from ospnext.data.sampler import Draw
from ospnext.data.store import ClipStore
from ospnext.data.transforms import Size, fit, to_pixel_values

MOST_TRIES = 8
"""Clips that are tried for one sample before the run stops: that many bad ones in a row are no accident."""

RANDOM_LENGTH = 1_000_000
"""Samples of ``t2v_random`` in an epoch."""


class DataError(ValueError):
    """Data that cannot be used; its message names the clips and the way out."""


@dataclass(frozen=True)
class SampleSettings:
    """How a sample is made of a clip.

    Attributes:
        buckets: shapes of samples; a draw's ``group`` is a place in it.
        train_fps: frames per second of a sample, where ``sample_stride`` is None.
        sample_stride: frames of the file from one of the sample to the next.
        text_drop_ratio: share of captions left out.
        keep_chinese: let cleaning keep ideographs.
        timeout: seconds that reading a clip may take.
        seed: of all that is random.
        threads: that decode one clip.
    """

    buckets: tuple[Bucket, ...]
    train_fps: float | None = 16.0
    sample_stride: float | None = None
    text_drop_ratio: float = 0.1
    keep_chinese: bool = False
    timeout: float = 600.0
    seed: int = 0
    threads: int = 1


class BadClip(NamedTuple):
    """A clip that could not be read, and why: ``reason`` is a key of ``FAULTS``, or ``short``."""

    clip: int
    path: str
    reason: str
    detail: str


class Sample(NamedTuple):
    """One sample.

    Attributes:
        video: uint8 [3, T, H, W].
        caption: "" where it is left out.
        clip: index of its clip.
        bad: clips that were drawn before it and could not be read.
    """

    video: Tensor
    caption: str
    clip: int
    bad: tuple[BadClip, ...] = ()


class ClipDataset(Dataset):
    """Samples of a store's clips.

    Args:
        store: the clips.
        groups: indices of the clips of each bucket; replacements come from the same group.
        settings: how samples are made.
    """

    def __init__(self, store: ClipStore, groups: Sequence[np.ndarray], settings: SampleSettings) -> None:
        self.store, self.groups, self.settings = store, list(groups), settings
        self._guard = Guard()
        self._slow: dict[int, BadClip] = {}  # not to be waited for twice; other failures are quick, and may depend on
        # the window, so remembering them would make a sample depend on what this process has read before

    def __getitem__(self, draw: Draw) -> Sample:
        group, seed = self.groups[draw.group], self.settings.seed
        bad: list[BadClip] = []
        for attempt in range(MOST_TRIES):
            index = draw.clip
            if attempt:
                index = int(np.random.default_rng([seed, *draw[:2], attempt]).choice(group))
            found = self._slow.get(index) or self.read(Draw(draw.epoch, index, draw.group))
            if isinstance(found, Sample):
                return found._replace(bad=tuple(bad))
            if found.reason == "timeout":
                self._slow[index] = found
            bad.append(found)
        named = "; ".join(dict.fromkeys(f"{clip.path} ({clip.reason}: {clip.detail})" for clip in bad))
        raise DataError(
            f"{MOST_TRIES} clips in a row cannot be read: {named}. Are the files where the store says? "
            "`ospnext data check` looks at a sample of them, `ospnext data build` leaves out those that are damaged"
        )

    def read(self, draw: Draw) -> Sample | BadClip:
        """The sample of a draw, or why its clip cannot be read."""
        clip, rng = self.store[draw.clip], np.random.default_rng([self.settings.seed, *draw[:2]])
        which = choose(clip.captions, rng, self.settings.text_drop_ratio)
        caption = "" if which is None else clean(clip.captions[which], self.settings.keep_chinese)
        bucket, seconds = self.settings.buckets[draw.group], self.settings.timeout
        deadline = time.monotonic() + seconds
        try:
            video = self._guard.call(lambda: read_clip(clip, bucket, self.settings, rng, deadline), seconds)
        except ProbeError as error:
            return BadClip(draw.clip, clip.path, error.reason, error.detail)
        except Stuck as error:
            return BadClip(draw.clip, clip.path, "timeout", str(error))
        except OSError as error:
            return BadClip(draw.clip, clip.path, "unreadable", error.strerror or str(error))
        return Sample(video, caption, draw.clip)


def read_clip(
    clip: ClipRecord, bucket: Bucket, settings: SampleSettings, rng: np.random.Generator, deadline: float
) -> Tensor:
    """A random window of a clip in the shape of ``bucket``, uint8 [3, T, H, W].

    Raises:
        ProbeError: the clip cannot be read, is too short, or has another size than its record says.
        OSError: the file cannot be opened.
    """
    numbers = frame_numbers(clip, bucket.num_frames, settings.train_fps, settings.sample_stride, rng)
    target, displayed = Size(bucket.height, bucket.width), Size(clip.height, clip.width)
    video = torch.empty(3, bucket.num_frames, *target, dtype=torch.uint8)
    for picture in decode(clip.path, numbers.tolist(), threads=settings.threads, deadline=deadline):
        if (picture.height, picture.width) != displayed:
            found = f"{picture.height} x {picture.width}, not {clip.height} x {clip.width} as the store says"
            raise ProbeError("unreadable", f"frame {picture.number} is {found}")
        frame = fit(picture.pixels, displayed, clip.crop, target)
        for place in np.flatnonzero(numbers == picture.number):
            video[:, place] = frame
    return video


class RandomDataset(Dataset):
    """Noise in the shape of samples, with empty captions: to try a run without data, never to learn from."""

    def __init__(self, settings: SampleSettings) -> None:
        self.settings = settings

    def __getitem__(self, draw: Draw) -> Sample:
        bucket = self.settings.buckets[draw.group]
        rng = np.random.default_rng([self.settings.seed, *draw[:2]])
        # A normal in [-1, 1] pixel values, as the reference's; what lies beyond three deviations is clipped.
        noise = rng.standard_normal((3, *bucket), dtype=np.float32)
        video = torch.from_numpy(((noise / 3).clip(-1, 1) * 127.5 + 127.5).round().astype(np.uint8))
        return Sample(video, "", draw.clip)


class Batch(NamedTuple):
    """Samples of one shape.

    Attributes:
        video: uint8 [B, 3, T, H, W]; ``pixel_values`` makes it what the VAE reads.
        ids: token ids [B, L], int64.
        mask: 1 where there is a token, [B, L], int64.
        captions: B texts, "" where left out.
        clips: their indices.
        bad: clips that could not be read and were replaced.
    """

    video: Tensor
    ids: Tensor
    mask: Tensor
    captions: list[str]
    clips: list[int]
    bad: list[BadClip]

    def pixel_values(self, device: torch.device | str = "cpu") -> Tensor:
        """float32 [B, 3, T, H, W] in [-1, 1] on ``device``: it travels as bytes and becomes numbers there."""
        return to_pixel_values(self.video.to(device, non_blocking=True))


@dataclass(frozen=True)
class Collate:
    """Stacks samples and turns captions into tokens, padded or cut to ``text_len``; runs in the workers."""

    tokenizer: PreTrainedTokenizerBase
    text_len: int

    def __call__(self, samples: list[Sample]) -> Batch:
        captions = [sample.caption for sample in samples]
        tokens = self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=self.text_len, return_tensors="pt"
        )
        return Batch(
            torch.stack([sample.video for sample in samples]),
            tokens.input_ids,
            tokens.attention_mask,
            captions,
            [sample.clip for sample in samples],
            [clip for sample in samples for clip in sample.bad],
        )


CollateFunction = Callable[[list], NamedTuple]
