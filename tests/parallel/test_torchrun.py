"""Real launches: bad input ends all with one line, a process that dies ends the job, and nobody hangs."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

GENERATE = ("-m", "ospnext", "generate", "--prompt", "a large red star", "device=cpu")
LONG = ("scheduler_config.num_inference_steps=10000", "use_skiparse_sequence_parallel=true", "skiparse_sp_size=2")


def torchrun(*words: str, processes: int = 2) -> list[str]:
    """The command line; workers are the direct children of what it starts."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    return [*launcher, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", *words]


def test_bad_input_is_one_line_of_the_first(tmp_path: Path) -> None:
    done = subprocess.run(
        torchrun(*GENERATE, "skiparse_sp_size=3", "use_skiparse_sequence_parallel=true"),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ospnext")][:1]
    assert line.startswith("ospnext: error: ssp 3 x ulysses 1")
    assert "ssp 2 with ulysses 1" in line
    assert done.stderr.count("ospnext: error") == 1
    assert "exitcode  : 2" in done.stderr, "torchrun's own report"
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


@contextmanager
def running(words: list[str], folder: Path) -> Iterator[subprocess.Popen]:
    """A job that is at work: it has said what runs and begun to sample."""
    with (folder / "log").open("w") as log:
        job = subprocess.Popen(words, stdout=log, stderr=log, cwd=folder)
    try:
        deadline = time.monotonic() + 300
        while not list(folder.glob("outputs/*/manifest.json")):
            assert job.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        time.sleep(3)  # models are loaded, or nearly
        yield job
    finally:
        for child in psutil.Process(job.pid).children(recursive=True) if job.poll() is None else []:
            child.kill()
        job.kill()
        job.wait()


def workers(job: subprocess.Popen) -> list[psutil.Process]:
    """The processes of a job in order of rank."""
    children = [child for child in psutil.Process(job.pid).children() if "ospnext" in child.cmdline()]
    return sorted(children, key=lambda child: int(child.environ()["RANK"]))


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (signal.SIGKILL, r"rank +: 1 \(local_rank: 1\)\s+exitcode +: -9"),
        pytest.param(signal.SIGINT, r"ospnext: process 1 of 2 on \S+: interrupted", marks=pytest.mark.long),
    ],
    ids=["killed", "raised"],
)
def test_a_process_that_dies_ends_the_job_and_is_named(sent: signal.Signals, said: str, tmp_path: Path) -> None:
    with running(torchrun(*GENERATE, *LONG), tmp_path) as job:
        members = workers(job)
        assert len(members) == 2
        os.kill(members[1].pid, sent)
        assert job.wait(timeout=60) != 0
        assert not psutil.wait_procs(members, timeout=10)[1], "nobody is left"
    log = (tmp_path / "log").read_text()
    assert re.search(said, log), log
    assert "Root Cause" in log
    assert re.search(r"Root Cause.*\n\[\d\]:\n.*\n.*\n  rank +: 1 ", log), log


@pytest.mark.long
def test_machines_end_together(tmp_path: Path) -> None:
    """Two launchers, as on two machines: when a process of one is killed, both end within a minute."""
    with socket.socket() as free:
        free.bind(("", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=test", *GENERATE, *LONG]
    (tmp_path / "other").mkdir()
    with (tmp_path / "other" / "log").open("w") as log:
        other = subprocess.Popen([*command, "output_dir=../outputs/x"], stdout=log, stderr=log, cwd=tmp_path / "other")
    try:
        with running([*command, "output_dir=outputs/x"], tmp_path) as job:
            os.kill(workers(job)[0].pid, signal.SIGKILL)
            start = time.monotonic()
            assert job.wait(timeout=60) != 0
            assert other.wait(timeout=60 - (time.monotonic() - start)) != 0
    finally:
        for child in psutil.Process(other.pid).children(recursive=True) if other.poll() is None else []:
            child.kill()
        other.kill()
        other.wait()
    said = [(folder / "log").read_text() for folder in (tmp_path, tmp_path / "other")]
    assert "exitcode  : -9" in said[0]
    assert "lost another process" in said[1]
