"""``ospnext generate`` with a toy pipeline in a real folder: real files, real videos, real resuming."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ospnext.checkpoints.formats import SPARSE_KEYS
from ospnext.cli import main
from ospnext.config import load_config
from ospnext.generate import memory, sources, videos
from ospnext.generate import run as generate
from ospnext.generate.manifest import only_run
from ospnext.generate.pipeline import OSPNextPipeline
from ospnext.generate.run import run
from ospnext.generate.settings import GenerateConfig, output_folder
from ospnext.media import read_video, write_video

Generate = Callable[..., str]


@pytest.fixture
def model(pipe: OSPNextPipeline, tmp_path: Path) -> Path:
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def make(model: Path, tmp_path: Path) -> Generate:
    """Run with the toy model into ``tmp_path / "out"``, on the CPU."""

    def call(**settings: Any) -> str:
        plain = {"model": str(model), "output_dir": str(tmp_path / "out"), "device": "cpu", "seed": 10}
        return run(GenerateConfig.model_validate(plain | {"prompt": "a red square"} | settings))

    return call


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def test_everything_is_written(make: Generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = make(prompt=("a red square", "two blue stars"), num_videos_per_prompt=2, batch_size=3, save_fps=8.0)
    out = tmp_path / "out"
    assert str(out) in line
    assert "4 videos (4 new, decoded whole)" in line
    names = {path.name for path in out.iterdir()}
    assert names == {"config.yaml", "manifest.json", "video_grid.mp4", *(f"video_{i}.mp4" for i in range(4))}
    manifest = manifest_of(out)
    assert [(v["prompt"], v["seed"]) for v in manifest["videos"]] == [
        ("a red square", 10),
        ("a red square", 11),
        ("two blue stars", 12),
        ("two blue stars", 13),
    ]
    assert all(v["negative_prompt"] == "ugly" and v["seconds"] > 0 for v in manifest["videos"])
    assert manifest["settings"]["guidance_scale"] == 3.0
    clip = read_video(out / "video_3.mp4")
    assert clip.frames.shape == (5, 32, 48, 3)
    assert clip.fps == 8
    saved = load_config(GenerateConfig, out / "config.yaml")
    assert saved.prompt == ("a red square", "two blue stars")
    printed = capsys.readouterr().out
    for part in ("euler, 3 steps, shift 3", "0 dense, 4 sparse", "transformer float32", "vae float32", "one process"):
        assert part in printed


def test_a_video_is_the_pipelines_own(make: Generate, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def watch(path: Path, frames: torch.Tensor, fps: float) -> None:
        written.append(frames)
        write_video(path, frames, fps)

    monkeypatch.setattr(videos, "write_video", watch)
    make(prompt=("a red square", "two blue stars"), batch_size=2)
    pipe = OSPNextPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    for i, prompt in enumerate(("a red square", "two blue stars")):
        frames = pipe(prompt, generator=torch.Generator().manual_seed(10 + i)).frames[0]
        assert np.abs(written[i].numpy() - frames * 255).max() < 0.51


def test_a_resumed_run_makes_only_what_is_missing(make: Generate, tmp_path: Path) -> None:
    prompts = ("one", "two", "three")
    out = tmp_path / "out"
    make(prompt=prompts)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("video_?.mp4")}
    content = (out / "video_1.mp4").read_bytes()
    (out / "video_1.mp4").unlink()
    assert "(1 new," in make(prompt=prompts, batch_size=2)
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("video_?.mp4")}
    assert [name for name in sorted(after) if after[name] != before[name]] == ["video_1.mp4"]
    assert (out / "video_1.mp4").read_bytes() == content
    assert "(1 new," in make(prompt=(*prompts, "four"))
    assert "(0 new," in make(prompt=prompts)
    assert len(manifest_of(out)["videos"]) == 4


def test_a_prompt_names_its_folder(
    make: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    default = {"output_dir": GenerateConfig().output_dir}
    assert "(1 new, decoded whole) in outputs/a-red-square;" in make(**default, prompt="A red square.")
    assert "(1 new, decoded whole) in outputs/two-blue-stars;" in make(**default, prompt="two blue stars")
    assert "(0 new, decoded whole) in outputs/a-red-square;" in make(**default, prompt="A red square.")
    saved = load_config(GenerateConfig, tmp_path / "outputs" / "a-red-square" / "config.yaml")
    assert saved.output_dir == default["output_dir"]


def test_long_prompts_that_begin_alike_have_folders_of_their_own() -> None:
    spin = "A red star spins in the middle of a dark {} background."
    names = {output_folder("{prompt}", [spin.format(colour)]).name for colour in ("blue", "green")}
    assert len(names) == 2
    assert all(len(name) == 40 and name.startswith("a-red-star-spins-in-the-middle-of") for name in names)
    assert output_folder("out/{prompt}/1", ["雨中的/纸船"]) == Path("out/雨中的-纸船/1")
    assert output_folder("out", ["a"]) == Path("out")
    assert output_folder("{prompt}", ["?!"]) == Path("video")


def test_what_the_configuration_has_to_say_is_in_the_report(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fsdp_size=8", "task=t2v", f"model={model}", "device=cpu", f"output_dir={tmp_path / 'out'}"]
    assert main(["generate", *words, "--prompt", "a red square"]) == 0
    said = ["task has no effect here: text to video is the only task", "one process: fsdp_size 8 becomes 1"]
    assert manifest_of(tmp_path / "out")["report"]["notes"].splitlines() == said
    printed = "".join(capsys.readouterr())
    assert [printed.count(line) for line in said] == [1, 1]


def test_nothing_is_loaded_when_all_is_there(make: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    make()

    def refuse(*_: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(generate, "load_pipeline", refuse)
    make()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheduler_config": {"shift": 7.0}}, "shift was 3.0, now 7.0"),
        ({"seed": 99}, "seed 10, not 99"),
        ({"prompt": "a blue star"}, "not 'a blue star'"),
        ({"negative_prompt": "dull"}, "not 'dull'"),
        ({"num_frames": 9}, "num_frames was 5, now 9"),
    ],
)
def test_other_settings_are_refused_unless_overwritten(
    make: Generate, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    make()
    content = (tmp_path / "out" / "video_0.mp4").read_bytes()
    with pytest.raises(ValueError, match=message):
        make(**settings)
    assert (tmp_path / "out" / "video_0.mp4").read_bytes() == content
    assert "(1 new," in make(**settings, overwrite=True)
    assert (tmp_path / "out" / "video_0.mp4").read_bytes() != content


def test_other_layouts_of_the_same_weights_are_another_run(make: Generate, model: Path) -> None:
    config = json.loads((model / "transformer" / "config.json").read_text())
    dense = {key: value for key, value in config.items() if key not in SPARSE_KEYS}
    (model / "transformer" / "config.json").write_text(json.dumps(dense))
    make()
    with pytest.raises(ValueError, match="skiparse_model_type was 'full', now 'dual_end'"):
        make(transformer_config={"skiparse_model_type": "dual_end"})


def test_strange_videos_are_not_overwritten(make: Generate, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "video_0.mp4").write_bytes(b"mine")
    with pytest.raises(ValueError, match="there already"):
        make()
    assert (tmp_path / "out" / "video_0.mp4").read_bytes() == b"mine"


def test_a_failure_keeps_what_is_done(make: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = videos.write_video

    def fail_at_second(path: Path, *rest: Any) -> None:
        if path.name == "video_1.mp4":
            raise OSError(28, "No space left on device", str(path))
        write(path, *rest)

    monkeypatch.setattr(videos, "write_video", fail_at_second)
    with pytest.raises(OSError, match="No space"):
        make(prompt=("one", "two", "three"))
    assert [v["file"] for v in manifest_of(tmp_path / "out")["videos"]] == ["video_0.mp4"]
    monkeypatch.undo()
    assert "3 videos (2 new," in make(prompt=("one", "two", "three"))


def test_not_a_number_is_said(make: Generate, model: Path, tmp_path: Path) -> None:
    pipe = OSPNextPipeline.from_pretrained(model)
    torch.nn.init.constant_(pipe.transformer.head.head.bias, float("nan"))
    pipe.save_pretrained(model)
    with pytest.raises(ValueError, match=r"video_0\.mp4 came out as NaN or infinite: use a usual guidance_scale"):
        make()
    assert not manifest_of(tmp_path / "out")["videos"]
    with pytest.raises(ValueError, match="float16 overflows, use weight_dtype=bf16"):
        make(weight_dtype="fp16", overwrite=True)


# ── what is found in the folder ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: "{", "Expecting property name"),
        (lambda state: "null", "Input should be"),
        (lambda state: json.dumps(state | {"videos": [1]}), "videos"),
        (lambda state: json.dumps(state | {"videos": [{"file": "video_0.mp4"}]}), "videos.0.number: Field required"),
        (
            lambda state: json.dumps(state | {"videos": [state["videos"][0] | {"number": "first"}]}),
            "videos.0.number: Input should be",
        ),
        (lambda state: json.dumps(state | {"settings": 3}), "settings"),
    ],
)
def test_a_damaged_manifest_is_said_and_nothing_is_touched(
    make: Generate, tmp_path: Path, damage: Callable[[Any], str], message: str
) -> None:
    make()
    out = tmp_path / "out"
    (out / "manifest.json").write_text(damage(manifest_of(out)))
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match=f"is not a manifest of ospnext .*{message}") as caught:
        make()
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    make(overwrite=True)


def test_a_damaged_video_is_named_and_made_anew_once_removed(make: Generate, tmp_path: Path) -> None:
    make(prompt=("one", "two"))
    out = tmp_path / "out"
    whole = (out / "video_1.mp4").read_bytes()
    (out / "video_1.mp4").write_bytes(whole[:100])
    (out / "video_grid.mp4").unlink()
    with pytest.raises(ValueError, match=r"video_1\.mp4 .*remove it and start again"):
        make(prompt=("one", "two"))
    (out / "video_1.mp4").unlink()
    assert "2 videos (1 new" in make(prompt=("one", "two"))
    assert (out / "video_1.mp4").read_bytes() == whole


def test_two_runs_never_write_to_one_folder(make: Generate, tmp_path: Path) -> None:
    make()
    out = tmp_path / "out"
    before = {path: path.read_bytes() for path in out.iterdir()}
    with only_run(out), pytest.raises(ValueError, match=r"another run is writing to .*out: wait for it"):
        make(prompt="another", overwrite=True)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    make()


def test_what_a_killed_run_left_half_written_is_taken_away(make: Generate, tmp_path: Path) -> None:
    make()
    out = tmp_path / "out"
    for name in (".video_0.mp4.123.part", ".manifest.json.123.part", ".notes.part"):
        (out / name).touch()
    make()
    assert [path.name for path in out.glob(".*")] == [".notes.part"]


# ── what is refused before anything is loaded ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": None}, "no prompt"),
        ({"prompt": " "}, "prompt is empty"),
        ({"model": "/nowhere/at/all"}, "does not exist"),
        ({"vae_config": {"vae_path": "/nowhere/vae.pth"}}, "vae_config.vae_path"),
        ({"output_dir": "/proc/out"}, "cannot be written"),
        ({"device": "cuda:9"}, "not available"),
        ({"attention_kernel": "flash3"}, "flash3"),
        ({"transformer_config": {"num_layers": 6}}, "num_layers"),
    ],
)
def test_bad_input_is_one_clear_line(
    make: Generate, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(generate, "load_pipeline", refuse)
    with pytest.raises(ValueError, match=message) as caught:
        make(**settings)
    assert "\n" not in str(caught.value)


def test_missing_parts_are_named_by_their_key(model: Path, tmp_path: Path) -> None:
    config = {
        "prompt": "a",
        "output_dir": str(tmp_path / "out"),
        "device": "cpu",
        "transformer_config": {"pretrained_model_dir_or_checkpoint": str(model / "transformer")},
    }
    with pytest.raises(ValueError, match=r"vae_config\.vae_path is not set"):
        run(GenerateConfig.model_validate(config))
    assert not (tmp_path / "out").exists()


def test_parts_at_paths_of_their_own(model: Path, tmp_path: Path) -> None:
    config = {
        "prompt": "a",
        "output_dir": str(tmp_path / "out"),
        "device": "cpu",
        "num_frames": 5,
        "height": 32,
        "width": 32,
        "scheduler_config": {"num_inference_steps": 2, "shift": 5.0, "guidance_scale": 4.0},
        "sampler": "unipc",
        "transformer_config": {"pretrained_model_dir_or_checkpoint": str(model / "transformer")},
        "vae_config": {"vae_path": str(model / "vae"), "dtype": "bf16"},
        "text_encoder_config": {
            "checkpoint_path": str(model / "text_encoder"),
            "text_tokenizer_path": str(model / "tokenizer"),
        },
    }
    run(GenerateConfig.model_validate(config))
    settings = manifest_of(tmp_path / "out")["settings"]
    assert (settings["sampler"], settings["shift"], settings["vae_dtype"]) == ("unipc", 5.0, "bfloat16")
    assert "模糊" in manifest_of(tmp_path / "out")["videos"][0]["negative_prompt"]


def test_too_little_memory_is_said_before_loading(make: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 100_000)
    with pytest.raises(ValueError, match=r"needs .* GiB on cpu, but .* are free"):
        make()


def test_with_no_model_given_the_embedded_one_runs(
    make: Generate, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sources, "EMBEDDED", model)
    make(model=None)
    assert "shapes (embedded)" in capsys.readouterr().out
    monkeypatch.setattr(sources, "EMBEDDED", model / "nothing")
    with pytest.raises(ValueError, match="embedded model is not in this installation"):
        make(model=None)
