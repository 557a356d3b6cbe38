"""Losses on held-out examples of instruction data, by task: nats per target token given the input, for every family."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from lit_llm.components.loss.module import target_nats
from lit_llm.data.examples import ExampleSet
from lit_llm.evaluation.found import Found
from lit_llm.models.transformer import LanguageModel
from lit_llm.objectives.config import MasksConfig
from lit_llm.objectives.layout import Family, lay_out


class HeldOutExamples:
    """Evaluates a model on the same held-out examples each time it is asked."""

    def __init__(
        self, examples: ExampleSet, count: int, family: Family, masks: MasksConfig, byte_lengths: np.ndarray | None
    ) -> None:
        """count: examples, evenly spread over those held out; byte_lengths: of each token, None where not known."""
        self.family, self.masks, self.tasks = family, masks, examples.tasks
        wanted = min(count, examples.count("validation"))
        self.places = (np.arange(wanted) * examples.count("validation") // wanted).tolist()
        self.pairs = [examples.read("validation", place) for place in self.places]
        self.of_task = examples.task_of("validation")[self.places].tolist()
        self.bytes = [None if byte_lengths is None else int(byte_lengths[target].sum()) for _, target in self.pairs]

    def rows(
        self, model: LanguageModel, batch_tokens: int, progress: Callable[[int, int], None] = lambda *_: None
    ) -> list[dict[str, Any]]:
        """{"example", "task", "tokens", "bytes", "nats"} of each, in order; the model should be in evaluation mode."""
        device = next(model.parameters()).device
        nats = np.empty(len(self.pairs))
        done = 0
        for part in by_length([len(source) + len(target) for source, target in self.pairs], batch_tokens):
            sources, targets = zip(*(self.pairs[number] for number in part), strict=True)
            batch = lay_out(sources, targets, self.family, self.masks).to(device)
            with torch.no_grad():
                found = target_nats(model.hidden(**batch.inputs), model.unembedding_VD, batch.targets, batch.weights)
            ends = np.cumsum([len(target) for target in targets])
            nats[part] = [each.sum() for each in np.split(found.double().cpu().numpy(), ends[:-1])]
            done += len(part)
            progress(done, len(self.pairs))
        return [
            {
                "example": place,
                "task": self.tasks[task],
                "tokens": len(target),
                "bytes": size,
                "nats": float(value),
            }
            for place, task, (_, target), size, value in zip(
                self.places, self.of_task, self.pairs, self.bytes, nats, strict=True
            )
        ]

    def validation(self, batch_tokens: int) -> Callable[[LanguageModel], dict[str, float]]:
        """For training: val/target_nll, val/perplexity, val/bits_per_byte, val/target_nll/<task>."""

        def evaluate(model: LanguageModel) -> dict[str, float]:
            return {
                f"val/{name.replace('nll', 'target_nll')}": v
                for name, v in summary(self.rows(model, batch_tokens)).items()
            }

        return evaluate


def evaluate_examples(
    model: LanguageModel, held_out: HeldOutExamples, batch_tokens: int, progress: Callable[[int, int], None]
) -> Found:
    """The same for a finished model, with every example's own loss."""
    rows = held_out.rows(model, batch_tokens, progress)
    return Found(summary(rows), rows)


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


def by_length(lengths: Iterable[int], batch_tokens: int) -> list[list[int]]:
    """Numbers of the rows in batches, long with long, each of at most `batch_tokens` with its padding (or one row)."""
    batches: list[list[int]] = []
    longest = 0
    for length, number in sorted(((length, number) for number, length in enumerate(lengths)), reverse=True):
        if not batches or (len(batches[-1]) + 1) * longest > batch_tokens:
            batches.append([])
            longest = length
        batches[-1].append(number)
    return batches
