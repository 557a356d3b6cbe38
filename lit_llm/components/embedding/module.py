"""Modules of `EmbeddingConfig` and `OutputConfig`: learned positions, and what makes logits of states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llm.components.few_rows import Linear, linear
from lit_llm.components.norm.config import NormConfig
from lit_llm.components.norm.module import Norm


class LearnedPositions(nn.Embedding):
    """A table with a row for each position, which is added to the embeddings.

    Tokens beyond it are refused before; padding after a row's last token may have such a position, and reads the last
    row.
    """

    def forward(self, positions: Tensor) -> Tensor:
        """... positions -> ... x D."""
        return super().forward(positions.clamp_max(self.num_embeddings - 1))


class Head(nn.Module):
    """hidden ─ dense ─ gelu ─ norm ─▶ unembedding"""

    def __init__(self, norm: NormConfig, d_model: int) -> None:
        super().__init__()
        self.dense = Linear(d_model, d_model)
        self.norm = Norm(norm, d_model)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(hidden)))


@dataclass(frozen=True)
class Unembedding:
    """States to logits: softcap(multiplier head(h) Wᵀ + b)."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None
    head: Head | None = None
    compiled_terms: Callable[..., Tensor] | None = None
    """`terms_of_rows` of the loss, compiled for training."""
    multiplier: float = 1.0

    def __call__(self, hidden: Tensor) -> Tensor:
        """... x D -> ... x V."""
        logits = linear(self.states(hidden), self.weight_VD, self.bias_V)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def states(self, hidden: Tensor) -> Tensor:
        """States that the matrix reads: ... x D -> ... x D."""
        states = hidden if self.head is None else self.head(hidden)
        return states if self.multiplier == 1 else states * self.multiplier

    @property
    def parameters(self) -> list[Tensor]:
        """All tensors that are trained: the matrix, the bias and the head's, where there are any."""
        head = [] if self.head is None else list(self.head.parameters())
        return [self.weight_VD, *([] if self.bias_V is None else [self.bias_V]), *head]

    @property
    def vocabulary(self) -> int:
        return self.weight_VD.shape[0]
