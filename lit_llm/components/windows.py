"""Sliding windows of attention: what a window is, and when it is computed block by block. Loads no torch."""

from __future__ import annotations

Window = tuple[int, int]
"""Keys that are seen are fewer than so many tokens before, and after, the query."""

BAND = 8
"""Blocks from which on a window is computed block by block; for fewer one mask over all is as cheap."""


def band_size(window: Window, causal: bool) -> int:
    """Tokens of a block: enough that a query's window ends in the blocks next to its own."""
    return max(window[0] - 1, 0 if causal else window[1] - 1, 16)
