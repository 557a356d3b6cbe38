"""Caches of keys and values between passes, so that a generated token costs one position and not all of them.

row of 3 tokens   ▣ ▣ ▣ ◇ ·     ▣ cached     ◇ slot of the next token: directly behind the row's last token, whatever
row of 1 token    ▣ ◇ · · ·                    other rows hold
                                · padding of a shorter prompt, or spare capacity; never visible

Self-attention's cache grows by one token a pass, in slots that are allocated at once where the number of tokens is
known; a cache of a source is filled once. A row that has ended makes room for another prompt's. With a window of w
tokens the cache has w slots, and the token at position p is in slot p mod w.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, Self

import torch
from torch import Tensor

from lit_llm.components.masks import AttentionMask

SPARE_TOKENS = 64
"""Least number of slots that are added when a cache is full."""


class CacheLengths:
    """Number of cached tokens in each of the B rows; one object that the caches of all layers share."""

    def __init__(self, lengths: Sequence[int], device: torch.device, capacity: int | None = None) -> None:
        """capacity: tokens that the longest row will have in the end; None: unknown."""
        self.capacity = capacity
        self.lengths = list(lengths)  # besides the tensor: reading it needs no wait for the device
        self.lengths_B = torch.tensor(self.lengths, device=device)

    @property
    def even(self) -> bool:
        """True where all rows hold the same number of tokens."""
        return min(self.lengths) == max(self.lengths)

    def advance(self) -> None:
        """Add one token to each row."""
        self.lengths = [length + 1 for length in self.lengths]
        self.lengths_B = self.lengths_B + 1

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows; call it before `keep` of the caches."""
        self.lengths = [self.lengths[row] for row in rows]
        self.lengths_B = self.lengths_B[torch.tensor(rows, device=self.lengths_B.device)]

    def replace(self, rows: Sequence[int], other: CacheLengths) -> None:
        """Put the rows of another batch in the place of these; call it after `replace` of the caches."""
        self.set(rows, other.lengths)

    def set(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Give these rows other numbers of tokens."""
        for row, length in zip(rows, lengths, strict=True):
            self.lengths[row] = length
        self.lengths_B = torch.tensor(self.lengths, device=self.lengths_B.device)

    def next_positions(self) -> Tensor:
        """Position of the next token of each row: 1, or B x 1 where rows differ."""
        return self.lengths_B[:1] if self.even else self.lengths_B[:, None]

    def mask(self, more: int = 0) -> AttentionMask:
        """Mask for one query of each row, which sees the row's tokens and `more` further ones."""
        return AttentionMask(key_lengths=None if self.even else self.lengths_B + more)


class Cache(Protocol):
    """State of one part of a layer between passes."""

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""

    def replace(self, rows: Sequence[int], other: Self) -> None:
        """Put all rows of another batch's cache in the place of these."""

    def bytes(self) -> list[int]:
        """Bytes of each row, measured on the tensors, without padding and spare capacity."""


class KeyValues:
    """Keys and values of one attention: B x H x S x K each. window: number of tokens that are kept; None: all."""

    def __init__(self, rows: CacheLengths, window: int | None = None) -> None:
        self.rows, self.window = rows, window
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def add(self, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of a pass, and return all that its queries attend to.

        The first pass adds whole prompts, shorter rows padded at the end. Each later one adds one token to each row, or
        several where all rows hold the same number and no window limits them.
        """
        if self.k is None or self.v is None:
            self.k, self.v = self._allocated(k_BHTK), self._allocated(v_BHTK)
            return k_BHTK, v_BHTK
        added = k_BHTK.shape[2]
        assert added == 1 or (self.rows.even and self.window is None)
        last = max(self.rows.lengths)
        end = min(last + added, self.window or last + added)
        if end > self.k.shape[2]:
            self.k, self.v = (_enlarged(part, _with_spare(part.shape[2], end)) for part in (self.k, self.v))
        place = last % self.window if self.window else last
        for held, new in ((self.k, k_BHTK), (self.v, v_BHTK)):
            if self.rows.even:
                held[:, :, place : place + added] = new
            else:
                places_B = self.rows.lengths_B if self.window is None else self.rows.lengths_B % self.window
                held[torch.arange(len(held), device=held.device), :, places_B] = new[:, :, 0]
        return self.k[:, :, :end], self.v[:, :, :end]

    def extend(self, rows: Sequence[int], keys_values: tuple[Tensor, Tensor], start: int) -> None:
        """Add tokens to these rows alone, behind the `start` tokens that each of them holds."""
        k_RHTK, v_RHTK = keys_values
        end = start + k_RHTK.shape[2]
        if self.k is None or self.v is None:
            shape = (len(self.rows.lengths), k_RHTK.shape[1], max(end, self.rows.capacity or 0), k_RHTK.shape[3])
            # Zeros, as in `_enlarged`.
            self.k, self.v = k_RHTK.new_zeros(shape), v_RHTK.new_zeros(shape)
        elif end > self.k.shape[2]:
            self.k, self.v = (_enlarged(part, _with_spare(part.shape[2], end)) for part in (self.k, self.v))
        self.k[rows, :, start:end], self.v[rows, :, start:end] = k_RHTK, v_RHTK

    def of_rows(self, rows: Sequence[int], lengths: CacheLengths) -> KeyValues:
        """A copy of these rows alone, which hold `lengths` tokens, without spare slots."""
        copied, tokens = KeyValues(lengths, self.window), max(lengths.lengths)
        if self.k is not None and self.v is not None and tokens:
            copied.k, copied.v = self.k[rows, :, :tokens], self.v[rows, :, :tokens]
        return copied

    def _allocated(self, part_BHTK: Tensor) -> Tensor:
        """A pass over prompts, in slots for all tokens that are still to come, where their number is known."""
        kept = part_BHTK if self.window is None else self._last_tokens(part_BHTK)
        slots = max(self.rows.capacity or 0, part_BHTK.shape[2])
        slots = slots if self.window is None else min(slots, self.window)
        return kept.contiguous() if slots == kept.shape[2] else _enlarged(kept, slots)

    def _last_tokens(self, part_BHTK: Tensor) -> Tensor:
        """Each row's last `window` tokens of a pass over prompts, each in its slot."""
        assert self.window is not None
        rows, heads, tokens, head_dim = part_BHTK.shape
        if tokens <= self.window:
            return part_BHTK
        places_W = torch.arange(self.window, device=part_BHTK.device)
        last_B1 = self.rows.lengths_B[:, None] - 1
        held_BW = last_B1 - (last_B1 - places_W) % self.window  # the last position that belongs to each slot
        # In a row shorter than the window some slots have none; their content is masked.
        index = held_BW.clamp_min(0)[:, None, :, None].expand(rows, heads, self.window, head_dim)
        return part_BHTK.gather(2, index)

    @property
    def filled(self) -> bool:
        """True where the cache holds keys and values of an earlier pass."""
        return self.k is not None

    @property
    def capacity(self) -> int:
        """Number of keys that a pass over single tokens attends to."""
        end = max(self.rows.lengths) + 1
        return end if self.window is None else min(end, self.window)

    def mask(self, mask: AttentionMask) -> AttentionMask:
        """Mask for a single query over the cached keys. mask: its mask over a whole row."""
        if self.window is None:
            return mask
        full = min(self.rows.lengths) + 1 >= self.window
        even = full or self.rows.even
        return AttentionMask(key_lengths=None if even else (self.rows.lengths_B + 1).clamp_max(self.window))

    def positions(self) -> Tensor:
        """Positions of the cached keys in a pass over single tokens: S, or B x S."""
        places = torch.arange(self.capacity, device=self.rows.lengths_B.device)
        if self.window is None:
            return places
        newest_B1 = self.rows.lengths_B[:, None]
        positions_BS = newest_B1 - (newest_B1 - places) % self.window
        return positions_BS[0] if self.rows.even else positions_BS

    def cached(self) -> tuple[Tensor, Tensor]:
        """Keys and values of a cache that is filled once."""
        assert self.k is not None
        assert self.v is not None
        longest = max(self.rows.lengths)
        return self.k[:, :, :longest], self.v[:, :, :longest]

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        assert self.k is not None
        assert self.v is not None
        self.k, self.v = self.k[rows], self.v[rows]

    def replace(self, rows: Sequence[int], other: KeyValues) -> None:
        """Put all rows of another batch's cache in the place of these."""
        assert self.k is not None
        assert self.v is not None
        assert other.k is not None
        assert other.v is not None
        slots = other.k.shape[2]
        if slots > self.k.shape[2]:
            self.k, self.v = _enlarged(self.k, slots), _enlarged(self.v, slots)
        # Slots beyond those are further than the new rows' lengths, and so are not seen before they are filled.
        self.k[rows, :, :slots], self.v[rows, :, :slots] = other.k, other.v

    def bytes(self) -> list[int]:
        """Bytes of each row's tokens, measured on the tensors, without padding and spare capacity."""
        parts = (part for part in (self.k, self.v) if part is not None)
        per_token = sum(part.shape[1] * part.shape[3] * part.element_size() for part in parts)
        lengths = self.rows.lengths
        return [min(length, self.window or length) * per_token for length in lengths]


class TwoCaches:
    """Caches of a row, and of its source, which is filled once."""

    def __init__(self, row: KeyValues, source: KeyValues) -> None:
        self.row, self.source = row, source
        self._joined: tuple[Tensor, Tensor] | None = None

    def joined(self, keys: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the source, then of the row's first `keys` slots, as one tensor each.

        The two caches become views of these tensors, so that a later token copies nothing. They are made anew where
        rows have left or a cache was enlarged.
        """
        tokens = max(self.source.rows.lengths)
        if self._joined is None or not self._are_views_of(self._joined[0], tokens):
            assert self.row.k is not None
            assert self.row.v is not None
            k, v = self.source.cached()
            self._joined = torch.cat([k, self.row.k], dim=2), torch.cat([v, self.row.v], dim=2)
            self.source.k, self.source.v = (part[:, :, :tokens] for part in self._joined)
            self.row.k, self.row.v = (part[:, :, tokens:] for part in self._joined)
        k, v = self._joined
        return k[:, :, : tokens + keys], v[:, :, : tokens + keys]

    def _are_views_of(self, joined: Tensor, source_tokens: int) -> bool:
        row, source = self.row.k, self.source.k
        assert row is not None
        assert source is not None
        of_source = source_tokens == 0 or source.data_ptr() == joined.data_ptr()  # an empty view has no address
        same_row = row.data_ptr() == joined[:, :, source_tokens:].data_ptr()
        return of_source and same_row and source.shape[2] == source_tokens

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        self.row.keep(rows)
        self.source.keep(rows)

    def replace(self, rows: Sequence[int], other: TwoCaches) -> None:
        """Put all rows of another batch's caches in the place of these."""
        self.row.replace(rows, other.row)
        self.source.replace(rows, other.source)

    def bytes(self) -> list[int]:
        """Bytes of each row, measured on the tensors."""
        return [sum(both) for both in zip(self.row.bytes(), self.source.bytes(), strict=True)]


class StackCache:
    """Caches of all layers of a stack."""

    def __init__(self, layers: Sequence[Mapping[str, Cache]], shared_kv: KeyValues | None = None) -> None:
        self.layers = layers
        """{part: cache} of each layer, without parts that keep nothing."""
        self.shared_kv = shared_kv
        """Keys and values that several layers share."""

    @property
    def caches(self) -> list[Cache]:
        """All caches of the stack."""
        caches = [cache for layer in self.layers for cache in layer.values()]
        return caches if self.shared_kv is None else [*caches, self.shared_kv]

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        for cache in self.caches:
            cache.keep(rows)

    def replace(self, rows: Sequence[int], other: StackCache) -> None:
        """Put all rows of another batch's caches in the place of these."""
        for cache, new in zip(self.caches, other.caches, strict=True):
            cache.replace(rows, new)

    def bytes(self) -> list[int]:
        """Bytes of each row, measured on the tensors."""
        return [sum(row) for row in zip(*(cache.bytes() for cache in self.caches), strict=True)]


def _with_spare(slots: int, needed: int) -> int:
    """Number of slots of an enlarged cache: 1.5 times as many, so that each token is copied only a few times."""
    return max(needed, slots + max(SPARE_TOKENS, slots // 2))


def _enlarged(held_BHSK: Tensor, slots: int) -> Tensor:
    """A copy with that many slots."""
    rows, heads, tokens, head_dim = held_BHSK.shape
    # Zeros: masked slots still enter the sums with weight zero, and 0 x NaN is NaN.
    enlarged = held_BHSK.new_zeros(rows, heads, slots, head_dim)
    enlarged[:, :, :tokens] = held_BHSK
    return enlarged
