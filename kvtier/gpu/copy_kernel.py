"""The Triton kernel that copies many ranges, wherever they lie."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def copy_ranges(ranges, words, SPAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Copy ranges of `words` 8 bytes each. Grid: (ranges, spans of a range).

    `ranges` has each range's destination and source, int64 addresses that are multiples of 16.
    """
    entry = ranges + 2 * tl.program_id(0).to(tl.int64)
    destination = tl.multiple_of(tl.load(entry), 16).to(tl.pointer_type(tl.int64))
    source = tl.multiple_of(tl.load(entry + 1), 16).to(tl.pointer_type(tl.int64))
    at = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    valid = at < words
    tl.store(destination + at, tl.load(source + at, mask=valid), mask=valid)
