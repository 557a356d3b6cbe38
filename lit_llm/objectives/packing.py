"""Packing of examples into shared rows, which saves padding. Loads no torch; `collate_packed` fills the rows."""

from __future__ import annotations

from collections.abc import Sequence


def rows_of(sizes: Sequence[Sequence[int]]) -> list[list[int]]:
    """Numbers of the examples of each row: first fit, the largest first (Johnson 1973), ties in the examples' order.

    sizes: tokens of each example on each side of a row. No side of a row is longer than that of the longest example: in
    longer rows the masked scores between examples cost more than packing saves.
    """
    room = [max(side) for side in zip(*sizes, strict=True)]
    rows: list[list[int]] = []
    left: list[list[int]] = []
    for number in sorted(range(len(sizes)), key=lambda number: -sum(sizes[number])):
        size = sizes[number]
        row = next((row for row, free in enumerate(left) if all(map(int.__le__, size, free))), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(list(room))
        rows[row].append(number)
        left[row] = [free - taken for free, taken in zip(left[row], size, strict=True)]
    return [sorted(row) for row in rows]


def sizes_of(lengths: Sequence[tuple[int, int]], family: str) -> list[tuple[int, ...]]:
    """Tokens of each example on each side of a row, of which an encoder-decoder has two. lengths: (source, target)."""
    if family == "encoder_decoder":
        return [(max(source, 1), target) for source, target in lengths]  # an empty source is one token
    return [(source + target,) for source, target in lengths]
