"""Figures of a model on the shapes world: intervals, grading in processes, and the command from end to end."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from ospnext.cli import main
from ospnext.config import ConfigError, load_config
from ospnext.evaluate.shapes import EvaluateShapesConfig, generate, summarise
from ospnext.generate.pipeline import OSPNextPipeline
from ospnext.shapes.grading import VIDEOS_PER_PROCESS, grade_all, one_thread
from ospnext.shapes.render import render
from ospnext.shapes.share import Share, share
from ospnext.shapes.world import World, is_held_out, sample_scene


def marks(right: int, asked: int) -> list[bool]:
    return [True] * right + [False] * (asked - right)


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    [
        (410, 512, 0.76400, 0.83308),  # by hand: (411.92073 -/+ 1.959964 * 9.09066) / 515.84146
        (5, 10, 0.23659, 0.76341),  # the textbook's, as (0.237, 0.763)
        (0, 10, 0.0, 0.27753),  # z^2 / (n + z^2)
        (10, 10, 0.72247, 1.0),
    ],
)
def test_wilson_intervals(right, asked, low, high):
    measured = share(marks(right, asked))
    assert (measured.right, measured.asked) == (right, asked)
    assert measured.low == pytest.approx(low, abs=1e-5)
    assert measured.high == pytest.approx(high, abs=1e-5)
    assert 0 <= measured.low <= right / asked <= measured.high <= 1


def test_wilson_bounds_solve_the_score_equation():
    k, n, low, high = share(marks(410, 512))
    for bound in (low, high):  # at a bound, the share seen is z standard errors of that bound away
        assert abs(k / n - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / n), rel=1e-6)


def test_a_share_of_nothing_could_be_anything():
    assert share([]) == Share(0, 0, 0.0, 1.0)


@pytest.fixture(scope="module")
def rendered():
    """Scenes of the whole world, held out, with their true videos; enough for two processes."""
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, World.full(), held_out=True) for _ in range(VIDEOS_PER_PROCESS + 4)]
    assert all(is_held_out(scene) for scene in scenes)
    return scenes, list(render(scenes, 33, 128, 128).numpy())


def test_true_videos_are_all_right(rendered):
    scenes, videos = rendered
    result = summarise(grade_all(videos, scenes), scenes)
    counts = Counter(len(scene.things) for scene in scenes)
    assert all(s.right == s.asked > 0 for s in result.values())
    assert result["everything"].asked == result["colour"].asked == len(scenes)
    assert result["relation"].asked == sum(bool(scene.relation) for scene in scenes)
    assert result["everything, 1 object"].asked == counts[1]
    assert result["everything, 2 objects"].asked == counts[2]


def test_wrong_videos_are_not(rendered):
    scenes, videos = (some[:8] for some in rendered)
    grey = [np.full_like(video, 128) for video in videos]
    result = summarise(grade_all(grey, scenes), scenes)
    assert all(s.right == 0 for s in result.values())
    assert "everything" in result


def test_a_grading_process_keeps_to_one_thread():
    before = torch.get_num_threads()
    try:
        with threadpool_limits(2):
            one_thread()
            assert {pool["num_threads"] for pool in threadpool_info()} == {1}
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_the_command_from_end_to_end(model, tmp_path, capsys):
    out = tmp_path / "evaluation"
    words = [f"model={model}", f"output_dir={out}", "num_prompts=3", "batch_size=2", "keep_videos=2", "device=cpu"]
    assert main(["evaluate-shapes", *words, "weight_dtype=fp32"]) == 0
    assert "95% interval" in capsys.readouterr().out
    record = json.loads((out / "shapes.json").read_text())
    assert sorted(p.name for p in out.iterdir()) == ["contact_sheet.png", "shapes.json", "video_0.mp4", "video_1.mp4"]
    assert record["result"]["everything"]["asked"] == len(record["prompts"]) == 3
    assert record["config"]["num_prompts"] == 3
    assert record["prompts"][0]["grade"]["colour"] is False
    assert main(["evaluate-shapes", *words, "weight_dtype=fp32", "num_prompts=1"]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["contact_sheet.png", "shapes.json", "video_0.mp4"]  # no older one


def test_a_video_does_not_depend_on_its_batch(model):
    pipe = OSPNextPipeline.from_pretrained(model, torch_dtype=torch.float32)
    torch.nn.init.normal_(pipe.transformer.head.head.weight, std=0.1)  # untrained, it would always say zero velocity
    pipe.set_progress_bar_config(disable=True)
    prompts = ["A red star spins.", "A green ring moves left.", "A blue square grows."]
    one, three = (generate(pipe, prompts, EvaluateShapesConfig(batch_size=size, seed=5)) for size in (1, 3))
    assert [video.shape for video in three] == [(5, 64, 64, 3)] * 3
    for alone, together in zip(one, three, strict=True):
        assert np.abs(alone.astype(int) - together).max() <= 1  # rounding, at the edge between two bytes
    assert not np.array_equal(three[0], three[1])


def test_bad_input_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["evaluate-shapes", f"model={tmp_path / 'none'}", f"output_dir={tmp_path / 'out'}"]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    assert main(["evaluate-shapes", f"model={tmp_path}", f"output_dir={tmp_path / 'file'}"]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "file") in error
    assert error.count("\n") == 1
    with pytest.raises(ConfigError, match="world is 'huge'"):
        load_config(EvaluateShapesConfig, None, ["world=huge"])
