"""Settings of the embedding of token ids, and of the output that makes logits.

Scaled embeddings: Vaswani et al., arXiv 1706.03762, section 3.4, and Gemma. Normed ones: ModernBERT (arXiv 2412.13663).
Learned positions: Gehring et al., arXiv 1705.03122, BERT (arXiv 1810.04805) and GPT-2.
Soft-capped logits: Gemma 2 (arXiv 2408.00118). A dense head and a bias: BERT (arXiv 1810.04805). Multi-token
prediction: Gloeckle et al., arXiv 2404.19737.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lit_llm.config.section import Section, config_error

MOST_AHEAD = 8
"""Most further tokens of a multi-token prediction."""


class EmbeddingConfig(Section):
    """Transformations of the embeddings before the first layer."""

    scaled: bool = False
    """Multiply by sqrt(d_model)."""
    norm: bool = False
    """Normalise by a norm with the settings of `model.norm`."""
    positions: Literal["none", "continuous", "restart"] = Field("none", exclude_if=lambda value: value == "none")
    """Learned absolute positions: a row of a table is added to each token's embedding, after its scale and before its
    norm. Each stack has its own table. In a decoder beside an encoder the target's positions continue after the source,
    or restart at zero, as with `attention.rope`; elsewhere the first two are equal. In addition to RoPE and biases:
    GPT-2 is `attention.rope: none` with a table."""
    max_positions: int | None = Field(None, gt=0, exclude_if=lambda value: value is None)
    """Rows of a table of learned positions. Longer texts are refused, in training, evaluation and generation."""

    @model_validator(mode="after")
    def _table_has_a_length(self) -> EmbeddingConfig:
        if self.positions != "none" and self.max_positions is None:
            message = (
                f"positions: {self.positions} needs the number of learned positions: the tokens of the longest text"
            )
            raise config_error(("max_positions", message))
        return self

    def resolved(self, *, beside_source: bool) -> EmbeddingConfig:
        """This section without settings that have no effect. beside_source: a decoder may go on after a source."""
        if self.positions == "none":
            return self.model_copy(update={"max_positions": None})
        return self if beside_source else self.model_copy(update={"positions": "continuous"})


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
