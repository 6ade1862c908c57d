"""The ``ospnext`` command: finds the subcommand (``commands.COMMANDS``), reads its configuration and runs it.

``ospnext COMMAND [CONFIG.yaml] [key=value ...]``; ``ospnext --help`` lists the commands. Modules are imported when they
are needed, so that help is quick. No other module reads the environment. Exit codes: 0 done, 2 bad input (one line on
stderr), 130 interrupted.

``torchrun --nproc-per-node 8 -m ospnext COMMAND ...`` runs a command on many processes: bad input is still one line, of
the first one; a process that fails by itself says which it is.
"""

import argparse
import io
import logging
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, NoReturn

from ospnext import __version__
from ospnext.commands import COMMANDS, Command
from ospnext.config import Config, ConfigError, config_keys, load_config, refuse_placeholders

OLD_VARIABLES = {
    "NPRC_PER_NODE": "--nproc-per-node",
    "NNODES": "--nnodes",
    "PET_NNODES": "--nnodes",
    "RANK": "--node-rank",
}
LINGER = 20.0  # seconds in which the launcher may end a process that has lost another


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(format="ospnext: warning: %(message)s")  # it is all that modules log
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a name stops no run
    # Torch reads it when it is imported: threads that wait should sleep, for on shared cores spinning ones cost the
    # others their time and a video takes several times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("WANDB_MODE", "offline")  # nothing leaves this machine unless somebody says so
    name = words[0] if words else "--help"
    try:
        if name in ("-h", "--help"):
            print(overview())
        elif name == "--version":
            print(f"ospnext {__version__}")
        elif world_size(os.environ) > 1:
            return _run_among_many(words)
        else:
            _run(words)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left, as in `ospnext --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        line = explain(error)
        if line is None or "--traceback" in words:
            raise
        if is_first(os.environ):
            print(f"ospnext: error: {line}", file=sys.stderr)
        return 2
    return 0


def _run(words: Sequence[str]) -> None:
    name, command, rest = find_command(words)
    for line in old_variables(os.environ):
        print(line, file=sys.stderr)
    if "-h" in rest or "--help" in rest:
        print_help(name, command)
        return
    config = read_config(name, command, rest)
    for line in () if command.reports else config.notices:
        print(f"note: {line}", file=sys.stderr)
    if (line := _load(command.run)(config)) is not None:
        print(line)


def _run_among_many(words: Sequence[str]) -> int:
    """As ``_run`` on one of many processes; returns the exit code."""
    from ospnext.parallel.launch import RefusalError, agree, joined, part, read_launch

    launch = read_launch(os.environ)
    if not launch.first:
        logging.disable(logging.WARNING)  # the first one warns for all
    if "-h" in words or "--help" in words:
        if launch.first:
            _run(words)
        return 0

    def read() -> tuple[Command, Config]:
        name, command, rest = find_command(words)
        if not command.many:
            raise ConfigError(
                f"{name} runs in one process, but {launch.world} were started (WORLD_SIZE): start it without torchrun"
            )
        return command, read_config(name, command, rest, launch.world)

    try:
        with joined(launch):
            for line in old_variables(os.environ) if launch.first else ():
                print(line, file=sys.stderr)
            command, config = agree(launch, read)
            line = _load(command.run)(config, launch)
            if launch.first and line is not None:
                print(line)
    except RefusalError as error:
        if launch.first:
            cause = error.__cause__
            print(f"ospnext: error: {explain(cause if isinstance(cause, Exception) else error)}", file=sys.stderr)
        part()  # once the first has spoken: the launcher ends all when one has ended
        return 2
    except BaseException as error:
        _leave(launch, error, "--traceback" in words)
    return 0


def _leave(launch: Any, error: BaseException, show: bool) -> NoReturn:
    """End this process at once, whatever the others do; they are the launcher's to end."""
    from ospnext.parallel.launch import is_lost

    if isinstance(error, KeyboardInterrupt):
        line, code = "interrupted", 130
    elif is_lost(error) and not show:
        line, code = "lost another process, which ended first", 1
    else:
        known = explain(error) if isinstance(error, ValueError | OSError | MemoryError | RuntimeError) else None
        line, code = f"error: {known or type(error).__name__}", 1 if known is None else 2
        if known is None or show:
            traceback.print_exception(error)
    print(f"ospnext: {launch}: {line}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if is_lost(error):
        time.sleep(LINGER)  # so that the launcher sees first who ended first
    os._exit(code)  # no farewell: other processes' ends would be waited for


def find_command(words: Sequence[str]) -> tuple[str, Command, Sequence[str]]:
    """The command that words begin with, its name of one word or two, and the words that are left.

    Raises:
        ConfigError: there is no such command.
    """
    count = 2 if " ".join(words[:2]) in COMMANDS else 1
    name = " ".join(words[:count])
    if name not in COMMANDS:
        raise ConfigError(f"unknown command {name!r}: use one of {', '.join(COMMANDS)}")
    return name, COMMANDS[name], words[count:]


def read_config(name: str, command: Command, words: Sequence[str], processes: int = 1) -> Config:
    """The configuration a command line asks for, fitted to one process if it runs on one, without placeholders.

    Raises:
        ConfigError: a word, key or value that does not belong.
        FileNotFoundError: the YAML file does not exist.
    """
    from ospnext.config_keys import key_rules
    from ospnext.sections import RunConfig

    parser = _Parser(prog=f"ospnext {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--traceback", action="store_true")
    cls: type[Config] = _load(command.config)
    fields = dict(config_keys(cls))
    for option, key in command.options.items():
        if fields[key].annotation is bool:
            parser.add_argument(option, action="store_const", const=True)
        else:
            parser.add_argument(option)
    given = vars(parser.parse_intermixed_args(words))
    overrides = [word for word in given["words"] if "=" in word and not os.path.exists(word)]
    plain = [word for word in given["words"] if word not in overrides]
    path = None
    values: dict[str, Any] = {
        key: given[option.strip("-").replace("-", "_")] for option, key in command.options.items()
    }
    if command.arguments:
        values |= dict(zip(command.arguments, plain, strict=False))
        plain = plain[len(command.arguments) :]
    elif plain:
        path, *plain = plain
    if plain:
        raise ConfigError(f"{plain[0]!r} is not understood: settings are written key=value")
    if command.rest:
        values[command.rest] = tuple(word for word in overrides if word.partition("=")[0].strip() not in fields)
        overrides = [word for word in overrides if word not in values[command.rest]]
    exact = [(key, value) for key, value in values.items() if value is not None]
    config = load_config(cls, path, [*overrides, *exact], key_rules(name))
    refuse_placeholders(config)
    return config.alone() if isinstance(config, RunConfig) and processes == 1 else config


def world_size(environment: Mapping[str, str]) -> int:
    """How many processes torchrun started.

    Raises:
        ConfigError: the variable is no whole number.
    """
    text = environment.get("WORLD_SIZE") or "1"
    if not text.isdecimal():
        raise ConfigError(f"environment variable WORLD_SIZE is {text!r}: it should be a whole number")
    return max(1, int(text))


def is_first(environment: Mapping[str, str]) -> bool:
    """Whether this process speaks for all. RANK alone, as older scripts set it, means nothing."""
    return environment.get("WORLD_SIZE", "1") == "1" or environment.get("RANK", "0") == "0"


def old_variables(environment: Mapping[str, str]) -> list[str]:
    """A warning for each variable of older launch scripts that is set and not read.

    Under torchrun, RANK is its own, and PET_NNODES is a name that it knows.
    """
    launched = environment.get("WORLD_SIZE", "1") not in ("", "1")
    return [
        f"warning: {name} is not read: give torchrun {option}"
        for name, option in OLD_VARIABLES.items()
        if name in environment and not (launched and name in ("RANK", "PET_NNODES"))
    ]


def explain(error: Exception) -> str | None:
    """One line about an error that the input caused; None for an error that is ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError | RuntimeError):
        full = type(error).__name__ in ("MemoryError", "OutOfMemoryError") or "DefaultCPUAllocator" in text
        return f"out of memory: make fewer frames, smaller ones, or fewer at once ({text[:200]})" if full else None
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return text


def overview() -> str:
    """The text of ``ospnext --help``."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: ospnext COMMAND [CONFIG.yaml] [key=value ...]\n\n"
        f"commands:\n{rows}\n\n"
        "ospnext COMMAND --help   the keys of a command, with defaults and meaning\n"
        "ospnext --version        the version\n\n"
        f"A first video, of the small model that comes along:\n  ospnext {COMMANDS['generate'].examples[0]}"
    )


def print_help(name: str, command: Command) -> None:
    """Print what a command takes: its own keys with defaults and meaning, then those it shares, and examples."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    cls: type[Config] = _load(command.config)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("key", no_wrap=console.width >= 120, max_width=None if console.width >= 120 else 39)
    table.add_column("default")
    table.add_column("meaning")
    places = {name: place for place, name in enumerate(cls.__annotations__)}
    keys = [(places.get(key.partition(".")[0], len(places)), key, field) for key, field in config_keys(cls)]
    own = sorted((item for item in keys if item[0] < len(places)), key=lambda item: item[0])
    for group in (own, [item for item in keys if item[0] == len(places)]):
        for _, key, field in group:
            default = "required" if field.is_required() else _shown(field.get_default(call_default_factory=True))
            table.add_row(key, escape(default), escape(field.description or ""))
        table.add_row()
    words = " ".join(word.upper() for word in command.arguments) or "[CONFIG.yaml]"
    flags = {key for key, field in config_keys(cls) if field.annotation is bool}
    options = "".join(
        f" [{option}]" if key in flags else f" [{option} {key.upper()}]" for option, key in command.options.items()
    )
    print(f"usage: ospnext {name} {words}{options} [key=value ...]\n\n{command.summary}\n")
    with console.capture() as capture:
        console.print(table)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))
    print(
        "\n".join(
            [
                "--traceback shows where an error comes from",
                "",
                "examples:",
                *(f"  ospnext {example}" for example in command.examples),
            ]
        )
    )


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are errors like all others."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; settings are written key=value")
