"""One strict scheme for every command: frozen configuration classes, YAML in, dotted overrides, YAML out.

A configuration is a tree of ``Config`` classes. ``load_config`` reads a YAML file (safe loading only), applies
``a.b=c`` overrides, settles keys of older configs by a table of ``KeyRule``, and refuses every other unknown key with
the nearest known one. Nothing here knows which commands exist.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, NamedTuple, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, model_validator
from pydantic.fields import FieldInfo

PLACEHOLDER = "/path/to"
NEAR = 0.6  # likeness from which an unknown key is taken for a misspelling
MOST_ERRORS = 5  # wrong keys named in one line
LONGEST_VALUE = 200  # characters of a wrong value in a message


class ConfigError(ValueError):
    """A configuration that cannot be used; its message is one line that names the key and the way out."""


class Config(BaseModel):
    """Base of every configuration section: strict types, no unknown keys, no change after it is made.

    Lists are taken as tuples, so that a frozen section is frozen all through. A field that pydantic reserves the name
    of carries its YAML key as alias; it may be given by either name in Python, in YAML by the key only.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_by_name=True,
        validate_by_alias=True,
    )

    alternatives: ClassVar[tuple[str, ...]] = ()
    """Keys of which one at most may be given; on the command line, one replaces what the file gives."""

    _notices: tuple[str, ...] = PrivateAttr(default=())

    @property
    def notices(self) -> tuple[str, ...]:
        """What the loader has to say about this configuration, a line each: for the report of the run."""
        return self._notices

    def with_notices(self, lines: Iterable[str]) -> Self:
        """A copy that carries these further lines in ``notices``."""
        copy = self.model_copy()
        copy._notices = (*self._notices, *lines)
        return copy

    @model_validator(mode="after")
    def _one_alternative(self) -> Self:
        given = [key for key in self.alternatives if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both given: keep one")
        return self

    @model_validator(mode="before")
    @classmethod
    def _lists_to_tuples(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


C = TypeVar("C", bound=Config)


class Fate(Enum):
    """What becomes of a key that older configs hold."""

    MAPPED = "mapped"
    NO_EFFECT = "no effect"
    RENAMED = "renamed"


class KeyRule(NamedTuple):
    """The fate of one key.

    Attributes:
        fate: mapped (same meaning here), no effect (accepted, one line printed), renamed (refused).
        target: the key to use: required for RENAMED, for MAPPED only where it stands in another place.
        why: for NO_EFFECT, the reason that is printed.
    """

    fate: Fate
    target: str = ""
    why: str = ""


def load_config(
    cls: type[C],
    path: str | Path | None = None,
    overrides: Iterable[str | tuple[str, Any]] = (),
    rules: Mapping[str, KeyRule] | None = None,
) -> C:
    """A ``cls`` from a YAML file and ``a.b=c`` overrides, both optional; overrides win.

    Args:
        cls: the configuration class of the command.
        path: the YAML file; None for defaults and overrides only.
        overrides: ``a.b=c``, the value read as a YAML scalar, or as a YAML list or quoted string; or a dotted key
            with its value as it is.
        rules: fates of keys that are not fields of ``cls``, by dotted key.

    Raises:
        ConfigError: unknown, renamed, doubled or mistyped keys, all named in one line.
        FileNotFoundError: the file does not exist.
    """
    data = read_yaml(path) if path is not None else {}
    pairs = [parse_override(override) if isinstance(override, str) else override for override in overrides]
    if any(key in cls.alternatives for key, _ in pairs):
        data = {key: value for key, value in data.items() if key not in cls.alternatives}
    for key, value in pairs:
        if broken := [text for text in (value if isinstance(value, list) else [value]) if _is_broken(text)]:
            raise ConfigError(f"{key}: {broken[0]!r} is not text in UTF-8")
        _put(data, key, value)
    settled = _settle(cls, data, rules or {})
    if settled.errors:
        more = len(settled.errors) - MOST_ERRORS
        raise ConfigError("; ".join(settled.errors[:MOST_ERRORS]) + (f"; and {more} more" if more > 0 else ""))
    try:
        config = cls.model_validate(settled.data)
    except ValidationError as error:
        raise ConfigError(describe_errors(cls, error)) from error
    return config.with_notices(settled.notices)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping a YAML file holds; an empty file is an empty mapping.

    Raises:
        ConfigError: not YAML, not a mapping, not UTF-8, or a key stands twice.
        FileNotFoundError: no such file.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        data = _load(text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds a {type(data).__name__}; a config is a mapping of key: value")
    return data


def parse_override(text: str) -> tuple[str, Any]:
    """The dotted key and the value of ``a.b=c``; free text such as a prompt may hold colons and hashes.

    Raises:
        ConfigError: there is no ``=``, no key, or a value that YAML cannot hold, such as a list that does not end.
    """
    key, equals, raw = text.partition("=")
    key, raw = key.strip(), raw.strip()
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{text!r} is no override: write key=value, or section.key=value")
    try:
        return key, _load(raw) if raw[:1] in ("[", "{", '"', "'") else _plain_scalar(raw)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: {_shown(raw)} is not a YAML value: {' '.join(str(error).split())}") from error


def config_keys(cls: type[Config], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted YAML key of a configuration class with its field, leaves only, in the order of the class."""
    for name, field in cls.model_fields.items():
        key = prefix + (field.alias or name)
        section = _section_of(field)
        if section is None:
            yield key, field
        else:
            yield from config_keys(section, key + ".")


def leaves(data: Mapping[str, Any], prefix: str = "", stop: set[str] | None = None) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a nested mapping; a mapping under a key of ``stop``, or an empty one, is a leaf."""
    for name, value in data.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and not (stop and key in stop):
            yield from leaves(value, key + ".", stop)
        else:
            yield key, None if isinstance(value, Mapping) and not value and key not in (stop or ()) else value


def dump_yaml(config: Config) -> str:
    """The whole configuration as YAML that ``load_config`` reads back to an equal one."""
    data = config.model_dump(mode="json", by_alias=True)
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def save_config(config: Config, path: str | Path) -> None:
    """Write ``dump_yaml`` to a file."""
    Path(path).write_text(dump_yaml(config), encoding="utf-8")


def refuse_placeholders(config: Config) -> None:
    """Stop on ``/path/to/...`` values left from a sample config.

    Raises:
        ConfigError: names every such key.
    """
    left = [f"{key} ({value})" for key, value in leaves(config.model_dump(by_alias=True)) if _is_placeholder(value)]
    if left:
        raise ConfigError(f"placeholders are left in the config; give real paths for {', '.join(left)}")


def describe_errors(cls: type[Config], error: ValidationError) -> str:
    """A pydantic error in one line: each key, what it holds, and what it should hold."""
    known = {key for key, _ in config_keys(cls)}
    messages: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        path = [str(part) for part in item["loc"]]
        key = next((".".join(path[:n]) for n in range(len(path), 0, -1) if ".".join(path[:n]) in known), ".".join(path))
        index = "".join(f"[{part}]" for part in item["loc"][key.count(".") + 1 :] if isinstance(part, int))
        shown = "" if not key or isinstance(item["input"], Mapping | BaseModel) else f" is {_shown(item['input'])}, but"
        if item["type"] == "missing":
            messages.setdefault(key, []).append("is missing")
            continue
        wanted = item["msg"].removeprefix("Value error, ").replace("Input should", "should").replace("tuple", "list")
        quotes = " (in quotes)" if item["type"] == "string_type" and isinstance(item["input"], int | float) else ""
        messages.setdefault(f"{key}{index}{shown}", []).append(wanted + quotes)
    return "; ".join(f"{what} {' or '.join(dict.fromkeys(wanted))}".strip() for what, wanted in messages.items())


def nearest_key(key: str, known: Iterable[str]) -> str | None:
    """The known dotted key most like ``key``: by its last name first, then by its section; None if nothing is near."""
    section, _, name = key.rpartition(".")

    def likeness(candidate: str) -> tuple[float, float]:
        other_section, _, other = candidate.rpartition(".")
        same_name = difflib.SequenceMatcher(None, name, other).ratio()
        return same_name + 0.1 * (section == other_section), difflib.SequenceMatcher(None, key, candidate).ratio()

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best)[0] >= NEAR else None


class _Settled(NamedTuple):
    """What ``cls`` is made of, what to say about the rest, and what is wrong."""

    data: dict[str, Any]
    notices: list[str]
    errors: list[str]


def _settle(cls: type[Config], data: Mapping[str, Any], rules: Mapping[str, KeyRule]) -> _Settled:
    """Sort every key: a field of ``cls``, settled by ``rules``, or an error."""
    known = [key for key, _ in config_keys(cls)]
    result = _Settled({}, [], [])
    moved: dict[str, Any] = {}
    for key, value in leaves(data, stop={*known, *rules}):
        rule = rules.get(key)
        if isinstance(value, int) and abs(value) >= 2**63:
            result.errors.append(f"{key} is {_shown(value)}, but whole numbers go up to {2**63 - 1}")
        elif key in known:
            _put(result.data, key, value)
        elif any(name.startswith(f"{key}.") for name in [*known, *rules]):
            if value is not None:  # a section that is named but left empty is nothing
                result.errors.append(f"{key!r} is a section, but holds {value!r}: give its keys")
        elif rule is None or (rule.fate is Fate.MAPPED and not rule.target):
            near = nearest_key(key, [*known, *(name for name, other in rules.items() if other.fate is Fate.MAPPED)])
            result.errors.append(f"unknown key {key!r}" + (f"; did you mean {near!r}?" if near else ""))
        elif rule.fate is Fate.RENAMED:
            result.errors.append(f"key {key!r} is not read: use {rule.target}")
        elif rule.fate is Fate.NO_EFFECT:
            result.notices.append(f"{key} has no effect here: {rule.why}")
        else:
            moved[key] = value
    for key, value in moved.items():
        target = rules[key].target
        present = dict(leaves(result.data)).get(target, value)
        if present == value:
            _put(result.data, target, value)
        else:
            result.errors.append(f"{key!r} is {value!r}, but {target!r}, which means the same, is {present!r}")
    return result


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for depth, section in enumerate(sections, start=1):
        if data.get(section) is None:
            data[section] = {}
        data = data[section]
        if not isinstance(data, dict):
            raise ConfigError(f"{key!r}: {'.'.join(sections[:depth])!r} holds a value, not a section")
    data[name] = value


def _section_of(field: FieldInfo) -> type[Config] | None:
    """The class of a section, also of one that may be left out (``Section | None``)."""
    kinds = get_args(field.annotation) if isinstance(field.annotation, UnionType) else (field.annotation,)
    sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Config)]
    return sections[0] if sections else None


def _shown(value: Any) -> str:
    """A value as messages have it: what is wrong with a very long one is seen at its start."""
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def _is_broken(value: Any) -> bool:
    """Whether it is text with bytes of another encoding in it, which Python keeps as lone surrogates."""
    return isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_placeholder(value: Any) -> bool:
    return isinstance(value, str) and (value == PLACEHOLDER or value.startswith(PLACEHOLDER + "/"))


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML with the surprises of YAML 1.1 taken out: ``on`` is text, ``1e-4`` a number, keys stand once.

    Numbers are read as YAML 1.2 does: ``010`` is ten, ``0x10`` and ``1_000`` are text.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own attribute
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("null", "merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_number(self, node: yaml.ScalarNode) -> int:
        """A decimal number, which Python does not read from thousands of digits."""
        try:
            return int(node.value)
        except ValueError as error:
            problem = f"{_shown(node.value)} is no whole number, or a very long one"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping with text keys; raises on a key that stands twice."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            name = str(key_node.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {name!r} stands twice", key_node.start_mark)
            seen.add(name)
        return {str(key): value for key, value in super().construct_mapping(node, deep).items()}


_TAG = "tag:yaml.org,2002:"
for _name, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
):
    _StrictLoader.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})$"), list(_first))
_StrictLoader.add_constructor(_TAG + "int", _StrictLoader.construct_number)


class _Dumper(yaml.SafeDumper):
    """Safe YAML with quotes round all text that ``_StrictLoader`` or a reader of YAML 1.1 takes for something else."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own attribute
        first: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
            *_StrictLoader.yaml_implicit_resolvers.get(first, []),
        ]
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_StrictLoader.yaml_implicit_resolvers}
    }

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Text; line ends that are none of ours are escaped, since PyYAML would fold them or read them as ours."""
        style = '"' if any(end in text for end in "\x85\u2028\u2029") else None
        return self.represent_scalar(_TAG + "str", text, style)


_Dumper.add_representer(str, _Dumper.represent_text)


def _load(text: str) -> Any:
    """The one YAML document in ``text``, safely."""
    loader = _StrictLoader(text)
    loader.deep_construct = True  # at once, not later: so what holds itself is refused, and not built
    try:
        return loader.get_single_data()
    except RecursionError as error:
        raise yaml.YAMLError("lists or mappings stand too deep in each other") from error
    except (AttributeError, LookupError, ValueError) as error:  # what PyYAML lets through for !!bool x and its like
        raise yaml.YAMLError(f"a value is not of the type that its !! names ({error})") from error
    finally:
        loader.dispose()


def _plain_scalar(raw: str) -> Any:
    """The value of an unquoted YAML scalar, whatever signs of YAML its text holds."""
    loader = _StrictLoader("")
    try:
        tag = loader.resolve(yaml.ScalarNode, raw, (True, False))
        return loader.construct_object(yaml.ScalarNode(tag, raw))
    finally:
        loader.dispose()
