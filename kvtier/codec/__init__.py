"""Lossless encoding of KV blocks for disk and bucket: smaller, and checked to the last bit when decoded."""

from kvtier.codec.block import BlockCodec
from kvtier.codec.format import BlockHeader, Section, read_header

__all__ = ["BlockCodec", "BlockHeader", "Section", "read_header"]
