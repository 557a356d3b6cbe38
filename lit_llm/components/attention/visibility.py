"""Who sees whom: the masks of self- and cross-attention, and the call that applies them.

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

A target token whose document has no source gets exactly zero from cross-attention, wherever its output norm stands
(a norm of zeros is zero), and sends no gradient through it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Visibility:
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
    _masks: dict[tuple[int, int, torch.device], Tensor | None] = field(default_factory=dict, repr=False)
    _weights: dict[torch.dtype, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def mask(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """Boolean, True where visible: T x S, or B x 1 x T x S where rows differ. None when all is visible."""
        shape = (queries, keys, device)
        if shape not in self._masks:
            self._masks[shape] = self.rows(0, queries, keys, device)
        return self._masks[shape]

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
        if self.key_lengths is not None:
            real = key < self.key_lengths.to(device).view(-1, 1, 1, 1)
            seen = real if seen is None else seen & real
        if self.documents is not None:
            of_query, of_key = (documents.to(device) for documents in self.documents)
            same = (of_query[:, first:last, None] == of_key[:, None, :]).unsqueeze(1)
            seen = same if seen is None else seen & same
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


class DotProduct(nn.Module):
    """softmax(QKᵀ/√K)V over the visible keys. A module of its own, so that a probe can hook what goes in."""

    def forward(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, visible: Visibility) -> Tensor:
        gqa = q_BHTK.shape[1] != k_BHSK.shape[1]
        queries, keys, prefix = q_BHTK.shape[2], k_BHSK.shape[2], visible.prefix
        if visible.documents is not None:
            added, blind = visible.weights(queries, keys, q_BHTK.dtype, q_BHTK.device)
            out = F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=added, enable_gqa=gqa)
            return out.masked_fill(blind, 0.0)
        if visible.causal and visible.key_lengths is None and not isinstance(prefix, Tensor):
            prefix = prefix or 0
            # A prefix of one token sees what it sees anyway.
            if prefix <= 1:
                return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, is_causal=True, enable_gqa=gqa)
            # The prefix is one dense block without a mask: cheaper than masking T x T, and no score is computed twice.
            head, tail = q_BHTK[:, :, :prefix], q_BHTK[:, :, prefix:]
            out = F.scaled_dot_product_attention(head, k_BHSK[:, :, :prefix], v_BHSK[:, :, :prefix], enable_gqa=gqa)
            if prefix >= queries:
                return out
            mask = visible.mask(queries, keys, q_BHTK.device)
            assert mask is not None
            rest = F.scaled_dot_product_attention(tail, k_BHSK, v_BHSK, attn_mask=mask[prefix:], enable_gqa=gqa)
            return torch.cat([out, rest], dim=2)
        mask = visible.mask(queries, keys, q_BHTK.device)
        return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=mask, enable_gqa=gqa)


def largest_logit(q_BHTK: Tensor, k_BHSK: Tensor, visible: Visibility) -> Tensor:
    """The largest |q·k|/√K over the visible pairs; fused kernels never show it, so the scores are computed again."""
    groups = q_BHTK.shape[1] // k_BHSK.shape[1]
    scores = q_BHTK.float() @ k_BHSK.float().repeat_interleave(groups, dim=1).transpose(-1, -2)
    scores = scores.abs() / q_BHTK.shape[-1] ** 0.5
    mask = visible.mask(q_BHTK.shape[2], k_BHSK.shape[2], q_BHTK.device)
    return scores.max() if mask is None else scores.masked_fill(~mask, 0.0).max()
