"""Scaling of the residual connection: what a branch, or the stream that it is added to, is multiplied by.

DeepNorm: Wang et al., arXiv 2203.00555. ReZero: Bachlechner et al., arXiv 2003.04887. LayerScale: Touvron et al.,
arXiv 2103.17239. Loads no torch.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from lit_llm.components.part import TensorShape
from lit_llm.config.section import OneOf, Section


class Residual(Section):
    """A residual connection without a learned factor, or with one that begins at zero."""

    kind: Literal["none", "deepnorm", "rezero"] = "none"
    """none: x + f(x). deepnorm: norm(a x + f(x)); a and the initial values of f depend on the depth. rezero: x + g f(x)
    with one learned number g for each branch, which begins at zero."""

    def branch_shape(self, width: int) -> TensorShape | None:
        """Shape of the factor that each branch learns; None where it learns none."""
        return (1,) if self.kind == "rezero" else None

    @property
    def initial(self) -> float:
        """Value with which a learned factor begins."""
        return 0.0


class LayerScale(Section):
    """A residual connection with a learned factor for each entry: x + g * f(x)."""

    kind: Literal["layer_scale"] = "layer_scale"
    """layer_scale: d_model learned numbers for each branch."""
    initial: float = Field(0.1, gt=0)
    """Value with which they begin. The paper: 0.1 up to 18 layers, 1e-5 for 24, 1e-6 for more."""

    def branch_shape(self, width: int) -> TensorShape | None:
        """Shape of the factor that each branch learns."""
        return (width,)


AnyResidual = Annotated[Residual | LayerScale, OneOf(default=Residual)]


class DeepNorm(NamedTuple):
    """Constants of DeepNorm for one stack (arXiv 2203.00555, figure 2)."""

    alpha: float
    """Factor of the residual stream."""
    beta: float
    """Factor of the initial values of W_v, W_o and the feed-forward network."""


def deepnorm(layers: int, encoder: int = 0, decoder: int = 0) -> DeepNorm:
    """The constants for a stack of `layers` layers.

    Args:
        layers: Layers of the stack.
        encoder: Layers of the encoder whose output the stack reads; 0 where it reads none.
        decoder: Layers of the decoder that reads the stack; 0 where none does.
    """
    if decoder:
        shape = (layers**4 * decoder) ** (1 / 16)
        return DeepNorm(0.81 * shape, 0.87 / shape)
    if encoder:
        return DeepNorm((3 * layers) ** 0.25, (12 * layers) ** -0.25)
    return DeepNorm((2 * layers) ** 0.25, (8 * layers) ** -0.25)
