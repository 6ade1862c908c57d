"""The ``ospnext`` command: a table from subcommand to configuration class and run function.

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
from typing import Any, NamedTuple, NoReturn

from ospnext import __version__
from ospnext.config import Config, ConfigError, config_keys, load_config, refuse_placeholders


class Command(NamedTuple):
    """One subcommand.

    Attributes:
        summary: its line in ``ospnext --help``.
        config: ``module:Class`` of its configuration.
        run: ``module:function`` that takes the configuration and returns a line to print, or None.
        options: ``--option`` and the key it sets.
        arguments: the keys its plain words set, in order; () where the one plain word is a YAML file.
        examples: command lines, without the program's name.
        reports: whether its run says itself, in a report, what the configuration has to say (``notices``).
        rest: the key that takes ``key=value`` words which are not its own; "" where there is none.
        many: whether it runs on many processes: its run takes the ``Launch`` too.
    """

    summary: str
    config: str
    run: str
    options: Mapping[str, str] = {}
    arguments: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    reports: bool = False
    rest: str = ""
    many: bool = False


COMMANDS: dict[str, Command] = {
    "generate": Command(
        "make videos from prompts",
        "ospnext.generate.settings:GenerateConfig",
        "ospnext.generate.run:run",
        options={"--prompt": "prompt", "--prompts": "prompts"},
        examples=(
            "generate --prompt 'A large red star floats upwards on a white background.'",
            "generate model=checkpoints/Wan2.1-T2V-1.3B --prompts prompts.txt num_videos_per_prompt=2 output_dir=out",
            "generate configs/generate/osp_14b.yaml scheduler_config.num_inference_steps=30 seed=7",
        ),
        reports=True,
        many=True,
    ),
    "train": Command(
        "train the transformer on videos",
        "ospnext.train.settings:TrainConfig",
        "ospnext.train.sft:run",
        examples=(
            "train configs/shapes/transformer.yaml time_budget_minutes=10",
            "train configs/train/osp_1_3b.yaml data_config.dataset_config.metafile_or_dir_path=data/clips",
        ),
        many=True,
    ),
    "rl": Command(
        "train an adapter by reinforcement learning",
        "ospnext.train.rl_settings:RLConfig",
        "ospnext.train.rl:run",
        examples=(
            "rl configs/rl/shapes.yaml time_budget_minutes=9",
            "rl configs/rl/osp_14b.yaml rl_config.prompt_file=prompts.txt",
        ),
        reports=True,
        many=True,
    ),
    "export": Command(
        "make a pipeline folder of a training state",
        "ospnext.train.export:ExportConfig",
        "ospnext.train.export:run",
        arguments=("state", "dst"),
        examples=("export runs/shapes_transformer/iter_000014000 out/pipeline",),
    ),
    "train-vae": Command(
        "train a small video VAE on moving shapes",
        "ospnext.train.video_vae:VAETrainConfig",
        "ospnext.train.video_vae:run",
        examples=("train-vae configs/shapes/vae.yaml time_budget_minutes=10",),
    ),
    "train-text": Command(
        "train a small text encoder on captions of moving shapes",
        "ospnext.train.text:TextTrainConfig",
        "ospnext.train.text:run",
        examples=("train-text configs/shapes/text.yaml",),
    ),
    "evaluate-shapes": Command(
        "grade a model on held-out prompts of the shapes world",
        "ospnext.evaluate.shapes:EvaluateShapesConfig",
        "ospnext.evaluate.shapes:run",
        examples=("evaluate-shapes num_prompts=64", "evaluate-shapes model=runs/shapes_transformer/pipeline"),
    ),
    "compare-shapes": Command(
        "compare two models or settings on the same prompts and seeds of the shapes world",
        "ospnext.evaluate.compare:CompareShapesConfig",
        "ospnext.evaluate.compare:run",
        examples=(
            "compare-shapes other.quant=hif8 other.quant_attn=hif8",
            "compare-shapes model=runs/shapes_dense/pipeline other.model=runs/shapes_dense_to_sparse/pipeline",
        ),
    ),
    "evaluate reward": Command(
        "score a folder of videos by the rewards of reinforcement learning",
        "ospnext.evaluate.reward:EvaluateRewardConfig",
        "ospnext.evaluate.reward:run",
        arguments=("folder",),
        examples=(
            "evaluate reward outputs/osp_14b 'reward_fn={flicker: 1.0, motion: 1.0}'",
            "evaluate reward outputs/osp_14b 'reward_fn={videoalign: 1.0}' 'reward_config.options={videoalign: "
            "{load_from_pretrained: checkpoints/VideoReward, base_model: checkpoints/Qwen2-VL-2B-Instruct}}'",
        ),
    ),
    "convert": Command(
        "write a transformer checkpoint in another format",
        "ospnext.prepare.convert:ConvertConfig",
        "ospnext.prepare.convert:run",
        options={"--to": "to"},
        arguments=("src", "dst"),
        examples=("convert checkpoints/osp_next_14b out/diffusers --to diffusers",),
    ),
    "quantize": Command(
        "write a checkpoint whose weights take 8 bits (HiF8)",
        "ospnext.prepare.quantize:QuantizeConfig",
        "ospnext.prepare.quantize:run",
        arguments=("src", "dst"),
        examples=("quantize checkpoints/osp_next_14b checkpoints/osp_next_14b_hif8", "quantize shapes out/shapes_hif8"),
    ),
    "merge-lora": Command(
        "merge a LoRA into a model's weights",
        "ospnext.prepare.merge_lora:MergeLoraConfig",
        "ospnext.prepare.merge_lora:run",
        arguments=("base", "adapter", "dst"),
        examples=(
            "merge-lora checkpoints/osp_next_14b runs/lora/adapter out/merged",
            "merge-lora shapes style.safetensors out/merged scale=0.8",
        ),
    ),
    "convert-lora": Command(
        "write a LoRA under other programs' names",
        "ospnext.prepare.merge_lora:ConvertLoraConfig",
        "ospnext.prepare.merge_lora:convert",
        options={"--to": "to"},
        arguments=("src", "dst"),
        examples=("convert-lora runs/lora/adapter out/style.safetensors --to comfyui",),
    ),
    "plan": Command(
        "say what a run needs: memory, traffic, time",
        "ospnext.prepare.plan:PlanConfig",
        "ospnext.prepare.plan:run",
        options={"--world": "world", "--json": "json"},
        arguments=("config",),
        examples=(
            "plan configs/generate/osp_14b.yaml --world 8",
            "plan configs/generate/osp_14b.yaml --world 64 accelerator=h200 videos=8",
        ),
        reports=True,
        rest="overrides",
    ),
    "data build": Command(
        "choose the clips to train on from videos and captions",
        "ospnext.data.build:BuildConfig",
        "ospnext.data.build:run",
        examples=(
            "data build configs/data/filter.yaml save_path=data/clips",
            "data build data_path=my_videos save_path=data/clips sample_num_frames=33",
        ),
    ),
    "data import": Command(
        "turn a store of OSP-Next's filter into one of ours",
        "ospnext.data.importing:ImportConfig",
        "ospnext.data.importing:run",
        arguments=("src", "save_path"),
        examples=("data import old/dataset data/clips",),
    ),
    "data encode": Command(
        "make VAE latents and text embeddings of a store once, for training",
        "ospnext.prepare.encode:EncodeConfig",
        "ospnext.prepare.encode:run",
        examples=("data encode metafile_or_dir_path=data/clips save_path=data/latents model=shapes",),
    ),
    "data check": Command(
        "decode a sample of a store and draw it with its captions",
        "ospnext.data.check:CheckConfig",
        "ospnext.data.check:run",
        arguments=("store",),
        examples=("data check data/clips num_clips=32",),
    ),
}

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
