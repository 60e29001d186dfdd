"""What leaders and workers both say about blocks and passes."""

from __future__ import annotations

import sys

Pages = tuple[int, ...]
"""One block's page in each layer group of the pool, -1 where it has none; a flat pool has one group."""

EVERY_PASS = sys.maxsize
"""Stands for all passes where the number of one is asked for."""
