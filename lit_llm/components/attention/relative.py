"""T5's relative position bias (arXiv 1910.10683, section 2.1): a learned number for each head and bucket of distances.

distance   0 1 2 ... 7 | 8-11 12-15 16-22 ... >= 128     of 32 buckets, causal: half of them hold one distance each, the
                                                         rest grow with its logarithm
Without a causal mask each half of the buckets serves one direction. With one, keys after the query (an open prefix's)
share the bucket of distance 0, as in T5's decoder.

ALiBi (arXiv 2108.12409): minus the distance, ahead or behind, times a slope of the head; 1/2, 1/4, ..., 1/256 for
eight heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class RelativeBias(nn.Module):
    """Learned bias on the scores by bucket of distances."""

    is_table = True
    """Marks the weight as a table, not a matrix: no optimiser orthogonalises it."""

    def __init__(self, buckets: int, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(buckets, heads))

    def forward(self, buckets: Tensor) -> Tensor:
        """T x S, or B x T x S -> H x T x S, or B x H x T x S."""
        return self.weight[buckets].movedim(-1, -3)


def buckets_of(queries: Tensor, keys: Tensor, buckets: int, distance: int, causal: bool) -> Tensor:
    """Bucket of each query-key distance: positions of queries (T, or B x T) and keys (S, or B x S) -> [B x] T x S."""
    return bucket(keys.unsqueeze(-2) - queries.unsqueeze(-1), buckets, distance, causal)


def bucket(ahead: Tensor, buckets: int, distance: int, causal: bool) -> Tensor:
    """Number of the bucket for a key `ahead` tokens after its query."""
    first = torch.zeros_like(ahead)
    if causal:
        away = (-ahead).clamp_min(0)
    else:
        buckets //= 2
        first, away = (ahead > 0).long() * buckets, ahead.abs()
    exact = buckets // 2
    grown = (away.clamp_min(1).float() / exact).log() / math.log(distance / exact) * (buckets - exact)
    return first + torch.where(away < exact, away, (exact + grown.long()).clamp_max(buckets - 1))


def alibi_slopes(heads: int) -> list[float]:
    """Slopes of ALiBi: geometric from 2^(-8/n) to 2^-8, and for n no power of two every second of 2n more."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * number / power) for number in range(1, power + 1)]
    return slopes + [2 ** (-4 * number / power) for number in range(1, 2 * (heads - power), 2)]


def linear_bias(queries: Tensor, keys: Tensor, heads: int) -> Tensor:
    """ALiBi of queries (T, or B x T) and keys (S, or B x S) at these positions: [B x] H x T x S, in float32."""
    distances = (keys.unsqueeze(-2) - queries.unsqueeze(-1)).abs().unsqueeze(-3)
    return -distances * torch.tensor(alibi_slopes(heads), device=keys.device)[:, None, None]
