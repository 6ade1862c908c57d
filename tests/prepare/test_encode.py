"""Encoded clips: training reads what the encoders make of the videos; stopped runs go on; others are refused."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors import safe_open
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from ospnext.cli import main
from ospnext.data.buckets import Bucket
from ospnext.data.dataset import ClipDataset, DataError, Sample, SampleSettings
from ospnext.data.latents import LatentDataset, open_latent_loader, read_said, shard_name
from ospnext.data.records import ClipRecord
from ospnext.data.sampler import Draw
from ospnext.data.store import ClipStore, write_store
from ospnext.data.transforms import to_pixel_values
from ospnext.media import read_video, write_video
from ospnext.models.text import encode_prompts
from ospnext.models.video_vae import encode_video
from ospnext.parallel.state import read
from ospnext.prepare.encode import EncodeConfig, encoder_settings, load_encoders, run

CLIPS = 7


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of noise in two shapes, with two captions each; clip 2 is no video."""
    folder = tmp_path_factory.mktemp("clips")
    rng, records = np.random.default_rng(0), []
    for i in range(CLIPS):
        height, width = ((32, 48), (48, 32))[i % 2]
        path = folder / f"{i}.mp4"
        write_video(path, rng.integers(0, 256, (12, height, width, 3), dtype=np.uint8))
        if i == 2:
            path.write_bytes(b"no video")
        records.append(ClipRecord(str(path), (f"clip {i}", f"A long caption of CLIP {i}"), height, width, 16, 12))
    write_store(folder, records)
    return folder


def save_encoders(folder: Path, seed: int = 0) -> dict[str, str]:
    """A tiny random VAE, text encoder and tokenizer; returns their keys."""
    torch.manual_seed(seed)
    sizes = {"base_dim": 8, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [True, True]}
    AutoencoderKLWan(**sizes, patch_size=2, in_channels=12, out_channels=12).save_pretrained(folder / "vae")
    text = UMT5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    UMT5EncoderModel(text).save_pretrained(folder / "text")
    ByT5Tokenizer().save_pretrained(folder / "tokenizer")
    return {
        "vae_config.vae_path": str(folder / "vae"),
        "text_encoder_config.checkpoint_path": str(folder / "text"),
        "text_encoder_config.text_tokenizer_path": str(folder / "tokenizer"),
    }


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Keys that name the encoders."""
    return save_encoders(tmp_path_factory.mktemp("encoders"))


def config(store: Path, save_path: Path, paths: dict[str, str], **changes: object) -> EncodeConfig:
    sections: dict = {"vae_config": {}, "text_encoder_config": {"text_len": 24}}
    for key, value in paths.items():
        section, name = key.split(".")
        sections[section][name] = value
    values = {"buckets": ("5x32x48", "9x48x32"), "windows": 2, "clips_per_shard": 3, "num_workers": 0, "device": "cpu"}
    return EncodeConfig(
        metafile_or_dir_path=str(store), save_path=str(save_path), **sections, **(values | {"seed": 5} | changes)
    )


@pytest.fixture(scope="module")
def encoded(store: Path, paths: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All clips, encoded."""
    folder = tmp_path_factory.mktemp("encoded")
    said = run(config(store, folder, paths))
    assert "6 clips in 3 shards; 1 could not be read" in said
    return folder


def test_training_reads_what_the_encoders_make(encoded: Path, store: Path, paths: dict[str, str]) -> None:
    encoders = load_encoders(config(store, encoded, paths), torch.device("cpu"))
    settings = SampleSettings((Bucket(5, 32, 48), Bucket(9, 48, 32)), seed=5)
    clips = ClipDataset(ClipStore(store), [np.arange(0, CLIPS, 2), np.arange(1, CLIPS, 2)], settings)
    latents = LatentDataset(encoded, seed=5, text_drop_ratio=0.1)
    assert [group.tolist() for group in latents.groups] == [[0, 4, 6], [1, 3, 5]]
    dropped = 0
    for epoch in range(2):
        for clip in (0, 1, 3, 4, 5, 6):
            draw = Draw(epoch, clip, clip % 2)
            online, stored = clips.read(draw), latents[draw]
            assert isinstance(online, Sample)
            expected = encode_video(encoders.vae, to_pixel_values(online.video)[None])[0]
            torch.testing.assert_close(stored.latents, expected, rtol=0, atol=1e-5)
            text = encode_prompts(encoders.tokenizer, encoders.text_encoder, [online.caption], 24, "cpu")[0]
            torch.testing.assert_close(stored.text, text[: len(stored.text)], rtol=0, atol=1e-5)
            assert not text[len(stored.text) :].any()
            dropped += online.caption == ""
    windows = [[latents[Draw(epoch, clip, 0)].latents for clip in (0, 4, 6)] for epoch in range(2)]
    assert not all(torch.equal(a, b) for a, b in zip(*windows, strict=True))
    assert torch.equal(latents[Draw(0, 0, 0)].latents, latents[Draw(2, 0, 0)].latents)


def test_batches_and_their_state(encoded: Path) -> None:
    def take(loader, steps: int) -> list:
        return [batch for batch, _ in zip(loader, range(steps), strict=False)]

    whole = take(open_latent_loader(encoded, None, 1, seed=5), 12)
    assert {tuple(batch.latents.shape) for batch in whole} == {(1, 16, 2, 4, 6), (1, 16, 3, 6, 4)}
    assert all(batch.text.shape == (1, 24, 16) for batch in whole)
    assert all(not batch.text[batch.mask == 0].any() for batch in whole)
    first = open_latent_loader(encoded, None, 1, seed=5)
    iterator = iter(first)
    head = [next(iterator) for _ in range(5)]
    second = open_latent_loader(encoded, None, 1, seed=5)
    second.load_state_dict(first.state_dict())
    resumed = head + take(second, 7)
    assert [batch.clips for batch in resumed] == [batch.clips for batch in whole]
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(resumed, whole, strict=True))
    drops = open_latent_loader(encoded, None, 1, seed=5, text_drop_ratio=1.0)
    assert all(batch.mask.sum() == 1 for batch in take(drops, 3))  # ByT5's end of text alone


def test_settings_that_differ_are_refused_by_name(
    encoded: Path, store: Path, paths: dict[str, str], tmp_path: Path
) -> None:
    own = encoder_settings(load_encoders(config(store, encoded, paths), torch.device("cpu")))
    LatentDataset(encoded, 0, 0.1, own | {"buckets": [[5, 32, 48], [9, 48, 32]], "train_fps": 16})
    other = save_encoders(tmp_path, seed=1)
    theirs = encoder_settings(load_encoders(config(store, encoded, other), torch.device("cpu")))
    with pytest.raises(DataError, match=r"vae is \w{12}\.\.\. there, \w{12}\.\.\. here; text_encoder is"):
        LatentDataset(encoded, 0, 0.1, theirs)
    with pytest.raises(DataError, match=r"train_fps is 16.* there, 24 here"):
        LatentDataset(encoded, 0, 0.1, {"train_fps": 24})
    with pytest.raises(DataError, match="seed is 5 there, 6 here: give another save_path"):
        run(config(store, encoded, paths, seed=6))
    before = {path.name: path.stat().st_mtime_ns for path in encoded.iterdir()}
    run(config(store, encoded, paths))
    after = {path.name: path.stat().st_mtime_ns for path in encoded.iterdir() if path.name != "index.json"}
    assert after == {name: when for name, when in before.items() if name != "index.json"}


def test_an_unfinished_folder_is_refused_and_completed(
    encoded: Path, store: Path, paths: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="no finished folder"):
        LatentDataset(tmp_path, 0, 0.1)
    said = run(config(store, tmp_path, paths, part=1, parts=2))
    assert "part 1 of 2 is done; 2 of 3 shards are others'" in said
    with pytest.raises(DataError, match="no finished folder"):
        LatentDataset(tmp_path, 0, 0.1)
    (tmp_path / shard_name(1)).write_bytes(b"half")  # as no stopped run leaves it
    assert "6 clips" in run(config(store, tmp_path, paths))
    for number in range(3):
        with safe_open(encoded / shard_name(number), "pt") as a, safe_open(tmp_path / shard_name(number), "pt") as b:
            assert sorted(a.keys()) == sorted(b.keys())
            assert all(torch.equal(a.get_tensor(key), b.get_tensor(key)) for key in a.keys())  # noqa: SIM118
    assert [bad[0] for n in range(3) for bad in (read_said(tmp_path / shard_name(n)) or {})["bad"]] == [2]


def test_a_damaged_shard_is_named_and_made_again(
    encoded: Path, store: Path, paths: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(encoded, tmp_path, dirs_exist_ok=True)
    shard = tmp_path / shard_name(0)
    shard.write_bytes(shard.read_bytes()[:-100])
    for workers in (0, 1):
        with pytest.raises(DataError, match=rf"{shard_name(0)}: missing or damaged .*makes it again") as caught:
            for _, _ in zip(range(12), open_latent_loader(tmp_path, None, 1, num_workers=workers), strict=False):
                pass
        assert "\n" not in str(caught.value)
    run(config(store, tmp_path, paths))
    assert shard.stat().st_size == (encoded / shard_name(0)).stat().st_size
    (tmp_path / "index.json").write_text("[]")
    with pytest.raises(DataError, match="encode the clips anew"):
        LatentDataset(tmp_path, 0, 0.1)


def test_a_full_disk_says_which_file(store: Path, paths: dict[str, str], tmp_path: Path) -> None:
    words = [f"{key}={value}" for key, value in paths.items()]
    words += [f"metafile_or_dir_path={store}", f"save_path={tmp_path}", "num_workers=0", "buckets=[5x32x48,9x48x32]"]
    words = ["data", "encode", *words, "text_encoder_config.text_len=24", "device=cpu"]
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)); "
    program = f"{limit}import sys; from ospnext.cli import main; sys.exit(main({words!r}))"
    # -B: no module is left compiled in part either.
    done = subprocess.run([sys.executable, "-B", "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{shard_name(0)}: cannot be written" in done.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["empty.safetensors"]


def test_a_killed_run_leaves_whole_shards_and_goes_on(store: Path, paths: dict[str, str], tmp_path: Path) -> None:
    words = [f"{key}={value}" for key, value in paths.items()]
    words += [f"metafile_or_dir_path={store}", f"save_path={tmp_path}", "clips_per_shard=1", "num_workers=0"]
    words += ["text_encoder_config.text_len=24", "buckets=[5x32x48,9x48x32]", "device=cpu"]
    command = [sys.executable, "-m", "ospnext", "data", "encode", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (tmp_path / shard_name(0)).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("clips-*.safetensors")}
    assert kept
    assert main(["data", "encode", *words]) == 0
    assert all((tmp_path / name).stat().st_mtime_ns == when for name, when in kept.items())
    assert len(LatentDataset(tmp_path, 0, 0.1).shards) == CLIPS


def test_bad_input_is_one_line(
    store: Path, paths: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"{key}={value}" for key, value in paths.items()]
    words += [f"metafile_or_dir_path={store}", f"save_path={tmp_path / 'out'}", "device=cpu"]
    for change, message in (
        ("buckets=[6x32x48]", "4k + 1"),
        ("buckets=[5x33x48]", "multiples of"),
        ("buckets=[5x33]", "FRAMESxHEIGHTxWIDTH"),
        ("sample_num_frames=81", "none of the 7 clips is long enough for 81x480x832"),
        ("part=1", "parts count from 0 to 0"),
        (f"metafile_or_dir_path={tmp_path}", "no store there"),
    ):
        assert main(["data", "encode", *words, change]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in error
        assert not (tmp_path / "out").exists()
    assert main(["data", "encode", *words[:1], *words[3:], "buckets=[5x32x48]"]) == 2
    assert "text_encoder_config.checkpoint_path" in capsys.readouterr().err


SMALL = {
    "device": "cpu",
    "weight_dtype": "fp32",
    "seed": 5,
    "training_iteration": 3,
    "trackers": "[]",
    **{
        f"model_config.{key}": value for key, value in {"dim": 24, "ffn_dim": 32, "freq_dim": 8, "text_dim": 16}.items()
    },
    **{f"model_config.{key}": value for key, value in {"text_len": 24, "num_heads": 2, "num_layers": 2}.items()},
    "data_config.num_workers": 0,
}


def test_text_is_as_long_as_the_models_transformer_reads(tmp_path: Path) -> None:
    given = {"metafile_or_dir_path": str(tmp_path), "save_path": str(tmp_path), "model": "shapes"}
    assert load_encoders(EncodeConfig(**given), torch.device("cpu")).text_len == 128


def train(output: Path, name: str, data: Path, paths: dict[str, str], **more: object) -> int:
    """``ospnext train`` of a tiny transformer on a data set."""
    given = {"data_config.dataset_name": name, "data_config.dataset_config.metafile_or_dir_path": data}
    keys = SMALL | paths | given | {key.replace("__", "."): value for key, value in more.items()}
    return main(["train", *(f"{key}={value}" for key, value in keys.items()), f"output_dir={output}"])


def test_training_runs_on_encoded_clips_and_refuses_others(
    encoded: Path, paths: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert train(tmp_path / "run", "latents", encoded, paths) == 0
    assert "latents read from files" in capsys.readouterr().out
    assert (tmp_path / "run/pipeline/model_index.json").is_file()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/train_log.jsonl").read_text().splitlines()]
    assert len(losses) == 3
    assert all(loss > 0 for loss in losses)
    same = {"vae_config.dtype": "bf16", "training_iteration": 1}  # than which the clips were made in others
    assert train(tmp_path / "same", "latents", encoded, paths | same) == 0
    others = save_encoders(tmp_path, seed=1)
    capsys.readouterr()
    for more, said in (
        (others, f"{encoded} was made with other settings: vae is"),
        ({"model_config.text_len": 12}, "text_len is 24 there, 12 here"),
        ({"model_config.text_dim": 32}, "model_config.text_dim is 32, but the width of embeddings in"),
        ({"data_config.dataset_config.sample_num_frames": 81}, "buckets is [[5, 32, 48], [9, 48, 32]] there"),
    ):
        assert train(tmp_path / "other", "latents", encoded, paths | more) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
        assert not (tmp_path / "other").exists()


def test_a_state_of_encoded_clips_is_exported_with_their_vae_and_sizes(
    encoded: Path, paths: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    clips = shutil.copytree(encoded, tmp_path / "clips")
    assert train(tmp_path / "run", "latents", clips, {}, training_iteration=1) == 0
    assert "no pipeline: VAE" in capsys.readouterr().out
    state, others = tmp_path / "run/iter_000000001", save_encoders(tmp_path / "others", seed=1)

    def export(to: str, vae: str) -> int:
        keys = ("text_encoder_path", "tokenizer_path")
        given = [f"{key}={path}" for key, path in zip(keys, list(paths.values())[1:], strict=True)]
        return main(["export", str(state), str(tmp_path / to), f"vae_path={vae}", *given])

    own, other = paths["vae_config.vae_path"], others["vae_config.vae_path"]
    capsys.readouterr()
    assert export("other", other) == 2
    said = capsys.readouterr().err
    assert f"{other} is not the VAE that made {clips}" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "other").exists()
    assert export("own", own) == 0
    sizes = ("num_frames", "height", "width")
    defaults = json.loads((tmp_path / "own/model_index.json").read_text())["defaults"]
    assert [defaults[name] for name in sizes] == [9, 48, 32], "of the largest clips"
    shutil.rmtree(clips)
    assert export("gone", other) == 0
    assert not {*sizes} & json.loads((tmp_path / "gone/model_index.json").read_text())["defaults"].keys()


def test_training_on_encoded_clips_makes_videos_with_networks_it_does_without(
    encoded: Path, paths: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    some = {"validation_config.interval": 3, "validation_config.prompts": "A red star."}
    some |= {"validation_config.num_inference_steps": 2}
    assert train(tmp_path / "run", "latents", encoded, paths | some) == 0
    assert train(tmp_path / "plain", "latents", encoded, paths) == 0
    one, other = (read(tmp_path / name / "iter_000000003", "") for name in ("run", "plain"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    video = read_video(tmp_path / "run/validation/step_000000003/video_0.mp4")
    assert video.frames.shape == (9, 48, 32, 3)  # the largest of the buckets
    vae_only = {key: value for key, value in paths.items() if "vae" in key}
    capsys.readouterr()
    assert train(tmp_path / "other", "latents", encoded, vae_only | some) == 2
    assert "name vae_config.vae_path, text_encoder_config.checkpoint_path" in capsys.readouterr().err


def test_training_runs_on_videos_and_resumes_exactly(store: Path, paths: dict[str, str], tmp_path: Path) -> None:
    size = {
        f"data_config__dataset_config__sample_{k}": v for k, v in (("num_frames", 5), ("height", 32), ("width", 48))
    }
    more = size | {"save_interval": 1, "data_config__batch_size": 2, "data_config__drop_last": False}
    assert train(tmp_path / "whole", "wan_t2v", store, paths, **more) == 0
    assert train(tmp_path / "parts", "wan_t2v", store, paths, **(more | {"training_iteration": 2})) == 0
    assert train(tmp_path / "parts", "wan_t2v", store, paths, **more, encoder_cpu_offload=True) == 0
    one, other = (read(tmp_path / name / "iter_000000003", "") for name in ("whole", "parts"))
    assert all(torch.equal(one[key], other[key]) for key in one)
