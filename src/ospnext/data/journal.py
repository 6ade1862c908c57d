"""What reading files found, a JSON line each, so that nothing is read twice: not after a kill, not with new filters.

An entry holds while its file has the same size and time of change. What another run may find otherwise (a reading that
took too long, a decoder that died, a file that was not there) is not kept.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, NamedTuple, Self

from ospnext.data.probe import FileFacts
from ospnext.data.workers import Failure

Found = FileFacts | Failure | float
"""What a file holds, why it cannot be used, or the motion of one of its clips."""

_PASSING = ("timeout", "crash", "missing")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of writing ``path`` with its name: a full disk does not say of which file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


class FileKey(NamedTuple):
    """A file in one state, and what was asked of it; size and time are -1 where there is no file."""

    path: str
    size: int
    modified_ns: int
    question: str


def file_key(path: str, question: str) -> FileKey:
    """The key of a question to the file as it is now."""
    try:
        status = os.stat(path)
    except OSError:
        return FileKey(path, -1, -1, question)
    return FileKey(path, status.st_size, status.st_mtime_ns, question)


class Journal:
    """Entries by file, appended to ``path`` as they come; a line that a kill cut short is skipped.

    Raises:
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[FileKey, Found] = {}
        self._file: IO[str]

    def __enter__(self) -> Self:
        if self._path.is_file():
            with open(self._path, encoding="utf-8", errors="replace") as file:
                for line in file:
                    self._read(line)
        self._file = open(self._path, "a", encoding="utf-8", errors="backslashreplace")
        self._file.write("\n")  # after a line that was cut short
        return self

    def __exit__(self, *_: object) -> None:
        with naming(self._path):
            self._file.close()

    def get(self, key: FileKey) -> Found | None:
        """What was found; None if the file was not read in this state."""
        return self._known.get(key)

    def put(self, key: FileKey, found: Found) -> None:
        """Keep what was found, on disk at once."""
        self._known[key] = found
        if isinstance(found, Failure):
            if found.reason in _PASSING:
                return
            entry: dict[str, object] = {"key": key, "fault": found}
        elif isinstance(found, FileFacts):
            entry = {"key": key, "facts": asdict(found)}
        else:
            entry = {"key": key, "motion": found}
        with naming(self._path):
            self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            self._file.flush()

    def _read(self, line: str) -> None:
        try:
            entry = json.loads(line)
            found: Found
            if "facts" in entry:
                found = FileFacts(**entry["facts"])
            else:
                found = Failure(*entry["fault"]) if "fault" in entry else float(entry["motion"])
            self._known[FileKey(*entry["key"])] = found
        except (ValueError, KeyError, TypeError):
            return  # cut short, or of another version: the file is read again
