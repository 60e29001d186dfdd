"""Block layouts: sizes, and impossible ones refused."""

from __future__ import annotations

import pytest

from kvtier.errors import LayoutError
from kvtier.layout import BlockLayout


def test_sizes_follow_from_the_dimensions():
    layout = BlockLayout("bfloat16", tokens_per_block=32, layers=32, kv_factor=2, row_elements=8 * 32 * 128)
    assert layout.shard_bytes == layout.block_bytes == 4 << 20
    assert BlockLayout("float8_e4m3fn", 32, 4, 2, 64, shards=8).block_bytes == 8 * 4 * 2 * 64


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dtype": "nvfp4"}, "nvfp4.*allowed.*bfloat16"),
        ({"layers": 0}, "positive"),
        ({"shards": -1}, "positive"),
        ({"row_elements": 1 << 40}, "limit"),
    ],
)
def test_impossible_layouts_are_refused(change, says):
    good = {"dtype": "bfloat16", "tokens_per_block": 32, "layers": 2, "kv_factor": 2, "row_elements": 64}
    with pytest.raises(LayoutError, match=says):
        BlockLayout(**{**good, **change})
