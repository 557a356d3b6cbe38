"""Protocol of an objective: one window of text becomes one example, whose lengths do not depend on the text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Self

from lit_llm.config.section import Section

if TYPE_CHECKING:
    import numpy as np

EOD, BOS = 0, 1
"""First two ids of every tokenizer: the end of a document, also used as padding; and <s>, which begins a target."""


class Example(NamedTuple):
    """Source and target of one window. `collate.py` makes the inputs of a family of them."""

    source: np.ndarray
    """S ids."""
    target: np.ndarray
    """T ids."""
    counted: np.ndarray | None = None
    """T: whether a target counts in the loss. None: all count."""


class Lengths(NamedTuple):
    """Numbers of tokens of one example; fractions are means."""

    source: float
    target: float
    """Target tokens that count in the loss."""
    given: float = 0
    """Target tokens that are read and do not count."""

    @property
    def read(self) -> float:
        """Number of tokens that the model reads, of an objective whose target follows its source."""
        return self.source + self.target + self.given


class AnyObjective(Section):
    """Turns a window into an example. All random choices come from the generator that is passed."""

    @abstractmethod
    def example(self, window_T: np.ndarray, random: np.random.Generator, vocabulary: int) -> Example:
        """The example of one window. vocabulary: ids of the text; the objective's own ids (`extra_ids`) follow them."""

    @abstractmethod
    def lengths(self, sequence_length: int) -> list[tuple[float, Lengths]]:
        """Pairs (share, lengths), whose shares add up to 1.

        The mean over them is the exact mean over the objective's examples, for functions that are at most quadratic in
        the lengths, such as FLOPs.
        """

    def extremes(self, sequence_length: int) -> list[Lengths]:
        """Lengths of the examples with the longest source, the longest target, or the longest of both together."""
        return [lengths for _, lengths in self.lengths(sequence_length)]

    def average(self, sequence_length: int, value: Callable[[Lengths], float]) -> float:
        """Mean of `value`, at most quadratic in the lengths, over the objective's examples."""
        return sum(share * value(lengths) for share, lengths in self.lengths(sequence_length))

    def extra_ids(self, sequence_length: int) -> dict[str, int]:
        """{kind: number} of ids beyond those of the text, in this order."""
        return {}

    def opening(self, sequence_length: int, vocabulary: int) -> tuple[int, ...]:
        """Ids before a prefix that is to be continued, which tell the model to continue it."""
        return ()

    def resolved(self, sequence_length: int) -> Self:
        """This objective with all defaults filled in."""
        return self

    def problem(self, sequence_length: int) -> str:
        """Reason why no window of this length can become an example, or ''."""
        return ""


def described(extra: dict[str, int]) -> str:
    """Text of extra ids: `21 sentinels, 3 mode tokens`."""
    return ", ".join(f"{count} {what}" for what, count in extra.items())
