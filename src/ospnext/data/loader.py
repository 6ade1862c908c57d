"""The loader: endless batches for one data-parallel rank, with a state that resumes at the very next sample.

    loader = open_loader("wan_t2v", "data/clips", settings, tokenizer, text_len=512, batch_size=1, rank=3, world=8)
    for batch in loader:  # crosses epochs
        pixels = batch.pixel_values(device)
        ...
        state = loader.state_dict()  # after this batch, whatever the workers have read ahead

Why torch's DataLoader and not torchdata's StatefulDataLoader: that one saves the state of every worker too, which fits
only as many workers. Here samples are functions of (seed, epoch, index) and the order one of a ``Progress``: a few
numbers, the same on all ranks, say it all. ``sampler.Steps`` resumes in a StatefulDataLoader in the same way.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from ospnext.data.buckets import assign
from ospnext.data.dataset import (
    RANDOM_LENGTH,
    BadClip,
    ClipDataset,
    Collate,
    CollateFunction,
    DataError,
    RandomDataset,
    SampleSettings,
)
from ospnext.data.sampler import Draw, Sampler, Steps
from ospnext.data.store import ClipStore, StoreError

logger = logging.getLogger(__name__)

RANDOM_BANNER = (
    "t2v_random: THE DATA IS NOISE. This run tries the machinery and learns nothing; to train on videos set "
    "data_config.dataset_name=wan_t2v and data_config.dataset_config.metafile_or_dir_path"
)


class BatchLike(Protocol):
    """What a batch of any kind tells the loader."""

    clips: list[int]
    bad: list[BadClip]


@dataclass
class Statistics:
    """What this rank has read since it started.

    Attributes:
        samples: taken.
        replaced: reads that failed and were made up for by another clip.
        reasons: of those, how many each.
        bad: the clips that failed, by path; each is named once in the log.
    """

    samples: int = 0
    replaced: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    bad: dict[str, BadClip] = field(default_factory=dict)

    def add(self, batch: BatchLike) -> None:
        """Count a batch."""
        self.samples += len(batch.clips)
        self.replaced += len(batch.bad)
        for clip in batch.bad:
            self.reasons[clip.reason] += 1
            if clip.path not in self.bad:
                self.bad[clip.path] = clip
                logger.warning("clip %s is replaced (%s: %s)", clip.path, clip.reason, clip.detail)


class Loader:
    """Endless batches of ``dataset`` in the order of ``sampler``.

    Args:
        dataset: samples by ``Draw``.
        sampler: of this rank.
        collate: from samples to a batch; runs in the workers.
        identity: what the data is, such as the store's fingerprint: a state of other data is refused.
        num_workers: processes that read ahead; 0 reads in this one.
        pin_memory: let batches lie where accelerators copy fastest from.
        prefetch: batches that each worker reads ahead.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: Sampler,
        collate: CollateFunction,
        identity: str,
        num_workers: int = 0,
        pin_memory: bool = False,
        prefetch: int = 2,
    ) -> None:
        self.dataset, self.sampler, self.identity = dataset, sampler, identity
        self.statistics = Statistics()
        self.progress = sampler.start
        self._arguments: dict[str, Any] = {
            "collate_fn": _Collated(collate),
            "num_workers": num_workers,
            "pin_memory": pin_memory,
        }
        self._arguments["generator"] = torch.Generator()  # else a number of the training's own would be drawn
        if num_workers:
            # A fork would inherit the accelerator's context and other threads' locks.
            self._arguments |= {"prefetch_factor": prefetch, "multiprocessing_context": "forkserver"}

    @property
    def epoch(self) -> int:
        """The epoch of the last batch."""
        return self.progress.epoch

    def __iter__(self) -> Iterator[Any]:
        """Batches from the present state on. Start anew after ``load_state_dict``; one iteration at a time.

        Raises:
            DataError: too many clips in a row cannot be read, or a process that reads them died.
            StoreError: the store was replaced or is damaged.
        """
        for batch in self.share(0, 1):
            self.advance()
            yield batch

    def share(self, member: int, members: int) -> Iterator[Any]:
        """Batches of every ``members``-th step from the present state on, the ``member``-th first.

        For processes that take turns: the state stays where it is, ``advance`` moves it step by step.

        Raises:
            DataError, StoreError: as iteration.
        """
        ahead = Steps(self.sampler, self.progress, member, members)
        batches = iter(DataLoader(_Attempts(self.dataset), batch_sampler=ahead, **self._arguments))
        while True:
            with naming_dead_workers():
                batch = next(batches)
            if isinstance(batch, Exception):
                raise batch
            self.statistics.add(batch)
            yield batch

    def advance(self) -> None:
        """A step was taken by all ranks."""
        self.progress = self.sampler.step(self.progress).after

    def state_dict(self) -> dict[str, Any]:
        """Where the last batch left off, in plain values; the same on every rank."""
        return {"data": self.identity, **self.sampler.state_dict(self.progress)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after ``state``, which any number of ranks, workers and any batch size may have saved.

        Raises:
            ValueError: it is of other data, another seed or other buckets.
        """
        if (saved := state.get("data", "data of another kind")) != self.identity:
            raise ValueError(
                f"the data's state was saved with {saved}, but this run reads {self.identity}: the order would "
                "mean nothing; name the data of the first run, or start anew"
            )
        self.progress = self.sampler.load_state_dict(state)


@contextmanager
def naming_dead_workers() -> Iterator[None]:
    """What torch says of a worker that was killed, as an error of the data with the way out."""
    try:
        yield
    except (RuntimeError, EOFError, ConnectionError) as error:  # the last two: it was about to hand over a batch
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        said = " ".join(str(error).split())[:160] or type(error).__name__
        raise DataError(
            f"a process that reads clips died ({said}): give it more memory, more shared "
            "memory (docker run --shm-size=8g), or set num_workers=0 to see at which clip it happens"
        ) from error


class _Attempts(Dataset):
    """``dataset`` with errors of the data as values: what a worker raises comes with its whole traceback as text."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, draw: Draw) -> Any:
        try:
            return self.dataset[draw]
        except (DataError, StoreError, OSError) as error:
            return error


@dataclass(frozen=True)
class _Collated:
    """A batch, or the first error among the samples."""

    collate: CollateFunction

    def __call__(self, samples: list[Any]) -> Any:
        error = next((sample for sample in samples if isinstance(sample, Exception)), None)
        return self.collate(samples) if error is None else error


def open_loader(
    dataset_name: str,
    metafile_or_dir_path: str | None,
    settings: SampleSettings,
    tokenizer: PreTrainedTokenizerBase,
    text_len: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    *,
    shuffle: bool = True,
    drop_last: bool = True,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Loader:
    """The loader of a data set by its name: ``wan_t2v`` or ``t2v_random``.

    Args:
        dataset_name: videos of the store at ``metafile_or_dir_path``, or noise.
        metafile_or_dir_path: what ``ospnext data build`` wrote.
        settings: how samples are made; one bucket, or several.
        tokenizer, text_len: of the text encoder.
        batch_size: samples of this rank in a step.
        rank, world: of the data-parallel ranks; those that share a video are one.
        shuffle, drop_last: as in ``Sampler``.
        num_workers, pin_memory: as in ``Loader``.

    Raises:
        ValueError: the settings contradict each other, there is no store, or no clip is long enough. All ranks find
            the same.
    """
    if dataset_name not in ("wan_t2v", "t2v_random"):
        raise ValueError(f"dataset_name is {dataset_name!r}: use wan_t2v (videos) or t2v_random (noise)")
    dataset: Dataset
    if dataset_name == "t2v_random":
        if metafile_or_dir_path is not None:
            raise ValueError(
                f"dataset_name is t2v_random, which is noise, but metafile_or_dir_path names {metafile_or_dir_path}: "
                "set dataset_name=wan_t2v to train on it, or leave the path out"
            )
        if rank == 0:
            logger.warning(RANDOM_BANNER)
        share = np.arange(RANDOM_LENGTH) % len(settings.buckets)
        groups = [np.flatnonzero(share == place) for place in range(len(settings.buckets))]
        dataset, identity = RandomDataset(settings), "noise"
    else:
        if metafile_or_dir_path is None:
            raise ValueError(
                "dataset_name is wan_t2v, but metafile_or_dir_path is missing: name the store that `ospnext data "
                "build` wrote"
            )
        store = ClipStore(metafile_or_dir_path)
        groups, left_out = assign(store, settings.buckets, settings.train_fps, settings.sample_stride)
        if left_out and rank == 0:
            logger.warning("%d of %d clips are too short for every sample shape and left out", left_out, len(store))
        dataset, identity = ClipDataset(store, groups, settings), f"store {store.fingerprint}"
    sampler = Sampler(groups, batch_size, rank, world, settings.seed, shuffle, drop_last)
    return Loader(dataset, sampler, Collate(tokenizer, text_len), identity, num_workers, pin_memory)
