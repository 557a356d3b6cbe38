"""Objectives cut a window of text into a source and a target, whatever family reads them.

causal_lm: the source is empty, every token is a target (DecLLM, arXiv 2510.26622).
prefix_lm: the first tokens are the source, the rest is the target (RedLLM, same paper: 1024 of 2048).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from lit_llm.config.section import OneOf, Section

if TYPE_CHECKING:
    import numpy as np

EOD, BOS = 0, 1
"""Every tokenizer's first two ids: the end of a document, also used as padding; and <s>, which opens a target."""


class CausalLM(Section):
    """Predict every token from those before it."""

    kind: Literal["causal_lm"] = "causal_lm"
    """Causal language modelling."""

    def cuts(self, sequence_length: int, rows: int, random: np.random.Generator) -> list[int]:
        """Tokens of the source, for each of `rows` windows."""
        return [0] * rows

    def average(self, sequence_length: int, value: Callable[[float], float]) -> float:
        """Mean of value(tokens of the source) over the objective's cuts."""
        return value(0)

    def extremes(self, sequence_length: int) -> tuple[int, int]:
        """The shortest and the longest source."""
        return 0, 0

    def resolved(self, sequence_length: int) -> CausalLM:
        """The same objective with nothing left open."""
        return self

    def problem(self, sequence_length: int) -> str:
        """Why no window of this length can be cut so, or ''."""
        return ""


class PrefixLM(Section):
    """Predict the second part of a window from its first part and from what was predicted before."""

    kind: Literal["prefix_lm"] = "prefix_lm"
    """Prefix language modelling."""
    split: Literal["half", "random"] | int = Field("half", union_mode="left_to_right")
    """Tokens of the prefix: half of the window, a number, or random (uniform from 1 to all but one)."""

    def cuts(self, sequence_length: int, rows: int, random: np.random.Generator) -> list[int]:
        """Tokens of the prefix, for each of `rows` windows."""
        if self.split == "random":
            return [int(cut) for cut in random.integers(1, sequence_length, size=rows)]
        return [sequence_length // 2 if self.split == "half" else self.split] * rows

    def average(self, sequence_length: int, value: Callable[[float], float]) -> float:
        """Mean of value(tokens of the prefix) over the objective's cuts; `value` at most quadratic."""
        if self.split != "random":
            return value(sequence_length // 2 if self.split == "half" else self.split)
        # Uniform over n = T - 1 integers around T / 2, with variance (n² - 1) / 12. The mean of a quadratic is that of
        # its values one standard deviation to either side.
        middle, deviation = sequence_length / 2, math.sqrt(((sequence_length - 1) ** 2 - 1) / 12)
        return (value(middle - deviation) + value(middle + deviation)) / 2

    def extremes(self, sequence_length: int) -> tuple[int, int]:
        """The shortest and the longest prefix."""
        if self.split == "random":
            return 1, sequence_length - 1
        cut = sequence_length // 2 if self.split == "half" else self.split
        return cut, cut

    def resolved(self, sequence_length: int) -> PrefixLM:
        """The same objective with nothing left open: half of 128 tokens are 64."""
        return self if self.split == "random" else PrefixLM(split=self.extremes(sequence_length)[0])

    def problem(self, sequence_length: int) -> str:
        """Why no window of this length can be cut so, or ''."""
        if isinstance(self.split, int) and not 0 < self.split < sequence_length:
            return f"a prefix of {self.split} tokens leaves no target in a sequence of {sequence_length}"
        return "" if sequence_length > 1 else "a window of one token cannot be cut in two"


Objective = Annotated[CausalLM | PrefixLM, OneOf(default=CausalLM)]


class MasksConfig(Section):
    """Which tokens of a window see each other, beyond what the family decides."""

    prefix: Literal["causal", "bidirectional"] = "causal"
    """bidirectional: a decoder-only model's source tokens see each other (BiAttn, arXiv 2510.26622; prefix decoder)."""
    documents: Literal["joined", "separate"] = "joined"
    """A window may hold parts of several documents. joined: its tokens see each other across the end-of-document tokens
    (arXiv 2510.26622 mentions no mask between documents). separate: a token sees its own document alone;
    its position stays that in the window."""
