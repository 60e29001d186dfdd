"""The pages: links lead somewhere, what they name exists, examples of settings are valid."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import typer.main
import yaml

from kvtier.cli import app
from kvtier.config import machine, parse_config

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SOURCES = "\n".join(file.read_text() for file in (ROOT / "kvtier").rglob("*.py"))


def fenced(page: Path, kind: str) -> list[str]:
    return [textwrap.dedent(block) for block in re.findall(rf" *```{kind}\n(.*?)```", page.read_text(), re.S)]


def anchors(page: Path) -> set[str]:
    """Return what a page's headings can be linked by, as GitHub makes it."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    for name in re.findall(
        r"\b(?:bench|tests|kvtier|deploy|configs)/[\w/]+\.(?:py|yaml|json|npy)\b", page.read_text()
    ):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_are_named_exist(page: Path) -> None:
    commands = typer.main.get_command(app)
    for line in re.findall(r"(?:`|\$ )kvtier ((?:[a-z-]+ ?)+(?:--[a-z-]+)?)", page.read_text()):
        command, words = commands, line.split()
        while words and hasattr(command, "commands"):
            assert words[0] in command.commands, line
            command = command.commands[words.pop(0)]
        if words and words[-1].startswith("--"):
            assert words[-1] in {name for parameter in command.params for name in parameter.opts}, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_metrics_that_are_named_are_counted(page: Path) -> None:
    tiers = r"(?:memory|disk|s3)_"
    for metric in re.findall(r"`kvtier_([a-z0-9_]+)`", page.read_text()):
        name = metric.removeprefix("agent_")
        if metric in ("agent_", ""):
            continue
        bare = re.sub(f"^{tiers}|_(?:memory|disk|s3)$", "", name)
        said = [f'"{name}"', f'"{bare}"', f'}}_{bare}"', f'"{bare}_{{']
        said += [f'"{bare.removeprefix("errors_")}"'] if bare.startswith("errors_") else []
        assert any(text in SOURCES for text in said), metric


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_of_settings_are_valid(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_bytes", lambda: 512 << 30)
    monkeypatch.setattr(machine, "directory_problem", lambda path: None)
    for example in fenced(page, "yaml"):
        settings = yaml.safe_load(example)
        if "memory" in settings:
            assert parse_config(settings)


def test_the_table_of_commands_and_the_pages_agree() -> None:
    """Every command is on some page."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    text = "\n".join(page.read_text() for page in PAGES)
    assert not [name for name in commands if f"kvtier {name}" not in text]
