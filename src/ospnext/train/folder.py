"""A training run's output folder: one run at a time, its configuration beside its states, and what changed since.

``config.yaml`` is the configuration of the last start that went on from the states there, or made them: of a start
that was refused nothing is left. ``ospnext export`` makes its pipeline by it.
"""

from contextlib import ExitStack
from pathlib import Path

from ospnext.config import ConfigError, dump_yaml, leaves, load_config, read_yaml
from ospnext.config_keys import key_rules
from ospnext.generate.manifest import only_run, write_text
from ospnext.generate.run import make_folder
from ospnext.parallel.state import sweep
from ospnext.sections import RunConfig
from ospnext.train.state import latest

SETTINGS = "config.yaml"
_ELSEWHERE = frozenset({"output_dir", "fsdp_size", "ddp_size", "sp_size", "skiparse_sp_size", "cfg_parallel_size"})
"""Keys that change no result: the folder is this one, however it is spelt, and the report has the parallel plan."""


def open_folder(stack: ExitStack, config: RunConfig, command: str) -> list[str]:
    """Make ``output_dir`` this run's; the first process calls it, before anything is loaded.

    Args:
        stack: lets the folder go when it is closed.
        config: of this run; the folder may hold states of it, or of another.
        command: the one it belongs to, by whose rules an older configuration is read.

    Returns:
        How the configuration is another than that of the states it goes on from, a line for each key.

    Raises:
        ConfigError: the folder cannot be written, or another run is writing to it.
        StateError: its newest state cannot be gone on from.
    """
    folder = make_folder(Path(config.output_dir))
    stack.enter_context(only_run(folder))
    resumes = latest(folder) is not None
    sweep(folder)  # nobody else is writing, and no run that is refused for its states has taken anything away
    return changed_settings(folder / SETTINGS, config, command) if resumes else []


def write_settings(config: RunConfig) -> None:
    """Write the configuration down, once its run has a state to go on from.

    Raises:
        OSError: it cannot be written.
    """
    write_text(Path(config.output_dir) / SETTINGS, dump_yaml(config))


def changed_settings(path: Path, config: RunConfig, command: str) -> list[str]:
    """What to say of a run that goes on with other settings than those in ``path``, a line for each key."""
    if not path.is_file():
        return []
    try:
        if not read_yaml(path):
            raise ConfigError(f"{path} is empty")
        before = load_config(type(config), path, [], key_rules(command))
    except (ValueError, OSError) as error:
        return [f"goes on, but not known with which settings before: {error}"]
    old, new = (dict(leaves(one.model_dump(by_alias=True))) for one in (before, config))
    return [
        f"goes on with another {key} than before: {new.get(key)!r}, not {old.get(key)!r}"
        for key in new | old
        if new.get(key) != old.get(key) and key not in _ELSEWHERE
    ]
