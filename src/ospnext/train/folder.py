"""A training run's output folder: one run at a time, its configuration beside its states, and what changed since."""

from contextlib import ExitStack
from pathlib import Path

from ospnext.config import dump_yaml, leaves, load_config
from ospnext.config_keys import key_rules
from ospnext.generate.manifest import only_run, write_text
from ospnext.generate.run import make_folder
from ospnext.sections import RunConfig
from ospnext.train.state import latest

SETTINGS = "config.yaml"


def open_folder(stack: ExitStack, config: RunConfig, command: str) -> list[str]:
    """Make ``output_dir`` this run's, and write down its configuration; the first process calls it, before all else.

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
    changed = changed_settings(folder / SETTINGS, config, command) if resumes else []
    write_text(folder / SETTINGS, dump_yaml(config))
    return changed


def changed_settings(path: Path, config: RunConfig, command: str) -> list[str]:
    """What to say of a run that goes on with other settings than those in ``path``, a line for each key."""
    if not path.is_file():
        return []
    try:
        before = load_config(type(config), path, [], key_rules(command))
    except ValueError as error:
        return [f"goes on, but not known with which settings before: {error}"]
    old, new = (dict(leaves(one.model_dump(by_alias=True))) for one in (before, config))
    return [
        f"goes on with another {key} than before: {new.get(key)!r}, not {old.get(key)!r}"
        for key in new | old
        if new.get(key) != old.get(key)
    ]
