"""Losses on held-out examples of instruction data, by task: nats per target token given the input, for every family."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lit_llm.config.metrics import BITS_PER_BYTE, SPLITS
from lit_llm.data.batches import spread
from lit_llm.data.examples import ExampleSet
from lit_llm.evaluation.likelihood import Measured
from lit_llm.evaluation.result import EvaluationResult, Progress
from lit_llm.evaluation.scoring import collated, score
from lit_llm.evaluation.unit_losses import losses_by_source
from lit_llm.models.families import LanguageModel
from lit_llm.objectives.collate import Batch, Family
from lit_llm.objectives.config import MasksConfig


class HeldOutExamples:
    """Evaluates models on one fixed set of held-out examples."""

    def __init__(
        self,
        examples: ExampleSet,
        count: int,
        masks: MasksConfig,
        byte_lengths: np.ndarray | None,
        split: str = "validation",
    ) -> None:
        """Read the examples.

        count: number of examples, evenly spread over the split; byte_lengths: of each token, None where not known.
        Bits per byte are left out where the tokenizer has lost some of the examples' text.
        """
        byte_lengths = None if examples.lost_bytes else byte_lengths
        self.masks, self.tasks, self.split = masks, examples.tasks, split
        self.places = spread(count, examples.count(split)).tolist()
        self.pairs = [examples.read(split, place) for place in self.places]
        self.of_task = examples.task_of(split)[self.places].tolist()
        self.bytes = [None if byte_lengths is None else int(byte_lengths[target].sum()) for _, target in self.pairs]

    def target_batches(self, family: Family, batch_tokens: int) -> list[Batch]:
        """Batches whose targets are measured."""
        return [batch for _, batch in collated(self.pairs, family, self.masks, batch_tokens)]

    def rows(
        self, model: LanguageModel, batch_tokens: int, progress: Progress = lambda *_: None
    ) -> list[dict[str, Any]]:
        """Records {"example", "task", "tokens", "bytes", "nats"}, in order; the model should be in evaluation mode."""
        scored = score(model, self.pairs, self.masks, batch_tokens=batch_tokens, progress=progress)
        nats = {number: float(nats_of_targets.sum()) for number, nats_of_targets in scored}
        return [
            {
                "example": number_in_split,
                "task": self.tasks[task],
                "tokens": len(target),
                "bytes": size,
                "nats": nats[number],
            }
            for number, (number_in_split, task, (_, target), size) in enumerate(
                zip(self.places, self.of_task, self.pairs, self.bytes, strict=True)
            )
        ]

    def measured(self, model: LanguageModel, batch_tokens: int, progress: Progress = lambda *_: None) -> Measured:
        """Metrics during training: val/target_nll, val/perplexity, val/bits_per_byte, val/target_nll/<task>, or those
        of `test/`."""
        rows, begin = self.rows(model, batch_tokens, progress), SPLITS[self.split]
        metrics = {f"{begin}{name.replace('nll', 'target_nll', 1)}": value for name, value in summary(rows).items()}
        return Measured(metrics, losses_by_source(rows, "task", "example", self.split, "target_nll"))


def example_losses(
    model: LanguageModel, held_out: HeldOutExamples, *, batch_tokens: int, progress: Progress = lambda *_: None
) -> EvaluationResult:
    """Metrics of a trained model, examples/nll and the like, with the loss of each example as a row."""
    rows = held_out.rows(model, batch_tokens, progress)
    return EvaluationResult({f"examples/{name}": value for name, value in summary(rows).items()}, rows)


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Metrics nll (nats per token over all targets), perplexity, bits_per_byte; where tasks have names also nll/<task>
    and their plain mean, mean_over_tasks."""
    metrics = _totals(rows)
    tasks = list(dict.fromkeys(row["task"] for row in rows if row["task"]))
    by_task = {task: _totals([row for row in rows if row["task"] == task])["nll"] for task in sorted(tasks)}
    metrics |= {f"nll/{task}": value for task, value in by_task.items()}
    if len(by_task) > 1:
        metrics["mean_over_tasks"] = sum(by_task.values()) / len(by_task)
    return metrics


def _totals(rows: list[dict[str, Any]]) -> dict[str, float]:
    nats, tokens = math.fsum(row["nats"] for row in rows), sum(row["tokens"] for row in rows)
    metrics = {"nll": nats / tokens, "perplexity": math.exp(min(nats / tokens, 700.0))}
    sizes = [row["bytes"] for row in rows]
    if None not in sizes and sum(sizes):
        metrics[BITS_PER_BYTE.name] = nats / math.log(2) / sum(sizes)
    return metrics
