"""Keys and values that are kept between passes, so that a generated token costs one position and not all of them.

row of 3 tokens   ▣ ▣ ▣ ◇ ·     ▣ held     ◇ where the next pass puts its token: behind the row's own last, whatever the
row of 1 token    ▣ ◇ · · ·                  other rows hold; so each row is laid out as if it were alone
                                · padding of a shorter prompt, or room; never seen

Self-attention's cache grows by one token a pass; those of cross-attention and of partial attention are filled once and
stay. One with a window of w tokens stays, too, and puts the token at position p into its place p mod w.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lit_llm.components.masks import AttentionMask

SPARE_TOKENS = 64
"""Tokens of room at least that are made when a cache is full."""


class CacheLengths:
    """How many tokens each of the B rows holds. The caches of all layers agree on it and share one."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = list(lengths)  # beside the tensor, so that nobody waits for the device to know them
        self.lengths_B = torch.tensor(self.lengths, device=device)

    @property
    def even(self) -> bool:
        """Whether all rows hold as many tokens."""
        return min(self.lengths) == max(self.lengths)

    def advance(self) -> None:
        """Each row has taken one more token."""
        self.lengths = [length + 1 for length in self.lengths]
        self.lengths_B = self.lengths_B + 1

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these; to be called before the caches' own."""
        self.lengths = [self.lengths[row] for row in rows]
        self.lengths_B = self.lengths_B[torch.tensor(rows, device=self.lengths_B.device)]

    def next_positions(self) -> Tensor:
        """Where the next token of each row stands: 1, or B x 1 where rows differ."""
        return self.lengths_B[:1] if self.even else self.lengths_B[:, None]

    def mask(self, more: int = 0) -> AttentionMask:
        """What a single query of each row sees: the row's tokens and so many `more`. No mask where that is all."""
        return AttentionMask(key_lengths=None if self.even else self.lengths_B + more)


class Cache(Protocol):
    """What one part of a layer keeps between passes."""

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""

    def bytes(self) -> list[int]:
        """What each row takes, measured on the tensors, without padding and room."""


class KeyValues:
    """The keys and values of one attention: B x H x S x K each. window: only the last so many tokens are kept."""

    def __init__(self, rows: CacheLengths, window: int | None = None) -> None:
        self.rows, self.window = rows, window
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def add(self, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Put in what a pass computed, and return all that it attends to.

        The first time as many tokens as there are, shorter rows padded at the end; then one for each row.
        """
        if self.k is None or self.v is None:
            self.k, self.v = (part if self.window is None else self._last(part) for part in (k_BHTK, v_BHTK))
            return k_BHTK, v_BHTK
        assert k_BHTK.shape[2] == 1
        last = max(self.rows.lengths)
        end = min(last + 1, self.window or last + 1)
        if end > self.k.shape[2]:
            self.k, self.v = _enlarged(self.k), _enlarged(self.v)
        place = last % self.window if self.window else last
        for held, new in ((self.k, k_BHTK), (self.v, v_BHTK)):
            if self.rows.even:
                held[:, :, place : place + 1] = new
            else:
                places_B = self.rows.lengths_B if self.window is None else self.rows.lengths_B % self.window
                held[torch.arange(len(held), device=held.device), :, places_B] = new[:, :, 0]
        return self.k[:, :, :end], self.v[:, :, :end]

    def _last(self, part_BHTK: Tensor) -> Tensor:
        """Of a pass over prompts: each row's last `window` tokens, each in its place."""
        assert self.window is not None
        rows, heads, tokens, head_dim = part_BHTK.shape
        if tokens <= self.window:
            return part_BHTK
        places_W = torch.arange(self.window, device=part_BHTK.device)
        last_B1 = self.rows.lengths_B[:, None] - 1
        held_BW = last_B1 - (last_B1 - places_W) % self.window  # the last position that belongs to each place
        # In a row that is shorter than the window there may be none; what stands there then is not seen.
        index = held_BW.clamp_min(0)[:, None, :, None].expand(rows, heads, self.window, head_dim)
        return part_BHTK.gather(2, index)

    @property
    def filled(self) -> bool:
        """Whether there are keys and values of an earlier pass."""
        return self.k is not None

    @property
    def capacity(self) -> int:
        """Keys that a pass over single tokens attends to."""
        end = max(self.rows.lengths) + 1
        return end if self.window is None else min(end, self.window)

    def mask(self, mask: AttentionMask) -> AttentionMask:
        """What a single query sees of what is held with it, `mask` being what it sees of a whole row."""
        if self.window is None:
            return mask
        full = min(self.rows.lengths) + 1 >= self.window
        even = full or self.rows.even
        return AttentionMask(key_lengths=None if even else (self.rows.lengths_B + 1).clamp_max(self.window))

    def positions(self) -> Tensor:
        """Where each held key of a pass over single tokens stands: S, or B x S."""
        places = torch.arange(self.capacity, device=self.rows.lengths_B.device)
        if self.window is None:
            return places
        newest_B1 = self.rows.lengths_B[:, None]
        positions_BS = newest_B1 - (newest_B1 - places) % self.window
        return positions_BS[0] if self.rows.even else positions_BS

    def cached(self) -> tuple[Tensor, Tensor]:
        """The keys and values of a cache that is filled once."""
        assert self.k is not None
        assert self.v is not None
        return self.k, self.v

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, and what stands behind the longest of them."""
        longest = min(max(self.rows.lengths), self.window or max(self.rows.lengths))
        self.k, self.v = (part[:, :, :longest][rows] for part in self.cached())

    def bytes(self) -> list[int]:
        """What the tokens of each row take, measured on the tensors; without padding and room."""
        per_token = sum(part[0, :, 0].nbytes for part in self.cached())
        lengths = self.rows.lengths
        return [min(length, self.window or length) * per_token for length in lengths]


class TwoCaches:
    """Keys and values of a row, and of its source, which is filled once."""

    def __init__(self, own: KeyValues, source: KeyValues) -> None:
        self.own, self.source = own, source

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        self.own.keep(rows)
        self.source.keep(rows)

    def bytes(self) -> list[int]:
        """What each row takes, measured on the tensors."""
        return [sum(both) for both in zip(self.own.bytes(), self.source.bytes(), strict=True)]


class StackCache:
    """What all layers of a stack keep between passes."""

    def __init__(self, layers: Sequence[Mapping[str, Cache]], shared_kv: KeyValues | None = None) -> None:
        self.layers = layers
        """Of each layer by the names of its parts; the parts that keep nothing are not in it."""
        self.shared_kv = shared_kv
        """Keys and values that several layers share."""

    @property
    def caches(self) -> list[Cache]:
        """All of them."""
        found = [cache for layer in self.layers for cache in layer.values()]
        return found if self.shared_kv is None else [*found, self.shared_kv]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        for cache in self.caches:
            cache.keep(rows)

    def bytes(self) -> list[int]:
        """What each row takes, measured on the tensors."""
        return [sum(row) for row in zip(*(cache.bytes() for cache in self.caches), strict=True)]


def _enlarged(held_BHSK: Tensor) -> Tensor:
    """A copy with half as much room again, at least SPARE_TOKENS: each token is copied a few times at most."""
    rows, heads, tokens, head_dim = held_BHSK.shape
    # Zeros, since what is hidden from a row still takes part in its sums, with a weight of zero: 0 x NaN is NaN.
    roomier = held_BHSK.new_zeros(rows, heads, tokens + max(SPARE_TOKENS, tokens // 2), head_dim)
    roomier[:, :, :tokens] = held_BHSK
    return roomier
