"""Sliding windows of attention, and when they are computed block by block. Loads no torch."""

from __future__ import annotations

Window = tuple[int, int]
"""(n, m): visible keys are fewer than n tokens before, and m tokens after, the query."""

BAND = 8
"""Least number of blocks for which a window is computed block by block; for fewer, one T x T mask is as cheap."""


def band_size(window: Window, causal: bool) -> int:
    """Tokens of a block, enough that a query's window ends in the neighbouring blocks."""
    return max(window[0] - 1, 0 if causal else window[1] - 1, 16)
