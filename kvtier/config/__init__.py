"""The configuration: tiers declared in one YAML file, checked before anything starts."""

from kvtier.config.describe import describe
from kvtier.config.load import VARIABLE, load_config, parse_config
from kvtier.config.model import AgentConfig, Config, DiskConfig, MemoryConfig, S3Config
from kvtier.config.schema import json_schema
from kvtier.config.units import format_duration, format_size, parse_duration, parse_size

__all__ = [
    "VARIABLE",
    "AgentConfig",
    "Config",
    "DiskConfig",
    "MemoryConfig",
    "S3Config",
    "describe",
    "format_duration",
    "format_size",
    "json_schema",
    "load_config",
    "parse_config",
    "parse_duration",
    "parse_size",
]
