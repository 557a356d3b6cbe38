"""Position-wise feed-forward networks.

SwiGLU, GeGLU: Shazeer, arXiv 2002.05202. RedLLM and DecLLM use SwiGLU with d_ff = 4 d_model and three matrices
(arXiv 2510.26622).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from lit_llm.config.section import Section, partial


class FeedForwardConfig(Section):
    """`down(activation(gate x) * up x)` for swiglu and geglu, `down(activation(up x))` for gelu."""

    activation: Literal["swiglu", "geglu", "gelu"] = "swiglu"
    """swiglu and geglu have three matrices, gelu has two."""
    d_ff: int = Field(gt=0)
    """Width inside."""

    @property
    def gated(self) -> bool:
        return self.activation != "gelu"

    def tensors(self, d_model: int) -> list[tuple[int, int]]:
        """(rows, columns) of every parameter."""
        return [(self.d_ff, d_model)] * (1 + self.gated) + [(d_model, self.d_ff)]

    def parameters(self, d_model: int) -> int:
        """Number of parameters; each takes part in one multiply-add per token."""
        return sum(rows * columns for rows, columns in self.tensors(d_model))


_Optional: Any = partial(FeedForwardConfig)


class FeedForwardOverride(_Optional):
    """Keys of a feed-forward network that are different at one address; what is absent stays."""
