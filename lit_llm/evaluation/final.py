"""The evaluation of a model that has been trained: more text than during training, each split once, losses kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lit_llm.evaluation.likelihood import Measured
from lit_llm.evaluation.result import Progress
from lit_llm.evaluation.unit_losses import UnitLosses
from lit_llm.models.families import LanguageModel

Measure = Callable[[str, LanguageModel, Progress], Measured]
"""Evaluates a model on one split, by the split's name."""


class FinalEvaluation:
    """Called with a model in evaluation mode, it returns the metrics of all splits and keeps the losses of their units.

    What it reads is laid out when it is called, split by split: no memory is held while the model trains.
    """

    def __init__(self, splits: Sequence[str], measure: Measure, progress: Progress = lambda *_: None) -> None:
        self.splits, self.measure, self.progress = splits, measure, progress
        self.losses: list[UnitLosses] = []

    def __call__(self, model: LanguageModel) -> dict[str, float]:
        self.losses, metrics = [], dict[str, float]()
        for number, split in enumerate(self.splits):
            found = self.measure(split, model, self._told(number))
            metrics |= found.metrics
            self.losses += found.losses
        return metrics

    def _told(self, number: int) -> Progress:
        """Progress of all splits, by that of one: they are taken to be as large as each other."""
        return lambda done, total: self.progress(number * total + done, len(self.splits) * total)
