"""Choice of the next token from the model's distribution."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Settings of the choice of a token among the ids below `vocabulary`.

    The temperature is applied first, then `top_k`, then `top_p`.
    """

    temperature: float = 0.0
    """Divisor of the logits. 0 is greedy: always the most probable token, the lower id of equal ones."""
    top_k: int | None = None
    """Number of most probable tokens to draw from; all when absent."""
    top_p: float = 1.0
    """Draw from the fewest most probable tokens that together reach this mass (nucleus, arXiv 1904.09751)."""
    seed: int = 0
    """Seed. A draw depends only on it, on the prompt's index and on the step."""
    vocabulary: int | None = None
    """Number of the tokenizer's ids, among which to choose. A model may have more, without text: sentinels, modes, rows
    that pad its tables. None: all ids of the model."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: {self.temperature} is not a number from 0 (greedy) upwards")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: {self.top_k} leaves no token; at least 1, or None for all")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p} is not a mass in (0, 1]; 1 for all tokens")
        if self.vocabulary is not None and self.vocabulary < 1:
            raise ValueError(f"vocabulary: {self.vocabulary} leaves no token; at least 1, or None for all")


def choose(logits_BV: Tensor, sampling: Sampling, places: Sequence[tuple[int, int]]) -> Tensor:
    """B ids, one for each row. places: (index of its prompt, number of tokens after it), which seed the draw."""
    logits_BV = logits_BV[:, : sampling.vocabulary]
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    shares_BV = shares(logits_BV, sampling)
    # Inverse of the distribution function in the order of the ids: rounding of the logits hardly changes the draw. In
    # the order of probabilities, two tokens of nearly equal probability could swap places.
    up_to_BV = shares_BV.cumsum(dim=-1)
    drawn = [uniform(sampling.seed, prompt, step) for prompt, step in places]
    drawn_B1 = torch.tensor(drawn, dtype=up_to_BV.dtype, device=up_to_BV.device)[:, None] * up_to_BV[:, -1:]
    # Beyond the last id only where the logits are NaN.
    return torch.searchsorted(up_to_BV, drawn_B1, right=True)[:, 0].clamp(max=logits_BV.shape[-1] - 1)


def shares(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """B x V, in float64: weights of the draw, 0 outside of top_k and top_p. Requires a temperature above 0."""
    probabilities_BV = torch.softmax(logits_BV.double() / sampling.temperature, dim=-1)
    if sampling.top_k is None and sampling.top_p == 1:
        return probabilities_BV
    # Stable: of equally probable tokens the lower id comes first.
    ranked_BV, ids_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        ranked_BV[:, sampling.top_k :] = 0
    if sampling.top_p < 1:
        before_BV = ranked_BV.cumsum(dim=-1) - ranked_BV
        ranked_BV = ranked_BV.where(before_BV < sampling.top_p * ranked_BV.sum(dim=-1, keepdim=True), 0)
    return torch.zeros_like(probabilities_BV).scatter(-1, ids_BV, ranked_BV)


def uniform(seed: int, prompt: int, step: int) -> float:
    """A number in [0, 1), seeded by the three arguments."""
    digest = hashlib.sha256(f"{seed}/{prompt}/{step}".encode()).digest()
    return (int.from_bytes(digest[:8], "little") >> 11) / 2**53
