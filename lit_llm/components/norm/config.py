"""Norms of the residual stream.

RMSNorm: Zhang and Sennrich, arXiv 1910.07467. LayerNorm: Ba et al., arXiv 1607.06450; without bias as in ModernBERT
(arXiv 2412.13663).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lit_llm.config.section import OneOf, Section


class NormConfig(Section):
    """Normalises the D entries of each token before a block reads it (pre-norm), and after the last layer."""

    scale: bool = True
    """Learn a scale of D entries."""
    eps: float = Field(1e-6, gt=0)
    """Added to the mean square (or the variance) under the root."""

    def parameters(self, width: int) -> int:
        """Number of parameters of one norm over `width` entries."""
        return width if self.scale else 0


class RMSNorm(NormConfig):
    """Divides by the root mean square."""

    kind: Literal["rms_norm"] = "rms_norm"
    """RMSNorm."""


class LayerNorm(NormConfig):
    """Subtracts the mean and divides by the standard deviation."""

    kind: Literal["layer_norm"] = "layer_norm"
    """LayerNorm without a bias."""


AnyNorm = Annotated[RMSNorm | LayerNorm, OneOf(default=RMSNorm)]
