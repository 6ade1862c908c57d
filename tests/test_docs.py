"""The documentation says what is true: links lead somewhere, commands exist, the configuration page is current."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from ospnext.commands import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert not [link for link in links if link and not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_configs_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"^(?:`{0,3})ospnext ([a-z][a-z-]*)", text, flags=re.MULTILINE))
    named |= set(re.findall(r"`ospnext ([a-z][a-z-]*)", text))
    assert named <= {name.partition(" ")[0] for name in COMMANDS}
    configs = set(re.findall(r"\bconfigs/[\w/]+\.yaml", text))
    assert not [config for config in configs if not (ROOT / config).is_file()]


def test_configuration_page_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    fresh = import_module("make_configuration").page()
    assert (ROOT / "docs/configuration.md").read_text(encoding="utf-8") == fresh, "run: make docs"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in PAGES:
        named = re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert set(named) <= targets, page.name


def test_citation_is_complete() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (
        citation["version"] == re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    )
    assert {"2605.28691", "2503.20314", "2412.00131"} == {
        work["url"].rpartition("/")[2] for work in citation["references"]
    }
