"""Every error that kvtier raises on purpose.

KvTierError
├── ConfigError          the configuration file or an option says something impossible
├── LayoutError          the engine's KV pool is of a kind that kvtier refuses (said at registration)
├── CorruptBlock         encoded bytes are truncated, altered, foreign or of an unknown format
├── SlotMisfit           a block that the form of the arena's slots cannot hold
├── BrokenPromise        (kvtier.connector) promised blocks are gone: the only error the engine ever sees
└── TierError            a tier could not do what it was asked
    ├── TierUnavailable  for now: time-outs, refused connections, throttling; trying later may help
    ├── AccessDenied     credentials or permissions are wrong; trying again will not help
    └── TierFull         no room: disk full, quota reached

Engine-facing methods let none of these out but BrokenPromise: they catch, count and miss.
"""

from __future__ import annotations


class KvTierError(Exception):
    """Base of all errors that kvtier raises on purpose."""


class ConfigError(KvTierError):
    """A setting is wrong. The message names the key, the value, what is allowed and the file."""


class LayoutError(KvTierError):
    """The engine's KV pool has a layout that kvtier does not support."""


class CorruptBlock(KvTierError):
    """Encoded bytes that cannot be trusted: never decoded, never served, quarantined."""


class SlotMisfit(KvTierError):
    """A block that cannot be held in slots of the configured form, such as noise in plane slots."""


class TierError(KvTierError):
    """A tier failed. Carries what a user can do about it."""


class TierUnavailable(TierError):
    """The tier does not answer at present: time-out, refused connection, throttling, 5xx."""


class AccessDenied(TierError):
    """The tier refuses: wrong credentials, missing permission, missing bucket."""


class TierFull(TierError):
    """The tier has no room left."""
