"""Evaluation after the last step: more text than during training, each split once, losses of documents kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lit_llm.evaluation.likelihood import Measured
from lit_llm.evaluation.result import Progress
from lit_llm.evaluation.unit_losses import UnitLosses
from lit_llm.models.families import LanguageModel

Measure = Callable[[str, LanguageModel, Progress], Measured]
"""Evaluates a model on one split, by the split's name."""


class FinalEvaluation:
    """Computes the metrics of all splits for a model in evaluation mode, and keeps the losses of their units.

    Batches are collated when it is called, split by split: they take no memory while the model trains.
    """

    def __init__(self, splits: Sequence[str], measure: Measure, progress: Progress = lambda *_: None) -> None:
        self.splits, self.measure, self.progress = splits, measure, progress
        self.losses: list[UnitLosses] = []

    def __call__(self, model: LanguageModel) -> dict[str, float]:
        self.losses, metrics = [], dict[str, float]()
        for number, split in enumerate(self.splits):
            result = self.measure(split, model, self._progress_of_split(number))
            metrics |= result.metrics
            self.losses += result.losses
        return metrics

    def _progress_of_split(self, number: int) -> Progress:
        """A callback for the progress of one split; all splits are taken to be of equal size."""
        return lambda done, total: self.progress(number * total + done, len(self.splits) * total)
