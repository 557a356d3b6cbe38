"""Interface for what follows the execution of runs: the live table, the JSON lines, a test."""

from __future__ import annotations

from collections.abc import Sequence

from lit_llm.studies.runs import Run


class Observer:
    """Receives the events of runs and ignores them. Called in the coordinator, never in a run."""

    def preparing(self, what: str, done: int, total: int) -> None:
        """A corpus is being tokenised."""

    def message(self, text: str) -> None:
        """A message that is no error."""

    def launching(self, runs: Sequence[Run], todo: Sequence[Run], max_parallel: int) -> None:
        """The runs of the study, and those to be executed now."""

    def stage_started(self, name: str) -> None:
        """A process of this machine has begun a stage."""

    def stage_ended(self, name: str, state: str) -> None:
        """A process of this machine has left a stage in this state."""

    def places(self, launcher: str, words: str) -> None:
        """The places of an engine have changed: `2 running, 1 queued: PENDING (Resources)`."""

    def silent(self, name: str, seconds: float) -> None:
        """A run has made no progress for `seconds`, and may be stopped; 0: it goes on, or was stopped."""

    def restarting(self, name: str) -> None:
        """A run that ended is about to be restarted automatically."""

    def poll(self) -> None:
        """Read the store; called regularly."""

    def finished(self) -> None:
        """The last run has ended."""
