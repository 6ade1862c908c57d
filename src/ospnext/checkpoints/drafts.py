"""Folders and files that are whole or not there: written as drafts beside their place; those of killed processes go.

    with new_folder(Path("out/model")) as draft:
        ...  # write into draft

A lock says that a draft is still being written; the system takes it back when the process dies.
"""

import fcntl
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Keep a folder to this process; yields False where the file system knows no locks, and so there is none.

    Raises:
        BlockingIOError: another process, or an earlier call, keeps it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        held = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            held = False
        yield held
    finally:
        os.close(handle)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its place when the block ends well, and is gone when not.

    Of processes that were killed in their blocks nothing is left once the next one for the same ``path`` begins.

    Raises:
        OSError: there is no room, or no right to write; names ``path``.
    """
    with _draft(path) as folder:
        yield folder
        folder.chmod(0o755)  # mkdtemp's is private
        old = folder.with_suffix(".old")
        if path.exists():
            path.rename(old)
        try:
            folder.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """The same of a file: a name that the block writes to; errors as ``new_folder``."""
    with _draft(path) as folder:
        yield folder / path.name
        os.replace(folder / path.name, path)


@contextmanager
def _draft(path: Path) -> Iterator[Path]:
    """A locked folder beside ``path``, gone after the block, which may have moved it or what is in it."""
    prefix = f".{path.name[:100]}."
    with _named(path, path.with_name(prefix)), sigterm_interrupts(), ExitStack() as lock:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path, prefix)
        folder = _locked_draft(path.parent, prefix, lock)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _locked_draft(parent: Path, prefix: str, lock: ExitStack) -> Path:
    """A new draft, kept until ``lock`` is closed."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=parent))
        with suppress(BlockingIOError, FileNotFoundError):  # a process that begins took it for abandoned
            lock.enter_context(locked(folder))
            if folder.exists():
                return folder


def _remove_abandoned(path: Path, prefix: str) -> None:
    """Remove the drafts of ``path`` that no living process writes, and what such have moved out of their way."""

    def beside(suffix: str) -> list[Path]:
        ours = re.compile(rf"{re.escape(prefix)}[a-z0-9_]{{8}}\.{suffix}")  # eight are tempfile's: of no other path
        return [entry for entry in path.parent.iterdir() if ours.fullmatch(entry.name)]

    for draft in beside("tmp"):
        with suppress(BlockingIOError, FileNotFoundError), locked(draft) as held:
            if held:
                shutil.rmtree(draft, ignore_errors=True)
    for old in beside("old"):
        if old.with_suffix(".tmp").exists():  # its writer lives, and may have to put it back
            continue
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:  # killed between its two renames
            old.rename(path)


@contextmanager
def _named(path: Path, draft: Path) -> Iterator[None]:
    """Have errors name ``path``: not its draft, whose name begins so, nor, as those of a full disk do, nothing."""
    try:
        yield
    except shutil.Error as error:  # a list, of a folder that was copied
        raise OSError(f"{path}: {error.args[0][0][2]}") from error
    except OSError as error:
        if error.filename is None or str(error.filename).startswith(str(draft)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Inside, SIGTERM interrupts as Ctrl-C does, where it would end the process without its leave: drafts go first."""
    alone = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if alone:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if alone:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
