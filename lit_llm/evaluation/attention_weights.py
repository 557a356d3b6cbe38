"""Statistics of attention weights, from queries and keys; the weights themselves exist for a few queries at a time.

first     weight on the row's first key
local     weights on the `window` keys that end at the query (arXiv 2510.26622: 5)

          keys     0 1 2 3 4 5 6 7      window of 3
          query 5  · · · ▣ ▣ ▣

source    weights on the source's keys: their sum (mass), and, divided by that sum, their distribution

          steps 1  ▪ ▣ · · ▣ ·          overlap, cosine: of a row with the one before it
                2  · ▣ · ▪ ▣ ·          stripes: mean cosine of all pairs of rows, 1 where every target attends
                3  · ▣ ▪ · ▣ ·                   to the source alike, however far apart they stand
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llm.components.attention.dot_product import DotProduct, ScoreInputs, score_rows

TOP = 5
"""Source tokens that count as those attended to most."""


def attention_rows(attention: DotProduct, inputs: ScoreInputs, start: int = 0) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Attention weights of the queries from `start` on, in chunks, in float32 at least.

    Yields (c, weights of queries c to c + C: B x H x C x S, visible keys: 1 or B x 1 x C x S). The weights of a query
    that sees no key are zero.
    """
    for first, scores_BHCS, visible in score_rows(attention, inputs, start):
        weights_BHCS = scores_BHCS.masked_fill_(~visible, -torch.inf).softmax(dim=-1)
        yield first, weights_BHCS.masked_fill_(~visible.any(dim=-1, keepdim=True), 0.0), visible


def self_attention_shares(attention: DotProduct, inputs: ScoreInputs, window: int) -> tuple[Tensor, Tensor]:
    """(weight on the `window` keys that end at the query, weight on the row's first key): B x T each, means over heads.

    For self-attention, whose keys are the queries' tokens.
    """
    near_parts, first_parts = [], []
    for first, weights_BHCS, _ in attention_rows(attention, inputs):
        queries, keys = weights_BHCS.shape[2:]
        key = torch.arange(keys, device=weights_BHCS.device)
        query = torch.arange(first, first + queries, device=weights_BHCS.device)[:, None]
        near = (key <= query) & (key > query - window)
        near_parts.append((weights_BHCS * near).sum(-1).mean(1))
        first_parts.append(weights_BHCS[..., 0].mean(1))
    return torch.cat(near_parts, dim=1), torch.cat(first_parts, dim=1)


@dataclass(frozen=True)
class SourceAttention:
    """Statistics of one attention's weights on the source: B x N, for each target query, means over heads."""

    mass: Tensor
    """Weight on the source's keys."""
    null: Tensor
    """`mass` if all visible keys had equal weight: S / (S + i) at step i of a causal decoder."""
    entropy: Tensor
    """Entropy of the weights within the source, over that of uniform ones: 1 is uniform, 0 a single token."""
    top_mass: Tensor
    """Weight within the source on the TOP tokens."""
    top_percent_mass: Tensor
    """Weight within the source on the top 1% of its tokens, rounded up."""
    overlap: Tensor
    """Share of the TOP tokens that were among those of the query before."""
    cosine: Tensor
    """Cosine between the weights within the source and those of the query before."""
    sees: Tensor
    """Whether the query sees any of the source; elsewhere only `mass` and `null` are meaningful."""
    follows: Tensor
    """Whether the query before also sees any of it; elsewhere `overlap` and `cosine` are meaningless."""
    stripes: Tensor
    """B: mean cosine over all pairs of queries that see the source; NaN for fewer than two."""


def source_attention(attention: DotProduct, inputs: ScoreInputs, source: slice, start: int = 0) -> SourceAttention:
    """Statistics of the weights that the queries from `start` on put on the keys `source`."""
    q_BHTK = inputs.q_BHTK
    rows, heads, _, _ = q_BHTK.shape
    size = len(range(*source.indices(inputs.k_BHSK.shape[2])))
    top, percent = min(TOP, size), math.ceil(size / 100)
    parts: list[dict[str, Tensor]] = []
    before_BHS = sum_BHS = q_BHTK.new_zeros(rows, heads, size, dtype=_weight_dtype(q_BHTK))
    attended_before = q_BHTK.new_full((rows, heads, top), -1, dtype=torch.long)
    for _, weights_BHCS, visible in attention_rows(attention, inputs, start):
        visible_keys, visible_source = (part.sum(-1) for part in (visible, visible[..., source]))
        mass_BHC = weights_BHCS[..., source].sum(-1)
        tiny = torch.finfo(mass_BHC.dtype).tiny
        within_BHCS = weights_BHCS[..., source] / mass_BHC.clamp_min(tiny).unsqueeze(-1)
        # The entropy of a single token is defined as 1, as of uniform weights.
        uniform = visible_source.clamp_min(2).to(mass_BHC.dtype).log()
        entropy_BHC = torch.where(visible_source > 1, torch.special.entr(within_BHCS).sum(-1) / uniform, 1.0)
        largest = within_BHCS.topk(max(top, percent), dim=-1)
        # Tokens without weight do not count as attended to: -1 marks them.
        attended = largest.indices[..., :top].masked_fill(largest.values[..., :top] == 0, -1)
        unit_BHCS = F.normalize(within_BHCS, dim=-1)
        cosine_BHC = (unit_BHCS * _previous_rows(unit_BHCS, before_BHS)).sum(-1)
        overlap_BHC = _overlap(attended, _previous_rows(attended, attended_before), mass_BHC.dtype)
        before_BHS, attended_before = unit_BHCS[:, :, -1], attended[:, :, -1]
        sum_BHS = sum_BHS + unit_BHCS.sum(2)
        by_head = {
            "mass": mass_BHC,
            "null": visible_source.to(mass_BHC.dtype) / visible_keys.clamp_min(1),
            "entropy": entropy_BHC,
            "top_mass": largest.values[..., :top].sum(-1),
            "top_percent_mass": largest.values[..., :percent].sum(-1),
            "overlap": overlap_BHC,
            "cosine": cosine_BHC,
            "sees": (visible_source > 0).to(mass_BHC.dtype),
        }
        parts.append({name: part.expand(rows, heads, -1).mean(1) for name, part in by_head.items()})
    joined = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
    sees_BN = joined.pop("sees") > 0
    follows_BN = sees_BN & F.pad(sees_BN[:, :-1], (1, 0))
    # |Σu|² is the sum of u·u' over all pairs, n of which are a unit vector with itself.
    n_B1 = sees_BN.sum(1, keepdim=True)
    stripes_B = ((sum_BHS.square().sum(-1) - n_B1) / (n_B1 * (n_B1 - 1))).mean(1)
    return SourceAttention(**joined, sees=sees_BN, follows=follows_BN, stripes=stripes_B)


def _weight_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _previous_rows(x_BHCn: Tensor, before_BHn: Tensor) -> Tensor:
    """The preceding row of each row."""
    return torch.cat([before_BHn.unsqueeze(2), x_BHCn[:, :, :-1]], dim=2)


def _overlap(attended: Tensor, before: Tensor, dtype: torch.dtype) -> Tensor:
    """B x H x C: number of common entries of two sets over the size of the larger; -1 is no entry."""
    common = (attended.unsqueeze(-1) == before.unsqueeze(-2)) & (attended >= 0).unsqueeze(-1)
    larger = torch.maximum((attended >= 0).sum(-1), (before >= 0).sum(-1)).clamp_min(1)
    return common.sum((-1, -2)).to(dtype) / larger
