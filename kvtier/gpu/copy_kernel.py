"""The Triton kernel that copies many ranges, wherever they lie."""

from __future__ import annotations

import triton
import triton.language as tl


# A variant for each kind of number would be compiled while the engine waits.
@triton.jit(do_not_specialize=["items"])  # type: ignore[untyped-decorator]
def copy_ranges(ranges, spans, items, words, SPAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Copy ranges of `words` 8 bytes each. Grid: any number of programs, which share the spans.

    `ranges` has each range's destination and source, int64 addresses that are multiples of 16. `spans` is
    their number in a range, the last one maybe shorter than `SPAN` words, and `items` that of all.
    """
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        entry = ranges + 2 * (item // spans).to(tl.int64)
        destination = tl.multiple_of(tl.load(entry), 16).to(tl.pointer_type(tl.int64))
        source = tl.multiple_of(tl.load(entry + 1), 16).to(tl.pointer_type(tl.int64))
        at = (item % spans) * SPAN + tl.arange(0, SPAN)
        valid = at < words
        tl.store(destination + at, tl.load(source + at, mask=valid), mask=valid)
