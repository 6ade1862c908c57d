"""The store: one LMDB file of clips, JSON values under the clip's number in 12 digits.

A store is a folder with ``data.mdb``; reports of the build lie beside it. The file is written under another name and
takes its place in one step, so a reader sees the old store or the new one, whole, and never both. Under ``meta`` it
keeps its format, its version, how many clips it holds and a fingerprint of them.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lmdb

from ospnext.data.records import ClipRecord

FORMAT = "ospnext clips"
VERSION = 1
FILE = "data.mdb"
META = b"meta"
_BATCH = 4096  # clips in one transaction
_FIRST_SIZE = 2**24  # bytes the map starts with; it doubles when it is full
_ENVIRONMENTS: dict[tuple[int, int, int], lmdb.Environment] = {}  # by process and file


class StoreError(ValueError):
    """A store that cannot be read; its message names the folder and the way out."""


class ClipStore:
    """The clips of a store, by number. Read-only; safe to pickle, fork and spawn: each process opens the file.

    Args:
        path: the folder of the store, or a folder that holds exactly one.

    Raises:
        StoreError: there is no store, there are several, or it is none of ours.
    """

    fingerprint: str
    """SHA-256 of the clips in their order, in hexadecimal digits."""

    def __init__(self, path: str | Path) -> None:
        self.path = find_store(path)
        self._opened: tuple[int, lmdb.Environment] | None = None
        meta = self._meta()
        self._length = int(meta["count"])
        self.fingerprint = str(meta["fingerprint"])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> ClipRecord:
        if not -self._length <= i < self._length:
            raise IndexError(f"clip {i} of a store of {self._length}")
        raw = self._get(_key(i % self._length))
        if raw is None:
            raise StoreError(f"{self.path}: clip {i} is not there: build it again with `ospnext data build`")
        try:
            record = ClipRecord.from_json(json.loads(raw))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StoreError(f"{self.path}: clip {i} is damaged ({error}): build the store again") from error
        if os.path.isabs(record.path):
            return record
        return ClipRecord.from_json({**record.to_json(), "path": os.path.normpath(self.path / record.path)})

    def __iter__(self) -> Iterator[ClipRecord]:
        return (self[i] for i in range(self._length))

    def is_whole(self) -> bool:
        """Whether the clips are those of the fingerprint; reads all of them."""
        digest = hashlib.sha256()
        for i in range(self._length):
            digest.update((self._get(_key(i)) or b"") + b"\n")
        return digest.hexdigest() == self.fingerprint

    def _get(self, key: bytes) -> bytes | None:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = _open(self.path)
            if hasattr(self, "fingerprint") and self._meta()["fingerprint"] != self.fingerprint:
                raise StoreError(f"{self.path}: was replaced by another store while it was in use: start again")
        try:
            with self._opened[1].begin() as transaction:
                return transaction.get(key)
        except lmdb.Error as error:
            raise StoreError(f"{self.path}: no readable LMDB ({error}): build it again") from error

    def _meta(self) -> dict[str, Any]:
        raw = self._get(META)
        if raw is None:
            raise StoreError(
                f"{self.path}: no store of this program; read a store of OSP-Next's filter with `ospnext data import`"
            )
        meta = _mapping(raw)
        if (
            meta.get("format") != FORMAT
            or meta.get("version") != VERSION
            or not {"count", "fingerprint"} <= meta.keys()
        ):
            raise StoreError(
                f"{self.path}: is {meta.get('format')!r} of version {meta.get('version')}, but version {VERSION} of "
                f"{FORMAT!r} is read here: build it again with `ospnext data build`"
            )
        return meta


def _open(folder: Path) -> tuple[int, lmdb.Environment]:
    """This process and its environment of the store: LMDB bears no second one, and none from before a fork."""
    status = os.stat(folder / FILE)
    key = (os.getpid(), status.st_dev, status.st_ino)
    for inherited in [other for other in _ENVIRONMENTS if other[0] != key[0]]:
        _ENVIRONMENTS.pop(inherited).close()
    if key not in _ENVIRONMENTS:
        _ENVIRONMENTS[key] = open_whole(folder)
    return key[0], _ENVIRONMENTS[key]


def open_whole(folder: Path) -> lmdb.Environment:
    """The LMDB in ``folder``, to read. What lies behind the end of a truncated file would end the process (SIGBUS).

    Raises:
        StoreError: it is none, or its end is missing.
    """
    try:
        environment = lmdb.open(str(folder), readonly=True, lock=False, readahead=False, meminit=False)
    except lmdb.Error as error:
        raise StoreError(f"{folder}: no readable LMDB ({error}): build it again") from error
    there, needed = os.path.getsize(folder / FILE), _size(environment)
    if there < needed:
        environment.close()
        raise StoreError(f"{folder / FILE}: truncated, {there} of {needed} bytes are there: build or copy it again")
    return environment


def _size(environment: lmdb.Environment) -> int:
    """Bytes of a file that holds every page in use."""
    return (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]


def _mapping(raw: bytes) -> dict[str, Any]:
    """The mapping that JSON holds; an empty one where it holds none."""
    try:
        values = json.loads(raw)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def find_store(path: str | Path) -> Path:
    """The folder of the one store at ``path``.

    Raises:
        StoreError: there is none, or there are several.
    """
    folder = Path(path).absolute()
    if (folder / FILE).is_file():
        return folder
    inner = sorted(child for child in folder.glob("*.lmdb") if (child / FILE).is_file())
    if not inner:
        raise StoreError(f"{path}: no store there (a folder with {FILE}): build one with `ospnext data build`")
    if len(inner) > 1:
        raise StoreError(f"{path}: holds {len(inner)} stores ({', '.join(c.name for c in inner)}): name one of them")
    return inner[0]


def write_store(folder: str | Path, records: Iterable[ClipRecord], absolute: bool = True) -> str:
    """Write ``records`` as the store at ``folder``, in place of the one that is there; returns its fingerprint.

    Args:
        folder: is made if need be. Until all is written, what is there stays as it is.
        records: one after the other; memory holds some thousands.
        absolute: keep paths as they are; otherwise relative to ``folder``, so that both can move together.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{FILE}.{os.getpid()}"
    try:
        try:
            fingerprint = _write(partial, _values(records, None if absolute else folder))
        except lmdb.Error as error:
            raise OSError(
                f"{folder}: the store cannot be written ({error}); the one that was there is whole"
            ) from error
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, folder / FILE)
    finally:
        partial.unlink(missing_ok=True)
    return fingerprint


def _values(records: Iterable[ClipRecord], start: Path | None) -> Iterator[bytes]:
    for record in records:
        values = record.to_json()
        if start is not None:
            values["path"] = os.path.relpath(record.path, start)
        # A file name that is not UTF-8 holds surrogates, which JSON writes as backslash, u and four digits.
        yield json.dumps(values, ensure_ascii=False, sort_keys=True).encode(errors="backslashreplace")


def _write(file: Path, values: Iterable[bytes]) -> str:
    digest, count = hashlib.sha256(), 0
    with lmdb.open(str(file), subdir=False, map_size=_FIRST_SIZE, lock=False, sync=False) as environment:
        batch: list[tuple[bytes, bytes]] = []
        for value in values:
            digest.update(value + b"\n")
            batch.append((_key(count), value))
            count += 1
            if len(batch) == _BATCH:
                _put(environment, batch)
                batch = []
        meta = {"format": FORMAT, "version": VERSION, "count": count, "fingerprint": digest.hexdigest()}
        _put(environment, [*batch, (META, json.dumps(meta).encode())])
        environment.sync(True)
        if os.path.getsize(file) < (whole := _size(environment)):
            os.truncate(file, whole)  # pages at the end that were never needed; see ``open_whole``
    return digest.hexdigest()


def _put(environment: lmdb.Environment, items: list[tuple[bytes, bytes]]) -> None:
    while True:
        try:
            with environment.begin(write=True) as transaction:
                for key, value in items:
                    transaction.put(key, value)
            return
        except lmdb.MapFullError:
            environment.set_mapsize(environment.info()["map_size"] * 2)


def _key(i: int) -> bytes:
    return f"{i:012d}".encode()
