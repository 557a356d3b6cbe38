"""Partial attention: every token of a decoder-only model attends to its source once more, through a memory of its own.

PALM (Fu et al. 2023, arXiv 2304.04052) adds it after self-attention, so that attention to the source does not fade as
the answer grows. Of the source's states S a memory P is made, which keys and values are projected from; queries come
from all tokens, and no mask but the source's end stands between them:

    P1 = f(S A1)    P2 = P1 A2    P = P2 + P1    softmax(Q Kᵀ / √K) V

f is ReLU, as in public code of it; A1 and A2 are d_model x d_model, without bias. Norms, grouped heads and rotary
positions are those of every attention here: `rope: none` is the formula as it stands above; otherwise queries and keys
are rotated by their places in the row, and `restart` is `continuous`, as in self-attention.

Not part of it, though PALM has them: the source auto-encoding loss, the language embedding, and position ids that
restart at the target.
"""

from __future__ import annotations

from typing import Literal

from lit_llm.components.attention.config import AttentionOverride


class PartialAttentionOverride(AttentionOverride):
    """Where this is written there is a partial attention: `palm`, or `{heads: 2}` for one unlike `model.attention`."""

    kind: Literal["palm"] = "palm"
    """palm: keys and values from P = P2 + P1, as PALM makes it from the source's states."""
