"""Text to tokens and back."""

from __future__ import annotations

import json
from pathlib import Path


class Tokenizer:
    """The tokenizer of a model directory.

    Attributes:
        eos_id: The token that ends an answer, or None.
    """

    def __init__(self, directory: str | Path) -> None:
        from tokenizers import Tokenizer as _Tokenizer

        self._tokenizer = _Tokenizer.from_file(str(Path(directory) / "tokenizer.json"))
        config = json.loads((Path(directory) / "config.json").read_text())
        self.eos_id: int | None = config.get("eos_token_id")

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text; special tokens written in it count as such."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: list[int]) -> str:
        """Return the text of token ids, special tokens included."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))
