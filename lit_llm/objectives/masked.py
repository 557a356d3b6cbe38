"""Masked language modelling: hidden tokens are predicted in their places (BERT, arXiv 1810.04805).

window   a b c d e f          source   a [MASK] c d x f          target   a b c d e f
                                                                 counted    ·       ·
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lit_llm.objectives.base import AnyObjective, Example, Lengths

if TYPE_CHECKING:
    import numpy as np


class MaskedLM(AnyObjective):
    """Predict hidden tokens in their places, for a bidirectional model."""

    kind: Literal["masked_lm"] = "masked_lm"
    """Masked language modelling."""
    rate: float = Field(0.3, gt=0, lt=1)
    """Share of the tokens that are predicted: 0.3 in ModernBERT (arXiv 2412.13663), 0.15 in BERT. Every window has the
    same number, as in BERT's preparation; ModernBERT's code draws each token independently, as many on average."""
    replacement: Literal["bert", "mask"] = "bert"
    """Replacement of predicted tokens. bert: [MASK] for 80% of them, a random token of the text's vocabulary for 10%,
    the token itself for 10%, as in BERT and in ModernBERT's code. mask: [MASK] for all."""

    def count(self, sequence_length: int) -> int:
        """Number of tokens of a window that are predicted."""
        return max(1, round(self.rate * sequence_length))

    def example(self, window_T: np.ndarray, random: np.random.Generator, vocabulary: int) -> Example:
        import numpy as np

        places = random.choice(len(window_T), self.count(len(window_T)), replace=False)
        source, counted = window_T.astype(np.int64), np.zeros(len(window_T), dtype=bool)
        counted[places] = True
        mask, draw = vocabulary, random.random(len(places))
        source[places] = mask
        if self.replacement == "bert":
            source[places[draw < 0.1]] = window_T[places[draw < 0.1]]
            other = places[(draw >= 0.1) & (draw < 0.2)]
            source[other] = random.integers(2, vocabulary, size=len(other))  # neither an end nor <s>
        return Example(source, window_T, counted)

    def lengths(self, sequence_length: int) -> list[tuple[float, Lengths]]:
        return [(1.0, Lengths(sequence_length, self.count(sequence_length)))]

    def extra_ids(self, sequence_length: int) -> dict[str, int]:
        return {"[MASK]": 1}
