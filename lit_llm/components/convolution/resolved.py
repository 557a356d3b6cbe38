"""Short convolutions between neighbouring tokens ("Canon layers", Allen-Zhu 2025, arXiv 2512.17351).

Each entry of a token becomes itself plus a weighted sum of that entry in KERNEL neighbouring tokens, with separate
weights for each entry and without a bias:

    y_t = x_t + Σ_i w_i ⊙ x_{t+i}        decoder: i from -3 to 0        encoder: i from -2 to 1

The paper has decoders alone. An encoder sees both sides, and with an even kernel one token more before than after.
Tokens of other documents and padding count as zero. The four places of the paper are keys of the two parts that have
them: A and B are `attention.convolution: [input, qkv]`, C and D `feed_forward.convolution: [input, hidden]`.

A convolution stands beside an attention or a feed-forward network, so this folder has no section of its own. This file
has shapes and costs, and loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping

from lit_llm.components.part import TensorShape

KERNEL = 4
"""Tokens that a convolution reads, that of the paper."""


NEIGHBOURS = "a convolution reads tokens on both sides in an encoder, and those before alone in a decoder"


def convolution_shapes(widths: Mapping[str, int]) -> dict[str, TensorShape]:
    """{parameter: shape} of convolutions. widths: {name: entries of a token}."""
    return {f"convolution.{name}.weight": (width, KERNEL) for name, width in widths.items()}


def convolution_activations(widths: Mapping[str, int], tokens: float) -> float:
    """Entries that autograd keeps: each convolution's input, padded by what stands before and after a row."""
    return sum(widths.values()) * (tokens + KERNEL - 1)


def convolution_state(widths: Mapping[str, int]) -> int:
    """Entries that are kept for one sequence while decoding: the inputs of the tokens before the next one."""
    return sum(widths.values()) * (KERNEL - 1)
