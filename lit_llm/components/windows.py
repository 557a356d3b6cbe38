"""Sliding windows of attention, when they are computed block by block, and FlexAttention's blocks. Loads no torch."""

from __future__ import annotations

Window = tuple[int, int]
"""(n, m): visible keys are fewer than n tokens before, and m tokens after, the query."""

BAND = 8
"""Least number of blocks for which a window is computed block by block; for fewer, one T x T mask is as cheap."""
BLOCK = 128
"""Queries, and keys, of a block of FlexAttention; the default of torch's kernels."""


def band_size(window: Window, causal: bool) -> int:
    """Tokens of a block, enough that a query's window ends in the neighbouring blocks."""
    return max(window[0] - 1, 0 if causal else window[1] - 1, 16)


def block_mask_bytes(queries: int, keys: int) -> int:
    """Bytes of one mask for FlexAttention: a boolean for each pair of tokens, filled up to whole blocks, and lists.

    The lists name blocks by int32 numbers, for each row and for each column of blocks: those of which some pairs are
    visible, those of which all are, and the lengths of both.
    """
    rows, columns = -(-queries // BLOCK), -(-keys // BLOCK)
    return rows * columns * BLOCK**2 + 4 * (4 * rows * columns + 2 * (rows + columns))
