"""Which examples share a row, so that short ones cost less padding. Loads no torch; `collate_packed` fills the rows."""

from __future__ import annotations

from collections.abc import Sequence


def rows_of(sizes: Sequence[Sequence[int]]) -> list[list[int]]:
    """Which examples share a row: first fit, the largest first (Johnson 1973), ties in the order of the examples.

    sizes: what each example takes, on each side of a row. No row is longer than the longest example, on either side: in
    longer ones the scores between examples, which are computed and then masked, cost more than is saved.
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
    """What examples of these (tokens of the source, tokens of the target) take of a row: of each of its sides, for an
    encoder-decoder."""
    if family == "encoder_decoder":
        return [(max(source, 1), target) for source, target in lengths]  # an empty source is one token
    return [(source + target,) for source, target in lengths]
