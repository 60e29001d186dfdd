"""Lossless encoding of KV blocks for disk and bucket: smaller, and checked to the last bit when decoded."""

from kvtier.codec.block import BlockCodec, check_block
from kvtier.codec.format import BlockHeader, Section, read_header
from kvtier.codec.slots import PlaneSlots, RawSlots, SlotForm, slot_form
from kvtier.codec.source import StoredFile

__all__ = [
    "BlockCodec",
    "BlockHeader",
    "PlaneSlots",
    "RawSlots",
    "Section",
    "SlotForm",
    "StoredFile",
    "check_block",
    "read_header",
    "slot_form",
]
