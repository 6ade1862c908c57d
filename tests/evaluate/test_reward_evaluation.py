"""``ospnext evaluate reward``: a folder of real videos to JSON."""

import json

import numpy as np
import pytest

from ospnext.cli import main
from ospnext.media import write_video
from ospnext.shapes.captions import caption
from ospnext.shapes.render import render
from ospnext.shapes.world import World, sample_scene


@pytest.fixture
def folder(tmp_path):
    for i in (0, 2, 10):
        write_video(tmp_path / f"video_{i}.mp4", np.full((5, 32, 48, 3), 20 * i, np.uint8), fps=8)
    write_video(tmp_path / "video_grid.mp4", np.zeros((5, 32, 48, 3), np.uint8))
    (tmp_path / "video_2.txt").write_text("a grey wall\n")
    return tmp_path


def test_every_video_with_its_prompt(folder, capsys):
    assert (
        main(
            ["evaluate", "reward", str(folder), "reward_fn={brightness: 2.0, flicker: 1.0}", "reward_config.device=cpu"]
        )
        == 0
    )
    assert "3 videos: score 1.62" in capsys.readouterr().out
    result = json.loads((folder / "rewards.json").read_text())
    assert [(row["file"], row["prompt"]) for row in result["videos"]] == [
        ("video_0.mp4", ""),
        ("video_2.mp4", "a grey wall"),
        ("video_10.mp4", ""),
    ]
    for row, value in zip(result["videos"], (0, 40, 200), strict=True):
        assert row["brightness"] == pytest.approx(value / 255, abs=0.01)
        assert row["score"] == pytest.approx(2 * value / 255 + 1, abs=0.02)
    assert result["failures"] == {"brightness": 0, "flicker": 0}


def test_scenes_beside_videos_are_graded(tmp_path, capsys):
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, World.large(), held_out=True) for _ in range(2)]
    for i, (scene, frames) in enumerate(zip(scenes, render(scenes, 33, 128, 128), strict=True)):
        write_video(tmp_path / f"{i}.mp4", frames)
        (tmp_path / f"{i}.json").write_text(json.dumps({"scene": scene.to_dict()}))
    (tmp_path / "prompts.txt").write_text("".join(caption(scene, rng) + "\n" for scene in scenes))
    words = ["reward_fn={shapes: 1.0}", f"prompts={tmp_path / 'prompts.txt'}", "reward_config.device=cpu"]
    words += ["reward_config.options.shapes.workers=1", f"output={tmp_path / 'out.json'}"]
    assert main(["evaluate", "reward", str(tmp_path), *words]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["mean"]["shapes.everything"] == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "reward 'shapes' needs scene of every video, and 1.mp4 has none: write a mapping with it to"),
        ("[1]", "1.json must hold a mapping, such as {}, not list"),
        ("{bad", "1.json is no JSON"),
    ],
)
def test_metadata_that_will_not_do_are_named_before_anything_is_scored(tmp_path, capsys, text, said):
    for i in range(2):
        write_video(tmp_path / f"{i}.mp4", np.zeros((5, 32, 32, 3), np.uint8))
    scene = sample_scene(np.random.default_rng(0), World.large(), held_out=True)
    (tmp_path / "0.json").write_text(json.dumps({"scene": scene.to_dict()}))
    if text is not None:
        (tmp_path / "1.json").write_text(text)
    assert main(["evaluate", "reward", str(tmp_path), "reward_fn={shapes: 1.0}"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "rewards.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere", "reward_fn={motion: 1.0}"], "nowhere: no such folder"),
        ([".", "reward_fn={motion: 1.0}"], "holds no videos"),
        ([".", "reward_fn={moton: 1.0}"], "did you mean 'motion'"),
        ([".", "reward_fn={videoalign: 1.0}"], "no load_from_pretrained"),
        (["."], "reward_fn is missing"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "reward", *words]) == 2
    assert said in capsys.readouterr().err
