"""Write docs/configuration.md from the configuration classes and the table of older keys: ``make docs``."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from pydantic.fields import FieldInfo

from ospnext.commands import COMMANDS
from ospnext.config import Config, Fate, config_keys
from ospnext.config_keys import key_rules
from ospnext.sections import RunConfig

PAGE = Path(__file__).parent / "configuration.md"
INTRODUCTION = """\
# Configuration

<!-- Written by `make docs` from the configuration classes; change those instead. -->

`ospnext COMMAND [CONFIG.yaml] [key=value ...]`: defaults, then the YAML file, then the command line. Sections nest in
YAML and are dotted on the command line (`scheduler_config.shift=7`). Values are strictly typed; an unknown key is
refused with the nearest known one, and a `/path/to` placeholder that was left in place is named.
"""


def page() -> str:
    """The text of docs/configuration.md."""
    return "\n".join([INTRODUCTION, *_shared(), *(line for name in COMMANDS for line in _command(name)), *_older()])


def _shared() -> Iterator[str]:
    yield "## Keys of every run that loads the model\n"
    yield from _keys(config_keys(RunConfig))


def _command(name: str) -> Iterator[str]:
    command = COMMANDS[name]
    cls: type[Config] = resolve_name(command.config)
    shared = dict(config_keys(RunConfig)) if issubclass(cls, RunConfig) else {}
    yield f"## `ospnext {name}`\n"
    yield f"{command.summary[:1].upper()}{command.summary[1:]}."
    if command.options:
        yield "Options: " + ", ".join(f"`{option}` sets `{key}`" for option, key in command.options.items()) + "."
    if command.arguments:
        yield f"Plain words set {', '.join(f'`{key}`' for key in command.arguments)}."
    if shared:
        yield "It takes the shared keys above and these."
    yield ""
    own = [(key, field) for key, field in config_keys(cls) if key not in shared or _differ(field, shared[key])]
    yield from _keys(own)


def _keys(rows: Iterable[tuple[str, FieldInfo]]) -> Iterator[str]:
    yield "| key | default | meaning |"
    yield "|---|---|---|"
    for key, field in rows:
        default = "required" if field.is_required() else _shown(field.get_default(call_default_factory=True))
        yield f"| `{key}` | {default} | {_cell(field.description or '')} |"
    yield ""


def _older() -> Iterator[str]:
    yield "## Keys of older configs\n"
    yield "Configs of OSP-Next run as they are. A key that means the same is simply read; one that is left out has the"
    yield "default above: of size, steps, guidance and shift the model's own, else Wan2.1's. The other keys:\n"
    for name in COMMANDS:
        rules = key_rules(name)
        rows = [
            *(
                (key, f"means `{rule.target}`")
                for key, rule in rules.items()
                if rule.fate is Fate.MAPPED and rule.target
            ),
            *((key, f"refused: use {rule.target}") for key, rule in rules.items() if rule.fate is Fate.RENAMED),
            *((key, f"no effect: {rule.why}") for key, rule in rules.items() if rule.fate is Fate.NO_EFFECT),
        ]
        if rows:
            yield f"### `ospnext {name}`\n"
            yield "| key | what becomes of it |"
            yield "|---|---|"
            yield from (f"| `{key}` | {_cell(fate)} |" for key, fate in rows)
            yield ""


def _differ(one: FieldInfo, other: FieldInfo) -> bool:
    return (one.description, one.get_default(call_default_factory=True)) != (
        other.description,
        other.get_default(call_default_factory=True),
    )


def _shown(value: Any) -> str:
    if value is None:
        return ""
    text = json.dumps(value) if isinstance(value, bool | tuple) else str(value)  # as YAML would have it
    return f"`{_cell(text)}`"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
