"""The recipes of the embedded model: each loads with its command's class, and writes its settings out."""

from pathlib import Path
from pkgutil import resolve_name

import pytest

from ospnext.commands import COMMANDS
from ospnext.config import config_keys, load_config, read_yaml, refuse_placeholders

FOLDER = Path(__file__).parents[2] / "configs/shapes"
COMMAND_OF = {"vae": "train-vae", "text": "train-text", "transformer": "train", "dense_to_sparse": "train"}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_with_its_commands_class(path):
    config = load_config(resolve_name(COMMANDS[COMMAND_OF[path.stem]].config), path)
    refuse_placeholders(config)
    assert config.notices == ()  # no key without effect
    assert config.output_dir == f"runs/shapes_{path.stem}"


@pytest.mark.parametrize("name", ["vae", "text"])
def test_small_recipes_leave_nothing_to_a_default(name):
    keys = {key for key, _ in config_keys(resolve_name(COMMANDS[COMMAND_OF[name]].config))}
    raw = read_yaml(FOLDER / f"{name}.yaml")
    written = {f"{key}.{inner}" for key, value in raw.items() if isinstance(value, dict) for inner in value}
    written |= {key for key, value in raw.items() if not isinstance(value, dict)}
    assert keys - written == {"time_budget_minutes"}  # the machine's business
