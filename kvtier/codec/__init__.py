"""Lossless encoding of KV blocks for disk and bucket: smaller, and checked to the last bit when decoded."""

from kvtier.codec.block import BlockCodec, check_block
from kvtier.codec.format import BlockHeader, Section, read_header

__all__ = ["BlockCodec", "BlockHeader", "Section", "check_block", "read_header"]
