"""``ospnext data build`` on real files: what is kept, what is not and why, and that nothing is lost on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from corpus import SOUND, Corpus

from ospnext.cli import main
from ospnext.config import ConfigError, load_config
from ospnext.data.build import BuildConfig, run
from ospnext.data.store import ClipStore

DAMAGED = {
    "truncated.mp4": "truncated",
    "truncated.mkv": "truncated",
    "truncated_index.mp4": "unreadable",
    "zero_bytes.mp4": "empty",
    "text.mp4": "unreadable",
    "only_audio.mp4": "no_video",
}
EASY: dict[str, Any] = {"min_hxw": 1000, "sample_num_frames": 17, "workers": 2}


def build(folder: Path, entries: list[dict[str, Any]], corpus: Corpus, **settings: Any) -> tuple[ClipStore, list[dict]]:
    """The store of a meta file, and what was left out."""
    meta = folder / "meta, with a comma.json"
    meta.write_text(json.dumps(entries), encoding="utf-8")
    index = folder / "all_videos.txt"
    index.write_text(f"# corpora\n{corpus.folder},{meta}\n", encoding="utf-8")
    save = folder / "clips"
    run(BuildConfig(**{**EASY, "ann_txt_path": str(index), "save_path": str(save), **settings}))
    return ClipStore(save), left_out(save)


def left_out(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "left_out.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("decode_all", [False, True])
def test_every_file_is_kept_or_quarantined_for_its_reason(tmp_path: Path, corpus: Corpus, decode_all: bool) -> None:
    names = [*corpus.videos, *corpus.damaged, "nowhere.mp4"]
    store, left = build(
        tmp_path, [{"path": name, "cap": f"caption of {name}"} for name in names], corpus, decode_all=decode_all
    )
    kept = {Path(clip.path).name: clip for clip in store}
    for clip in SOUND:
        record = kept.pop(clip.name)
        assert (record.height, record.width, record.num_frames) == (clip.height, clip.width, clip.frames), clip.name
        assert record.fps == pytest.approx(clip.fps, rel=0.02), clip.name
        assert record.captions == (f"caption of {clip.name}",)
    expected = {**DAMAGED, "nowhere.mp4": "missing"}
    if decode_all:  # what only a decoder finds
        expected |= {"truncated.mp4": "undecodable", "holes.mp4": "undecodable"}
    assert {Path(item["path"]).name: item["rule"] for item in left} == expected
    assert kept.keys() == {"mp4_inside.webm", "holes.mp4"} - expected.keys()


def test_the_file_is_believed_over_its_description(tmp_path: Path, corpus: Corpus) -> None:
    lie = {"resolution": {"height": 2160, "width": 3840}, "fps": 60, "num_frames": 4000}
    store, _ = build(tmp_path, [{"path": "h264.mp4", "cap": ["one", "", "two"], **lie}], corpus)
    assert (store[0].height, store[0].fps, store[0].num_frames) == (96, 24.0, 48)
    assert store[0].captions == ("one", "two")
    report = json.loads((tmp_path / "clips/report.json").read_text())
    assert report["store"] == store.fingerprint
    assert {fact: item["count"] for fact, item in report["corrected"].items()} == dict.fromkeys(
        ("height", "width", "fps", "num_frames"), 1
    )
    assert (tmp_path / "clips/report.png").read_bytes().startswith(b"\x89PNG")


def test_both_ends_of_cut_and_crop_are_checked(tmp_path: Path, corpus: Corpus) -> None:
    good = [{"cut": [10, 40]}, {"cut": [10]}, {"cut": [0, 48]}, {"crop": [0, 64, 0, 48]}]
    bad = [
        {"cut": [10, 49]},
        {"cut": [-1, 30]},
        {"cut": [30, 30]},
        {"crop": [0, 129, 0, 48]},
        {"cut": "all"},
        {"cap": 3},
    ]
    store, left = build(tmp_path, [{"path": "h264.mp4", "cap": "a", **more} for more in good + bad], corpus)
    assert [(clip.start, clip.num_frames) for clip in store] == [(10, 30), (10, 38), (0, 48), (0, 48)]
    assert store[3].crop == (0, 64, 0, 48)
    assert [item["rule"] for item in left] == ["cut", "cut", "cut", "crop", "annotation", "annotation"]


def test_a_clip_that_stands_twice_is_kept_once(tmp_path: Path, corpus: Corpus) -> None:
    entry = {"path": "h264.mp4", "cap": "a"}
    store, left = build(tmp_path, [entry, entry, {**entry, "cap": "b"}], corpus)
    assert len(store) == 2
    assert [item["rule"] for item in left] == ["duplicate"]


def test_the_older_filter_config_runs_as_it_is(tmp_path: Path, corpus: Corpus) -> None:
    seed = yaml.safe_load((Path(__file__).parent / "seed_filter.yaml").read_text())
    (tmp_path / "meta.json").write_text(json.dumps([{"path": "h264.mp4", "cap": "a"}]))
    (tmp_path / "all.txt").write_text(f"{corpus.folder},{tmp_path / 'meta.json'}")
    config = load_config(
        BuildConfig,
        Path(__file__).parent / "seed_filter.yaml",
        [("ann_txt_path", str(tmp_path / "all.txt")), ("save_path", str(tmp_path / "clips"))],
    )
    assert (config.min_hxw, config.max_motion_value, config.too_long_factor) == (seed["min_hxw"], 0.02, 5.0)
    with pytest.raises(ConfigError, match="no clip of 1 is left"):
        run(config)
    assert [item["rule"] for item in left_out(tmp_path / "clips")] == ["area"]
    assert not (tmp_path / "clips/data.mdb").exists()


def test_a_new_build_replaces_and_a_failed_one_leaves_the_old(tmp_path: Path, corpus: Corpus) -> None:
    entries = [{"path": name, "cap": "a"} for name in ("h264.mp4", "h265.mp4")]
    before, _ = build(tmp_path, entries, corpus)
    with pytest.raises(ConfigError, match="no clip"):
        build(tmp_path, entries, corpus, sample_num_frames=500)
    assert ClipStore(tmp_path / "clips").fingerprint == before.fingerprint
    after, _ = build(tmp_path, entries[:1], corpus)
    assert (len(before), len(after)) == (2, 1)
    assert before[1].path.endswith("h265.mp4")  # who has the old one open reads it to the end


def test_save_path_may_end_in_lmdb_and_move_with_its_videos(tmp_path: Path, corpus: Corpus) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/a.mp4").write_bytes(corpus.path("h264.mp4").read_bytes())
    (tmp_path / "here/a.txt").write_text("a red\nstar")
    save = tmp_path / "here/clips.lmdb"
    run(BuildConfig(data_path=str(tmp_path / "here"), save_path=str(save), save_absolute_path=False, **EASY))
    (tmp_path / "here").rename(tmp_path / "there")
    assert ClipStore(tmp_path / "there")[0].path == str(tmp_path / "there/a.mp4")
    assert ClipStore(tmp_path / "there/clips.lmdb")[0].captions == ("a red star",)


def test_names_of_every_kind(tmp_path: Path, corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    videos = tmp_path / "视频, two\nlines"
    videos.mkdir()
    names = [
        "a, b.mp4",
        "猫.mp4",
        "e\u0301.mp4",
        "\x1b[31mred.mp4",
        "[bold]b.mp4",
        os.fsdecode(b"gbk \xc3\xa8\xff.mp4"),
    ]
    for name in names:
        os.link(corpus.path("h264.mp4"), videos / name)
        (videos / name).with_suffix(".txt").write_text(f"caption of {name.encode(errors='replace')!r}")
    (videos / "\x1b[2Jnothing.mp4").touch()
    (videos / "folder.mp4").mkdir()
    os.mkfifo(videos / "pipe.mp4")
    os.symlink("nowhere", videos / "link.mp4")
    os.symlink(videos, videos / "round")
    save = tmp_path / "clips"
    run(BuildConfig(data_path=str(videos), save_path=str(save), **EASY))
    assert {Path(clip.path).name for clip in ClipStore(save)} == set(names)
    assert {item["rule"] for item in left_out(save)} == {"empty", "unreadable", "missing"}
    assert "\x1b[2J" not in capsys.readouterr().err
    assert main(["data", "check", str(save)]) == 0


def test_a_full_disk_says_which_file_and_leaves_the_old_store(tmp_path: Path, corpus: Corpus) -> None:
    old, _ = build(tmp_path, [{"path": "h264.mp4", "cap": "a"}], corpus)
    (tmp_path / "more.json").write_text('[{"path": "h265.mp4", "cap": "a"}]')
    words = ["data", "build", f"data_path={tmp_path / 'more.json'}", f"videos_root={corpus.folder}"]
    words += [f"save_path={tmp_path / 'clips'}", "min_hxw=1000", "sample_num_frames=17"]
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300)); "
    program = f"{limit}from ospnext.cli import main; main({words!r})"
    # -B: no module is left compiled in part either.
    done = subprocess.run([sys.executable, "-B", "-c", program], capture_output=True, text=True)
    assert "probes.jsonl: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert ClipStore(tmp_path / "clips").fingerprint == old.fingerprint


def test_no_clips_and_no_place_to_write_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "none.json").write_text("[]")
    (tmp_path / "one.json").write_text('[{"path": "a.mp4", "cap": "a"}]')
    (tmp_path / "file").touch()
    for words, message in (
        (["data_path=none.json", "save_path=clips"], "describes no clips"),
        (["data_path=one.json", "save_path=file"], "file: File exists"),
        (["data_path=one.json", "save_path=file/clips"], "file/clips: Not a directory"),
        (["data_path=nowhere", "save_path=clips"], "no such folder or table"),
        (["ann_txt_path=nowhere", "save_path=clips"], "nowhere: No such file"),
    ):
        placed = [f"{key}={tmp_path / value}" for key, value in (word.split("=") for word in words)]
        assert main(["data", "build", *placed]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "none.json", "one.json"]


def test_a_killed_build_goes_on_where_it_was(tmp_path: Path, corpus: Corpus) -> None:
    """Hundreds of files, killed in the middle: what was read is kept, the old store is whole, the next build ends."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for i in range(600):
        os.link(corpus.path("h264.mp4"), videos / f"{i:03d}.mp4")
        (videos / f"{i:03d}.txt").write_text(f"caption {i}")
    save = tmp_path / "clips"
    old, _ = build(tmp_path, [{"path": "h264.mp4", "cap": "a"}], corpus)
    words = [f"data_path={videos}", f"save_path={save}", "min_hxw=1000", "sample_num_frames=17", "workers=1"]
    process = subprocess.Popen([sys.executable, "-m", "ospnext", "data", "build", *words, "decode_all=true"])
    journal = save / "probes.jsonl"
    read = 0
    while read < 20 and process.poll() is None:
        time.sleep(0.02)
        read = journal.read_text().count("decode_all")
    process.send_signal(signal.SIGKILL)
    process.wait()
    read = journal.read_text().count("decode_all")
    assert 20 <= read < 600
    assert ClipStore(save).fingerprint == old.fingerprint
    with journal.open("a") as file:
        file.write('{"key": ["cut sho')
    assert main(["data", "build", *words, "decode_all=true"]) == 0
    assert len(ClipStore(save)) == 600
    lines = [line for line in journal.read_text().splitlines() if line.startswith('{"key": ["' + str(videos))]
    assert len(lines) == 600  # each file was read once


def test_motion_is_measured_once_and_filtered(tmp_path: Path, corpus: Corpus) -> None:
    entries = [{"path": "h264.mp4", "cap": "a"}, {"path": "vp9.webm", "cap": "a", "motion": 0.9}]
    store, left = build(tmp_path, entries, corpus, measure_motion=True, max_motion_value=0.5)
    assert 0.001 < store[0].motion < 0.05
    assert [item["rule"] for item in left] == ["motion"]
    assert (tmp_path / "clips/probes.jsonl").read_text().count('"motion 0 48') == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give one"),
        ({"ann_txt_path": "a", "data_path": "b"}, "keep one"),
        ({"data_path": "a", "min_h_div_w_ratio": 3.0}, "larger than"),
        ({"data_path": "a", "train_fps": None}, "sample_stride"),
        ({"data_path": "a", "min_hw": 3}, "min_hxw"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(BuildConfig, None, [("save_path", "x"), *settings.items()])
