"""What cannot work is said in one line, with exit code 2, before a tensor is read or a file is written."""

import json
import os
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ByT5Tokenizer

from ospnext.cli import main
from ospnext.generate import memory, videos
from ospnext.generate import run as generate
from ospnext.generate.pipeline import OSPNextPipeline
from ospnext.media import write_video
from ospnext.models.transformer import OSPNextTransformer3DModel

Refused = Callable[..., str]
PARTS = ("transformer", "vae", "text_encoder")


@pytest.fixture
def model(pipe: OSPNextPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline folder ``model`` in the working directory."""
    monkeypatch.chdir(tmp_path)
    pipe.save_pretrained("model")
    return Path("model")


@pytest.fixture
def refused(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run the command with these words, see it refuse in one line, and return that line."""

    def loaded(*_: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(generate, "load_pipeline", loaded)

    def call(*words: str) -> str:
        before = sorted(Path.cwd().rglob("*"))
        capsys.readouterr()
        assert main(["generate", f"model={model}", "device=cpu", "output_dir=out", "prompt=a", *words]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert len(said.err.splitlines()) == 1
        assert said.err.startswith("ospnext: error: ")
        assert sorted(Path.cwd().rglob("*")) == before
        return said.err

    return call


def weights_of(model: Path, part: str) -> Path:
    return next((model / part).glob("*.safetensors"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ── what is wrong with a model ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("part", PARTS)
def test_truncated_weights(refused: Refused, model: Path, part: str) -> None:
    weights = weights_of(model, part)
    for length in (weights.stat().st_size - 100, 20, 0):
        os.truncate(weights, length)
        assert f"{weights}: truncated" in refused()


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_not_whole(refused: Refused, model: Path, part: str) -> None:
    (model / part / "config.json").rename("config.json")
    assert part in refused()
    shutil.rmtree(model / part)
    assert f"missing model/{part}" in refused()


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("transformer/config.json", {"num_heads": 3}, "dim 32 must be num_heads (3)"),
        ("transformer/config.json", {"dim": "wide"}, "dim is 'wide'"),
        ("transformer/config.json", {"num_layers": 6}, "missing: blocks.4"),
        ("vae/config.json", {"base_dim": "wide"}, "model/vae: its settings do not fit"),
        ("vae/config.json", {"scale_factor_spatial": 16}, "its layers compress by (4, 8)"),
        ("vae/config.json", {"base_dim": 16}, "not the weights of this AutoencoderKLWan"),
        ("text_encoder/config.json", {"d_model": None}, "model/text_encoder: its settings do not fit"),
        ("text_encoder/config.json", {"num_layers": 2}, "missing: encoder.block.1"),
        ("scheduler/scheduler_config.json", {"shift": "much"}, "model/scheduler: its settings do not fit"),
        ("scheduler/scheduler_config.json", {"shift_terminal": 0.1}, "shift_terminal"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "'DDIMScheduler' is not known"),
        ("model_index.json", {"defaults": {"height": "tall"}}, "defaults.height is 'tall'"),
        ("model_index.json", {"prompt_cleaning": "soap"}, "prompt_cleaning is 'soap'"),
    ],
)
def test_settings_that_make_no_model(
    refused: Refused, model: Path, file: str, change: dict[str, Any], message: str
) -> None:
    edit_json(model / file, **change)
    assert message in refused()


def test_parts_of_different_models(refused: Refused, model: Path) -> None:
    sizes = {"dim": 32, "ffn_dim": 32, "freq_dim": 16, "num_heads": 2, "num_layers": 2}
    other = model / "transformer"
    OSPNextTransformer3DModel(**sizes, text_dim=16, in_dim=4, out_dim=4).save_pretrained(other)
    assert "from 4 latent channels to 4, but the autoencoder has 16" in refused()
    OSPNextTransformer3DModel(**sizes, text_dim=32).save_pretrained(other)
    assert "text of width 32, but the text encoder makes 16" in refused()
    OSPNextTransformer3DModel(**sizes, text_dim=16).save_pretrained(other)
    ByT5Tokenizer(extra_ids=200).save_pretrained(model / "tokenizer")
    assert "the text encoder 384" in refused()


def test_a_model_that_is_no_pipeline(refused: Refused) -> None:
    Path("empty").mkdir()
    assert "model: nowhere does not exist" in refused("model=nowhere")
    assert "name a whole pipeline folder" in refused("model=empty")


def test_fourteen_billion_weights_are_refused_by_their_headers(
    refused: Refused, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40, "text_dim": 16}
    with torch.device("meta"):
        tensors = OSPNextTransformer3DModel(**sizes).state_dict()
    shutil.rmtree(model / "transformer")
    (model / "transformer").mkdir()
    (model / "transformer" / "config.json").write_text(json.dumps({"_class_name": "OSPNextModel", **sizes}))
    places: dict[str, str] = {}
    for shard, names in enumerate((list(tensors)[:600], list(tensors)[600:])):
        file = f"diffusion_pytorch_model-{shard + 1:05d}-of-00002.safetensors"
        write_sparse(model / "transformer" / file, {name: tensors[name] for name in names})
        places |= dict.fromkeys(names, file)
    index = model / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    monkeypatch.setattr(memory, "free_memory", lambda device: 20 * 2**30)
    assert "needs 26.6 GiB on cpu, but 20.0 GiB are free" in refused("weight_dtype=bf16")
    assert "needs 53.2 GiB" in refused()


def write_sparse(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A bfloat16 safetensors file that is all hole after its header."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)


# ── what is wrong with a request ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("hieght=64", "did you mean 'height'?"),
        ("scheduler_config.shfit=3", "did you mean 'scheduler_config.shift'?"),
        ("sheduler_config.shift=3", "did you mean 'scheduler_config.shift'?"),
        ("vae_config=3", "'vae_config' is a section"),
        ("num_frames=many", "num_frames is 'many'"),
        ("height=0", "height is 0"),
        ("width=-64", "width is -64"),
        ("width=99999999", "the most is 4093 frames, 16384 high and 16384 wide"),
        ("num_frames=0", "num_frames is 0"),
        ("scheduler_config.num_inference_steps=0", "num_inference_steps is 0"),
        ("scheduler_config.guidance_scale=.nan", "guidance_scale is nan, but should be a finite number"),
        ("scheduler_config.shift=.inf", "shift is inf, but should be a finite number"),
        ("seed=-1", "seed is -1"),
        ("seed=99999999999999999999", "seed is 99999999999999999999"),
        ("device=tpu", "device 'tpu' is not known"),
        ("device=cuda:99", "'cuda:99' is not available here"),
        ("attention_kernel=flash2", "kernel 'flash2' is unavailable"),
        ("output_dir=file", "output_dir file cannot be written"),
        ("output_dir=file/below", "output_dir file/below cannot be written"),
        ("prompts=blank", "holds no prompt"),
        ("scheduler_config.num_inference_steps=1000000000000", "num_inference_steps is 1000000000000"),
        ("num_videos_per_prompt=1000000000000", "num_videos_per_prompt is 1000000000000"),
        ("batch_size=1000000000000", "batch_size or size of video"),
        ("save_fps=1e300", "save_fps is 1e+300"),
        ("save_fps=1e-9", "save_fps is 1e-09"),
        ("negative_prompt=\udcff\udcfe", r"negative_prompt: '\udcff\udcfe' is not text in UTF-8"),
    ],
)
def test_words(refused: Refused, word: str, message: str) -> None:
    Path("file").touch()
    Path("blank").write_text("\n \n\t\n")
    prompt = ("prompt=",) if word.startswith("prompts=") else ()
    assert message in refused(*prompt, word)


# ── what goes on all the same ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_size_beside_the_grid_is_a_warning(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = ["num_frames=2", "height=17", "width=41", "output_dir=out"]
    assert main(["generate", f"model={model}", "device=cpu", "prompt=a", *words]) == 0
    assert "2 frames of height 17 and width 41 become 1 of 16 and 48" in caplog.text


def test_output_does_not_grow_with_the_prompts(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["num_frames=1", "height=16", "width=16", "scheduler_config.num_inference_steps=1"]
    lines = []
    for count in (2, 12):
        Path("prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(count)))
        capsys.readouterr()
        place = ["--prompts", "prompts.txt", f"output_dir=out{count}"]
        assert main(["generate", f"model={model}", "device=cpu", *words, *place]) == 0
        lines.append(len(capsys.readouterr().out.splitlines()))
    assert lines[0] == lines[1]


def test_an_interrupted_run_goes_on_where_it_stopped(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", f"model={model}", "device=cpu", "prompt=[one, two, three]", "output_dir=out"]

    def interrupt_at_second(path: Path, *rest: Any) -> None:
        if path.name == "video_1.mp4":
            signal.raise_signal(signal.SIGINT)
        write_video(path, *rest)

    # What is started in the background may be told to ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch:
        patch.setattr(videos, "write_video", interrupt_at_second)
        assert main(words) == 130
    signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "\ninterrupted\n"
    assert {path.name for path in Path("out").iterdir()} == {"config.yaml", "manifest.json", "video_0.mp4"}
    first = Path("out/video_0.mp4").read_bytes()
    assert main(words) == 0
    assert "3 videos (2 new," in capsys.readouterr().out
    assert Path("out/video_0.mp4").read_bytes() == first
