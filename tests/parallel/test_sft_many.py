"""``ospnext train`` on many processes: the losses and the weights of one, whatever is shared and however it is cut."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sft_cases as cases
import torch
from processes import Processes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ospnext.checkpoints.lora_files import read_adapter
from ospnext.generate.pipeline import OSPNextPipeline
from ospnext.media import read_video
from ospnext.parallel.state import newest, read, read_record, step_of
from ospnext.prepare.quantize import quantize_transformer
from ospnext.quant.config import QuantConfig

Group = Callable[[int], Processes]

PATIENCE = 600.0  # seconds, for the day the machine is busy
SSP2 = {"use_skiparse_sequence_parallel": True, "skiparse_sp_size": 2}
ULYSSES2 = {"use_sequence_parallel": True, "sp_size": 2}
SPARING = {"fsdp_size": 2, "gradient_checkpointing": True, "encoder_cpu_offload": True}
SPARING |= {"text_encoder_config.use_fsdp": True}


def batch(size: int, parts: int) -> dict[str, Any]:
    return {"data_config.batch_size": size, "gradient_accumulation_steps": parts}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return cases.save_encoders(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="module")
def expected(paths: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one process makes of four clips a step."""
    folder = tmp_path_factory.mktemp("one")
    assert cases.train(0, 1, paths | {"output_dir": folder}) == ""
    return cases.outcome(folder)


def hold(found: Any, expected: Any) -> None:
    """Compare tensors and log lines."""
    (tensors, lines), (wanted, logged) = found, expected
    assert tensors.keys() == wanted.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, wanted[name], atol=2e-5, rtol=2e-4, msg=lambda text, n=name: f"{n}: {text}")
    assert len(lines) == len(logged)
    for line, other in zip(lines, logged, strict=True):
        assert line == pytest.approx(other, rel=2e-4, abs=1e-6)


def test_accumulation_trades_against_batch_size(paths: Any, expected: Any, tmp_path: Path) -> None:
    assert cases.train(0, 1, paths | batch(1, 4) | {"output_dir": tmp_path}) == ""
    hold(cases.outcome(tmp_path), expected)


@pytest.mark.parametrize(
    ("world", "values"),
    [
        (2, batch(2, 1) | {"fsdp_size": 2}),
        (2, batch(1, 4) | SSP2 | SPARING),
        (2, batch(2, 2) | ULYSSES2 | {"fsdp_size": 1}),
        pytest.param(
            4, batch(1, 2) | SSP2 | {"fsdp_size": 2, "explicit_prefetching_num_blocks": 2}, marks=pytest.mark.long
        ),
    ],
    ids=["data", "ssp", "ulysses, whole weights", "data, ssp, copies of shards"],
)
def test_the_run_is_that_of_one_process(
    world: int, values: dict[str, Any], processes: Group, paths: Any, expected: Any, tmp_path: Path
) -> None:
    assert set(
        processes(world).run(cases.train, world, paths | values | {"output_dir": tmp_path}, seconds=PATIENCE)
    ) == {""}
    hold(cases.outcome(tmp_path), expected)
    pipe = OSPNextPipeline.from_pretrained(tmp_path / "pipeline")
    average = {k.removeprefix("average.transformer."): v for k, v in expected[0].items() if k.startswith("average.t")}
    for name, p in pipe.transformer.named_parameters():
        torch.testing.assert_close(p.detach(), average[name], atol=2e-5, rtol=2e-4)


def test_dense_becomes_sparse_on_two_processes_as_on_one(processes: Group, paths: Any, tmp_path: Path) -> None:
    dense = cases.save_dense(tmp_path / "dense")
    values = paths | {
        "model_config.pretrained_model_dir_or_checkpoint": dense,
        "convert_layouts": True,
        "distillation_config.weight": 0.5,
        "training_iteration": 2,
    }
    assert cases.train(0, 1, values | {"output_dir": tmp_path / "one"}) == ""
    shared = batch(1, 4) | SSP2 | {"fsdp_size": 2, "gradient_checkpointing": True, "reshard_after_forward": False}
    values |= shared | {"output_dir": tmp_path / "two"}
    assert set(processes(2).run(cases.train, 2, values, seconds=PATIENCE)) == {""}
    found, expected = cases.outcome(tmp_path / "two"), cases.outcome(tmp_path / "one")
    assert all("loss_distillation" in line for line in expected[1])
    hold(found, expected)


@pytest.mark.parametrize("stored", [False, True], ids=["ssp", "data, on 8 bits"])
def test_an_adapter_s_run_is_that_of_one_process(stored: bool, processes: Group, paths: Any, tmp_path: Path) -> None:
    given, sharing = paths | cases.save_base(tmp_path / "base"), batch(1, 4) | SSP2
    if stored:  # sums in the same order, and one step: a number beside a midpoint would fall on its other side
        quantize_transformer(tmp_path / "base", tmp_path / "small", QuantConfig())
        given["model_config.pretrained_model_dir_or_checkpoint"] = str(tmp_path / "small")
        given, sharing = given | batch(1, 4) | {"training_iteration": 1}, batch(1, 2)
    assert cases.train(0, 1, given | {"output_dir": tmp_path / "one"}) == ""
    many = sharing | {"fsdp_size": 2, "gradient_checkpointing": True, "output_dir": tmp_path / "two"}
    assert set(processes(2).run(cases.train, 2, given | many, seconds=PATIENCE)) == {""}
    hold(cases.outcome(tmp_path / "two"), cases.outcome(tmp_path / "one"))
    one, two = (read_adapter(tmp_path / run / "adapter").pairs for run in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name].up, two[name].up, atol=2e-5, rtol=2e-4) for name in one)


@pytest.mark.parametrize("sharing", [SSP2 | batch(1, 4), batch(2, 1)], ids=["one video", "two videos"])
def test_videos_along_the_way_are_those_of_one_process(
    sharing: dict[str, Any], processes: Group, paths: Any, expected: Any, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    section = {"interval": 2, "prompts": tmp_path / "prompts.txt", "num_videos": 3, "num_inference_steps": 2}
    values = paths | {f"validation_config.{key}": value for key, value in section.items()}
    values |= {"validation_config.guidance_scale": 2.0, "reshard_after_forward": False, "trackers": "[tensorboard]"}
    assert cases.train(0, 1, values | {"output_dir": tmp_path / "one"}) == ""
    values |= sharing | {"fsdp_size": 2, "output_dir": tmp_path / "two", "text_encoder_config.use_fsdp": True}
    assert set(processes(2).run(cases.train, 2, values, seconds=PATIENCE)) == {""}
    for name in ("one", "two"):
        hold(cases.outcome(tmp_path / name), expected)  # of a run without any
        assert len(list((tmp_path / name / "validation").glob("*/*.mp4"))) == 2 * 3
        curves = EventAccumulator(str(tmp_path / name / "tensorboard"), {"images": 0}).Reload()
        assert curves.Tags()["images"] == [f"validation/video_{i}" for i in range(3)]
    apart = []
    for video in sorted((tmp_path / "one/validation").glob("*/*.mp4")):
        other = read_video(tmp_path / "two/validation" / video.parent.name / video.name).frames
        apart.append(abs(read_video(video).frames.astype(int) - other).mean())
    assert max(apart) < 1, "a colour that is rounded otherwise moves the codec a little"
    assert apart.count(0) >= 3


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_run_goes_on_from_osp_nexts_own_folder(
    world: int, processes: Group, paths: Any, expected: Any, tmp_path: Path
) -> None:
    assert cases.train(0, 1, paths | {"output_dir": tmp_path / "run", "optimizer_config.eps": 1e-4}) == ""
    state = newest(tmp_path / "run")
    assert state is not None
    old = cases.save_foreign(state, tmp_path / "old" / state.name, by_name=world == 1)
    values = paths | {"output_dir": tmp_path / "on", "import_checkpoint": old, "fsdp_size": world}
    said = [cases.train(0, 1, values)] if world == 1 else processes(2).run(cases.train, 2, values, seconds=PATIENCE)
    assert set(said) == {""}
    found, wanted = (read(newest(tmp_path / name), "") for name in ("on", "run"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    records = [read_record(newest(tmp_path / name)) for name in ("on", "run")]
    assert [records[0][key] for key in ("step", "clipper")] == [records[1][key] for key in ("step", "clipper")]
    assert cases.train(0, 1, values | {"training_iteration": 5}) == "", "and on, from its own state"
    shutil.rmtree(old)
    assert cases.train(0, 1, values | {"training_iteration": 6}) == "", "for which the old folder need not be there"
    small = {"model_config.dim": "", "model_config.ffn_dim": "", "training_iteration": 7}
    assert cases.train(0, 1, values | small) == "", "nor sizes, which its weights told"
    lone = {"distillation_config.weight": 0.5, "training_iteration": 8}
    assert "is the teacher, and not there any more" in cases.train(0, 1, values | lone)


def test_an_old_folder_that_is_not_whole_is_refused_by_name(paths: Any, expected: Any, tmp_path: Path) -> None:
    assert cases.train(0, 1, paths | {"output_dir": tmp_path / "run", "training_iteration": 1}) == ""
    state = newest(tmp_path / "run")
    assert state is not None
    old = cases.save_foreign(state, tmp_path / "old/iter_000000001", by_name=True)
    values = paths | {"output_dir": tmp_path / "on", "import_checkpoint": old}
    for name in ("ema_model_state_dict.pt", "optim_state_dict.pt"):
        kept = (old / name).read_bytes()
        (old / name).write_bytes(kept[: len(kept) // 2])
        assert f"{old / name}: cannot be read" in cases.train(0, 1, values)
        (old / name).unlink()
        assert f"{old} is not complete: {name} not there" in cases.train(0, 1, values)
        (old / name).write_bytes(kept)
    average = torch.load(old / "ema_model_state_dict.pt", weights_only=True)
    average["blocks.9.modulation"] = average.pop("blocks.0.modulation")
    torch.save(average, old / "ema_model_state_dict.pt")
    assert "of another model: 2 names or shapes differ, such as blocks.0.modulation" in cases.train(0, 1, values)
    assert "name a folder iter_NUMBER" in cases.train(0, 1, values | {"import_checkpoint": tmp_path})
    assert not (tmp_path / "on").exists()


def test_what_is_wrong_in_an_old_folder_is_said_of_its_file(
    paths: Any, expected: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert cases.train(0, 1, paths | {"output_dir": tmp_path / "run", "training_iteration": 1}) == ""
    old = cases.save_foreign(tmp_path / "run/iter_000000001", tmp_path / "old/iter_000000001", by_name=True)
    values = paths | {"output_dir": tmp_path / "on", "import_checkpoint": old, "training_iteration": 2}
    name, clipped = "blocks.0.modulation", "moving_avg_max_grad_norm"
    model, average = old / "model_state_dict.pt", old / "ema_model_state_dict.pt"
    optimiser, clipper = old / "optim_state_dict.pt", old / "adaptive_grad_clip_states.pt"
    moments = torch.load(optimiser, weights_only=True)["state"]
    for path, inside, said in (
        (average, {name: None}, f"no tensors of floating point: {name}"),
        (average, {name: torch.load(average, weights_only=True)[name].long()}, "no tensors of floating point"),
        (average, {3: torch.zeros(2)}, "of another model: 1 names or shapes differ, such as 3"),
        (optimiser, {"state": moments | {name: moments[name] | {"exp_avg": 1.0}}}, "no tensors of floating point"),
        (optimiser, {"state": moments | {3: moments[name]}}, "neither all by name nor numbered"),
        (optimiser, {"state": moments | {name: moments[name] | {"step": torch.zeros(2)}}}, f"step of {name} is tensor"),
        (optimiser, {"state": moments | {name: moments[name] | {"step": float("nan")}}}, f"step of {name} is nan"),
        (clipper, {clipped: torch.zeros(2)}, "not there, or no numbers"),
        (clipper, {clipped: "x"}, "not there, or no numbers"),
        (model, b"abc", "truncated, or not a file of plain weights"),
        (average, b"abc", "cannot be read"),
    ):
        kept = path.read_bytes()
        if isinstance(inside, bytes):
            path.write_bytes(inside)
        else:
            torch.save(torch.load(path, weights_only=True) | inside, path)
        refused = cases.train(0, 1, values)
        assert said in refused
        assert str(path) in refused
        path.write_bytes(kept)
    assert not (tmp_path / "on").exists()
    fresh: Any = None
    sound = torch.load(clipper, weights_only=True)
    for numbers in ({clipped: float("nan")}, {clipped: float("inf")}, {f"{clipped}_var": -1.0}):
        torch.save(sound | numbers, clipper)
        shutil.rmtree(tmp_path / "on", ignore_errors=True)
        capsys.readouterr()
        assert cases.train(0, 1, values) == ""
        assert f"{clipper.name} (its numbers are negative or not finite" in capsys.readouterr().out
        found = read_record(tmp_path / "on/iter_000000002")["clipper"]
        fresh = fresh or found
        assert found == fresh, "clipping has begun anew, whatever they were"
        assert 0 < found["mean"] < 100


@pytest.mark.long
def test_the_same_processes_train_again(processes: Group, paths: Any, expected: Any, tmp_path: Path) -> None:
    """On copies of shards, whose groups DTensor remembers by the mesh."""
    values = paths | batch(1, 2) | SSP2 | {"fsdp_size": 2}
    for name in ("first", "second"):
        again = values | {"output_dir": tmp_path / name}
        assert set(processes(4).run(cases.train, 4, again, seconds=PATIENCE)) == {""}
        hold(cases.outcome(tmp_path / name), expected)


@pytest.mark.long
def test_a_run_goes_on_on_other_numbers_of_processes(
    processes: Group, paths: Any, expected: Any, tmp_path: Path
) -> None:
    values = paths | {"output_dir": tmp_path, "save_interval": 1}
    first = values | batch(1, 2) | SSP2 | {"training_iteration": 1, "fsdp_size": 4}
    assert set(processes(4).run(cases.train, 4, first, seconds=PATIENCE)) == {""}
    second = values | batch(2, 1) | {"training_iteration": 3, "fsdp_size": 2}
    assert set(processes(2).run(cases.train, 2, second, seconds=PATIENCE)) == {""}
    assert cases.train(0, 1, values) == ""
    hold(cases.outcome(tmp_path), expected)


def test_bad_sizes_are_refused_on_all_before_anything_is_written(processes: Group, paths: Any, tmp_path: Path) -> None:
    for values, said in (
        (SSP2 | {"skiparse_sp_size": 3}, "ssp 3 x ulysses 1 (skiparse_sp_size x sp_size) does not fit 2 processes"),
        ({"model_config.in_dim": 8}, "model_config.in_dim is 8, but the VAE's latent channels 4"),
        ({"vae_config.vae_path": "nowhere"}, "nowhere"),
        ({"cfg_parallel_size": 2}, "cfg_parallel_size is 2"),
    ):
        refused = processes(2).run(cases.train, 2, paths | values | {"output_dir": tmp_path / "run"}, seconds=PATIENCE)
        assert all(said in text for text in refused)
        assert not (tmp_path / "run").exists()


def test_bfloat16_shards_learn_within_their_rounding(
    processes: Group, paths: Any, expected: Any, tmp_path: Path
) -> None:
    values = paths | batch(2, 1) | {"output_dir": tmp_path, "weight_dtype": "bf16", "fsdp_size": 2}
    assert set(processes(2).run(cases.train, 2, values, seconds=PATIENCE)) == {""}
    tensors, lines = cases.outcome(tmp_path)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    for line, other in zip(lines, expected[1], strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=0.02)


@pytest.mark.long
def test_torchrun_ends_well_at_sigterm_and_goes_on(paths: Any, tmp_path: Path) -> None:
    values = cases.SETTINGS | paths | batch(1, 1) | SSP2 | {"fsdp_size": 2, "output_dir": tmp_path}
    words = [f"{key}={value}" for key, value in values.items()]

    def start(iterations: int) -> subprocess.Popen:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*launcher, "-m", "ospnext", "train", *words, f"training_iteration={iterations}"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    running, log = start(100_000), tmp_path / "train_log.jsonl"
    while running.poll() is None and not (log.exists() and log.read_text().count("\n") > 5):
        time.sleep(0.1)
    running.terminate()
    said, _ = running.communicate(timeout=300)
    state = newest(tmp_path)
    assert state is not None, said
    assert not (tmp_path / "pipeline").exists()
    running = start(step_of(state) + 2)
    said, _ = running.communicate(timeout=300)
    assert running.returncode == 0, said
    assert f"resumed from {state}" in said
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, step_of(state) + 3))
    assert (tmp_path / "pipeline").exists()
