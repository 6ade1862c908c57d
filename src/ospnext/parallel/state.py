"""States of a run on disk: sharded over its processes, written while training goes on, whole or not at all.

    states = StateWriter(Path("output"), keep=3)
    states.save(step, tensors, {"step": step})  # copies the tensors, returns, writes behind the run's back
    states.finish()  # waits until it is there

    folder = newest(Path("output"))
    record = load(folder, tensors)  # in place, on any number of processes, in any sharding

A state is the folder ``iter_{step:09d}``: torch's distributed checkpoint (DCP) of all tensors, ``record.json`` for
what is no tensor, and ``COMPLETE``, the SHA-256 of every file. It is written as a draft beside its place and renamed
when all processes have written and every byte is hashed, so a folder of that name is either whole or damaged since,
and ``load`` tells which. All processes see one file system.
"""

import hashlib
import io
import json
import logging
import os
import pickle
import shutil
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

RECORD = "record.json"
COMPLETE = "COMPLETE"
_METADATA = ".metadata"
_PREFIX = "iter_"
_FAILURES = (OSError, RuntimeError, ValueError, CheckpointException)  # the last is no Exception

logger = logging.getLogger(__name__)


class StateError(ValueError):
    """A state that cannot be written or taken; the message names its folder and the way out."""


# ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class StateWriter:
    """Writes states of one run, one at a time, in the background.

    All processes make it and call its methods together.

    Args:
        folder: of the run.
        keep: how many of the newest states stay; None keeps all.
    """

    def __init__(self, folder: Path, keep: int | None = None) -> None:
        self.folder, self.keep = folder, keep
        # A group of its own: collectives of the training's group would meet those of the writing thread.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._over: threading.Event | None = None  # set when the state that is being written is there, or is not
        self._error = ""

    def save(self, step: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Begin to write a state; waits for the one before it. A state of the same step that is there stays.

        Args:
            step: names the folder.
            tensors: plain (the same on all processes) or sharded, by name; they may change once this returns.
            record: JSON values, the same on all processes.

        Raises:
            StateError: the state before it could not be written. Older ones are untouched.
        """
        self.finish()
        final = self.folder / f"{_PREFIX}{step:09d}"
        if any(step_of(there) == step for there in states(self.folder)):  # under whatever spelling of the step
            return
        draft = self.folder / f".{final.name}.tmp"
        if self._rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
        problem = self._agree(lambda: draft.mkdir(parents=True) if self._rank == 0 else None)
        if problem:
            raise _unwritable(final, problem)
        writing = self._begin(tensors, draft)
        over = threading.Event()
        threading.Thread(target=self._publish, args=(writing, draft, final, dict(record), over)).start()
        self._over = over

    def finish(self) -> None:
        """Wait until the state that is being written is there. A wait that was interrupted can be taken up again.

        Raises:
            StateError: it could not be written.
        """
        if self._over is not None:
            self._over.wait()  # no join: Python 3.11 takes a thread for ended once Ctrl-C has broken off a join
            self._over = None
        if self._error:
            error, self._error = self._error, ""
            raise StateError(error)

    def _begin(self, tensors: Mapping[str, Tensor], draft: Path) -> Future:
        writer = FileSystemWriter(draft)
        if self._group is not None:
            saving = dcp.async_save(dict(tensors), storage_writer=writer, process_group=self._group)
            assert isinstance(saving, Future)
            return saving
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        pool = ThreadPoolExecutor(max_workers=1)
        saving = pool.submit(_save_alone, copies, writer)
        pool.shutdown(wait=False)
        return saving

    def _publish(
        self, writing: Future, draft: Path, final: Path, record: Mapping[str, Any], over: threading.Event
    ) -> None:
        """In the background: wait for the files, hash them, rename the draft, remove what is too old."""

        def hash_own() -> None:
            writing.result()
            hashes = {path.name: _sha256(path) for path in sorted(draft.glob(f"__{self._rank}_*"))}
            _write(draft / f".hashes.{self._rank}", json.dumps(hashes))

        def publish() -> None:
            if self._rank:
                return
            _write(draft / RECORD, json.dumps(record, indent=2) + "\n")
            hashes = {name: _sha256(draft / name) for name in (_METADATA, RECORD)}
            for part in sorted(draft.glob(".hashes.*")):
                hashes |= json.loads(part.read_text())
                part.unlink()
            _write(draft / COMPLETE, json.dumps(hashes, indent=2) + "\n")
            os.replace(draft, final)
            _sync(self.folder)
            self._prune()

        try:
            problem = self._agree(hash_own) or self._agree(publish)
            if problem:
                if self._rank == 0:
                    shutil.rmtree(draft, ignore_errors=True)
                self._error = str(_unwritable(final, problem))
        finally:
            over.set()

    def _agree(self, work: Callable[[], None]) -> str:
        """Do a piece of work on every process; returns the first problem of any, the same everywhere."""
        problem = ""
        try:
            work()
        except _FAILURES as error:
            problem = f"{_line(error)}" + (f" (process {self._rank})" if self._group is not None else "")
        if self._group is None:
            return problem
        problems: list[str] = [""] * dist.get_world_size(self._group)
        dist.all_gather_object(problems, problem, group=self._group)
        return next(filter(None, problems), "")

    def _prune(self) -> None:
        if self.keep is None:
            return
        for old in complete(self.folder)[: -self.keep]:
            doomed = old.with_name(f".{old.name}.old")
            shutil.rmtree(doomed, ignore_errors=True)  # what a run that was killed here has left
            try:
                os.replace(old, doomed)  # at once no state any more, however long removing takes
            except OSError as error:  # the new state is there all the same
                logger.warning("%s cannot be removed (%s): remove it and %s", old, _line(error), doomed.name)
            shutil.rmtree(doomed, ignore_errors=True)


def _save_alone(tensors: dict[str, Tensor], writer: FileSystemWriter) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.save(tensors, storage_writer=writer, no_dist=True)


def _unwritable(final: Path, problem: str) -> StateError:
    return StateError(
        f"cannot save {final}: {problem}; make room, or give another output_dir (states before it are untouched: the "
        "same command goes on from the newest)"
    )


# ── finding ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def states(folder: Path) -> list[Path]:
    """Folders with a state's name, oldest first, whatever is in them."""
    return sorted((path for path in folder.glob(f"{_PREFIX}*") if _is_step(path.name)), key=step_of)


def step_of(state: Path) -> int:
    """The step in a state's name."""
    return int(state.name.removeprefix(_PREFIX))


def _is_step(name: str) -> bool:
    number = name.removeprefix(_PREFIX)
    return name.startswith(_PREFIX) and number.isascii() and number.isdecimal()


def complete(folder: Path) -> list[Path]:
    """States that were written to their end, oldest first."""
    return [path for path in states(folder) if (path / COMPLETE).is_file()]


def newest(folder: Path) -> Path | None:
    """The state to go on from, or None where there is none.

    Raises:
        StateError: the newest folder with a state's name is none: nobody can tell what it was to be; or two folders
            name the same step.
    """
    found = states(folder)
    for one, other in pairwise(found):
        if step_of(one) == step_of(other):
            raise StateError(f"{one} and {other.name} beside it both name step {step_of(one)}: remove or rename one")
    if found and not (found[-1] / COMPLETE).is_file():
        raise StateError(
            f"{found[-1]} is not complete: it has no file {COMPLETE}; remove or rename it to go on from the state "
            "before it"
        )
    return found[-1] if found else None


def sweep(folder: Path) -> None:
    """Remove what killed runs left half written or half removed; nobody may be writing to the folder."""
    for path in folder.glob(f".{_PREFIX}*"):
        if path.suffix in (".tmp", ".old") and _is_step(path.stem[1:]):
            shutil.rmtree(path, ignore_errors=True)


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_record(state: Path) -> dict[str, Any]:
    """What a state holds besides tensors, checked against its hash first.

    Raises:
        StateError: it is incomplete or damaged.
    """
    try:
        hashes, written = _hashes(state), (state / RECORD).read_bytes()
        if hashlib.sha256(written).hexdigest() != hashes[RECORD]:
            raise _altered(RECORD)
        return _mapping(RECORD, written)
    except (OSError, ValueError) as error:
        raise _damaged(state, _line(error)) from error


def load(state: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fill ``tensors`` from a state, every file checked against its hash first; all processes call it together.

    Args:
        state: a folder of ``newest``.
        tensors: plain or sharded, by name: exactly those that were saved, in their shapes.

    Returns:
        The record.

    Raises:
        StateError: a file is missing or damaged, or the state is of another model. Nothing has changed.
    """
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    if problem := _same_everywhere(_check_files(state, rank, ranks)):
        raise _damaged(state, problem)
    reader = _TensorReader(state)
    saved = {
        name: entry.size
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    _compare(state, {name: tensor.shape for name, tensor in tensors.items()}, saved)
    _fill(state, tensors, reader, alone=not dist.is_initialized())
    return read_record(state)


def read(state: Path, prefix: str) -> dict[str, Tensor]:
    """Tensors of a state whose names begin with ``prefix``, whole and on the CPU, by what follows it; in one process.

    Raises:
        StateError: a file is missing or damaged.
    """
    if problem := _check_files(state):
        raise _damaged(state, problem)
    reader = _TensorReader(state)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and name.startswith(prefix)
    }
    _fill(state, tensors, reader, alone=True)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _fill(state: Path, tensors: Mapping[str, Tensor], reader: FileSystemReader, alone: bool) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(dict(tensors), storage_reader=reader, no_dist=alone)
    except _FAILURES as error:
        raise _damaged(state, _line(error)) from error


class _TensorReader(FileSystemReader):
    """DCP's reader, whose metadata is a pickle: only what describes tensors is let in."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / _METADATA
        metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise StateError(f"{path}: {name} is no tensor and was not loaded")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    _ALLOWED = frozenset(
        [
            *(("torch.distributed.checkpoint.metadata", name) for name in (
                "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex",
                "StorageMeta", "_MEM_FORMAT_ENCODING",
            )),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.serialization", "_get_layout"),
            ("torch", "Size"),
            *(("pathlib", name) for name in ("PosixPath", "WindowsPath", "PurePosixPath")),
            ("pathlib._local", "PosixPath"),  # where Python 3.13 keeps it
        ]
    )  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        # Members of _MEM_FORMAT_ENCODING stand under their class's qualified name in some versions of torch.
        raise StateError(f"a state's .metadata asks for {module}.{name}: it was not written by this program")


def _check_files(state: Path, rank: int = 0, ranks: int = 1) -> str:
    """What is wrong with this process's share of a state's files; an empty string if nothing is."""
    try:
        hashes = _hashes(state)
        for name in sorted(hashes)[rank::ranks]:
            if _sha256(state / name) != hashes[name]:
                raise _altered(name)
    except (OSError, ValueError) as error:
        return _line(error)
    return ""


def _hashes(state: Path) -> dict[str, Any]:
    """The hashes in ``COMPLETE``, of every file that a state has; raises OSError, or ValueError where it is damaged."""
    hashes = _mapping(COMPLETE, (state / COMPLETE).read_bytes())
    files = {RECORD, _METADATA, *(path.name for path in state.glob("__*"))}
    if unnamed := sorted(files - hashes.keys()):
        raise ValueError(f"{COMPLETE} does not name {', '.join(unnamed[:3])}")
    return hashes


def _mapping(name: str, written: bytes) -> dict[str, Any]:
    """The mapping that a file of JSON holds; raises ValueError where it holds none."""
    try:
        found = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise _altered(name) from error
    if not isinstance(found, dict):
        raise _altered(name)
    return found


def _altered(name: str) -> ValueError:
    return ValueError(f"{name} is not what was written")


def _same_everywhere(problem: str) -> str:
    if not dist.is_initialized():
        return problem
    problems = [""] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next(filter(None, problems), "")


def _compare(state: Path, ours: Mapping[str, Sequence[int]], theirs: Mapping[str, Sequence[int]]) -> None:
    names = sorted(ours.keys() ^ theirs.keys())
    differing = [name for name in ours.keys() & theirs.keys() if tuple(ours[name]) != tuple(theirs[name])]
    if names:
        problem = f"{len(names)} tensors are in one of them only, such as {', '.join(names[:3])}"
    elif differing:
        name = min(differing)
        problem = f"{len(differing)} tensors differ in shape, such as {name}: {list(theirs[name])} there, "
        problem += f"{list(ours[name])} in this run"
    else:
        return
    raise StateError(
        f"{state} is the state of another run: {problem}; give another output_dir, or remove the {_PREFIX} folders in "
        "this one to start over"
    )


def _damaged(state: Path, problem: str) -> StateError:
    return StateError(
        f"{state} is incomplete or damaged ({problem}): use the state before it; a run goes on from there once this "
        "folder is removed"
    )


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _line(error: BaseException) -> str:
    """An error in one short line; some have no words."""
    if isinstance(error, CheckpointException):
        errors: Iterable[Any] = error.failures.values()
        error = next((e[0] if isinstance(e, tuple) else e for e in errors), error)
    return " ".join(str(error).split())[:200] or type(error).__name__
