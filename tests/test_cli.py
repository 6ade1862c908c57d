"""The command as a user meets it: exit codes, one line for a mistake, quick help."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name

import pytest

from ospnext import __version__
from ospnext.cli import explain, is_first, main, old_variables, read_config, world_size
from ospnext.commands import COMMANDS
from ospnext.config import ConfigError, config_keys
from ospnext.parallel.launch import Launch, read_launch

DATA = Path(__file__).parent / "data"
ROOT = Path(__file__).parents[1]


def ospnext(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ospnext", *words],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "--prompt", "a cat", "hieght=64"], "did you mean 'height'?"),
        (["generate", "none.yaml"], "none.yaml: No such file or directory"),
        (["generate", str(DATA / "seed_generate.yaml")], "model_config.pretrained_model_dir_or_checkpoint"),
        (["generate", "--steps", "4"], "settings are written key=value"),
        (["generate", "a.yaml", "b.yaml"], "'b.yaml' is not understood"),
        (["generate", "--prompt", "a", "--prompts", "b"], "keep one"),
        (["paint"], "unknown command 'paint': use one of generate"),
        (["generate", "--prompts", "empty.txt", "device=cpu"], "empty.txt holds no prompt"),
        (["convert", "only_one"], "dst is missing"),
        (["train", "scheduler_config.shift=0"], "scheduler_config.shift is 0"),
        (["generate", "scheduler_config.shift=1e-10"], "scheduler_config.shift is 1e-10"),
        (["rl", "scheduler_config.shift=2e3"], "scheduler_config.shift is 2000.0"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, message, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    done = ospnext(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("ospnext: error: ")
    assert message in done.stderr


def test_help_is_quick_and_lists_every_command(tmp_path):
    done = ospnext("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert all(command.summary in done.stdout for command in COMMANDS.values())
    code = "import sys, ospnext.cli; ospnext.cli.main(['--help']); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.endswith("False\n")


def test_help_of_a_command_is_a_table_of_its_keys(tmp_path):
    done = ospnext("generate", "--help", cwd=tmp_path)
    assert done.returncode == 0
    row = next(line for line in done.stdout.splitlines() if line.startswith("batch_size"))
    assert row.split() == ["batch_size", "1", "videos", "that", "are", "denoised", "together"]
    assert "scheduler_config.num_inference_steps" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_table_exists(name, capsys):
    assert main([name, "--help"]) == 0
    assert "key" in capsys.readouterr().out
    module, _, function = COMMANDS[name].run.partition(":")
    assert callable(getattr(__import__(module, fromlist=[function]), function))


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_true(name, capsys):
    command = COMMANDS[name]
    keys = {key for key, _ in config_keys(resolve_name(command.config))}
    assert command.examples
    for example in command.examples:
        assert example.startswith(f"{name} ")
        words = shlex.split(example.removeprefix(name))
        assert {word.partition("=")[0] for word in words if "=" in word} <= keys
        assert all((ROOT / word).is_file() for word in words if word.endswith(".yaml"))
    main([*name.split(), "--help"])
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if line.startswith("  ospnext")] == [f"  ospnext {one}" for one in command.examples]
    assert shown == [line.rstrip() for line in shown]


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ospnext {__version__}\n"


def test_variables_that_are_not_torchruns_are_refused_by_the_first_alone(tmp_path):
    first = ospnext("generate", "--prompt", "a", cwd=tmp_path, WORLD_SIZE="4", RANK="0")
    assert first.returncode == 2
    assert "LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set: start with torchrun, or unset WORLD_SIZE" in first.stderr
    other = ospnext("generate", "--prompt", "a", cwd=tmp_path, WORLD_SIZE="4", RANK="1")
    assert (other.returncode, other.stderr) == (2, "")


def test_torchruns_variables_say_who_is_who():
    assert read_launch({"RANK": "3"}) == Launch()
    there = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    assert read_launch(there) == Launch(3, 4, 1)
    assert not read_launch(there).first
    with pytest.raises(ValueError, match="RANK is 'x': it should be a whole number"):
        read_launch(there | {"RANK": "x"})
    with pytest.raises(ValueError, match="RANK 4 of WORLD_SIZE 4: start with torchrun"):
        read_launch(there | {"RANK": "4"})


def test_processes_are_counted_by_torchruns_variables():
    assert world_size({}) == 1
    assert world_size({"WORLD_SIZE": "8"}) == 8
    with pytest.raises(ConfigError, match="WORLD_SIZE is 'eight'"):
        world_size({"WORLD_SIZE": "eight"})
    assert is_first({"RANK": "3"})
    assert not is_first({"WORLD_SIZE": "8", "RANK": "3"})


def test_variables_of_older_scripts_lead_to_torchruns_options():
    assert old_variables({"HOME": "x"}) == []
    warnings = "\n".join(old_variables({"NPRC_PER_NODE": "8", "PET_NNODES": "2"}))
    assert "NPRC_PER_NODE is not read: give torchrun --nproc-per-node" in warnings
    assert "PET_NNODES is not read: give torchrun --nnodes" in warnings
    assert old_variables({"NNODES": "2", "RANK": "1"}) == [
        "warning: NNODES is not read: give torchrun --nnodes",
        "warning: RANK is not read: give torchrun --node-rank",
    ]
    assert old_variables({"RANK": "1", "WORLD_SIZE": "2", "PET_NNODES": "2"}) == [], "they are torchrun's"


def test_words_become_a_config(tmp_path):
    path = tmp_path / "a=b.yaml"
    path.write_text("seed: 3\nheight: 64\n")
    words = ["height=128", str(path), "--prompt", "12: a cat = a pet", "fsdp_size=8"]
    config = read_config("generate", COMMANDS["generate"], words)
    assert (config.seed, config.height, config.prompt) == (3, 128, "12: a cat = a pet")
    assert config.notices == ("one process: fsdp_size 8 becomes 1",)


def test_plain_words_become_arguments():
    config = read_config("convert", COMMANDS["convert"], ["from", "to_folder", "--to", "wan", "overwrite=true"])
    assert (config.src, config.dst, config.to, config.overwrite) == ("from", "to_folder", "wan", True)


def test_only_errors_of_the_input_are_explained(tmp_path):
    assert explain(RuntimeError("a bug of ours")) is None
    assert explain(ValueError("two\nlines")) == "two lines"
    assert explain(PermissionError(13, "Permission denied", "out")) == "out: Permission denied"
    assert explain(OSError(28, "No space left on device")) == "No space left on device"
    assert explain(MemoryError()).startswith("out of memory")
    text = "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    assert explain(RuntimeError(text)).startswith("out of memory")


def test_a_terminal_of_few_letters_stops_nothing():
    code = "from ospnext.cli import main; main(['--version']); print('雪')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("\\u96ea\n")


def test_an_interrupt_is_130(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ospnext.cli.print_help", interrupted)
    assert main(["generate", "--help"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"
