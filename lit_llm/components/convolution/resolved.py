"""Short convolutions between neighbouring tokens: those of Canon layers, and those of recurrent mixers.

Canon layers (Allen-Zhu 2025, arXiv 2512.17351): each entry of a token becomes itself plus a weighted sum of that entry
in KERNEL neighbouring tokens, with separate weights for each entry and without a bias:

    y_t = x_t + Σ_i w_i ⊙ x_{t+i}        decoder: i from -3 to 0        encoder: i from -2 to 1

The paper has decoders alone. An encoder sees both sides, and with an even kernel one token more before than after.
The four places of the paper are keys of the two parts that have them: A and B are `attention.convolution: [input,
qkv]`, C and D `feed_forward.convolution: [input, hidden]`.

Recurrent mixers (Mamba, arXiv 2312.00752) have another form, before the recurrence of each direction of a row:

    y_t = swish(Σ_i w_i ⊙ x_{t+i} [+ b])        i from -(width - 1) to 0

Tokens of other documents and padding count as zero. A convolution stands inside of another part, so this folder has no
section of its own. This file has shapes and costs, and loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lit_llm.components.part import TensorShape

KERNEL = 4
"""Tokens that a convolution of Canon layers reads, that of the paper."""


class Form(NamedTuple):
    """Form of a short convolution; by default that of a decoder's Canon layers."""

    width: int = KERNEL
    """Neighbours that are summed, the token itself among them."""
    after: int = 0
    """How many of them come after the token."""
    residual: bool = True
    """True where the token is added to the sum."""
    bias: bool = False
    swish: bool = False
    """True where swish follows. What it reads is summed in float32."""

    @property
    def distances(self) -> range:
        """Distances of the neighbours from the token, those before it negative."""
        return range(self.after - self.width + 1, self.after + 1)


def canon_form(causal: bool) -> Form:
    """The form of Canon layers in a decoder (causal), or in an encoder."""
    return Form(after=0 if causal else KERNEL - 1 - KERNEL // 2)


NEIGHBOURS = "a convolution reads tokens on both sides in an encoder, and those before alone in a decoder"


def convolution_shapes(widths: Mapping[str, int]) -> dict[str, TensorShape]:
    """{parameter: shape} of convolutions. widths: {name: entries of a token}."""
    return {f"convolution.{name}.weight": (width, KERNEL) for name, width in widths.items()}


def is_convolution(name: str) -> bool:
    """True for a name of `convolution_shapes`. Each row of such weights is one channel's filter."""
    return name.startswith("convolution.")


def convolution_activations(widths: Mapping[str, int], tokens: float) -> float:
    """Entries that autograd keeps: each convolution's input, padded by what stands before and after a row."""
    return sum(widths.values()) * (tokens + KERNEL - 1)


def convolution_state(widths: Mapping[str, int], width: int = KERNEL) -> int:
    """Entries that are kept for one sequence while decoding: the inputs of the tokens before the next one.

    widths: {name: entries of a token}; width: tokens that a convolution reads.
    """
    return sum(widths.values()) * (width - 1)
