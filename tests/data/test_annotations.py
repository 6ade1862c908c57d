"""Every form of description gives the same clips; what cannot be read is named."""

import json
from pathlib import Path

import pytest

from ospnext.config import ConfigError
from ospnext.data.annotations import Annotation, BadEntry, Columns, parse_entry, read_data, read_index


def test_tables_of_all_kinds_say_the_same(tmp_path: Path) -> None:
    rows = [{"path": "a.mp4", "cap": "red, and round", "fps": 24, "cut": [3, 9]}, {"path": "b.mp4", "cap": "blau"}]
    (tmp_path / "m.json").write_text(json.dumps(rows))
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "m.csv").write_text('path,cap,fps,cut,note\na.mp4,"red, and round",24,"[3, 9]",x\nb.mp4,blau,,,\n')
    (tmp_path / "m.tsv").write_text("video\tprompt\tfps\tcut\na.mp4\tred, and round\t24\t[3, 9]\nb.mp4\tblau\t\t\n")
    for name in ("m.json", "m.jsonl", "m.csv", "m.tsv"):
        first, second = read_data(tmp_path / name)
        assert isinstance(first, Annotation)
        assert isinstance(second, Annotation)
        assert (first.path, first.captions, first.fps) == (str(tmp_path / "a.mp4"), ("red, and round",), 24.0)
        assert (first.start, first.end, second.end, second.captions) == (3, 9, None, ("blau",))


def test_columns_can_be_named_and_roots_moved(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("clip,words\nx/a.mp4,hello\n")
    with pytest.raises(ConfigError, match="video_column"):
        list(read_data(tmp_path))
    (found,) = read_data(tmp_path, "/root", Columns("clip", "words"))
    assert isinstance(found, Annotation)
    assert (found.path, found.captions) == ("/root/x/a.mp4", ("hello",))


def test_folder_takes_captions_from_text_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.mp4", "sub/a.MKV", "no.webm"):
        (tmp_path / name).touch()
    (tmp_path / "b.txt").write_text("two\n lines ", encoding="utf-8-sig")
    (tmp_path / "sub/a.txt").write_bytes(b"\xff\xfe")
    first, second, third = read_data(tmp_path)
    assert isinstance(first, Annotation)
    assert first.captions == ("two lines",)
    assert isinstance(second, Annotation)
    assert second.captions == ()
    assert isinstance(third, BadEntry)


def test_index_allows_commas_comments_and_relative_names(tmp_path: Path) -> None:
    (tmp_path / "a, b").mkdir()
    (tmp_path / "a, b/m, n.json").write_text('[{"path": "v.mp4", "cap": "c"}]')
    index = tmp_path / "index.txt"
    index.write_text(f"# mine\n\na, b,a, b/m, n.json\n{tmp_path}/a, b,{tmp_path}/a, b/m, n.json\n")
    found = list(read_index(index))
    assert [entry.path for entry in found] == [str(tmp_path / "a, b/v.mp4")] * 2
    for line in ("only a folder", "root,nowhere.json"):
        index.write_text(line)
        with pytest.raises(ConfigError, match=r"index\.txt:1"):
            list(read_index(index))


def _nested(depth: int) -> object:
    """A list of few objects whose text would have 2 to the ``depth`` brackets."""
    value: object = []
    for _ in range(depth):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("text", "not a mapping"),
        ({"cap": "a"}, "name the video"),
        ({"path": "a", "cap": {"en": "a"}}, "text or a list"),
        ({"path": "a", "cut": [1, 2, 3]}, "start, end"),
        ({"path": "a", "cut": [0.5]}, "whole number"),
        ({"path": "a", "crop": [1, 2]}, "x0, x1"),
        ({"path": "a", "fps": "fast"}, "fps"),
        ({"path": "a", "num_frames": True}, "num_frames"),
        ({"path": "a", "resolution": [1080, 1920]}, "height and width"),
        ({"path": "a", "fps": float("inf")}, "fps"),
        ({"path": "a", "num_frames": float("inf")}, "num_frames"),
        ({"path": "a", "num_frames": 10**400}, "num_frames"),
        ({"path": "a", "fps": float("nan")}, "fps"),
        ({"path": "a", "cut": [0, 1e300]}, "end of cut"),
        ({"path": "a\0.mp4"}, "zero byte"),
        ({"path": "\ud83d.mp4"}, "surrogate"),
        ({"path": "a", "cap": ["fine", "half \ud83d"]}, "surrogate"),
        ({"path": "a", "cap": _nested(60)}, "text or a list"),
    ],
)
def test_entries_that_cannot_be_used_are_named(entry: object, problem: str) -> None:
    found = parse_entry(entry, "/", "m.json[0]")
    assert isinstance(found, BadEntry)
    assert problem in found.problem


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.json", b"[1,", "not valid JSON"),
        ("m.json", b"", "not valid JSON"),
        ("m.json", b"[" * 200_000, "brackets"),
        ("m.json", b"[1" + b"0" * 5000 + b"]", "not valid JSON"),
        ("m.json", b"{}", "is a list of clips"),
        ("m.json", b"\xff\xfe", "UTF-8"),
        ("m.jsonl", b"{}\n\nx", r"m\.jsonl:3: not valid JSON"),
        ("m.csv", b"", "has no column"),
        ("m.csv", b"\xff", "UTF-8"),
        ("m.csv", b"path,cap\n" + b"x" * 200_000, "not a valid table"),
        ("m.xml", b"", "is no folder"),
    ],
)
def test_damaged_tables_stop_the_build(tmp_path: Path, name: str, text: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ConfigError, match=message) as caught:
        list(read_data(tmp_path / name))
    assert "m." in str(caught.value)
    index = tmp_path / "index.txt"
    index.write_bytes(b"\x80")
    with pytest.raises(ConfigError, match=r"index\.txt: not a text file"):
        list(read_index(index))
    with pytest.raises(ConfigError, match="no such folder"):
        list(read_data(tmp_path / "nowhere"))
