"""What a configuration means, in plain words."""

from __future__ import annotations

from kvtier.config import machine
from kvtier.config.model import AgentConfig, Config, DiskConfig, S3Config
from kvtier.config.units import format_duration, format_size
from kvtier.errors import ConfigError


def describe(config: Config) -> list[str]:
    """Say what would be kept where, how much of it, and what happens on a miss.

    Args:
        config: A checked configuration.

    Returns:
        Sentences, one a line; never a secret. What is allowed but likely a mistake begins with "warning:".
    """
    size = format_size(config.memory.size)
    lines = [
        f"memory: {size} of host memory hold the blocks that an engine can load at once; when full, the "
        "least recently used make room."
    ]
    lines.append(_describe_agent(config.agent))
    lines += (
        _describe_disk(config.disk) if config.disk else ["disk: none; nothing is kept on this node's disk."]
    )
    lines += _describe_s3(config.s3) if config.s3 else ["s3: none; nothing is shared with other nodes."]
    if config.s3 and config.s3.warm_on_start and not config.disk:
        lines.append("warning: s3.warm_on_start does nothing without a section disk, which it fills.")
    if config.disk or config.s3:
        wait, flush = format_duration(config.lookup_wait), format_duration(config.flush_timeout)
        lines += [
            f"miss: a lookup waits at most {wait} for blocks that are being fetched into memory; the engine "
            "computes what is not there by then, and the next lookup finds it.",
            f"close: what is not yet written gets {flush}, then it is dropped.",
        ]
    else:
        lines += [
            "miss: the engine computes what is not in memory.",
            "warning: with neither disk nor s3, every block is lost when kvtier stops.",
        ]
    return lines


def _describe_agent(agent: AgentConfig) -> str:
    if agent.mode == "inprocess":
        return "agent: none; each engine has its own store, and its memory goes when the engine stops."
    place = f" with its sockets in {agent.directory}" if agent.directory else ""
    health = f"; metrics and health on {agent.http}" if agent.http else ""
    start = "the first engine starts it" if agent.mode == "auto" else "engines wait until somebody starts it"
    return f"agent: one process holds the memory for all engines of the node{place}; {start}{health}."


def _describe_disk(disk: DiskConfig) -> list[str]:
    size = format_size(disk.size)
    lines = [
        f"disk: up to {size} of compressed blocks below {disk.path}, kept over restarts; when full, the "
        "least recently used make room."
    ]
    total = machine.filesystem_bytes(disk.path)
    if disk.size > total:
        lines.append(
            f"warning: disk.size is {size}, but the whole file system of {disk.path} has "
            f"{format_size(total)}; once it is full, new blocks are not kept there."
        )
    return lines


def _describe_s3(s3: S3Config) -> list[str]:
    place = f"{s3.endpoint or 'AWS'}{f', region {s3.region}' if s3.region else ''}"
    variables = s3.key_variables()
    keys = " and ".join(variables) if variables else "the usual chain (AWS_ACCESS_KEY_ID, profile, role)"
    connect, read = format_duration(s3.connect_timeout), format_duration(s3.read_timeout)
    lines = [
        f"s3: compressed blocks go to the bucket {s3.bucket} at {place}, below {s3.prefix}/, for every node "
        f"that names the same; credentials from {keys}.",
        f"s3: up to {s3.concurrency} requests at once; {connect} without a connection or {read} without a "
        f"byte make a miss; other nodes' blocks are looked for every {format_duration(s3.index_refresh)}.",
        f"s3: {_describe_lifecycle(s3)}",
    ]
    if s3.encryption:
        key = f" with the key {s3.kms_key}" if s3.kms_key else ""
        lines.append(f"s3: the server is asked to encrypt what is written by {s3.encryption}{key}.")
    if s3.warm_on_start:
        size = format_size(s3.warm_on_start)
        lines.append(f"s3: at the start, up to {size} of the most used blocks are brought to the disk.")
    try:
        s3.credentials()
    except ConfigError as error:
        lines.append(f"warning: {error}.")
    return lines


def _describe_lifecycle(s3: S3Config) -> str:
    if s3.ttl is None and s3.quota is None:
        return "what is stored stays: neither s3.ttl nor s3.quota says otherwise."
    limits = []
    if s3.ttl is not None:
        limits.append(f"was not used for {format_duration(s3.ttl)}")
    if s3.quota is not None:
        limits.append(f"is least recently used and too much for {format_size(s3.quota)}")
    return f"deleted is what {' or '.join(limits)}, all below {s3.prefix}/ together."
