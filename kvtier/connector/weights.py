"""Which model this is: a fingerprint of its configuration and its weight files."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from kvtier._logging import log_once

_log = logging.getLogger(__name__)

WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth")
VOLATILE_KEYS = frozenset({"transformers_version", "_name_or_path", "_commit_hash"})
"""Keys of config.json that say nothing about the KV cache and change from save to save."""

WHOLE_BYTES = 64 << 20
"""Files up to this size are digested whole; larger ones by samples of each tensor."""
SAMPLE_BYTES = 4 << 10
STEP_BYTES = 4 << 20
"""From one sample to the next, inside a tensor."""
WHOLE_TENSOR_BYTES = 64 << 10
MAX_HEADER_BYTES = 100 << 20
"""What the reader of safetensors itself accepts."""

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""What the engine makes of pictures, whose digests are taken before."""

_COMMIT = re.compile("[0-9a-f]{40}")
_PRIVATE = secrets.token_hex(16)


def model_facts(model: str | None, revision: str | None) -> dict[str, Any]:
    """Describe a model so that two descriptions are equal only if the weights are.

    Args:
        model: Local directory, weight file, or name on the Hugging Face hub, whose local snapshot is used.
        revision: Commit, branch or tag on the hub.

    Returns:
        Plain JSON data: `config`, `quantization`, `index`, `weights` (bytes and digest of each file) and
        `revision` where known. Without readable weights it is an identity that nobody else shares, or, for a
        commit on the hub, name and commit.
    """
    if model is None:
        log_once(
            _log, "no-model", "the engine's arguments name no model: its KV stays private to this process"
        )
        return private_facts(None)
    try:
        place = _local_files(model, revision)
        if place is not None:
            facts = _describe_files(place)
            if facts["weights"]:
                return facts
            log_once(_log, "no-weights", "no weight files in %s: its KV stays private to this process", place)
            return private_facts(model)
    except (OSError, ValueError) as error:
        log_once(_log, "unreadable", "cannot read the model's files, its KV stays private: %r", error)
        return private_facts(model)
    if revision and _COMMIT.fullmatch(revision):
        return {"name": model, "revision": revision}
    log_once(_log, "name-only", "%s is no local model: its KV stays private to this process", model)
    return {**private_facts(model), "revision": revision}


def private_facts(model: str | None) -> dict[str, Any]:
    """Return an identity that no other process shares, for weights that nobody can tell from others."""
    return {"private": _PRIVATE, "name": model}


def adapter_digest(path: str) -> str:
    """Digest a LoRA adapter: its weights, and its configuration.

    Args:
        path: A directory in PEFT's layout, or a file.

    Raises:
        OSError: It cannot be read.
        FileNotFoundError: There are no weights.
    """
    place = Path(path).expanduser()
    weights = [place] if place.is_file() else _weight_files(place)
    if not weights:
        raise FileNotFoundError(f"no weights in {place}")
    facts = {
        "config": _read_json(place / "adapter_config.json"),
        "weights": {file.name: _describe_weight(file) for file in weights},
    }
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def model_config(model: str | None, revision: str | None) -> Mapping[str, Any]:
    """Return the model's config.json, its text part where it has several, {} where it cannot be read."""
    try:
        place = _local_files(model, revision) if model else None
        config = _read_json(place / "config.json") if place and place.is_dir() else None
    except (OSError, ValueError):
        return {}
    if not isinstance(config, dict):
        return {}
    for part in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(part), dict):
            return {**config, **config[part]}
    return config


def _local_files(model: str, revision: str | None) -> Path | None:
    """Return the directory or file that holds the weights, None where there is none on this machine."""
    path = Path(model).expanduser()
    if path.exists():
        return path.resolve() if path.is_file() else path
    stored = _hub_cache() / f"models--{model.replace('/', '--')}"
    wanted = revision or "main"
    ref = stored / "refs" / wanted
    commit = ref.read_text().strip() if ref.is_file() else wanted
    snapshot = stored / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def _hub_cache() -> Path:
    """Return where the hub's own library keeps its snapshots."""
    user = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", f"{user}/huggingface")
    older = os.environ.get("HUGGINGFACE_HUB_CACHE", f"{home}/hub")
    return Path(os.path.expandvars(os.environ.get("HF_HUB_CACHE", older))).expanduser()


def _describe_files(place: Path) -> dict[str, Any]:
    if place.is_file():
        return {"weights": {place.name: _describe_weight(place)}}
    config = _read_json(place / "config.json")
    if isinstance(config, dict):
        config = {key: value for key, value in config.items() if key not in VOLATILE_KEYS}
    facts: dict[str, Any] = {
        "config": config,
        "quantization": _read_json(place / "hf_quant_config.json"),
        "index": {file.name: _digest_whole(file) for file in sorted(place.glob("*.index.json"))},
        "processor": {name: _read_json(place / name) for name in PROCESSOR_FILES},
        "weights": {file.name: _describe_weight(file) for file in _weight_files(place)},
    }
    if place.parent.name == "snapshots":
        facts["revision"] = place.name
    return facts


def _weight_files(place: Path) -> list[Path]:
    return sorted({file for pattern in WEIGHT_PATTERNS for file in place.glob(pattern) if file.is_file()})


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _describe_weight(file: Path) -> dict[str, int | str]:
    status = file.stat()
    digest = _digest_weight(str(file), status.st_size, status.st_mtime_ns, status.st_ino)
    return {"bytes": status.st_size, "digest": digest}


@lru_cache(maxsize=4096)
def _digest_weight(path: str, size: int, mtime_ns: int, inode: int) -> str:
    """Digest a weight file: whole if it is small, else small tensors whole and samples of all others.

    A fine-tune may leave all but a few tensors as they were, and a new calibration all but some scales; what
    it changes it changes all over. Only safetensors tell where tensors are; other files count as one.
    """
    file = Path(path)
    if size <= WHOLE_BYTES:
        return _digest_whole(file)
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb", buffering=0) as stream:
        header, tensors = _tensors(stream.fileno(), size)
        digest.update(header)
        for start, stop in tensors:
            if stop - start <= WHOLE_TENSOR_BYTES:
                digest.update(os.pread(stream.fileno(), stop - start, start))
                continue
            for offset in (*range(start, stop - SAMPLE_BYTES, STEP_BYTES), stop - SAMPLE_BYTES):
                digest.update(os.pread(stream.fileno(), SAMPLE_BYTES, offset))
    return digest.hexdigest()


def _tensors(descriptor: int, size: int) -> tuple[bytes, list[tuple[int, int]]]:
    """Return the header of a safetensors file, and where its tensors begin and end.

    Any other file has an empty header and is one tensor.
    """
    other = b"", [(0, size)]
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    base = 8 + length
    if length > MAX_HEADER_BYTES or base > size:
        return other
    header = os.pread(descriptor, length, 8)
    try:
        entries = json.loads(header)
        offsets = [entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"]
        tensors = sorted((base + start, base + stop) for start, stop in offsets)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return other
    valid = all(
        type(start) is int and type(stop) is int and base <= start <= stop <= size for start, stop in tensors
    )
    return (header, tensors) if tensors and valid else other


def _digest_whole(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
