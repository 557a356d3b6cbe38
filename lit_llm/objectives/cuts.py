"""Objectives that cut a window in two: the first part is the source, the second the target.

causal_lm: the source is empty, every token is a target (DecLLM, arXiv 2510.26622).
prefix_lm: the first tokens are the source, the rest is the target (RedLLM, same paper: 1024 of 2048).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lit_llm.objectives.base import AnyObjective, Example, Lengths

if TYPE_CHECKING:
    import numpy as np


class CausalLM(AnyObjective):
    """Predict every token from those before it."""

    kind: Literal["causal_lm"] = "causal_lm"
    """Causal language modelling."""

    def example(self, window_T: np.ndarray, random: np.random.Generator, vocabulary: int) -> Example:
        return Example(window_T[:0], window_T)

    def lengths(self, sequence_length: int) -> list[tuple[float, Lengths]]:
        return [(1.0, Lengths(0, sequence_length))]


class PrefixLM(AnyObjective):
    """Predict the second part of a window, token by token, from its first part and the tokens before."""

    kind: Literal["prefix_lm"] = "prefix_lm"
    """Prefix language modelling."""
    split: Literal["half", "random"] | int = Field("half", union_mode="left_to_right")
    """Tokens of the prefix: half of the window, a number, or random (uniform from 1 to all but one)."""

    def example(self, window_T: np.ndarray, random: np.random.Generator, vocabulary: int) -> Example:
        length = len(window_T)
        place = int(random.integers(1, length)) if self.split == "random" else self._prefix_tokens(length)
        return Example(window_T[:place], window_T[place:])

    def lengths(self, sequence_length: int) -> list[tuple[float, Lengths]]:
        if self.split != "random":
            place = self._prefix_tokens(sequence_length)
            return [(1.0, Lengths(place, sequence_length - place))]
        # Uniform over n = T - 1 integers around T / 2, with variance (n² - 1) / 12. The mean of a quadratic is the mean
        # of its values at one standard deviation to either side.
        middle, deviation = sequence_length / 2, math.sqrt(((sequence_length - 1) ** 2 - 1) / 12)
        return [(0.5, Lengths(middle + sign * deviation, middle - sign * deviation)) for sign in (-1, 1)]

    def extremes(self, sequence_length: int) -> list[Lengths]:
        if self.split != "random":
            return super().extremes(sequence_length)
        return [Lengths(1, sequence_length - 1), Lengths(sequence_length - 1, 1)]

    def resolved(self, sequence_length: int) -> PrefixLM:
        """This objective with `half` as a number of tokens."""
        return self if self.split == "random" else PrefixLM(split=self._prefix_tokens(sequence_length))

    def problem(self, sequence_length: int) -> str:
        if isinstance(self.split, int) and not 0 < self.split < sequence_length:
            return f"a prefix of {self.split} tokens leaves no target in a sequence of {sequence_length}"
        return "" if sequence_length > 1 else "a window of one token cannot be cut in two"

    def _prefix_tokens(self, sequence_length: int) -> int:
        assert self.split != "random"
        return sequence_length // 2 if self.split == "half" else self.split
