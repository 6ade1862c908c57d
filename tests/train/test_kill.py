"""A run that is killed at any moment, also while it saves, loses the steps since its last state and nothing else."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
import torch
from test_curve import WORDS

from ospnext.cli import main
from ospnext.parallel.state import complete, load, newest, read, states
from ospnext.train.video_vae import VAEArchitecture

STEPS = 12


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    VAEArchitecture(base_dim=8, dim_mult=(1, 1, 1), z_dim=4).build().save_pretrained(folder)
    return folder


def words(vae: Path, folder: Path) -> list[str]:
    last = [f"training_iteration={STEPS}", "save_interval=1", f"vae_config.vae_path={vae}", f"output_dir={folder}"]
    return ["train", *WORDS, *last]


def start(vae: Path, folder: Path) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ospnext", *words(vae, folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def in_one_thread(arguments: list[str]) -> None:
    """The command; sums depend on how many threads there are."""
    torch.set_num_threads(1)
    main(arguments)


def start_at_once(vae: Path, folder: Path) -> BaseProcess:
    """The same in a process that has everything imported already: as real to kill, and started in no time."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["ospnext.train.sft", "ospnext.evaluate.shapes"])
    process = context.Process(target=in_one_thread, args=(words(vae, folder),))
    process.start()
    return process


def steps_logged(folder: Path) -> int:
    path = folder / "train_log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def kill_in(running: subprocess.Popen | BaseProcess, folder: Path, after: int, wait: float) -> None:
    """kill -9 once so many lines are logged, and a moment later; states are being written all the time."""
    process = psutil.Process(running.pid)
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE and steps_logged(folder) < after:
        time.sleep(0.01)
    time.sleep(wait)
    running.kill()
    running.wait() if isinstance(running, subprocess.Popen) else running.join()


def hold(vae: Path, folder: Path, expected: Path) -> None:
    """Go on to the end, and compare with a run that was never interrupted."""
    assert main(words(vae, folder)) == 0
    one, other = newest(folder), newest(expected)
    assert one is not None
    assert other is not None
    mine, theirs = read(one, ""), read(other, "")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert (one / "record.json").read_text() == (other / "record.json").read_text()
    losses = [
        [json.loads(x)["loss"] for x in (f / "train_log.jsonl").read_text().splitlines()] for f in (folder, expected)
    ]
    assert losses[0] == losses[1]


def test_killed_once_while_it_saves(vae: Path, tmp_path: Path) -> None:
    assert main(words(vae, tmp_path / "whole")) == 0
    folder = tmp_path / "killed"
    kill_in(start(vae, folder), folder, 3, 0.0)
    assert len(complete(folder)) == len(states(folder)), "what has a state's name is whole"
    for left in (".iter_000000001.old", ".iter_000000099.tmp"):  # of kills at other moments
        (folder / left).mkdir()
        (folder / left / "x").touch()
    hold(vae, folder, tmp_path / "whole")
    assert not list(folder.glob(".iter_*"))


def test_sigterm_ends_well(vae: Path, tmp_path: Path) -> None:
    running = start(vae, tmp_path)
    while running.poll() is None and steps_logged(tmp_path) < 2:
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    said, _ = running.communicate(timeout=300)
    assert running.returncode == 0, said
    assert "start again to go on" in said
    state = newest(tmp_path)
    assert state is not None
    assert f"saved {state}" in said
    assert not (tmp_path / "pipeline").exists()


@pytest.mark.long
def test_killed_fifty_times(vae: Path, tmp_path: Path) -> None:
    assert main(words(vae, tmp_path / "whole")) == 0
    rng, kills, rounds = random.Random(0), 0, 0
    while kills < 50:
        folder = tmp_path / str(rounds)
        rounds += 1
        while steps_logged(folder) < STEPS - 2:
            before = max((int(p.name[5:]) for p in complete(folder)), default=0) if folder.exists() else 0
            kill_in(start_at_once(vae, folder), folder, before + rng.randint(0, 2), rng.random() * 0.5)
            kills += 1
            found = complete(folder) if folder.exists() else []
            assert [p.name for p in states(folder)] == [p.name for p in found]
            after = max((int(p.name[5:]) for p in found), default=0)
            assert after >= before, "a state was lost"
            if found:  # it loads, every byte of it
                load(found[-1], read(found[-1], ""))
        hold(vae, folder, tmp_path / "whole")
