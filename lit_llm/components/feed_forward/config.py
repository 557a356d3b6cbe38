"""Position-wise feed-forward networks.

Gated ones: Shazeer, arXiv 2002.05202; the list is that of Narang et al., arXiv 2102.11972, with squared ReLU
(arXiv 2109.08668). RedLLM and DecLLM use SwiGLU with d_ff = 4 d_model and three matrices
(arXiv 2510.26622).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from lit_llm.components.part import Example, MatrixKind, Part, Precision, TensorShape, Widths
from lit_llm.config.section import partial


class FeedForwardConfig(Part):
    """`down(activation(gate x) * up x)` for the gated ones (...glu), `down(activation(up x))` for the others."""

    module: ClassVar[str] = "lit_llm.components.feed_forward.module:FeedForward"

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
    """Activation. Those that end in glu have a gate, and so three matrices: swish, gelu, relu, sigmoid (glu) or nothing
    (liglu) on the gate. _tanh: gelu by its approximation with tanh, as in Gemma and T5."""
    d_ff: int = Field(gt=0)
    """Hidden width."""
    bias: bool = Field(False, exclude_if=lambda value: not value)
    """Add a learned vector to what each of its matrices makes, as in the first Transformer (arXiv 1706.03762)."""

    @property
    def gated(self) -> bool:
        return self.activation.removesuffix("_tanh").endswith("glu")

    def shapes(self, widths: Widths) -> dict[str, TensorShape]:
        inward = (self.d_ff, widths.row)
        gate = {"gate.weight": inward} if self.gated else {}
        shapes = {**gate, "up.weight": inward, "down.weight": (widths.row, self.d_ff)}
        biases = {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items()} if self.bias else {}
        return {**shapes, **biases}

    def matrix_kind(self, name: str) -> MatrixKind:
        return "out" if name == "down.weight" else "up"

    def activation_bytes(self, example: Example, widths: Widths, precision: Precision) -> float:
        # Input and output of the activation; with a gate also the other factor and the product.
        return example.row * (4 if self.gated else 2) * self.d_ff * precision.compute


_Optional: Any = partial(FeedForwardConfig)


class FeedForwardOverride(_Optional):
    """Keys of a feed-forward network that one address overrides; absent keys keep their values."""
