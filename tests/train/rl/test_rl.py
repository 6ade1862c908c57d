"""``ospnext rl`` through the command: what it leaves, that it goes on exactly, that it learns, and what it refuses."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import yaml
from rl_cases import SETTINGS, config_of, lines_of, save_pipeline, words_of
from safetensors.torch import load_file
from saved_states import read_state
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ospnext.checkpoints.lora_files import read_adapter
from ospnext.cli import main
from ospnext.config import load_config
from ospnext.config_keys import key_rules
from ospnext.flow.sde import rollout_levels, step_noises
from ospnext.media import read_video
from ospnext.parallel.launch import Launch
from ospnext.parallel.state import StateError, StateWriter, newest
from ospnext.rewards.simple import Brightness
from ospnext.train import pictures
from ospnext.train.loop import take_step
from ospnext.train.rl import update
from ospnext.train.rl.held_out import suspicions
from ospnext.train.rl.parts import as_generate, settle
from ospnext.train.rl.progress import SPAN, Progress
from ospnext.train.rl.rollout import Roller, Worth
from ospnext.train.rl.run import advantages_of
from ospnext.train.rl.settings import RLConfig
from ospnext.train.state import TrainState

SEED = Path(__file__).parents[2] / "data/seed_rl.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("rl"))


def train(folder: Path, out: Path, **settings: object) -> int:
    return main(["rl", *words_of(folder, out, **settings)])


def test_noise_that_is_too_much_for_the_steps_is_said(folder, tmp_path):
    def notices(**settings: object) -> list[str]:
        config = config_of(folder, tmp_path, rl_config__num_inference_steps=10, rl_config__noise="flow", **settings)
        return [line for line in as_generate(config)[1] if "too much" in line]

    assert notices() == []
    (line,) = notices(rl_config__noise_level=1.4)
    assert "noise_level 1.4 of flow is too much for steps as long as those of num_inference_steps 10" in line
    assert "2.06 times the noise" in line  # of the last random step
    (line,) = notices(rl_config__noise_level=1.4, rl_config__sde_steps=4)
    assert "1.62 times the noise" in line  # of the window's


def test_a_run_leaves_what_it_should(folder, tmp_path, capsys):
    out = tmp_path / "run"
    more = {"trackers": "[tensorboard]", "gradient_accumulation_steps": 2}
    assert train(folder, out, rl_config__eval_freq=2, save_interval=2, **more) == 0
    said = capsys.readouterr().out
    assert "shift is not set: rollouts, training and evaluation take the model's own, 3" in said
    assert "an epoch has 8 videos of 5 frames of 48 x 32 in groups of 4; 3 of 4 steps random (leading, osp 1)" in said
    log = lines_of(out / "train_log.jsonl")
    assert [(line["step"], line["epoch"]) for line in log] == [(1, 0), (2, 1), (3, 2)]
    for line in log:
        assert line["ratio"] == pytest.approx(1, abs=1e-4)
        assert line["ratio_before"] < 1e-5
        assert line["grad_norm"] > 0
        assert line["zero_variance_share"] == 0
        assert line["reward"] == pytest.approx(line["reward_brightness"])
        assert {"reward_flicker", "reward_sharpness", "clip_fraction", "unscored", "reward_std"} <= line.keys()
    groups = lines_of(out / "rewards.jsonl")
    assert [len(line["prompts"]) for line in groups] == [2, 2, 2]
    assert groups[0]["window"] == [0, 3]
    assert len({p["prompt"] for line in groups[:2] for p in line["prompts"]}) == 4  # others each time
    assert [line["epoch"] for line in lines_of(out / "evaluations.jsonl")] == [0, 2, 3]
    assert (out / "eval/over_time.mp4").stat().st_size > 0
    scores = json.loads((out / "eval/epoch_000002/scores.json").read_text())
    assert [one["seed"] for one in scores["videos"]] == [42, 43, 44]
    assert (out / "eval/epoch_000002/video_1.mp4").exists()
    assert not (out / "eval/epoch_000002/video_2.mp4").exists()
    curves = EventAccumulator(str(out / "tensorboard"), {"images": 0}).Reload()
    assert curves.Tags()["images"] == ["eval/video_0", "eval/video_1"]
    assert [event.step for event in curves.Images("eval/video_1")] == [0, 2, 3]
    assert all(event.encoded_image_string.startswith(b"GIF89a") for event in curves.Images("eval/video_1"))
    assert sorted(p.name for p in out.glob("lora-checkpoint-*")) == [
        f"lora-checkpoint-{n}{kind}" for n in (2, 3) for kind in ("", "-ema")
    ]


def test_a_checkpoint_folder_is_peft_s_and_holds_what_osp_next_s_does(folder, tmp_path):
    assert train(folder, tmp_path, num_epochs=2) == 0
    place = tmp_path / "lora-checkpoint-4"
    config = peft.LoraConfig.from_pretrained(str(place))
    assert (config.r, config.lora_alpha) == (4, 8)
    tensors = load_file(place / "adapter_model.safetensors")
    other = torch.load(place / "adapter_model.bin", weights_only=True)
    name = "base_model.model.blocks.1.cross_attn.o.lora_B"
    assert torch.equal(tensors[f"{name}.weight"], other[f"{name}.default.weight"])
    assert tensors[f"{name}.weight"].abs().max() > 0
    average = read_adapter(tmp_path / "lora-checkpoint-4-ema")
    shadow = read_state(place / "iter_000000004", "average.transformer.")
    assert torch.equal(average.pairs["blocks.0.self_attn.q"].up, shadow["blocks.0.self_attn.q.lora_B.default.weight"])
    assert json.loads((place / "rl_training_state.json").read_text()) == {"global_step": 4, "next_epoch": 2}
    clipper = torch.load(place / "adaptive_grad_clipper.pt", weights_only=True)
    assert clipper["moving_avg_max_grad_norm"] > 0
    again = load_config(RLConfig, place / "config.yaml", [], key_rules("rl"))
    assert again == config_of(folder, tmp_path, num_epochs=2).alone()
    base = load_file(folder / "pipeline/transformer/diffusion_pytorch_model.safetensors")
    assert not set(base) & set(tensors)


def test_what_was_evaluated_is_what_generate_makes(folder, tmp_path, monkeypatch):
    """The averaged adapter's folder, the same seeds, the model's own shift: the videos of the last evaluation."""
    monkeypatch.setattr(pictures, "animated_gif", None)  # there is no tracker to make any for
    assert train(folder, tmp_path / "run", num_epochs=2, optimizer_config__lr=0.1) == 0
    words = [f"model={folder / 'pipeline'}", f"lora_path={tmp_path / 'run/lora-checkpoint-4-ema'}", "seed=42"]
    words += [f"prompts={folder / 'held_out.txt'}", f"output_dir={tmp_path / 'out'}", "device=cpu"]
    assert main(["generate", *words]) == 0
    for number in (0, 1):
        made = read_video(tmp_path / f"out/video_{number}.mp4").frames.astype(int)
        last, first = (
            read_video(tmp_path / f"run/eval/epoch_{epoch:06d}/video_{number}.mp4").frames.astype(int)
            for epoch in (2, 0)
        )
        assert abs(made - last).max() <= 2
        assert abs(made - first).max() > 2


def test_without_pyav_frames_are_kept_and_it_is_said(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "av", None)  # as if it were not installed
    assert train(folder, tmp_path, num_epochs=1) == 0
    assert "PyAV is not installed: evaluations keep frames as .npy" in capsys.readouterr().out
    frames = np.load(tmp_path / "eval/epoch_000001/video_1.npy")
    assert (frames.shape, frames.dtype) == ((5, 32, 48, 3), np.uint8)
    assert not list(tmp_path.glob("eval/**/*.mp4"))


def equal_states(one: Path, other: Path) -> None:
    mine, theirs = read_state(one, ""), read_state(other, "")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    records = [json.loads((place / "record.json").read_text()) for place in (one, other)]
    for record in records:
        record["data"].pop("seconds")
    assert records[0] == records[1]


def test_in_pieces_it_is_the_run_that_was_never_interrupted(folder, tmp_path, capsys):
    mix = {"rl_config__window": "random", "rl_config__sde_steps": 2, "rl_config__window_interval": 1}
    mix |= {"lr_schedule": "cosine"}
    assert train(folder, tmp_path / "whole", **mix) == 0
    assert train(folder, tmp_path / "pieces", time_budget_minutes=1e-6, **mix) == 0
    assert "stopped at epoch 0 of 3, step 0: start again to go on" in capsys.readouterr().out
    assert train(folder, tmp_path / "pieces", num_epochs=1, **mix) == 0
    # As if it had been killed in the second epoch: its lines are there, its state is not.
    with (tmp_path / "pieces/rewards.jsonl").open("a") as file:
        file.write(json.dumps({"epoch": 1, "prompts": []}) + "\n{")
    assert train(folder, tmp_path / "pieces", **mix) == 0
    assert "resumed from" in capsys.readouterr().out
    equal_states(*(tmp_path / name / "iter_000000006" for name in ("whole", "pieces")))
    for log in ("train_log.jsonl", "rewards.jsonl"):
        assert lines_of(tmp_path / "whole" / log) == lines_of(tmp_path / "pieces" / log)


def test_a_state_is_not_exported_for_there_are_adapters(folder, tmp_path, capsys):
    assert train(folder, tmp_path / "run", num_epochs=1) == 0
    state = newest(tmp_path / "run")
    assert main(["export", str(state), str(tmp_path / "out")]) == 2
    assert "a state of reinforcement learning, whose adapters are in lora-checkpoint-*/" in capsys.readouterr().err


def test_a_checkpoint_folder_goes_on_exactly_in_another_run(folder, tmp_path, capsys):
    assert train(folder, tmp_path / "whole") == 0
    assert train(folder, tmp_path / "first", num_epochs=1) == 0
    start = tmp_path / "first/lora-checkpoint-2"
    assert train(folder, tmp_path / "second", lora_config__lora_path=start) == 0
    assert f"goes on from {start}: epoch 1, step 2" in capsys.readouterr().out
    one, other = (read_state(tmp_path / name / "iter_000000006", "") for name in ("whole", "second"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", ["adaptive_grad_clipper.pt", "adaptive_grad_clip_states.pt"])
def test_osp_nexts_own_folder_goes_on_with_its_clipper_and_epoch(folder, tmp_path, capsys, name):
    assert train(folder, tmp_path / "first", num_epochs=1) == 0
    old = tmp_path / "first/lora-checkpoint-2"
    (old / "adaptive_grad_clipper.pt").rename(old / name)
    (old / "adapter_model.safetensors").unlink()  # theirs has the .bin alone
    state = newest(old)
    assert state is not None
    for file in (*state.iterdir(),):
        file.unlink()
    state.rmdir()
    assert train(folder, tmp_path / "second", num_epochs=1, lora_config__lora_path=old) == 0
    assert "epoch 1, step 2" in capsys.readouterr().out
    record = json.loads((tmp_path / "second/iter_000000002/record.json").read_text())
    assert record["clipper"]["mean"] > 0


@pytest.mark.parametrize("epoch", ["-2", "Infinity", '"two"'])
def test_a_training_state_that_cannot_be_is_named(folder, tmp_path, capsys, epoch):
    assert train(folder, tmp_path / "first", num_epochs=1, rl_config__eval_prompt_file=None) == 0
    old = tmp_path / "first/lora-checkpoint-2"
    shutil.rmtree(old / "iter_000000002")
    (old / "rl_training_state.json").write_text(f'{{"global_step": 2, "next_epoch": {epoch}}}')
    assert train(folder, tmp_path / "second", lora_config__lora_path=old, rl_config__eval_prompt_file=None) == 2
    assert f"{old}: its training state cannot be read" in capsys.readouterr().err


@pytest.mark.long
def test_the_reward_rises(folder, tmp_path):
    """By more than the deviation that videos had at the start, on training's prompts and on others."""
    settings = {"num_epochs": 80, "optimizer_config__eps": 1e-15, "optimizer_config__lr": 0.005}
    settings |= {"lora_config__rank": 8, "lora_config__alpha": 64, "rl_config__num_inference_steps": 6}
    settings |= {"rl_config__num_batches_per_epoch": 4, "gradient_accumulation_steps": 4, "rl_config__eval_freq": 80}
    assert train(folder, tmp_path, **settings) == 0
    log = lines_of(tmp_path / "train_log.jsonl")
    early, late = (sum(line["reward"] for line in some) / 5 for some in (log[:5], log[-5:]))
    assert late > early + 1.5 * log[0]["reward_std"]
    before, after = lines_of(tmp_path / "evaluations.jsonl")
    assert after["brightness"] > before["brightness"] + log[0]["reward_std"]


# ── checks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_ratio_that_is_not_one_stops_the_run_and_says_why(folder, tmp_path, monkeypatch, capsys):
    """As if another adapter had rolled out than the one that is trained."""
    roll = Roller.roll

    def roll_and_change(self, epoch, check):
        rolled = roll(self, epoch, check)
        with torch.no_grad():
            self.policy.transformer.blocks[0].self_attn.q.lora_B["default"].weight.add_(0.5)
        return rolled

    monkeypatch.setattr(Roller, "roll", roll_and_change)
    assert train(folder, tmp_path, rl_config__clip_range=1e-4) == 2
    said = capsys.readouterr().err
    assert "before an update the probability ratio is" in said
    assert "1.0e-04 is allowed" in said
    assert "All differ: the weights or the text are not those of the rollout" in said
    assert newest(tmp_path) is None


def test_cheating_is_suspected_where_the_reward_rises_and_a_watched_one_falls(folder, tmp_path):
    config = config_of(folder, tmp_path).rl_config
    before = {"reward": 0.5, "flicker": 0.9, "sharpness": 0.2}
    assert suspicions({"reward": 0.6, "flicker": 0.9, "sharpness": 0.19}, before, config) == []
    assert suspicions({"reward": 0.4, "flicker": 0.1, "sharpness": 0.0}, before, config) == []
    (line,) = suspicions({"reward": 0.6, "flicker": 0.5, "sharpness": 0.2}, before, config)
    assert "flicker, which nobody optimises, fell from 0.9 to 0.5" in line
    better = {"reward": 0.6, "flicker": 0.9999, "sharpness": 0.2}
    assert suspicions(better, before | {"flicker": 0.5}, config) == []  # of sharpness more is worse, too
    (line,) = suspicions(better | {"sharpness": 0.25}, before, config)
    assert "sharpness, which nobody optimises, rose from 0.2 to 0.25" in line


def test_rewards_that_fail_for_good_stop_the_run(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Brightness, "__call__", lambda self, videos, *_: [math.nan] * len(videos))
    assert train(folder, tmp_path, rl_config__eval_prompt_file=None) == 2
    assert "not one of epoch 0's 8 videos could be scored: brightness gave no number" in capsys.readouterr().err


def test_videos_that_are_no_numbers_are_not_a_rewards_fault(folder, tmp_path, capsys):
    settings = {"optimizer_config__lr": 1000, "rl_config__eval_prompt_file": None}
    assert train(folder, tmp_path, **settings) == 2
    said = capsys.readouterr().err
    assert "8 of them hold NaN or infinity: in random step 0 (sigma 1 to 0.9) the velocity is not finite" in said
    assert "lower optimizer_config.lr or rl_config.noise_level; where the adapter is broken already, remove" in said


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        (
            {"noise_level": 1e30},
            "(sigma 1 to 0.9) the state after it is not finite, of noise of standard deviation 3.2e+29: "
            "lower rl_config.noise_level (1e+30)",
        ),
        (
            {"noise_level": 1e-30},
            "(sigma 1 to 0.9) the log-probability is not finite, of noise of standard deviation 3.2e-31: "
            "raise rl_config.noise_level (1e-30)",
        ),
    ],
)
def test_what_is_no_number_in_a_rollout_is_said_with_the_way_out(folder, tmp_path, capsys, settings, what):
    given = {f"rl_config__{key}": value for key, value in settings.items()}
    assert train(folder, tmp_path, rl_config__eval_prompt_file=None, **given) == 2
    said = capsys.readouterr().err
    assert "in random step 0 (" in said
    assert what in said
    assert newest(tmp_path) is None


def test_infinite_rewards_are_no_numbers_in_the_log(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Brightness, "__call__", lambda self, videos, *_: [math.inf, *range(len(videos) - 1)])
    assert train(folder, tmp_path, num_epochs=1, rl_config__eval_prompt_file=None) == 0
    (line,) = lines_of(tmp_path / "rewards.jsonl")
    assert [prompt["rewards"] for prompt in line["prompts"]] == [[None, 0, 1, 2]] * 2


def test_another_alpha_is_another_run(folder, tmp_path, capsys):
    """The tensors of its state have the same shapes, and mean something else."""
    assert train(folder, tmp_path, num_epochs=1, rl_config__eval_prompt_file=None) == 0
    assert train(folder, tmp_path, lora_config__alpha=99, rl_config__eval_prompt_file=None) == 2
    assert "lora_config.alpha is 99 here, but 8 there" in capsys.readouterr().err
    assert not (tmp_path / "iter_000000004").exists()


def test_a_checkpoint_that_cannot_be_written_leaves_no_draft(folder, tmp_path, monkeypatch, capsys):
    def fail(state: TrainState, writer: StateWriter) -> None:
        raise StateError("no room")

    monkeypatch.setattr(TrainState, "save", fail)
    assert train(folder, tmp_path, save_interval=1, rl_config__eval_prompt_file=None) == 2
    assert "no room" in capsys.readouterr().err
    assert not [path.name for path in tmp_path.iterdir() if "lora-checkpoint" in path.name]


def test_what_has_changed_since_the_run_began_is_said(folder, tmp_path, capsys):
    assert train(folder, tmp_path, num_epochs=1, rl_config__eval_prompt_file=None) == 0
    assert "goes on" not in capsys.readouterr().out
    other = {"rl_config__prompt_file": folder / "held_out.txt", "rl_config__eval_prompt_file": None}
    assert train(folder, tmp_path, num_epochs=1, seed=7, **other) == 0
    said = capsys.readouterr().out
    assert "goes on with another seed than before: 7, not 42" in said
    assert f"goes on with another rl_config.prompt_file than before: '{folder / 'held_out.txt'}'" in said
    assert said.count("goes on with another") == 2


def test_a_run_that_is_killed_before_its_state_has_written_its_checkpoint(folder, tmp_path, monkeypatch):
    class KilledError(BaseException):
        pass

    def kill(state: TrainState, writer: StateWriter) -> None:
        if state.step == 2 and writer.folder == tmp_path:
            raise KilledError
        save(state, writer)

    save = TrainState.save
    settings = {"save_interval": 1, "rl_config__eval_prompt_file": None, "num_epochs": 2}
    monkeypatch.setattr(TrainState, "save", kill)
    with pytest.raises(KilledError):
        train(folder, tmp_path, **settings)
    assert newest(tmp_path) is None
    monkeypatch.undo()
    assert train(folder, tmp_path, **settings) == 0
    assert (tmp_path / "lora-checkpoint-2/adapter_model.safetensors").exists()
    assert [line["epoch"] for line in lines_of(tmp_path / "rewards.jsonl")] == [0, 1]


def test_a_log_of_somebody_elses_is_named(folder, tmp_path, capsys):
    (tmp_path / "rewards.jsonl").write_text('{"theirs": 1}\n')
    assert train(folder, tmp_path, rl_config__eval_prompt_file=None) == 2
    assert "rewards.jsonl, line 1: no line of this log" in capsys.readouterr().err
    assert (tmp_path / "rewards.jsonl").read_text() == '{"theirs": 1}\n'


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rl_config__reward_fn": "{videoalign: 1.0}"}, "load_from_pretrained"),
        ({"rl_config__reward_fn": "{brightnes: 1.0}"}, "did you mean 'brightness'"),
        ({"rl_config__num_image_per_prompt": 5}, "8 videos, no multiple of num_image_per_prompt 5"),
        ({"rl_config__watch_fn": "[brightness]"}, "watch_fn names brightness, which reward_fn optimises"),
        ({"rl_config__best_of_n": 3}, "best_of_n is 3: it must be even"),
        ({"rl_config__train_groups": 3}, "train_groups is 3, but an epoch has 2 prompts"),
        ({"rl_config__noise": "cps", "rl_config__noise_level": 1.5}, "noise_level is 1.5: that of noise cps is"),
        ({"rl_config__prompt_file": "nowhere.txt"}, "nowhere.txt"),
        ({"lora_config__target_modules": "[self_attn.x]"}, "self_attn.x"),
        ({"reward_config__options": "{motion: {}}"}, "names motion, which reward_fn and watch_fn do not"),
        ({"weight_dtype": "fp16"}, "training needs bf16's range"),
        (
            {"rl_config__reward_fn": "{shapes: 1.0}"},
            "reward 'shapes' needs scene of every prompt, and 'prompt number 0'",
        ),
        (
            {"rl_config__watch_fn": "[shapes]", "rl_config__prompt_file": "shapes:large:8"},
            "reward 'shapes' needs scene of every prompt, and 'another one, 0' has none",
        ),
        ({"reward_config__device": "moon"}, "device 'moon' is not known"),
        ({"reward_config__separate": "[motion]"}, "separate names motion, which reward_fn and watch_fn do not"),
        ({"rl_config__reward_fn": "{brightness: 0.0}"}, "nothing is optimised"),
        ({"rl_config__num_inference_steps": 10**9}, "rl_config.num_inference_steps is 1000000000"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_rolled_out(folder, tmp_path, capsys, settings, said):
    assert train(folder, tmp_path / "run", **settings) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("run/iter_*"))


def test_the_seed_yaml_runs(folder, tmp_path, capsys):
    """OSP-Next's own file, with real paths, a small size and a reward that needs no download."""
    own = yaml.safe_load(SEED.read_text())
    own["model_config"] = {"pretrained_model_dir_or_checkpoint": str(folder / "pipeline/transformer")}
    own["vae_config"] = {"vae_path": str(folder / "pipeline/vae"), "dtype": "fp32"}
    own["text_encoder_config"] = {
        "text_len": 12,
        "checkpoint_path": str(folder / "pipeline/text_encoder"),
        "text_tokenizer_path": str(folder / "pipeline/tokenizer"),
        "use_fsdp": True,
    }
    own["data_config"]["dataset_config"] = {
        "text_tokenizer_path": str(folder / "pipeline/tokenizer"),
        "tokenizer_max_length": 12,
    }
    own["rl_config"] |= {"prompt_file": str(folder / "prompts.txt"), "eval_prompt_file": str(folder / "held_out.txt")}
    own["rl_config"] |= {"height": 32, "width": 48, "num_frames": 5, "reward_fn": {"brightness": 1.0}}
    own |= {"output_dir": str(tmp_path / "run"), "num_epochs": 1, "weight_dtype": "fp32"}
    (tmp_path / "rl.yaml").write_text(yaml.safe_dump(own))
    assert main(["rl", str(tmp_path / "rl.yaml"), "device=cpu"]) == 0
    said = capsys.readouterr().out
    assert "10 of 25 steps random (leading, osp 1), shift 7, guidance 5" in said
    assert "take OSP-Next's recipe for generating, 7" in said
    assert "an epoch has 8 videos" in said
    assert (tmp_path / "run/lora-checkpoint-4/adapter_model.bin").exists()


def test_sigterm_in_an_epoch_leaves_the_state_before_it(folder, tmp_path):
    words = words_of(folder, tmp_path, num_epochs=100_000, rl_config__eval_prompt_file=None)
    running = subprocess.Popen([sys.executable, "-m", "ospnext", "rl", *words], stdout=subprocess.PIPE, text=True)
    while running.poll() is None and newest(tmp_path) is None:
        time.sleep(0.05)
    os.kill(running.pid, signal.SIGTERM)
    said, _ = running.communicate(timeout=300)
    assert running.returncode == 0, said
    assert "start again to go on" in said
    last = newest(tmp_path)
    assert last is not None
    epoch = json.loads((last / "record.json").read_text())["data"]["epoch"]
    assert train(folder, tmp_path, num_epochs=epoch + 1, rl_config__eval_prompt_file=None) == 0
    assert [line["epoch"] for line in lines_of(tmp_path / "train_log.jsonl")] == list(range(epoch + 1))


# ── meanings of keys ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_schedule_shift_is_reported_where_it_differs_from_the_models(folder, tmp_path):
    job = settle(config_of(folder, tmp_path, scheduler_config__shift=5.0), Launch())
    assert job.plan.sampling.shift == 5.0
    assert any("the model is deployed with 3" in line for line in job.notices)
    job = settle(config_of(folder, tmp_path, rl_config__sde_steps=4), Launch())
    assert any("sde_steps is 4: 3 are random" in line for line in job.notices)


def test_a_decline_is_one_beyond_what_prompts_explain():
    rng = np.random.default_rng(0)
    flat, falling = Progress(), Progress()
    said = []
    for epoch in range(60):
        noise = 0.06 * rng.standard_normal()
        flat.add(0.5 + noise)
        falling.add(0.5 - 0.01 * epoch + noise)
        assert flat.decline is None
        said.append(falling.decline)
    assert said[: 2 * SPAN - 1] == [None] * (2 * SPAN - 1)
    before, now = next(filter(None, said))
    assert now < before - 0.05
    again = Progress()
    again.load_state_dict(json.loads(json.dumps(falling.state_dict())))
    assert (again.decline, again.state_dict()) == (falling.decline, falling.state_dict())


@pytest.mark.parametrize("stop", [False, True])
def test_a_reward_that_falls_is_said(folder, tmp_path, monkeypatch, capsys, stop):
    values = iter(np.linspace(0.9, 0.1, 1000))
    monkeypatch.setattr(Brightness, "__call__", lambda self, videos, *_: [next(values) for _ in videos])
    more = {"num_epochs": 3 * SPAN, "rl_config__num_batches_per_epoch": 1, "state_interval": 5}
    more |= {"rl_config__eval_prompt_file": None, "rl_config__num_inference_steps": 2, "rl_config__watch_stop": stop}
    assert train(folder, tmp_path / "run", **more) == (2 if stop else 0)
    said = capsys.readouterr()
    words = "updates do more harm than good. Lower optimizer_config.lr (0.01), or learn from more than 4 videos"
    assert (said.err if stop else said.out).count(words) == (1 if stop else 2)
    assert len(lines_of(tmp_path / "run/train_log.jsonl")) == (2 * SPAN if stop else 3 * SPAN)


def also(settings: dict[str, object]) -> object:
    """A way that is tried among the long tests."""
    return pytest.param(settings, marks=pytest.mark.long)


@pytest.mark.parametrize(
    "settings",
    [
        also({"rl_config__sample_time_per_prompt": 2}),
        {"rl_config__best_of_n": 2, "rl_config__train_groups": 1, "rl_config__train_batch_size": 2},
        {"rl_config__kl_beta": 0.1, "rl_config__kl_convention": "no_dt"},
        also({"rl_config__kl_reward": 0.5}),
        {"rl_config__use_cfg_in_train": False},
        {"rl_config__cfg_gradient": "detached"},
        also({"rl_config__guidance_scale": 1.0}),
        also({"rl_config__guidance_mode": "sequential", "gradient_checkpointing": True}),
        {"rl_config__num_inner_epochs": 2, "rl_config__timestep_fraction": 0.5},
        {"rl_config__noise": "cps", "rl_config__flash": 0.5, "rl_config__sde_steps": 1, "rl_config__same_noise": True},
        also({"rl_config__noise": "dance", "rl_config__per_prompt_stat_tracking": False}),
        {
            "rl_config__step_weights": "noise",
            "rl_config__noise": "flow",
            "rl_config__global_std": True,
            "rl_config__reward_mixing": "advantages",
        },
        also({"model_config__quant": "hif8"}),
        also({"weight_dtype": "bf16", "rl_config__exact_rollouts": True, "rl_config__train_batch_size": 2}),
        {"encoder_cpu_offload": True, "rl_config__train_batch_size": 3, "reward_config__separate": "[brightness]"},
    ],
    ids=lambda settings: ", ".join(key.rpartition("__")[2] for key in settings),
)
def test_every_way_starts_at_ratio_one_and_trains(folder, tmp_path, settings):
    assert train(folder, tmp_path, **{"num_epochs": 2, "rl_config__eval_prompt_file": None} | settings) == 0
    log = lines_of(tmp_path / "train_log.jsonl")
    assert len(log) == 2
    for line in log:
        assert line["ratio_before"] < 1e-4
        assert line["grad_norm"] > 0
        assert math.isfinite(line["loss"])
    if "rl_config__kl_beta" in settings:
        assert log[0]["kl"] < log[1]["kl"]


def test_the_rate_follows_epochs(folder, tmp_path):
    given = {"lr_schedule": "cosine", "optimizer_config__lr": 0.02, "rl_config__eval_prompt_file": None}
    assert train(folder, tmp_path / "run", **given, num_epochs=2) == 0
    more = {"optimizer_config__resume_override_lr": True, "optimizer_config__resume_lr": 0.04}
    assert train(folder, tmp_path / "run", **given, **more, num_epochs=4) == 0
    rates = [line["lr"] for line in lines_of(tmp_path / "run/train_log.jsonl")]
    assert rates == pytest.approx([0.02, 0.01, 0.02, 0.04 * (1 - math.sqrt(0.5)) / 2], rel=1e-6)


def test_random_steps_count_by_their_noise(folder, tmp_path, monkeypatch):
    """The gradient is the sum of the steps' own, each by its share of the noise."""
    seen = []

    def look(state, settings, total):
        seen.append(torch.cat([p.grad.flatten().clone() for p in state.average.live.values()]))
        take_step(state, settings, total)

    monkeypatch.setattr(update, "take_step", look)
    given = {"num_epochs": 1, "rl_config__eval_prompt_file": None, "rl_config__num_inference_steps": 8}
    given |= {"rl_config__sde_steps": 2, "rl_config__noise": "flow"}
    ways = ({}, {"rl_config__timestep_fraction": 0.5}, {"rl_config__step_weights": "noise"})
    for i, way in enumerate(ways):
        assert train(folder, tmp_path / str(i), **given, **way) == 0
    both, one, weighted = (seen[i * len(seen) // 3] for i in range(3))  # the first update of each
    first, second = step_noises(rollout_levels(8, 3.0, 0, 2), "flow", 0.7)
    assert abs(first / second - 1) > 0.02
    expected = (first * one + second * (2 * both - one)) / (first + second)
    torch.testing.assert_close(weighted, expected, rtol=1e-4, atol=1e-5 * float(both.abs().max()))
    assert not torch.allclose(weighted, both, rtol=1e-3)


def test_the_divergence_of_a_rollout_is_taken_off_its_reward(folder, tmp_path):
    """Before the first update there is none, after it there is."""
    logs = {}
    for name, weight in (("without", 0.0), ("with", 100.0)):
        settings = {"rl_config__kl_reward": weight, "num_epochs": 2, "rl_config__eval_prompt_file": None}
        assert train(folder, tmp_path / name, **settings, optimizer_config__lr=0.1) == 0
        logs[name] = lines_of(tmp_path / name / "train_log.jsonl")
    assert logs["with"][0]["reward"] == pytest.approx(logs["without"][0]["reward"])
    assert logs["with"][1]["reward"] < logs["with"][1]["reward_brightness"] - 1e-4


def test_prompts_with_several_rewards_are_mixed_either_way(folder, tmp_path):
    rewards = torch.tensor([[1.0, 2.0, 3.0, 4.0], [40.0, 10.0, 20.0, 30.0]], dtype=torch.float64)
    worth = Worth(rewards.sum(0), {"a": rewards[0], "brightness": rewards[1]}, torch.tensor([0, 0, 1, 1]), {})
    c = config_of(folder, tmp_path).rl_config.model_copy(update={"reward_fn": {"a": 1.0, "brightness": 1.0}})
    summed = advantages_of(c, worth)
    assert summed.tolist() == pytest.approx([1, -1, -1, 1], abs=1e-3)
    each = advantages_of(c.model_copy(update={"reward_mixing": "advantages"}), worth)
    assert each.tolist() == pytest.approx([0, 0, -2, 2], abs=1e-3)


def test_defaults_are_the_seeds(folder, tmp_path):
    c = config_of(folder, tmp_path)
    assert (c.num_epochs, c.save_interval, SETTINGS["num_epochs"]) == (3, 100, 3)
    own = c.rl_config.model_fields["clip_range"].default, c.rl_config.model_fields["num_inference_steps"].default
    assert own == (5e-3, 20)


def test_rounding_is_divided_out_of_every_update_of_an_epoch(folder, tmp_path, monkeypatch):
    """Old log-probabilities that rounding has moved clip nothing: the kernels that train compute them anew."""
    roll, taken = Roller.roll, []

    def roll_and_round(self, epoch, check):
        rollouts, worth = roll(self, epoch, check)
        exact = [values.clone() for values in rollouts.log_probs]
        for values in rollouts.log_probs:
            values.add_(torch.where(torch.arange(len(values)) % 2 > 0, 4e-3, -4e-3))
        taken.append((rollouts, exact))
        return rollouts, worth

    monkeypatch.setattr(Roller, "roll", roll_and_round)
    settings = {"rl_config__clip_range": 1e-3, "rl_config__ratio_tolerance": 5e-3, "optimizer_config__lr": 1e-6}
    assert train(folder, tmp_path, **settings, rl_config__train_batch_size=2) == 0
    log = lines_of(tmp_path / "train_log.jsonl")
    assert all(line["clip_fraction"] == 0 for line in log)
    assert all(0.003 < line["ratio_before"] < 0.005 for line in log)
    for rollouts, exact in taken:
        for values, wanted in zip(rollouts.log_probs, exact, strict=True):
            torch.testing.assert_close(values, wanted, rtol=1e-5, atol=1e-5)
