"""From a YAML file to a `Config`, or to one message that names everything that is wrong with it."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from kvtier.config.model import AgentConfig, Config, DiskConfig, MemoryConfig, S3Config
from kvtier.config.rules import REFERENCE_PATTERN
from kvtier.errors import ConfigError

VARIABLE = "KVTIER_CONFIG"
"""The environment variable that names the configuration file."""

_Key = tuple[str, ...]
"""Where a value stands: ("s3", "bucket") is what messages call s3.bucket."""

_SECTIONS: Mapping[_Key, type[BaseModel]] = {
    (): Config,
    ("memory",): MemoryConfig,
    ("disk",): DiskConfig,
    ("s3",): S3Config,
    ("agent",): AgentConfig,
}
_KEY_SOURCES = (("s3", "access_key_env"), ("s3", "secret_key_env"))
_LITERAL_KEY = re.compile(r"(access|secret|api).*key|^key$|token|passw|credential", re.IGNORECASE)
_DOLLAR = re.compile(rf"\$\$|{REFERENCE_PATTERN}|\$")
_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9]*)?(\.[0-9]*)?([eE][-+]?[0-9]+)?|[-+]?\.(inf|nan)", re.IGNORECASE)
_ABSENT = object()
_EMPTY = ()
"""Stands for a key without a value, which no rule accepts; None would mean that the key is left out."""


class _Problems:
    """What is wrong with one document: at most one thing for each key, told in the order of the file."""

    def __init__(self, source: str, lines: Mapping[_Key, int]) -> None:
        self._source = source
        self._lines = lines
        self._texts: dict[_Key, str] = {}

    def add(self, key: _Key, text: str) -> None:
        self._texts.setdefault(key, text)

    def raise_if_any(self) -> None:
        if self._texts:
            found = sorted(self._texts.items(), key=lambda item: self._line(item[0]))
            raise ConfigError("\n".join(f"{self._where(key)}: {text}" for key, text in found))

    def _line(self, key: _Key) -> int:
        # A key that is missing is told at the head of its section.
        return self._lines.get(key) or self._lines.get(key[:-1], 0)

    def _where(self, key: _Key) -> str:
        line = self._line(key)
        place = f"{self._source}:{line}" if line else self._source
        return f"{place}: {'.'.join(key)}" if key else place


def load_config(path: Path | str | None = None) -> Config:
    """Read the configuration from a YAML file.

    Args:
        path: The file; None for the one that the environment variable KVTIER_CONFIG names.

    Returns:
        The checked configuration.

    Raises:
        ConfigError: There is no file, or something in it is wrong; the message has a line for each problem,
            with file, line, key, value and what is allowed.
    """
    named = path if path is not None else os.environ.get(VARIABLE)
    if not named:
        raise ConfigError(f"no configuration: give the path of a YAML file, or set {VARIABLE} to it")
    file = Path(named).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        origin = f" (named by {VARIABLE})" if path is None else ""
        raise ConfigError(f"{file}: cannot be read{origin}: {error.strerror}") from error
    return _parse_text(text, str(file))


def parse_config(data: Mapping[str, Any], source: str = "configuration") -> Config:
    """Check a configuration that is already plain data, as YAML or JSON would give it.

    Args:
        data: The document.
        source: What to call it in messages.

    Returns:
        The checked configuration.

    Raises:
        ConfigError: Something is wrong; the message has a line for each problem.
    """
    return _build(data, _Problems(source, {}))


def _parse_text(text: str, source: str) -> Config:
    lines: dict[_Key, int] = {}
    problems = _Problems(source, lines)
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ConfigError(f"{source}: has YAML aliases (*name); write the values out instead")
        root = yaml.compose(text, yaml.SafeLoader)
        if root is not None:
            _collect_lines(root, (), lines, problems)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(_syntax_message(error, source)) from error
    except ValueError as error:
        # PyYAML lets it through, such as a date with a thirteenth month.
        raise ConfigError(f"{source}: is no valid YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: is nested too deeply") from error
    return _build(data, problems)


def _syntax_message(error: yaml.YAMLError, source: str) -> str:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable text"
    if mark is None:
        return f"{source}: is no valid YAML: {what}"
    return f"{source}:{mark.line + 1}: is no valid YAML: {what} in column {mark.column + 1}"


def _collect_lines(node: yaml.Node, section: _Key, lines: dict[_Key, int], problems: _Problems) -> None:
    """Note the line of each key, the keys that stand twice in the same mapping, and numbers that mislead."""
    if isinstance(node, yaml.ScalarNode) and _is_odd_number(node) and _is_known(section):
        problems.add(
            section,
            f"{_shown(node.value)} is no plain decimal number: YAML would take it for an octal, hexadecimal, "
            "binary or base-60 one; allowed: digits without a zero before them, underscores and colons",
        )
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        key = (*section, str(key_node.value))
        first = lines.get(key)
        lines[key] = key_node.start_mark.line + 1
        if first is None:
            _collect_lines(value_node, key, lines, problems)
        else:
            problems.add(key, f"stands twice, first in line {first}; allowed: once")


def _is_odd_number(node: yaml.ScalarNode) -> bool:
    """Tell whether YAML 1.1 makes a number of a text that says another one to people, such as 010 or 1:30."""
    return node.tag.endswith((":int", ":float")) and not _DECIMAL.fullmatch(node.value)


def _is_known(key: _Key) -> bool:
    """Tell whether there is such a key, whose value may be shown: what stands elsewhere may be a secret."""
    model = _SECTIONS.get(key[:-1])
    return model is not None and bool(key) and key[-1] in model.model_fields and key not in _KEY_SOURCES


def _build(data: Any, problems: _Problems) -> Config:
    if not isinstance(data, Mapping):
        shown = "is empty" if data is None else f"is {_shown(data)}"
        problems.add(
            (), f"{shown}; allowed: the sections memory, disk, s3 and agent, such as memory: {{size: 4GiB}}"
        )
        problems.raise_if_any()
    expanded = _expand(data, (), problems)
    try:
        config = Config.model_validate(expanded, context={"file": True})
    except ValidationError as error:
        for details in error.errors(include_url=False, include_input=False):
            key = tuple(str(part) for part in details["loc"])
            problems.add(key, _said(key, dict(details), data, expanded))
        problems.raise_if_any()
        raise
    problems.raise_if_any()
    return config


def _expand(value: Any, key: _Key, problems: _Problems) -> Any:
    """Copy plain data with the references to environment variables replaced and all keys as text."""
    if isinstance(value, Mapping):
        return {str(name): _expand(inner, (*key, str(name)), problems) for name, inner in value.items()}
    if value is None:
        return _EMPTY
    if not isinstance(value, str) or key in _KEY_SOURCES:
        return value

    def replace(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        name, default = match[1], match[3]
        if name is None:
            form = "${NAME} or ${NAME:-default}"
            problems.add(key, f"{_shown(value)} has a $ that begins no {form}; write $$ for a dollar")
            return "$"
        found = os.environ.get(name) or default
        if found is None:
            problems.add(
                key,
                f"{_shown(value)} needs the environment variable {name}, which is not set; set it, or write "
                f"${{{name}:-default}}",
            )
        return found or ""

    return _DOLLAR.sub(replace, value)


def _said(key: _Key, details: dict[str, Any], data: Any, expanded: Any) -> str:
    """Put what pydantic found into plain words."""
    kind = details["type"]
    *parents, name = key
    section = tuple(parents)
    if kind == "extra_forbidden":
        return _unknown_key(section, name)
    if kind == "missing":
        return _missing_key(section, name)
    meant, written = _at(expanded, key), _at(data, key)
    if meant == _EMPTY:
        return "has no value; give one, or leave the key out"
    if key in _SECTIONS and not isinstance(meant, Mapping):
        return f"{_shown(written)} is no section; allowed: the keys {', '.join(_SECTIONS[key].model_fields)}"
    said = str(details["ctx"]["error"])
    if key in _SECTIONS or key in _KEY_SOURCES:
        return said
    if meant is _ABSENT:
        return f"{_shown(_SECTIONS[section].model_fields[name].default)} (the default) {said}"
    return f"{_shown(meant)}{'' if written == meant else f' (from {_shown(written)})'} {said}"


def _unknown_key(section: _Key, name: str) -> str:
    if _LITERAL_KEY.search(name):
        return (
            "credentials may not stand in the file; put them into environment variables and name those in "
            "s3.access_key_env and s3.secret_key_env, or leave both out to use the usual chain "
            "(AWS_ACCESS_KEY_ID, profile, instance role)"
        )
    allowed = list(_SECTIONS[section].model_fields)
    close = difflib.get_close_matches(name, allowed, n=1)
    last = name.rpartition(".")[2]
    places = [(*other, last) for other, model in _SECTIONS.items() if last in model.model_fields]
    hint = ""
    if places:
        hint = f"; did you mean {' or '.join(_placed(place) for place in places)}?"
    elif close:
        hint = f"; did you mean {close[0]}?"
    return f"is no known key; allowed: {', '.join(allowed)}{hint}"


def _placed(key: _Key) -> str:
    return f"{key[-1]} below {key[0]}" if len(key) > 1 else f"{key[0]} at the top level"


def _missing_key(section: _Key, name: str) -> str:
    if (*section, name) in _SECTIONS:
        return f"is missing; allowed: a section, such as {name}: {{size: 4GiB}}"
    description = _SECTIONS[section].model_fields[name].description or ""
    return f"is missing; give it: {description[0].lower()}{description[1:].rstrip('.')}"


def _at(data: Any, key: _Key) -> Any:
    for part in key:
        if not isinstance(data, Mapping) or part not in data:
            return _ABSENT
        data = data[part]
    return data


def _shown(value: Any) -> str:
    """Write a value as it may stand in a message: short, on one line, without the password of a URL."""
    text = re.sub(r"//.*@", "//***@", json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= 80 else f"{text[:76]} ..."
