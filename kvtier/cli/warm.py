"""`kvtier warm`: blocks from the bucket onto this node's disk, before anybody asks for them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from kvtier.cli.common import (
    ConfigOption,
    JsonFlag,
    nothing_there,
    opened_bucket,
    read_option,
    shows_progress,
)
from kvtier.config import Config, format_size, load_config, parse_size
from kvtier.errors import ConfigError, CorruptBlock, LayoutError, TierUnavailable
from kvtier.hashing import Namespace, chain_root, hash_blocks
from kvtier.layout import BlockLayout

if TYPE_CHECKING:
    from kvtier.tiers.s3 import S3Tier
    from kvtier.tiers.s3.warm import Wanted

_PATIENCE_SECONDS = 120.0
"""How long the bucket's index may take to load."""

Encode = Callable[[Any], Sequence[int]]


class Prompt(NamedTuple):
    """A prompt whose blocks are wanted.

    Attributes:
        tokens: Its token ids.
        salt: The cache salt of its requests.
        lora: Where the LoRA adapter lies that they use.
    """

    tokens: Sequence[int]
    salt: str | None
    lora: str | None


def warm(
    config: ConfigOption = None,
    top: Annotated[
        str | None, typer.Option(help="Bring the most used blocks, up to so many bytes: 100GiB.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Bring the prefixes of these prompts: JSON lines; see docs/operations.md.",
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Directory of the model's tokenizer, for prompts that are text.",
        ),
    ] = None,
    rate: Annotated[str | None, typer.Option(help="Bytes a second that are not exceeded: 200MiB.")] = None,
    namespace: Annotated[
        str | None, typer.Option(help="Which namespace, if the bucket has several (`kvtier ls`).")
    ] = None,
    json_out: JsonFlag = False,
) -> None:
    """Bring blocks from the bucket into the disk tier. Interrupted, it goes on where it stopped.

    Engines and agents that run already find them within seconds.
    """
    if (top is None) == (prompts is None):
        raise ConfigError("say what to bring: either --top SIZE or --prompts FILE")
    limit = _size("--top", top)
    per_second = _size("--rate", rate)
    settings = load_config(config)
    found, layout = _namespace_of(settings, namespace)
    with _tiers(settings, found, layout) as (bucket, disk):
        if prompts is None:
            wanted = bucket.hottest(limit or 0)
        else:
            wanted = list(_prefixes(bucket, prompts, tokenizer, found, layout))
        total = sum(part.size for part in wanted)
        from kvtier.tiers.s3.warm import Warmer

        with _progress(total, json_out) as advance:
            warmed = Warmer(bucket, disk, found.id, bytes_per_second=per_second).run(wanted, advance)
    report = {"namespace": found.hex, "wanted_bytes": total, **asdict(warmed)}
    if json_out:
        typer.echo(json.dumps(report))
    else:
        typer.echo(
            f"{warmed.blocks} blocks brought to the disk ({format_size(warmed.bytes)} read), "
            f"{warmed.held} were there, {warmed.failed} could not be had or kept"
        )
    if warmed.failed:
        raise typer.Exit(1)


def read_prompts(file: Path, encode: Encode) -> Iterator[Prompt]:
    """Give the prompts of a file.

    Args:
        file: JSON lines. Each is a text, or an object with one of `prompt` (a text), `messages` (a chat, for
            the tokenizer's template) and `tokens` (ids), and perhaps `cache_salt` and `lora` (a path).
        encode: Makes tokens of a text or of messages.

    Raises:
        ConfigError: A line is something else, or the file cannot be read.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts: {file} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file}:{number}: is no JSON: {error}") from error
        entry = {"prompt": entry} if isinstance(entry, str) else entry
        asked = [
            key for key in ("prompt", "messages", "tokens") if isinstance(entry, Mapping) and key in entry
        ]
        named = [entry.get(key) if isinstance(entry, Mapping) else None for key in ("cache_salt", "lora")]
        if len(asked) != 1 or not all(isinstance(name, str | None) for name in named):
            raise ConfigError(
                f"{file}:{number}: needs one of prompt, messages and tokens, perhaps cache_salt and lora"
            )
        value = entry[asked[0]]
        if asked[0] != "tokens":
            yield Prompt(encode(value), *named)
        elif isinstance(value, list) and all(type(token) is int and 0 <= token < 2**31 for token in value):
            yield Prompt(value, *named)
        else:
            raise ConfigError(f"{file}:{number}: tokens must be a list of token ids")


def _size(option: str, text: str | None) -> int | None:
    size = None if text is None else read_option(option, text, parse_size)
    if size == 0:
        raise ConfigError(f'{option}: "{text}" is nothing')
    return size


def _namespace_of(settings: Config, name: str | None) -> tuple[Namespace, BlockLayout]:
    """Find the namespace in the bucket, and what its document says."""
    from kvtier.tiers.s3.bucket import ObjectMissing
    from kvtier.tiers.s3.keys import Keys
    from kvtier.tiers.s3.namespaces import find_namespaces, read_facts

    if settings.s3 is None or settings.disk is None:
        raise ConfigError("warming up brings blocks from bucket to disk: the configuration needs s3 and disk")
    with opened_bucket(settings.s3) as bucket:
        names = list(find_namespaces(bucket, settings.s3.prefix))
        if not names:
            raise ConfigError(f"{nothing_there(settings.s3)} to warm up with")
        if name is None and len(names) != 1:
            raise ConfigError(
                f"the bucket has {len(names)} namespaces; name one with --namespace (kvtier ls)"
            )
        chosen = name or names[0]
        if chosen not in names:
            raise ConfigError(f"the bucket has no namespace {chosen}; see kvtier ls")
        try:
            facts = read_facts(bucket, Keys(settings.s3.prefix, chosen), chosen)
            return Namespace(facts, bytes.fromhex(chosen)), BlockLayout(**facts["layout"])
        except (CorruptBlock, ObjectMissing, KeyError, TypeError, LayoutError) as error:
            raise ConfigError(
                f"the document of namespace {chosen} does not tell its layout: {error}"
            ) from error


@contextmanager
def _tiers(settings: Config, namespace: Namespace, layout: BlockLayout) -> Iterator[tuple[S3Tier, Any]]:
    from kvtier.codec import BlockCodec
    from kvtier.tiers.disk import DiskTier
    from kvtier.tiers.s3 import S3Tier

    assert settings.s3 is not None
    assert settings.disk is not None
    bound = BlockCodec(layout, namespace.id).max_encoded_bytes
    disk = DiskTier(settings.disk.path, settings.disk.size, namespace, bound)
    bucket = S3Tier(settings.s3, namespace, layout, bound, upkeep=False)
    try:
        if not bucket.wait_ready(_PATIENCE_SECONDS):
            raise TierUnavailable("the bucket's index could not be loaded; the log above says why")
        yield bucket, disk
    finally:
        bucket.close(0.0)
        disk.close()


def _prefixes(
    bucket: S3Tier, file: Path, tokenizer: Path | None, namespace: Namespace, layout: BlockLayout
) -> Iterator[Wanted]:
    from kvtier.connector.weights import adapter_digest

    # Engines name adapters by the content of their files.
    name_of = functools.cache(adapter_digest)
    for prompt in read_prompts(file, _encoder(tokenizer)):
        try:
            lora = None if prompt.lora is None else name_of(prompt.lora)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file}: the LoRA adapter {prompt.lora} cannot be read: {error}") from error
        root = chain_root(namespace.id, prompt.salt, lora)
        wanted = bucket.prefix(hash_blocks(root, prompt.tokens, layout.tokens_per_block), root)
        if wanted is not None:
            yield wanted


def _encoder(directory: Path | None) -> Encode:
    loaded: list[Any] = []

    def encode(value: Any) -> Sequence[int]:
        if directory is None:
            raise ConfigError("the prompts are text: name the tokenizer's directory with --tokenizer")
        if not loaded:
            loaded.append(_load_tokenizer(directory))
        if isinstance(value, str):
            return list(loaded[0](value)["input_ids"])
        return list(
            loaded[0].apply_chat_template(value, add_generation_prompt=True, return_dict=True)["input_ids"]
        )

    return encode


def _load_tokenizer(directory: Path) -> Any:
    try:
        from transformers import AutoTokenizer

        # From this directory alone, and no code out of it.
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except ImportError as error:
        raise ConfigError("prompts that are text need the package transformers; or give tokens") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"--tokenizer: {directory} holds no tokenizer: {error}") from error


@contextmanager
def _progress(total: int, json_out: bool) -> Iterator[Callable[[int], None]]:
    if not shows_progress(json_out):
        yield lambda size: None
        return
    columns = TextColumn("warming up"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("warm", total=total)
        yield lambda size: progress.advance(task, size)
