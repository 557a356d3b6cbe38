"""Position-wise feed-forward networks.

Gated ones: Shazeer, arXiv 2002.05202; the list is that of Narang et al., arXiv 2102.11972, with squared ReLU
(arXiv 2109.08668). RedLLM and DecLLM use SwiGLU with d_ff = 4 d_model and three matrices
(arXiv 2510.26622).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from lit_llm.config.section import Section, partial


class FeedForwardConfig(Section):
    """`down(activation(gate x) * up x)` for the gated ones (...glu), `down(activation(up x))` for the others."""

    activation: Literal[
        "swiglu",
        "geglu",
        "geglu_tanh",
        "reglu",
        "glu",
        "liglu",
        "gelu",
        "gelu_tanh",
        "relu",
        "relu_squared",
        "swish",
        "elu",
        "selu",
        "sigmoid",
        "softplus",
    ] = "swiglu"
    """Those that end in glu have a gate, and so three matrices: swish, gelu, relu, sigmoid (glu) or nothing (liglu) on
    it. _tanh: gelu by its approximation with tanh, as in Gemma and T5."""
    d_ff: int = Field(gt=0)
    """Width inside."""

    @property
    def gated(self) -> bool:
        return self.activation.removesuffix("_tanh").endswith("glu")

    def tensors(self, d_model: int) -> list[tuple[int, int]]:
        """(rows, columns) of every parameter."""
        return [(self.d_ff, d_model)] * (1 + self.gated) + [(d_model, self.d_ff)]

    def parameters(self, d_model: int) -> int:
        """Number of parameters; each takes part in one multiply-add per token."""
        return sum(rows * columns for rows, columns in self.tensors(d_model))


_Optional: Any = partial(FeedForwardConfig)


class FeedForwardOverride(_Optional):
    """Keys of a feed-forward network that are different at one address; what is absent stays."""
