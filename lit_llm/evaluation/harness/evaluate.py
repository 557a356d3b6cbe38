"""Tasks of the harness, run on a model."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_llm.config.problems import InputError, Problem
from lit_llm.data.tokenizers import Tokenizer
from lit_llm.evaluation.harness.model import HarnessModel, check_installed, harness_model
from lit_llm.evaluation.harness.tasks import Guard, load_tasks
from lit_llm.evaluation.result import EvaluationResult
from lit_llm.evaluation.task_files import read_task_files
from lit_llm.evaluation.task_names import shots_by_task
from lit_llm.models.families import LanguageModel
from lit_llm.objectives.config import MasksConfig

_PER_TEXT_SIZE = ("word_perplexity", "byte_perplexity", "bits_per_byte")
"""Metrics that divide the loss of the tokens by the size of the text."""


def evaluate_tasks(
    model: LanguageModel,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    max_length: int,
    shots: int | Mapping[str, int] | None = None,
    masks: MasksConfig = MasksConfig(),
    limit: int | None = None,
    include_path: Path | None = None,
    batch_tokens: int = 16_384,
    seed: int = 1234,
) -> EvaluationResult:
    """Run tasks of the harness on a model in evaluation mode.

    tasks         names of tasks, groups and tags of the harness, of those in `include_path`, and of SUITES
    max_length    tokens of context and continuation together, of windows of a long text, and of a prompt with what is
                  written after it, for every family. A longer context loses its beginning, and is counted.
    shots         worked examples before each question: for all, or by name of `tasks`. By default a suite's, or the
                  task's own. As in the harness, a task that sets 0 itself keeps it.
    limit         questions of each task; its first ones
    include_path  a folder of task files. Where it has all tasks, the harness's own are not indexed.
    batch_tokens  tokens of a batch, padding included. The scores do not depend on it.
    seed          draws the shots

    Metrics are `tasks/<task>/<metric>`, with `/<filter>` after it where a task has several ways to read an answer,
    `tasks/<task>/questions`, and `tasks/<task>/truncated`: questions whose context lost something. Where there are any:
    `tokenised_apart` counts answers that merge with their context into one token, `without_tokens` answers of no token
    (an end of document stands for them), `lost_bytes` what the tokenizer loses of whole texts, whose perplexities are
    then left out. A row is a question with what the model answered, under one filter.

    `unreadable` counts documents that cannot be asked or scored: without a text or choices, with a text that the
    tokenizer refuses. They are left out of all other metrics. Their rows have the reason under `unreadable`.

    Raises InputError for a task that is not known, one whose data cannot be reached, one whose documents are all
    unreadable, and a suite whose task it is not.
    """
    check_installed()
    if max_length < 2:
        raise InputError(Problem(f"{max_length} has no room for a context and an answer; at least 2", "max_length"))
    from lm_eval.evaluator import evaluate

    shots_of = shots_by_task(tasks, shots)
    if include_path is not None:
        read_task_files(include_path)  # refuses what would run
    with _silence_warnings(), _sandbox_templates():
        loaded = load_tasks(shots_of, include_path, seed)
        harness = harness_model(model, tokenizer, max_length=max_length, masks=masks, batch_tokens=batch_tokens)
        guards = {name: Guard(name, task, harness) for name, task in loaded["tasks"].items()}
        results = evaluate(harness, loaded, limit=limit, bootstrap_iters=0)
    return _collect_results(results, harness, {name: guard.unreadable for name, guard in guards.items()})


@contextmanager
def _sandbox_templates() -> Iterator[None]:
    """Render the templates of the harness's task files in a sandbox, without access to Python."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    before = utils.env
    utils.env = ImmutableSandboxedEnvironment(undefined=before.undefined, keep_trailing_newline=True)
    utils.env.filters.update(before.filters)
    try:
        yield
    finally:
        utils.env = before


@contextmanager
def _silence_warnings() -> Iterator[None]:
    """Silence the harness's warnings, which are about intended settings: changed shots, no standard errors."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _collect_results(
    results: Mapping[str, Any], harness: HarnessModel, unreadable: Mapping[str, Mapping[int, str]]
) -> EvaluationResult:
    metrics: dict[str, float] = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, way = key.partition(",")
            if way and not metric.endswith("_stderr") and isinstance(value, int | float):
                metrics["/".join(["tasks", task, metric, *([way] if way != "none" else [])])] = float(value)
    rows = []
    for task, samples in results["samples"].items():
        left_out = unreadable[task]
        rows_of_task = [_row(task, sample, harness) for sample in samples if sample["doc_id"] not in left_out]
        questions = {row["question"]: row for row in rows_of_task}
        metrics[f"tasks/{task}/questions"] = float(len(questions))
        metrics[f"tasks/{task}/truncated"] = float(sum(row["truncated"] for row in questions.values()))
        for what in ("tokenised_apart", "without_tokens", "lost_bytes"):
            if count := sum(row[what] for row in questions.values()):
                metrics[f"tasks/{task}/{what}"] = float(count)
        if f"tasks/{task}/lost_bytes" in metrics:
            for name in _PER_TEXT_SIZE:
                metrics.pop(f"tasks/{task}/{name}", None)
        if left_out:
            metrics[f"tasks/{task}/unreadable"] = float(len(left_out))
        rows += rows_of_task
        # Their filter is empty, which keeps them out of every metric.
        rows += [
            {"task": task, "question": number, "filter": "", "unreadable": reason}
            for number, reason in sorted(left_out.items())
        ]
    return EvaluationResult(metrics, rows)


def _row(task: str, sample: Mapping[str, Any], harness: HarnessModel) -> dict[str, Any]:
    arguments = sample["arguments"]
    pairs = [(each[0], each[1]) for each in arguments if len(each) == 2 and isinstance(each[1], str)]
    plain = {
        "task": task,
        "question": sample["doc_id"],
        "filter": sample["filter"],
        "prompt_hash": sample["prompt_hash"],
        "target": sample["target"],
        "answers": sample["filtered_resps"],
        "truncated": any(each[0] in harness.truncated for each in arguments),
        "tokenised_apart": sum(pair in harness.apart for pair in pairs),
        "without_tokens": sum(pair in harness.without_tokens for pair in pairs),
        "lost_bytes": sum(harness.lost.get(each[0], 0) for each in arguments),
        **{metric: sample[metric] for metric in sample["metrics"]},
    }
    row = json.loads(json.dumps(plain, default=lambda value: value.item() if hasattr(value, "item") else str(value)))
    assert isinstance(row, dict)
    return row
