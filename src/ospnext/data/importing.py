"""``ospnext data import SRC SAVE_PATH``: a store of OSP-Next's filter, whose values are pickled, as one of ours.

    ospnext data import old/dataset data/clips
    ospnext data import '[old/a.lmdb, old/b.lmdb]' data/clips

A pickle can run any code when it is loaded. Before one is, its instructions are read, and all but those that make
dicts, lists, texts and numbers are refused; the reader then refuses every name as well. Video files are not opened:
what the old store says of them is taken over.
"""

import io
import pickle
import pickletools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import lmdb
from pydantic import Field

from ospnext.config import Config
from ospnext.data.annotations import Annotation, BadEntry, parse_entry
from ospnext.data.records import ClipRecord
from ospnext.data.store import FILE, META, StoreError, open_whole, write_store

_ZSTD = b"\x28\xb5\x2f\xfd"


class ImportConfig(Config):
    """``ospnext data import``: pickled stores into one of ours."""

    src: str | tuple[str, ...] = Field(description="an .lmdb folder, a folder that holds some, or a list of such")
    save_path: str = Field(min_length=1, description="folder of the store; training's metafile_or_dir_path")
    videos_root: str | None = Field(None, description="where relative paths of src begin")
    save_absolute_path: bool = Field(True, description="false: keep paths relative to save_path, to move both together")


def run(config: ImportConfig) -> str:
    """Import as configured; returns the line to print.

    Raises:
        StoreError: ``src`` is no such store, or holds what a store of clips does not.
    """
    sources = (config.src,) if isinstance(config.src, str) else config.src
    folders = [folder for source in sources for folder in find_folders(source)]
    if Path(config.save_path).absolute() in folders:
        raise StoreError(f"save_path is {config.save_path}, which is the store that is read: name another folder")
    records = [clip for folder in folders for clip in progress(read_pickled(folder, config.videos_root), folder)]
    if not records:
        raise StoreError(f"{', '.join(map(str, folders))}: no clips are in there")
    write_store(config.save_path, records, config.save_absolute_path)
    return f"wrote {config.save_path}: {len(records)} clips of {len(folders)} stores; look at them with data check"


def progress(records: Iterator[ClipRecord], folder: Path) -> Iterator[ClipRecord]:
    """``records`` with a count on the terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress, SpinnerColumn, TextColumn

    columns = SpinnerColumn(), TextColumn(f"reading {escape(folder.name)}: {{task.completed:,}} clips")
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield from bar.track(records, total=None)


def find_folders(source: str | Path) -> list[Path]:
    """The LMDB folders at ``source``, by name: itself, or all that lie in it.

    Raises:
        StoreError: there is none.
    """
    folder = Path(source).absolute()
    found = [folder] if (folder / FILE).is_file() else sorted(file.parent for file in folder.glob(f"*/{FILE}"))
    if not found:
        raise StoreError(f"{source}: no store there: give an .lmdb folder, or one that holds some")
    return found


def read_pickled(folder: Path, root: str | Path | None = None) -> Iterator[ClipRecord]:
    """The clips of one LMDB folder in the order of their keys.

    Raises:
        StoreError: a value is no plain pickle of a clip.
    """
    try:
        with open_whole(folder) as environment, environment.begin() as transaction:
            if transaction.get(META) is not None:
                raise StoreError(f"{folder}: is a store of this program already, it can be used as it is")
            for key, value in transaction.cursor():
                yield _record(load_plain(value, f"{folder}: {key.decode(errors='replace')}"), root, folder, key)
    except lmdb.Error as error:
        raise StoreError(f"{folder}: no readable LMDB ({error})") from error


_PLAIN = frozenset(
    (
        *("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET"),
        *("NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT"),
        *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "EMPTY_LIST", "LIST", "APPEND", "APPENDS"),
        *("EMPTY_DICT", "DICT", "SETITEM", "SETITEMS"),
    )
)
"""Instructions that make dicts, lists, texts and numbers. Tuples are not among them: a short pickle can nest one whose
hash takes for ever."""


def _require_plain(value: bytes) -> None:
    """Read the instructions of a pickle without following them.

    Raises:
        UnpicklingError: one is not among ``_PLAIN``, or asks for more memory than there is pickle.
    """
    argument: Any
    for opcode, argument, _ in pickletools.genops(value):
        if opcode.name not in _PLAIN:
            raise pickle.UnpicklingError(f"it holds the instruction {opcode.name} {str(argument or '')[:60]!r}")
        if opcode.name in ("PUT", "LONG_BINPUT") and argument > len(value):
            raise pickle.UnpicklingError(f"it asks for a memory of {argument} places")


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers and numbers; asks nothing from outside."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it asks for an object from outside")


def load_plain(value: bytes, source: str) -> Any:
    """The dicts, lists, texts and numbers that ``value`` pickles; ``source`` names it in messages.

    Raises:
        StoreError: it is none, or asks for anything else.
    """
    if value.startswith(_ZSTD):
        raise StoreError(f"{source}: is compressed (zstd): write the old store again without compression")
    try:
        _require_plain(value)
        return _PlainUnpickler(io.BytesIO(value)).load()
    except (
        pickle.UnpicklingError,
        EOFError,
        ArithmeticError,
        AttributeError,
        ImportError,
        LookupError,
        MemoryError,
        TypeError,
        ValueError,
    ) as error:
        raise StoreError(f"{source}: is no plain pickle of a clip and was not loaded ({error})") from error


def _record(values: Any, root: str | Path | None, folder: Path, key: bytes) -> ClipRecord:
    source = f"{folder}: clip {key.decode(errors='replace')}"
    entry = parse_entry(values, root or "/", source)
    if isinstance(entry, BadEntry):
        raise StoreError(f"{source}: {entry.problem}")
    if root is None and not Path(str(values["path"])).is_absolute():
        raise StoreError(f"{source}: its path {values['path']!r} is relative: give videos_root")
    return _from_facts(entry, values, source)


def _from_facts(entry: Annotation, values: Mapping[str, Any], source: str) -> ClipRecord:
    """The clip: ``num_frames`` from ``start_frame_idx`` on, and no further than the end of its cut."""
    if not (entry.height and entry.width and entry.num_frames):
        raise StoreError(f"{source}: has no resolution or num_frames; build it anew from its meta JSON")
    start = values.get("start_frame_idx") or entry.start
    if not isinstance(start, int):
        raise StoreError(f"{source}: start_frame_idx is {start!r:.60}: it should be a whole number")
    if min(entry.height, entry.width, entry.fps or 1) <= 0:
        raise StoreError(f"{source}: {entry.height} x {entry.width} at {entry.fps} frames per second are no video")
    if entry.crop and not entry.crop.fits(entry.height, entry.width):
        raise StoreError(f"{source}: crop {list(entry.crop)} of a picture of {entry.width} x {entry.height}")
    length = entry.num_frames if entry.end is None else min(entry.num_frames, entry.end - start)
    if start < 0 or length < 1:
        raise StoreError(f"{source}: frames [{start}, {start + length}) are none")
    return ClipRecord(
        entry.path,
        entry.captions,
        entry.height,
        entry.width,
        entry.fps or _DEFAULT_FPS,
        length,
        start,
        entry.crop,
        entry.motion,
    )


_DEFAULT_FPS = 24.0  # what the old filter took where none was given
