"""Settings of the embedding of token ids, and of the output that makes logits.

Scaled embeddings: Vaswani et al., arXiv 1706.03762, section 3.4, and Gemma. Normed ones: ModernBERT (arXiv 2412.13663).
Soft-capped logits: Gemma 2 (arXiv 2408.00118). A dense head and a bias: BERT (arXiv 1810.04805). Multi-token
prediction: Gloeckle et al., arXiv 2404.19737.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lit_llm.config.section import Section

MOST_AHEAD = 8
"""Most further tokens of a multi-token prediction."""


class EmbeddingConfig(Section):
    """Transformations of the embeddings before the first layer."""

    scaled: bool = False
    """Multiply by sqrt(d_model)."""
    norm: bool = False
    """Normalise by a norm with the settings of `model.norm`."""


class OutputConfig(Section):
    """Transformations of the last layer's states to logits."""

    head: Literal["none", "dense"] = "none"
    """dense: a D x D matrix, GeLU and a norm before the unembedding."""
    bias: bool = False
    """Add a learned number for each token of the vocabulary to the logits."""
    softcap: float | None = Field(None, gt=0)
    """Logits become softcap tanh(logit / softcap)."""
    future_tokens: int = Field(0, ge=0, le=MOST_AHEAD, exclude_if=lambda value: not value)
    """Number of further tokens that a decoder predicts in training, besides the next one (multi-token prediction, arXiv
    2404.19737). For each there is one more layer like the last, beside it, with the same norm and unembedding behind
    it. Their losses are added to the objective. Evaluations and generation leave these layers out."""

    def products(self, d_model: int) -> int:
        """Multiply-adds for each position, without the product with the vocabulary."""
        return d_model * d_model if self.head == "dense" else 0
