"""What an objective is: one window of text becomes one example, of lengths that are known before any text is read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Self

from lit_llm.config.section import Section

if TYPE_CHECKING:
    import numpy as np

EOD, BOS = 0, 1
"""Every tokenizer's first two ids: the end of a document, also used as padding; and <s>, which opens a target."""


class Example(NamedTuple):
    """What is given and what is asked for. `collate.py` turns it into what a family reads."""

    source: np.ndarray
    """S ids."""
    target: np.ndarray
    """T ids."""
    counted: np.ndarray | None = None
    """T, whether a target counts in the loss, of an objective whose targets stand in the source's own places. All count
    where it is None."""


class Lengths(NamedTuple):
    """Tokens of one example; fractions stand for a mean."""

    source: float
    target: float
    """Those that count in the loss."""


class AnyObjective(Section):
    """An objective turns a window into an example. What it draws comes from the generator that it is given, alone."""

    @abstractmethod
    def example(self, window_T: np.ndarray, random: np.random.Generator, vocabulary: int) -> Example:
        """The example of one window. vocabulary: ids of the text; the objective's own ids (`extra_ids`) follow them."""

    @abstractmethod
    def lengths(self, sequence_length: int) -> list[tuple[float, Lengths]]:
        """(share, lengths), the shares adding up to 1.

        The mean over them of a function at most quadratic in the lengths, as FLOPs are, is its exact mean over the
        objective's examples.
        """

    def extremes(self, sequence_length: int) -> list[Lengths]:
        """The examples that are longest in their source, their target, or both together."""
        return [lengths for _, lengths in self.lengths(sequence_length)]

    def average(self, sequence_length: int, value: Callable[[Lengths], float]) -> float:
        """Mean of `value`, at most quadratic in the lengths, over the objective's examples."""
        return sum(share * value(lengths) for share, lengths in self.lengths(sequence_length))

    def extra_ids(self, sequence_length: int) -> dict[str, int]:
        """{what: how many} ids that follow those of the text, which never holds them, in this order."""
        return {}

    def opening(self, sequence_length: int, vocabulary: int) -> tuple[int, ...]:
        """Ids before a prefix that is to be continued, so that the model takes it for one."""
        return ()

    def resolved(self, sequence_length: int) -> Self:
        """The same objective with nothing left open."""
        return self

    def problem(self, sequence_length: int) -> str:
        """Why no window of this length can become an example, or ''."""
        return ""


def described(extra: dict[str, int]) -> str:
    """`21 sentinels, 3 mode tokens`."""
    return ", ".join(f"{count} {what}" for what, count in extra.items())
