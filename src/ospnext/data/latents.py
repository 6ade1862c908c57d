"""Encoded clips: what ``ospnext data encode`` writes and training reads instead of videos.

A folder of safetensors shards, ``empty.safetensors`` with the embedding of no caption, and ``index.json``, which is
written last: without it the folder is not finished. A shard holds, for each clip ``c``, latents ``c.latents.w`` of
every window ``w`` [C, t, h, w] and embeddings ``c.text.k`` of every caption ``k`` [l, D], cut to its l tokens.

Every file carries the fingerprint of the settings: shapes and rate, the clips, the weights of both encoders, the
tokenizer. Files of other settings are never mixed, and training refuses a folder that was made for another model.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ospnext.data.captions import choose
from ospnext.data.dataset import BadClip, DataError
from ospnext.data.loader import Loader
from ospnext.data.sampler import Draw, Sampler

FORMAT = "ospnext latents"
VERSION = 1
INDEX = "index.json"
EMPTY = "empty.safetensors"


class Encoded(NamedTuple):
    """One encoded clip: its number in the store, the ``group`` of its shape, and what was made of it.

    ``latents`` float [C, t, h, w] of each window, ``texts`` [l, D] of each caption.
    """

    clip: int
    group: int
    latents: list[Tensor]
    texts: list[Tensor]


# ── fingerprints ──────────────────────────────────────────────────────────────────────────────────────────────────────


def module_fingerprint(module: nn.Module) -> str:
    """SHA-256 of a module's weights by name, in the numbers they are loaded in, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what a tokenizer makes of a sample of texts, and of its class and size."""
    texts = [
        "",
        "A large red star floats upwards on a white background.",
        "一只猫 at 5:30, über-naïve; 1,024 €",
        "\n\t ",
    ]
    said = [type(tokenizer).__name__, len(tokenizer), tokenizer(texts).input_ids]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def settings_fingerprint(settings: Mapping[str, Any]) -> str:
    """SHA-256 of plain settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def require_same(made: Mapping[str, Any], wanted: Mapping[str, Any], what: str, way_out: str) -> None:
    """Compare the settings that both have.

    Raises:
        DataError: some differ; names each with both values.
    """
    differing = [
        f"{key} is {_short(made[key])} there, {_short(wanted[key])} here"
        for key in wanted
        if key in made and made[key] != wanted[key]
    ]
    if differing:
        raise DataError(f"{what} with other settings: {'; '.join(differing)}: {way_out}")


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] + "..." if len(text) == 64 else text


# ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"clips-{number:08d}.safetensors"


def write_shard(path: Path, clips: Iterable[Encoded], bad: Iterable[BadClip], fingerprint: str) -> None:
    """Write a shard; it appears whole or not at all."""
    tensors: dict[str, Tensor] = {}
    places: list[tuple[int, int]] = []
    for item in clips:
        places.append((item.clip, item.group))
        tensors |= {f"{item.clip}.latents.{w}": tensor.contiguous() for w, tensor in enumerate(item.latents)}
        tensors |= {f"{item.clip}.text.{k}": tensor.contiguous() for k, tensor in enumerate(item.texts)}
    said = {"clips": places, "bad": [list(clip) for clip in bad]}
    write_tensors(path, tensors, fingerprint, said)


def write_tensors(path: Path, tensors: dict[str, Tensor], fingerprint: str, said: Mapping[str, Any]) -> None:
    """Write tensors with the fingerprint and ``said``; the file appears whole or not at all."""
    metadata = {"format": FORMAT, "version": str(VERSION), "fingerprint": fingerprint, "said": json.dumps(said)}
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            save_file(tensors, partial, metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error})") from error
        partial.chmod(0o666 & ~_umask())
        _replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_index(folder: Path, settings: Mapping[str, Any], shards: Sequence[str]) -> tuple[int, int]:
    """Write ``index.json`` from the headers of all shards; returns how many clips there are, and how many were bad."""
    clips, bad = [], 0
    for number, name in enumerate(shards):
        said = read_said(folder / name, settings_fingerprint(settings))
        assert said is not None
        clips += [[clip, group, number] for clip, group in said["clips"]]
        bad += len(said["bad"])
    index = {"format": FORMAT, "version": VERSION, "settings": dict(settings), "shards": list(shards), "clips": clips}
    partial = folder / f".{INDEX}.{os.getpid()}.part"
    try:
        partial.write_text(json.dumps(index), encoding="utf-8")
        _replace(partial, folder / INDEX)
    finally:
        partial.unlink(missing_ok=True)
    return len(clips), bad


def read_said(path: Path, fingerprint: str | None = None) -> dict[str, Any] | None:
    """What a file says of itself; None if it is not there or not readable.

    Raises:
        DataError: it is of other settings than those of ``fingerprint``.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (FileNotFoundError, SafetensorError):
        return None
    if fingerprint is not None and metadata.get("fingerprint") != fingerprint:
        raise DataError(f"{path} was made with other settings: give another save_path, or remove the folder")
    return json.loads(metadata["said"]) if metadata.get("format") == FORMAT else None


def _replace(partial: Path, path: Path) -> None:
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class LatentSample(NamedTuple):
    """One sample: ``latents`` float32 [C, t, h, w], ``text`` [l, D] without padding, and the index of its clip."""

    latents: Tensor
    text: Tensor
    clip: int


class LatentBatch(NamedTuple):
    """Samples of one shape.

    Attributes:
        latents: normalised, float32 [B, C, t, h, w].
        text: embeddings [B, L, D], zero where there is no token.
        mask: 1 where there is a token, [B, L], int64.
        clips: their indices.
        bad: none; clips that could not be read were left out when the folder was made.
    """

    latents: Tensor
    text: Tensor
    mask: Tensor
    clips: list[int]
    bad: list[BadClip]


class LatentDataset(Dataset):
    """Samples of a folder of encoded clips, by ``Draw``; epoch e shows window e mod ``windows``.

    Args:
        folder: what ``ospnext data encode`` wrote.
        seed: of the choice of captions.
        text_drop_ratio: share of captions left out.
        expected: settings that the folder must have been made with; those it does not know are not compared.

    Raises:
        DataError: there is no such folder, it is not finished, or it was made with other settings.
    """

    def __init__(
        self, folder: str | Path, seed: int, text_drop_ratio: float, expected: Mapping[str, Any] | None = None
    ) -> None:
        self.folder, self.seed, self.text_drop_ratio = Path(folder), seed, text_drop_ratio
        index = read_index(self.folder)
        self.settings: dict[str, Any] = index["settings"]
        require_same(
            self.settings, expected or {}, f"{self.folder} was made", "encode the clips anew, or train as it was made"
        )
        self.fingerprint = settings_fingerprint(self.settings)
        self.shards: list[str] = index["shards"]
        table = np.array(index["clips"], dtype=np.int64).reshape(-1, 3)
        self.groups = [table[table[:, 1] == place, 0] for place in range(len(self.settings["buckets"]))]
        self._shard_of = {int(clip): int(shard) for clip, _, shard in table}
        with _reading(self.folder / EMPTY), safe_open(self.folder / EMPTY, "pt") as file:
            self.empty: Tensor = file.get_tensor("text")

    def __getitem__(self, draw: Draw) -> LatentSample:
        rng = np.random.default_rng([self.seed, *draw[:2]])
        name = self.shards[self._shard_of[draw.clip]]
        with _reading(self.folder / name), safe_open(self.folder / name, "pt") as file:
            texts = sorted(key for key in file.keys() if key.startswith(f"{draw.clip}.text."))  # noqa: SIM118
            which = choose(texts, rng, self.text_drop_ratio)
            text = self.empty if which is None else file.get_tensor(f"{draw.clip}.text.{which}")
            latents = file.get_tensor(f"{draw.clip}.latents.{draw.epoch % self.settings['windows']}")
        return LatentSample(latents.float(), text, draw.clip)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What a missing or damaged file says, with the way out."""
    try:
        yield
    except (FileNotFoundError, SafetensorError) as error:
        raise DataError(f"{path}: missing or damaged ({error}): `ospnext data encode` makes it again") from error


@dataclass(frozen=True)
class LatentCollate:
    """Stacks samples; embeddings are padded with zeros to ``text_len`` tokens."""

    text_len: int

    def __call__(self, samples: list[LatentSample]) -> LatentBatch:
        text = samples[0].text.new_zeros(len(samples), self.text_len, samples[0].text.shape[-1])
        mask = torch.zeros(len(samples), self.text_len, dtype=torch.int64)
        for place, sample in enumerate(samples):
            text[place, : len(sample.text)] = sample.text
            mask[place, : len(sample.text)] = 1
        latents = torch.stack([sample.latents for sample in samples])
        return LatentBatch(latents, text, mask, [sample.clip for sample in samples], [])


def read_index(folder: Path) -> dict[str, Any]:
    """The ``index.json`` of a finished folder.

    Raises:
        DataError: there is none, or it is of another kind.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{folder}: no finished folder of encoded clips (there is no {INDEX}): run `ospnext data encode`, which "
            "goes on where it was stopped"
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(f"{folder / INDEX}: not readable ({error}): encode the clips anew") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT or index.get("version") != VERSION:
        raise DataError(f"{folder / INDEX}: not of this program's version {VERSION}: encode the clips anew")
    return index


def open_latent_loader(
    folder: str | Path,
    expected: Mapping[str, Any] | None,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    *,
    seed: int = 0,
    text_drop_ratio: float = 0.1,
    shuffle: bool = True,
    drop_last: bool = True,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Loader:
    """The loader of encoded clips; order, state and arguments as ``loader.open_loader``'s.

    Raises:
        ValueError: the folder is not there, not finished, or made with other settings than ``expected``.
    """
    dataset = LatentDataset(folder, seed, text_drop_ratio, expected)
    sampler = Sampler(dataset.groups, batch_size, rank, world, seed, shuffle, drop_last)
    collate = LatentCollate(dataset.settings["text_len"])
    return Loader(dataset, sampler, collate, f"latents {dataset.fingerprint}", num_workers, pin_memory)
