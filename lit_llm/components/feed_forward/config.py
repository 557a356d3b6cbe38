"""Position-wise feed-forward networks.

Gated ones: Shazeer, arXiv 2002.05202; the list is that of Narang et al., arXiv 2102.11972, with squared ReLU
(arXiv 2109.08668). RedLLM and DecLLM use SwiGLU with d_ff = 4 d_model and three matrices
(arXiv 2510.26622).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from lit_llm.components.convolution.resolved import (
    NEIGHBOURS,
    convolution_activations,
    convolution_shapes,
    convolution_state,
    is_convolution,
)
from lit_llm.components.part import CacheBytes, Example, MatrixKind, Part, Precision, TensorShape, Widths
from lit_llm.config.section import Items, partial


class FeedForwardConfig(Part):
    """`down(activation(gate x) * up x)` for the gated ones (...glu), `down(activation(up x))` for the others."""

    module: ClassVar[str] = "lit_llm.components.feed_forward.module:FeedForward"
    drops: ClassVar[tuple[str, ...]] = ("feed_forward_dropout",)

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
    convolution: Items[Literal["input", "hidden"]] = Field((), exclude_if=lambda value: not value)
    """Mix four neighbouring tokens by a convolution for each entry (Canon layers, arXiv 2512.17351): in the input (C),
    or in the inner matrices' output, before the activation (D)."""

    @field_validator("convolution")
    @classmethod
    def _in_one_order(cls, places: tuple[str, ...]) -> tuple[str, ...]:
        """Each place once, so that equal functions compare equal."""
        return tuple(place for place in ("input", "hidden") if place in places)

    @property
    def differs_by_stack(self) -> str:
        return NEIGHBOURS if self.convolution else ""

    @property
    def gated(self) -> bool:
        return self.activation.removesuffix("_tanh").endswith("glu")

    def shapes(self, widths: Widths) -> dict[str, TensorShape]:
        inward = (self.d_ff, widths.row)
        gate = {"gate.weight": inward} if self.gated else {}
        shapes = {**gate, "up.weight": inward, "down.weight": (widths.row, self.d_ff)}
        biases = {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items()} if self.bias else {}
        return {**shapes, **biases, **convolution_shapes(self.convolved(widths.row))}

    def convolved(self, width: int) -> dict[str, int]:
        """{name: entries of a token} of the convolutions. width: that of the residual stream."""
        inner = ("gate", "up") if self.gated else ("up",)
        names = {"input": {"input": width}, "hidden": dict.fromkeys(inner, self.d_ff)}
        return {name: entries for place in self.convolution for name, entries in names[place].items()}

    def cache_bytes(self, entry: int, encoder: bool, widths: Widths) -> CacheBytes:
        """Bytes of the states of convolutions."""
        return CacheBytes(states=entry * convolution_state(self.convolved(widths.row)))

    def matrix_kind(self, name: str) -> MatrixKind:
        if is_convolution(name):
            return "table"
        return "out" if name == "down.weight" else "up"

    def activation_bytes(self, example: Example, widths: Widths, precision: Precision) -> float:
        # Input and output of the activation; with a gate also the other factor and the product.
        kept = example.row * (4 if self.gated else 2) * self.d_ff
        kept += convolution_activations(self.convolved(widths.row), example.row)
        return kept * precision.compute + example.row * self.d_ff * precision.feed_forward_mask


_Optional: Any = partial(FeedForwardConfig)


class FeedForwardOverride(_Optional):
    """Keys of a feed-forward network that one address overrides; absent keys keep their values."""
