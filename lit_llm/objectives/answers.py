"""Answers to the questions of a synthetic task: the loss is on the answers alone.

split 4, question 1, answer 1:

window   k1 v1 k2 v2 k2 v2 k1 v1 ■         source   k1 v1 k2 v2         target    k2 v2 k1 v1
                                                                        counted   ·  v2 ·  v1
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lit_llm.objectives.base import AnyObjective, Example, Lengths

if TYPE_CHECKING:
    import numpy as np


class Answers(AnyObjective):
    """Predict the answers of a window that holds one example of a synthetic task.

    The target is questions, each followed by its answer. A model reads a question and the answers before it, like all
    tokens of a target, and is scored on the answer.
    """

    kind: Literal["answers"] = "answers"
    """Answers to questions."""
    split: int = Field(32, gt=0)
    """Tokens of the source."""
    question: int = Field(1, ge=0)
    """Tokens of a question, which do not count in the loss."""
    answer: int = Field(1, gt=0)
    """Tokens of an answer."""

    def counted(self, sequence_length: int) -> np.ndarray:
        """T: whether a window's token is part of an answer. The last one is the end of the document."""
        import numpy as np

        counted = np.zeros(sequence_length, dtype=bool)
        target = np.arange(sequence_length - self.split - 1)
        counted[self.split : -1] = target % (self.question + self.answer) >= self.question
        return counted

    def example(self, window_T: np.ndarray, random: np.random.Generator, vocabulary: int) -> Example:
        counted = self.counted(len(window_T))
        return Example(window_T[: self.split], window_T[self.split : -1], counted[self.split : -1])

    def lengths(self, sequence_length: int) -> list[tuple[float, Lengths]]:
        questions = (sequence_length - self.split - 1) // (self.question + self.answer)
        return [(1.0, Lengths(self.split, questions * self.answer, questions * self.question))]

    def problem(self, sequence_length: int) -> str:
        target, block = sequence_length - self.split - 1, self.question + self.answer
        if target > 0 and target % block == 0:
            return ""
        return (
            f"a source of {self.split} tokens and the end of the document leave {target} of a sequence of "
            f"{sequence_length}, which are no questions and answers of {block} tokens"
        )
