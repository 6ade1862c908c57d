"""``ospnext rl`` on many processes: the rollouts, the rewards and the adapter of one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rl_many_cases as cases
import torch
from processes import Processes
from rl_cases import save_pipeline

from ospnext.cli import main

Group = Callable[[int], Processes]

PATIENCE = 600.0  # seconds, for the day the machine is busy
ONE_UPDATE = {"gradient_accumulation_steps": 2, "num_epochs": 2}
SSP2 = {"use_skiparse_sequence_parallel": True, "skiparse_sp_size": 2}
CFG2 = {"cfg_parallel_size": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("rl"))


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one process makes of eight videos in one update an epoch."""
    out = tmp_path_factory.mktemp("one")
    assert cases.train(0, 1, folder, out, ONE_UPDATE) == ""
    return cases.outcome(out)


@pytest.mark.parametrize(
    ("world", "values"),
    [
        (2, {"rl_config__num_batches_per_epoch": 1, "fsdp_size": 2}),
        (2, {"rl_config__num_batches_per_epoch": 1, "rl_config__num_image_per_prompt": 4, "fsdp_size": 1}),
        (2, SSP2 | {"fsdp_size": 2, "gradient_checkpointing": True}),
        (2, CFG2 | {"fsdp_size": 1}),
        pytest.param(4, SSP2 | {"rl_config__num_batches_per_epoch": 1, "fsdp_size": 2}, marks=pytest.mark.long),
    ],
    ids=["data, shards", "data, whole weights", "ssp", "guidance", "data, ssp, copies of shards"],
)
def test_the_run_is_that_of_one_process(
    world: int, values: dict[str, Any], processes: Group, folder: Path, expected: Any, tmp_path: Path
) -> None:
    refused = processes(world).run(cases.train, world, folder, tmp_path, ONE_UPDATE | values, seconds=PATIENCE)
    assert set(refused) == {""}
    (tensors, log, evaluations), (wanted, logged, evaluated) = cases.outcome(tmp_path), expected
    assert tensors.keys() == wanted.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, wanted[name], atol=2e-5, rtol=2e-3, msg=lambda text, n=name: f"{n}: {text}")
    assert len(log) == len(logged) == 2
    for line, other in zip(log, logged, strict=True):
        for key in ("reward", "grad_norm", "ratio", "reward_flicker", "zero_variance_share"):
            assert line[key] == pytest.approx(other[key], rel=1e-3, abs=1e-6), key
        assert line["ratio_before"] < 1e-5  # on this very layout
    for line, other in zip(evaluations, evaluated, strict=True):
        assert line == pytest.approx(other, rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(
    "settings",
    [
        {"rl_config__kl_beta": 1.0, "rl_config__kl_reward": 10.0, "rl_config__num_inner_epochs": 2},
        {"rl_config__cfg_gradient": "detached"},
        {"rl_config__train_groups": 1, "rl_config__best_of_n": 2},
        {"model_config__quant": "hif8", "rl_config__use_cfg_in_train": False},
    ],
    ids=["leashed", "detached", "chosen", "hif8, conditional"],
)
def test_other_ways_are_those_of_one_process_too(
    settings: dict[str, Any], processes: Group, folder: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    values = ONE_UPDATE | settings
    assert cases.train(0, 1, folder, one, values) == ""
    values = values | SSP2 | {"fsdp_size": 2}
    assert set(processes(2).run(cases.train, 2, folder, two, values, seconds=PATIENCE)) == {""}
    for mine, theirs in zip(*(cases.lines_of(out / "train_log.jsonl") for out in (one, two)), strict=True):
        for key in ("reward", "grad_norm", "ratio", *(("kl",) if "rl_config__kl_beta" in settings else ())):
            assert mine[key] == pytest.approx(theirs[key], rel=5e-3, abs=1e-6), key


def test_a_base_in_8_bits_stays_so_in_shards(
    processes: Group, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, one, two = (tmp_path / name for name in ("small", "one", "two"))
    assert main(["quantize", str(folder / "pipeline"), str(small)]) == 0
    values = ONE_UPDATE | {"model": small, "num_epochs": 1, "rl_config__eval_prompt_file": None}
    capsys.readouterr()
    assert cases.train(0, 1, folder, one, values) == ""
    assert "weights stored in 8 bits" in " ".join(capsys.readouterr().out.split())
    values |= {"rl_config__num_batches_per_epoch": 1, "fsdp_size": 2}
    assert set(processes(2).run(cases.train, 2, folder, two, values, seconds=PATIENCE)) == {""}
    (mine,), (theirs,) = (cases.lines_of(out / "train_log.jsonl") for out in (one, two))
    for key in ("reward", "grad_norm", "ratio"):
        assert mine[key] == pytest.approx(theirs[key], rel=1e-3), key
    assert mine["ratio_before"] < 1e-5 > theirs["ratio_before"]


def test_groups_that_do_not_go_round_are_refused_on_all(processes: Group, folder: Path, tmp_path: Path) -> None:
    values = {"rl_config__num_batches_per_epoch": 1, "rl_config__num_image_per_prompt": 8, "rl_config__best_of_n": 4}
    refused = processes(2).run(cases.train, 2, folder, tmp_path / "run", values, seconds=PATIENCE)
    assert all("best_of_n chooses by a prompt's group, but 1 groups do not go round 2" in text for text in refused)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("level", "what"), [(1e-30, "log-probability is not"), (1e30, "state after it is not")])
def test_what_is_no_number_is_said_on_all(
    processes: Group, folder: Path, tmp_path: Path, level: float, what: str
) -> None:
    """In shards: what asks the model to find out is asked by all."""
    values = {"rl_config__noise_level": level, "rl_config__eval_prompt_file": None, "fsdp_size": 2}
    refused = processes(2).run(cases.train, 2, folder, tmp_path / "run", values, seconds=PATIENCE)
    assert all("in random step 0 (sigma 1 to 0.9)" in text for text in refused)
    assert all(what in text for text in refused)


def test_a_group_may_be_shared_by_ranks(processes: Group, folder: Path, tmp_path: Path) -> None:
    """Eight videos of one prompt: on two ranks each has four of them, and advantages know of all."""
    one, two = tmp_path / "one", tmp_path / "two"
    values = ONE_UPDATE | {"rl_config__num_image_per_prompt": 8, "rl_config__eval_prompt_file": None, "num_epochs": 1}
    assert cases.train(0, 1, folder, one, values) == ""
    values |= {"rl_config__num_batches_per_epoch": 1, "fsdp_size": 2}
    assert set(processes(2).run(cases.train, 2, folder, two, values, seconds=PATIENCE)) == {""}
    (mine,), (theirs,) = (cases.lines_of(out / "train_log.jsonl") for out in (one, two))
    for key in ("reward", "reward_std", "advantage_size", "grad_norm"):
        assert mine[key] == pytest.approx(theirs[key], rel=1e-3), key
