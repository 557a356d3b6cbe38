"""Who looks on while runs are executed: the live table, the lines for machines, a test."""

from __future__ import annotations

from collections.abc import Sequence

from lit_llm.studies.runs import Run


class Observer:
    """Looks on and says nothing; a subclass shows what it is told. Called in the coordinator, never in a run."""

    def preparing(self, what: str, done: int, total: int) -> None:
        """A corpus is being tokenised."""

    def message(self, text: str) -> None:
        """Something to know that is no error."""

    def launching(self, runs: Sequence[Run], todo: Sequence[Run], max_parallel: int) -> None:
        """The runs of the study, and those that will be executed now."""

    def silent(self, name: str, seconds: float) -> None:
        """A run makes no progress for so long, and will be stopped if that goes on; 0: it goes on, or was stopped."""

    def restarting(self, name: str) -> None:
        """A run that has ended is about to be begun again, by itself."""

    def poll(self) -> None:
        """Time to look at the store again."""

    def finished(self) -> None:
        """The last run has ended."""
