"""Norms of the residual stream.

RMSNorm: Zhang and Sennrich, arXiv 1910.07467. LayerNorm: Ba et al., arXiv 1607.06450; without bias as in ModernBERT
(arXiv 2412.13663).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lit_llm.config.section import Section


class NormConfig(Section):
    """Normalises the D entries of each token before a block reads it (pre-norm), and after the last layer."""

    function: Literal["rms_norm", "layer_norm"] = "rms_norm"
    """rms_norm divides by the root mean square; layer_norm centres, divides by the deviation, and has no bias."""
    scale: bool = True
    """Learn a scale of D entries."""
    eps: float = Field(1e-6, gt=0)
    """Added to the mean square (or the variance) under the root."""

    def tensors(self, width: int) -> list[tuple[int, int]]:
        """(rows, columns) of every parameter of one norm over `width` entries."""
        return [(1, width)] * self.scale

    def parameters(self, width: int) -> int:
        """Number of parameters of one norm over `width` entries."""
        return width if self.scale else 0
