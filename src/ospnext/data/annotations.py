"""Read what people say about their videos, in every form they have it, as ``Annotation``.

- ``ann_txt_path``: an index with a line ``<folder of the videos>,<meta JSON>`` for each corpus, as OSP-Next's filter
  reads it. The meta file is a JSON list, or one of the tables below.
- ``data_path``: a folder with a ``.txt`` caption beside each video; or a table: ``.json`` (a list), ``.jsonl``,
  ``.csv``, ``.tsv``; or a folder that holds a ``metadata`` table.

All tables have the same columns: the video, its caption or captions, and optionally ``resolution`` (or ``height`` and
``width``), ``fps``, ``num_frames``, ``cut``, ``crop``, ``motion``. Others are ignored.
"""

import csv
import json
import os
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ospnext.config import ConfigError
from ospnext.data.records import Crop

VIDEO_SUFFIXES = frozenset(
    (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".ts", ".m2ts", ".flv", ".wmv", ".mpg", ".mpeg", ".ogv", ".gif")
)
VIDEO_COLUMNS = ("path", "video", "video_path", "file_name", "filepath", "file")
CAPTION_COLUMNS = ("cap", "caption", "captions", "prompt", "text")
TABLES = (".json", ".jsonl", ".csv", ".tsv")


@dataclass(frozen=True)
class Annotation:
    """One clip as its owner describes it.

    Attributes:
        path: the video file, absolute.
        captions: those that are not empty.
        source: file and place of the description, for messages.
        start: first frame.
        end: the frame after the last; None for the end of the file.
        crop: see ``ClipRecord``.
        motion: see ``ClipRecord``.
        height, width, fps, num_frames: of the file, where stated; the file itself is believed.
    """

    path: str
    captions: tuple[str, ...]
    source: str
    start: int = 0
    end: int | None = None
    crop: Crop | None = None
    motion: float | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    num_frames: int | None = None


class BadEntry(NamedTuple):
    """A description that cannot be used: its path as written, where it stands, and what is wrong."""

    path: str
    source: str
    problem: str


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table; None for any of ``VIDEO_COLUMNS`` and ``CAPTION_COLUMNS``."""

    video: str | None = None
    caption: str | None = None


def read_index(path: str | Path, columns: Columns = Columns()) -> Iterator[Annotation | BadEntry]:
    """All clips of an index (``ann_txt_path``); lines that are empty or begin with ``#`` are skipped.

    Raises:
        ConfigError: a line is none, or names a file that is not there or cannot be read.
        FileNotFoundError: there is no index.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start})") from error
    corpora = [
        _index_line(line, f"{path}:{number}", Path(path).absolute().parent)
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    for root, table in corpora:
        yield from read_table(table, root, columns)


def read_data(
    path: str | Path, root: str | Path | None = None, columns: Columns = Columns()
) -> Iterator[Annotation | BadEntry]:
    """All clips of a folder or table (``data_path``).

    Args:
        path: the folder or table.
        root: where relative paths of a table begin; None for the folder the table lies in.
        columns: of a table.

    Raises:
        ConfigError: there is nothing, it is neither, or it cannot be read.
    """
    path = Path(path).absolute()
    if path.is_dir():
        tables = [path / f"metadata{suffix}" for suffix in TABLES if (path / f"metadata{suffix}").is_file()]
        if not tables:
            yield from _read_folder(path)
            return
        path = tables[0]
    yield from read_table(path, root or path.parent, columns)


def read_table(path: Path, root: str | Path, columns: Columns = Columns()) -> Iterator[Annotation | BadEntry]:
    """All clips of a ``.json``, ``.jsonl``, ``.csv`` or ``.tsv`` file; relative paths begin at ``root``.

    Raises:
        ConfigError: there is no such file, it is none of these, is damaged, or has no column for the video or the
            caption.
    """
    for source, values in _rows(path, columns):
        yield parse_entry(values, root, source, columns)


def parse_entry(values: Any, root: str | Path, source: str, columns: Columns = Columns()) -> Annotation | BadEntry:
    """One description. A missing caption is no fault here: a filter drops it."""
    shown = ""
    try:
        if not isinstance(values, Mapping):
            raise ValueError(f"is {_shown(values)}, not a mapping")
        given = _first(values, (columns.video,) if columns.video else VIDEO_COLUMNS)
        if not isinstance(given, str) or not given.strip():
            raise ValueError(f"path is {_shown(given)}: it should name the video")
        shown = given
        _require_file_name(given)
        resolution = values.get("resolution")
        resolution = _plain(resolution) or {}
        if not isinstance(resolution, Mapping):
            raise ValueError(f"resolution is {_shown(resolution)}: it should hold height and width")
        start, end = _cut(_plain(values.get("cut")))
        return Annotation(
            os.path.normpath(Path(root).absolute() / given),
            _captions(_first(values, (columns.caption,) if columns.caption else CAPTION_COLUMNS)),
            source,
            start,
            end,
            _crop(_plain(values.get("crop"))),
            _number(values, "motion"),
            _whole(resolution, "height") or _whole(values, "height"),
            _whole(resolution, "width") or _whole(values, "width"),
            _number(values, "fps"),
            _whole(values, "num_frames"),
        )
    except ValueError as error:
        return BadEntry(shown, source, str(error))


def _index_line(line: str, source: str, folder: Path) -> tuple[Path, Path]:
    """Root and table of a line. Either may hold commas: the split is where the right side is a file."""
    parts = line.strip().split(",")
    splits = [(",".join(parts[:i]).strip(), ",".join(parts[i:]).strip()) for i in range(len(parts) - 1, 0, -1)]
    if not splits:
        raise ConfigError(f"{source}: {line.strip()!r} is no <folder of the videos>,<meta JSON>")
    for root, table in splits:
        for start in (folder, Path.cwd()):
            if (start / table).is_file():
                return start / root, start / table
    raise ConfigError(f"{source}: there is no file {splits[0][1]!r}")


def _read_folder(folder: Path) -> Iterator[Annotation | BadEntry]:
    """Every video below ``folder`` in the order of names; its caption is the text file of the same name."""
    videos = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    if not videos:
        raise ConfigError(f"{folder}: holds no videos ({', '.join(sorted(VIDEO_SUFFIXES))})")
    for video in videos:
        text, source = video.with_suffix(".txt"), str(video.relative_to(folder))
        try:
            caption = " ".join(text.read_text(encoding="utf-8-sig").split()) if text.is_file() else ""
        except UnicodeDecodeError as error:
            yield BadEntry(str(video), source, f"{text.name} is no text in UTF-8 ({error.reason})")
            continue
        yield Annotation(str(video), _captions(caption), source)


def _rows(path: Path, columns: Columns) -> Iterator[tuple[str, Any]]:
    """Each row of a table with the place it stands at."""
    suffix = path.suffix.lower()
    if not path.exists():
        raise ConfigError(f"{path}: there is no such folder or table")
    if suffix not in TABLES:
        raise ConfigError(f"{path}: is no folder and none of {', '.join(TABLES)}")
    try:
        with open(path, encoding="utf-8-sig", newline="" if suffix in (".csv", ".tsv") else None) as file:
            if suffix == ".json":
                entries = _parsed(file.read(), str(path))
                if not isinstance(entries, list):
                    raise ConfigError(f"{path}: holds {_shown(entries)}; a meta file is a list of clips")
                yield from ((f"{path.name}[{i}]", entry) for i, entry in enumerate(entries))
            elif suffix == ".jsonl":
                for i, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{path.name}:{i}", _parsed(line, f"{path}:{i}")
            else:
                table = csv.DictReader(file, dialect="excel" if suffix == ".csv" else "excel-tab")
                _check_header(path, table.fieldnames or (), columns)
                yield from ((f"{path.name}:{table.line_num}", row) for row in table)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start})") from error
    except csv.Error as error:
        raise ConfigError(f"{path}: not a valid table: {error}") from error


def _parsed(text: str, place: str) -> Any:
    """What JSON says; ``place`` names it in messages."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{place}: not valid JSON: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{place}: not valid JSON: brackets inside brackets without end") from error


def _require_file_name(path: str) -> None:
    try:
        if b"\0" in os.fsencode(path):
            raise ValueError(f"path is {_shown(path)}: no file has a zero byte in its name")
    except UnicodeEncodeError as error:
        raise ValueError(f"path is {_shown(path)}: half of a surrogate pair, which is no Unicode") from error


def _check_header(path: Path, header: Any, columns: Columns) -> None:
    for what, key, own, usual in (
        ("video", "video_column", columns.video, VIDEO_COLUMNS),
        ("caption", "caption_column", columns.caption, CAPTION_COLUMNS),
    ):
        if not set(header) & set((own,) if own else usual):
            raise ConfigError(
                f"{path}: has no column {own or ' or '.join(usual)} for the {what}, but {', '.join(header) or 'none'}: "
                f"name it with {key}"
            )


def _first(values: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((values[name] for name in names if values.get(name) is not None), None)


def _captions(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    texts = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"cap is {_shown(value)}: it should be a text or a list of texts")
    if any("\ud800" <= sign <= "\udfff" for text in texts for sign in text):
        raise ValueError(f"cap is {_shown(value)}: half of a surrogate pair, which is no Unicode")
    return tuple(text.strip() for text in texts if text.strip())


def _plain(value: Any) -> Any:
    """A value of a CSV table is text: JSON, or nothing."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        return value


def _number(values: Mapping[str, Any], key: str) -> float | None:
    value = _plain(values.get(key))
    if value is None:
        return None
    if not _is_number(value):
        raise ValueError(f"{key} is {_shown(value)}: it should be a number")
    return float(value)


def _whole(values: Mapping[str, Any], key: str) -> int | None:
    value = _number(values, key)
    return None if value is None else _integer(value, key)


def _is_number(value: Any) -> bool:
    """Whether it is one that a computer counts with: neither infinite nor of hundreds of digits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _HUGE


def _integer(value: Any, what: str) -> int:
    if not _is_number(value) or int(value) != value:
        raise ValueError(f"{what} is {_shown(value)}: it should be a whole number")
    return int(value)


def _cut(value: Any) -> tuple[int, int | None]:
    """First frame and the one after the last of ``[start]`` or ``[start, end]``."""
    if value is None or value == []:
        return 0, None
    if not isinstance(value, list | tuple) or len(value) > 2:
        raise ValueError(f"cut is {_shown(value)}: it should be [start, end] in frames")
    start = _integer(value[0], "start of cut")
    return start, _integer(value[1], "end of cut") if len(value) == 2 and value[1] is not None else None


def _crop(value: Any) -> Crop | None:
    if value is None or value == []:
        return None
    if not isinstance(value, list | tuple) or len(value) != 4:
        raise ValueError(f"crop is {_shown(value)}: it should be [x0, x1, y0, y1] in pixels")
    return Crop(*(_integer(side, "a side of crop") for side in value))


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    text = _REPR.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_HUGE = 2**63
_REPR = reprlib.Repr()  # a list that holds the same list over and over has a text without end
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60
