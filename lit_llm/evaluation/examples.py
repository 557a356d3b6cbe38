"""Losses on held-out examples of instruction data, by task: nats per target token given the input, for every family."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from lit_llm.data.examples import ExampleSet
from lit_llm.evaluation.found import Found, Progress
from lit_llm.evaluation.scoring import score
from lit_llm.models.transformer import LanguageModel
from lit_llm.objectives.config import MasksConfig


class HeldOutExamples:
    """Evaluates a model on the same held-out examples each time it is asked."""

    def __init__(self, examples: ExampleSet, count: int, masks: MasksConfig, byte_lengths: np.ndarray | None) -> None:
        """count: examples, evenly spread over those held out; byte_lengths: of each token, None where not known."""
        self.masks, self.tasks = masks, examples.tasks
        wanted = min(count, examples.count("validation"))
        self.places = (np.arange(wanted) * examples.count("validation") // wanted).tolist()
        self.pairs = [examples.read("validation", place) for place in self.places]
        self.of_task = examples.task_of("validation")[self.places].tolist()
        self.bytes = [None if byte_lengths is None else int(byte_lengths[target].sum()) for _, target in self.pairs]

    def rows(
        self, model: LanguageModel, batch_tokens: int, progress: Progress = lambda *_: None
    ) -> list[dict[str, Any]]:
        """{"example", "task", "tokens", "bytes", "nats"} of each, in order; the model should be in evaluation mode."""
        scored = score(model, self.pairs, self.masks, batch_tokens=batch_tokens, progress=progress)
        nats = {number: float(found.sum()) for number, found in scored}
        return [
            {"example": place, "task": self.tasks[task], "tokens": len(target), "bytes": size, "nats": nats[number]}
            for number, (place, task, (_, target), size) in enumerate(
                zip(self.places, self.of_task, self.pairs, self.bytes, strict=True)
            )
        ]

    def validation(self, batch_tokens: int) -> Callable[[LanguageModel], dict[str, float]]:
        """For training: val/target_nll, val/perplexity, val/bits_per_byte, val/target_nll/<task>."""

        def evaluate(model: LanguageModel) -> dict[str, float]:
            found = summary(self.rows(model, batch_tokens))
            return {f"val/{name.replace('nll', 'target_nll', 1)}": value for name, value in found.items()}

        return evaluate


def example_losses(
    model: LanguageModel, held_out: HeldOutExamples, *, batch_tokens: int, progress: Progress = lambda *_: None
) -> Found:
    """The same for a finished model, as examples/nll and its like, with every example's own loss."""
    rows = held_out.rows(model, batch_tokens, progress)
    return Found({f"examples/{name}": value for name, value in summary(rows).items()}, rows)


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """nll (nats per token over all targets), perplexity, bits_per_byte; where tasks have names nll/<task> and their
    plain mean, mean_over_tasks."""
    found = _of(rows)
    tasks = list(dict.fromkeys(row["task"] for row in rows if row["task"]))
    by_task = {task: _of([row for row in rows if row["task"] == task])["nll"] for task in sorted(tasks)}
    found |= {f"nll/{task}": value for task, value in by_task.items()}
    if len(by_task) > 1:
        found["mean_over_tasks"] = sum(by_task.values()) / len(by_task)
    return found


def _of(rows: list[dict[str, Any]]) -> dict[str, float]:
    nats, tokens = math.fsum(row["nats"] for row in rows), sum(row["tokens"] for row in rows)
    found = {"nll": nats / tokens, "perplexity": math.exp(min(nats / tokens, 700.0))}
    sizes = [row["bytes"] for row in rows]
    if None not in sizes and sum(sizes):
        found["bits_per_byte"] = nats / math.log(2) / sum(sizes)
    return found
