"""Who sees whom: the masks of self- and cross-attention.

causal       ▣ · · ·     prefix of 2   ▣ ▣ · ·     full   ▣ ▣ ▣ ▣   rows: queries, columns: keys
             ▣ ▣ · ·                   ▣ ▣ · ·            ▣ ▣ ▣ ▣
             ▣ ▣ ▣ ·                   ▣ ▣ ▣ ·            ▣ ▣ ▣ ▣
             ▣ ▣ ▣ ▣                   ▣ ▣ ▣ ▣            ▣ ▣ ▣ ▣

Each of them may be cut at the borders of documents (numbers: which document a token belongs to):

causal     0 0 1 1       prefix    0 0 1 1        full   0 0 1 1        cross    0 1 1   source
         0 ▣ · · ·       of 3    0 ▣ ▣ · ·             0 ▣ ▣ · ·               1 · ▣ ▣
         0 ▣ ▣ · ·               0 ▣ ▣ · ·             0 ▣ ▣ · ·               1 · ▣ ▣
         1 · · ▣ ·               1 · · ▣ ·             1 · · ▣ ▣               2 · · ·   sees nothing: the output
         1 · · ▣ ▣               1 · · ▣ ▣             1 · · ▣ ▣          target         is zero

A window leaves of each what is near; `merged` attention sees the target's keys, then the source's:

causal       ▣ · · ·     prefix of 4   ▣ ▣ · ·     full   ▣ ▣ · ·     merged  ▣ · · · | ▣ ▣   the target's window,
of 2         ▣ ▣ · ·     window of 2   ▣ ▣ ▣ ·            ▣ ▣ ▣ ·     of 2    ▣ ▣ · · | ▣ ▣   and all of the source
             · ▣ ▣ ·                   · ▣ ▣ ▣            · ▣ ▣ ▣             · ▣ ▣ · | ▣ ▣
             · · ▣ ▣                   · · ▣ ▣            · · ▣ ▣             · · ▣ ▣ | ▣ ▣

A target token whose document has no source gets exactly zero from cross-attention, wherever its output norm stands
(a norm of zeros is zero), and sends no gradient through it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lit_llm.components.attention.config import Reach


@dataclass
class AttentionMask:
    """Which keys a query may attend to. Made anew for each forward pass; all layers share its masks."""

    causal: bool = False
    """Query t sees keys 0..t."""
    prefix: int | Tensor | None = None
    """With `causal`: the first `prefix` tokens (one number, or one for each of the B rows) also see each other; or
    boolean, B x S: these keys are seen by all queries of their document."""
    key_lengths: Tensor | None = None
    """B: keys at and beyond a row's length are padding. At least 1: a query that sees nothing has no output."""
    documents: tuple[Tensor, Tensor] | None = None
    """B x T of the queries and B x S of the keys: which document each belongs to; a query sees its own document's keys
    alone, and may see nothing."""
    reach: Reach | None = None
    """Keys that are seen are fewer than so many tokens before, and after, the query; None: all."""
    _masks: dict[tuple[int, int, torch.device], Tensor | None] = field(default_factory=dict, repr=False)
    _weights: dict[torch.dtype, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _within: dict[Reach, AttentionMask] = field(default_factory=dict, repr=False)
    _merged: dict[int, Merged] = field(default_factory=dict, repr=False)

    def within(self, reach: Reach | None) -> AttentionMask:
        """The same with a window; one for all layers that ask for it."""
        if reach is None:
            return self
        if reach not in self._within:
            self._within[reach] = replace(self, reach=reach, _masks={}, _weights={}, _within={}, _merged={})
        return self._within[reach]

    def merged(self, source: AttentionMask, source_keys: int) -> Merged:
        """The same with that many keys of a source behind its own; one for all layers, which all have one source."""
        if source_keys not in self._merged:
            self._merged[source_keys] = Merged(self, source, source_keys)
        return self._merged[source_keys]

    def mask(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """Boolean, True where visible: T x S, or B x 1 x T x S where rows differ. None when all is visible."""
        shape = (queries, keys, device)
        if shape not in self._masks:
            self._masks[shape] = self.rows(0, queries, keys, device)
        return self._masks[shape]

    def band(self, tokens: int, blocks: int, size: int, sides: int, device: torch.device) -> Tensor:
        """N x 1 x Q x S, of each block of `size` queries: which keys of the block before it, its own, and with three
        sides the next, it sees. For a causal or a full mask with a window."""
        key = (tokens, -size, device)
        if key not in self._masks:
            assert self.reach is not None
            query_N1 = torch.arange(blocks * size, device=device).view(blocks, size, 1)
            key_N1 = torch.arange(-size, (sides - 1) * size, device=device) + query_N1[:, :1]
            ago = query_N1 - key_N1
            ahead = 1 if self.causal else self.reach[1]
            seen = (ago < self.reach[0]) & (-ago < ahead) & (key_N1 >= 0) & (key_N1 < tokens)
            # What fills the last block is no query; it sees something, lest it be not a number.
            self._masks[key] = (seen | (query_N1 >= tokens)).unsqueeze(1)
        found = self._masks[key]
        assert found is not None
        return found

    def rows(self, first: int, last: int, keys: int, device: torch.device) -> Tensor | None:
        """Of `mask`, the queries from `first` to before `last`: made anew, for who goes through a long one in parts."""
        key = torch.arange(keys, device=device)
        seen: Tensor | None = None
        if self.causal:
            seen = key[None, :] <= torch.arange(first, last, device=device)[:, None]
            if isinstance(self.prefix, Tensor):
                prefix = self.prefix.to(device)
                opened = prefix[:, None, None] if prefix.dtype == torch.bool else key < prefix.view(-1, 1, 1, 1)
                seen = seen | opened
            elif self.prefix:
                seen = seen | (key < self.prefix)[None, :]
        if self.reach is not None:
            ago = torch.arange(first, last, device=device)[:, None] - key
            near = (ago < self.reach[0]) & (-ago < self.reach[1])
            seen = near if seen is None else seen & near
        if self.key_lengths is not None:
            real = key < self.key_lengths.to(device).view(-1, 1, 1, 1)
            seen = real if seen is None else seen & real
        if self.documents is not None:
            of_query, of_key = (documents.to(device) for documents in self.documents)
            same = (of_query[:, first:last, None] == of_key[:, None, :]).unsqueeze(1)
            seen = same if seen is None else seen & same
        if self.reach is not None and self.key_lengths is not None and seen is not None:
            # Padding that is far from every real key: let see everything, lest its states are not numbers.
            seen = seen | ~seen.any(dim=-1, keepdim=True)
        return seen

    def weights(self, queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """With documents. What is added to the scores, B x 1 x T x S; and which queries see nothing, B x 1 x T x 1.

        Those are let see everything, and their output is to be dropped: what a kernel makes of a row without any key
        (zeros, or NaN) is its own matter.
        """
        if dtype not in self._weights:
            mask = self.mask(queries, keys, device)
            assert mask is not None
            blind = ~mask.any(dim=-1, keepdim=True)
            # Made once for all layers: of a boolean mask every call would make, and keep, a copy of its own.
            added = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(~(mask | blind), -torch.inf)
            self._weights[dtype] = added, blind
        return self._weights[dtype]


@dataclass
class Merged:
    """What a query of merged attention sees: keys of its own row, then, in the same softmax, the source's.

    Stands wherever a `AttentionMask` does. `AttentionMask.merged` gives one to all layers alike, which share its masks.
    """

    own: AttentionMask
    source: AttentionMask
    source_keys: int
    """How many of the keys are the source's, the last."""
    _masks: dict[tuple[int, int, torch.device], Tensor | None] = field(default_factory=dict, repr=False)

    def mask(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """As `AttentionMask.mask`."""
        shape = (queries, keys, device)
        if shape not in self._masks:
            self._masks[shape] = self.rows(0, queries, keys, device)
        return self._masks[shape]

    def rows(self, first: int, last: int, keys: int, device: torch.device) -> Tensor | None:
        """As `AttentionMask.rows`."""
        own = keys - self.source_keys
        parts = self.own.rows(first, last, own, device), self.source.rows(first, last, self.source_keys, device)
        if parts[0] is None and parts[1] is None:
            return None
        widths, every = (own, self.source_keys), torch.ones((), dtype=torch.bool, device=device)
        rows = max((part.shape[0] for part in parts if part is not None and part.dim() == 4), default=0)
        shape = (rows, 1, last - first) if rows else (last - first,)
        return torch.cat(
            [
                (every if part is None else part).expand(*shape, width)
                for part, width in zip(parts, widths, strict=True)
            ],
            dim=-1,
        )
