"""Videos along the way: there, graded, the same each time, and without a trace in what is trained."""

import json
from pathlib import Path

import pytest
import torch
from saved_states import read_state
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_sft import read_log, train
from transformers import ByT5Tokenizer

from ospnext.generate.pipeline import OSPNextPipeline
from ospnext.media import read_video
from ospnext.models.text import small_text_encoder
from ospnext.train import pictures, validate

Capture = pytest.CaptureFixture
SOME = {"validation_config__interval": 2, "validation_config__num_videos": 2}
SOME |= {"validation_config__num_inference_steps": 2}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / validate.FILE).read_text().splitlines()]


def test_videos_come_graded_and_training_does_not_notice(tmp_path: Path, vae_folder: Path) -> None:
    assert train(tmp_path / "with", vae_folder, **SOME) == 0
    assert train(tmp_path / "without", vae_folder) == 0
    one, other = (read_state(tmp_path / run / "iter_000000005", "") for run in ("with", "without"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert read_log(tmp_path / "with") == read_log(tmp_path / "without")
    found = lines(tmp_path / "with")
    assert [line["step"] for line in found] == [2, 4, 5]
    for line in found:
        assert line["videos"] == 2
        assert 0 <= line["low"] <= line["everything"] <= line["high"] <= 1
        assert {"count", "shape", "colour", "motion"} <= line.keys()
        folder = tmp_path / f"with/validation/step_{line['step']:09d}"
        clips = [read_video(folder / f"video_{i}.mp4") for i in range(2)]
        assert [clip.frames.shape for clip in clips] == [(5, 32, 48, 3)] * 2
    curves = EventAccumulator(str(tmp_path / "with/tensorboard"), {"images": 0}).Reload()
    assert [event.step for event in curves.Scalars("validation/everything")] == [2, 4, 5]
    for number in range(2):
        images = curves.Images(f"validation/video_{number}")
        assert [event.step for event in images] == [2, 4, 5]
        for event in images:
            assert event.encoded_image_string.startswith(b"GIF89a")
            assert (event.width, event.height) == (48, 32)


def test_videos_are_those_of_the_averaged_weights(
    tmp_path: Path, vae_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last ones are what the exported pipeline makes of the same prompts and seeds."""
    written: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(validate, "write_video", lambda path, video, fps: written.update({str(path): video.copy()}))
    assert train(tmp_path / "run", vae_folder, **SOME, validation_config__prompts="A red star.") == 0
    monkeypatch.undo()
    assert "everything" not in lines(tmp_path / "run")[-1]
    pipe = OSPNextPipeline.from_pretrained(tmp_path / "run/pipeline")
    pipe.set_progress_bar_config(disable=True)
    frames = pipe("A red star.", num_inference_steps=2, generator=torch.Generator().manual_seed(1)).frames[0]
    found = torch.from_numpy(written[str(tmp_path / "run/validation/step_000000005/video_0.mp4")])
    torch.testing.assert_close(found, torch.from_numpy(frames * 255).round().to(torch.uint8), atol=1, rtol=0)


def test_a_resumed_run_makes_the_same_videos(tmp_path: Path, vae_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With trackers or without, where nobody makes pictures for them."""
    monkeypatch.setattr(pictures, "animated_gif", None)
    assert train(tmp_path / "whole", vae_folder, **SOME, trackers="[]") == 0
    monkeypatch.undo()
    assert train(tmp_path / "parts", vae_folder, **SOME, training_iteration=3) == 0
    assert train(tmp_path / "parts", vae_folder, **SOME) == 0
    whole, parts = lines(tmp_path / "whole"), lines(tmp_path / "parts")
    assert [line["step"] for line in parts] == [2, 3, 4, 5]
    assert [line for line in parts if line["step"] != 3] == whole
    for name in ("step_000000004/video_0.mp4", "step_000000005/video_1.mp4"):
        one, other = (read_video(tmp_path / run / "validation" / name).frames for run in ("whole", "parts"))
        assert (one == other).all()


def test_a_video_that_cannot_be_written_ends_no_run(tmp_path: Path, vae_folder: Path, capsys: Capture) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/validation").write_text("in the way")
    assert train(tmp_path / "run", vae_folder, **SOME) == 0
    said = capsys.readouterr().out
    assert "warning: 2 of 2 validation videos not written, such as" in said
    assert [line["step"] for line in lines(tmp_path / "run")] == [2, 4, 5]


def test_a_long_prompt_is_one_and_a_file_that_is_missing_is_named(
    tmp_path: Path, vae_folder: Path, capsys: Capture
) -> None:
    few = SOME | {"training_iteration": 1, "validation_config__num_inference_steps": 1}
    assert train(tmp_path / "run", vae_folder, **few, validation_config__prompts="A red star spins. " * 40) == 0
    assert [line["videos"] for line in lines(tmp_path / "run")] == [1]
    capsys.readouterr()
    for place, said in ((tmp_path / "none.txt", "No such file"), (tmp_path, f"{tmp_path} is a folder")):
        assert train(tmp_path / "other", vae_folder, **SOME, validation_config__prompts=place) == 2
        error = capsys.readouterr().err
        assert str(place) in error
        assert said in error
    assert not (tmp_path / "other").exists()


def test_prompts_that_are_missing_are_said_first(tmp_path: Path, vae_folder: Path, capsys: Capture) -> None:
    small_text_encoder(32, len(ByT5Tokenizer())).save_pretrained(tmp_path / "text_encoder")
    noise = {"data_config__dataset_name": "t2v_random", "train_text_encoder": False}
    noise |= {"text_encoder_config__checkpoint_path": tmp_path / "text_encoder"}
    assert train(tmp_path / "run", vae_folder, **SOME, **noise) == 2
    assert "validation_config.prompts is missing" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
