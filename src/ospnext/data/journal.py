"""What reading files found, a JSON line each, so that nothing is read twice: not after a kill, not with new filters.

An entry holds while its file has the same size and time of change. What another run may find otherwise (a reading that
took too long, a decoder that died, a file that was not there) is not kept.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import IO, NamedTuple, Self

from ospnext.data.probe import FileFacts
from ospnext.data.workers import Failure

_PASSING = ("timeout", "crash", "missing")


class FileKey(NamedTuple):
    """A file in one state, and how thoroughly it is read; size and time are -1 where there is no file."""

    path: str
    size: int
    modified_ns: int
    decode_all: bool


def file_key(path: str, decode_all: bool) -> FileKey:
    """The key of the file as it is now."""
    try:
        status = os.stat(path)
    except OSError:
        return FileKey(path, -1, -1, decode_all)
    return FileKey(path, status.st_size, status.st_mtime_ns, decode_all)


class Journal:
    """Entries by file, appended to ``path`` as they come; a line that a kill cut short is skipped.

    Raises:
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[FileKey, FileFacts | Failure] = {}
        self._file: IO[str]

    def __enter__(self) -> Self:
        if self._path.is_file():
            with open(self._path, encoding="utf-8", errors="replace") as file:
                for line in file:
                    self._read(line)
        self._file = open(self._path, "a", encoding="utf-8")
        self._file.write("\n")  # after a line that was cut short
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def get(self, key: FileKey) -> FileFacts | Failure | None:
        """What was found; None if the file was not read in this state."""
        return self._known.get(key)

    def put(self, key: FileKey, found: FileFacts | Failure) -> None:
        """Keep what was found, on disk at once."""
        self._known[key] = found
        if isinstance(found, Failure):
            if found.reason in _PASSING:
                return
            entry: dict[str, object] = {"key": key, "fault": found}
        else:
            entry = {"key": key, "facts": asdict(found)}
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._file.flush()

    def _read(self, line: str) -> None:
        try:
            entry = json.loads(line)
            found = FileFacts(**entry["facts"]) if "facts" in entry else Failure(*entry["fault"])
            self._known[FileKey(*entry["key"])] = found
        except (json.JSONDecodeError, KeyError, TypeError):
            return  # cut short, or of another version: the file is read again
