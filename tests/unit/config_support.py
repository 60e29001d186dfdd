"""What the tests of the configuration share."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtier.config import Config, load_config
from kvtier.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


class Files:
    """Writes YAML into a test's directory and loads it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = directory / "kvtier.yaml"

    def write(self, text: str) -> Path:
        """Write `text`, with DIR standing for the test's directory."""
        self.file.write_text(text.replace("DIR", str(self.directory)))
        return self.file

    def load(self, text: str) -> Config:
        """Load `text` as a configuration file."""
        return load_config(self.write(text))

    def problems(self, text: str) -> list[str]:
        """Return the lines of the error that loading `text` raises, each without the file's name."""
        with pytest.raises(ConfigError) as caught:
            self.load(text)
        lines = str(caught.value).split("\n")
        start = f"{self.file}:"
        assert all(line.startswith(start) for line in lines), lines
        return [line.removeprefix(start) for line in lines]

    def problem(self, text: str) -> str:
        """Return the only line of the error."""
        (line,) = self.problems(text)
        return line
