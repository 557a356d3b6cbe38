"""Losses of single documents, examples and questions, whose sums make a metric.

A metric such as val/target_nll is a sum of nats over a sum of tokens. Both sums run over units: the documents of
held-out text, the examples of instruction data, the questions of a task. A training keeps those of its last evaluation
in `losses.jsonl`, a line for each split and source:

    {"split": "validation", "metric": "target_nll", "source": "", "weight": 1.0, "unit": "document",
     "units": [0, 3, 4], "nats": [97.2, ...], "tokens": [31, ...], "bytes": [102, ...]}

A document's number is its place among the documents of its source's split: the same for all arms and seeds that read
the same text. An evaluation of a trained model keeps a record for each unit in `rows.jsonl`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lit_llm.config.metrics import BITS_PER_BYTE, SPLITS
from lit_llm.store.store import Stage, write_text

Units = dict[str, tuple[float, float]]
"""{unit: (sum of its losses, its weight)}. The metric is the sum of losses over the sum of weights."""


@dataclass(frozen=True)
class UnitLosses:
    """Losses of the units of one source in one evaluation."""

    source: str
    """Name of a source of a mixture, or of a task; empty for a single source."""
    units: Sequence[int | str]
    """Identifiers of the units within their source, the same for every model that reads the same text."""
    nats: Sequence[float]
    """Sum over the unit's target tokens."""
    tokens: Sequence[int]
    """The unit's target tokens."""
    bytes: Sequence[int] | None
    """Bytes of the targets' text; None where the tokenizer does not give them."""
    weight: float = 1.0
    """Weight of the source's nats, tokens and bytes among those of all sources."""
    split: str = "validation"
    metric: str = "target_nll"
    """Name of the loss per token, without the split."""
    unit: str = "document"
    """Kind of the units: document or example."""


def write_losses(file: Path, losses: Iterable[UnitLosses], check: Callable[[], None] = lambda: None) -> None:
    """Write `losses.jsonl`, whole or not at all. check: called before its name appears; raises for a late holder."""
    write_text(file, "".join(_json_line(each) + "\n" for each in losses), durable=True, check=check)


def _json_line(losses: UnitLosses) -> str:
    names = ("split", "metric", "source", "weight", "unit", "units", "nats", "tokens", "bytes")  # the split first
    return json.dumps({name: getattr(losses, name) for name in names})


def losses_by_source(
    rows: Sequence[Mapping[str, Any]], source: str, unit: str, split: str = "validation", metric: str = "nll"
) -> list[UnitLosses]:
    """Losses of rows with tokens, bytes and nats, grouped by the key `source`. unit: key of a row's identifier."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row[source], []).append(row)
    losses = []
    for name, group in groups.items():
        units, nats, tokens, sizes = ([row[key] for row in group] for key in (unit, "nats", "tokens", "bytes"))
        byte_counts = None if None in sizes else sizes
        losses.append(UnitLosses(name, units, nats, tokens, byte_counts, split=split, metric=metric, unit=unit))
    return losses


def read_losses(file: Path, split: str) -> list[UnitLosses]:
    """Losses of one split; empty where the file is missing. The lines of other splits are not parsed."""
    begin = f'{{"split": {json.dumps(split)}, '
    try:
        lines = file.read_text().splitlines()
    except FileNotFoundError:
        return []
    return [UnitLosses(**json.loads(line)) for line in lines if line.startswith(begin)]


def units_of(stage: Stage, metric: str) -> Units | None:
    """Units of a metric of a finished stage; None where no records of them are kept.

    metric: its name in the stage's result, `test/target_nll`, `likelihood/nll/<source>`. A perplexity has the units of
    its loss. The units of a mean over a mixture's sources or over tasks are weighted so that every source counts the
    same.
    """
    head, _, rest = metric.partition("/")
    split = next((split for split, begin in SPLITS.items() if begin == f"{head}/"), None)
    if split is not None:
        return _units_of_groups(read_losses(stage.losses_file, split), rest)
    reader = _READERS.get(head)
    return None if reader is None else reader(stage, rest)


def _units_of_groups(groups: Sequence[UnitLosses], metric: str) -> Units | None:
    """Units of a metric named without its split: `target_nll`, `bits_per_byte/<source>`, `mean_over_tasks`."""
    kind, _, source = metric.partition("/")
    if kind.startswith("mean_over_") and not source:
        named = [group for group in groups if group.source]
        return _join_groups(named, lambda group: 1 / sum(group.tokens)) if len(named) > 1 else None
    chosen = [group for group in groups if source in ("", group.source)]
    if kind == "perplexity" and not source:
        kind = "target_nll" if all(group.metric == "target_nll" for group in chosen) else "nll"

    def weight(group: UnitLosses) -> float:
        return 1.0 if source else group.weight

    if kind == BITS_PER_BYTE.name:
        return _join_groups(chosen, weight, by_byte=True)
    return _join_groups(chosen, weight) if all(group.metric == kind for group in chosen) else None


def _join_groups(
    groups: Sequence[UnitLosses], weight: Callable[[UnitLosses], float], by_byte: bool = False
) -> Units | None:
    """Units of all groups, each group's losses and weights multiplied by `weight`; None where the weights sum to 0.

    by_byte: use bits and bytes in place of nats and tokens.
    """
    units: Units = {}
    for group in groups:
        sizes = group.bytes if by_byte else group.tokens
        if sizes is None:
            return None
        times = weight(group)
        per_nat = times / math.log(2) if by_byte else times
        pairs = [(per_nat * nats, times * size) for nats, size in zip(group.nats, sizes, strict=True)]
        units.update(zip(_unit_names(group.source, tuple(group.units)), pairs, strict=True))
    return units if sum(size for _, size in units.values()) > 0 else None


@lru_cache(maxsize=256)
def _unit_names(source: str, units: tuple[int | str, ...]) -> tuple[str, ...]:
    """Names of units, unique among all sources; cached, since many runs read the same units."""
    return tuple(f"{source}/{unit}" if source else str(unit) for unit in units)


# --- records of evaluations ----------------------------------------------------------------------------------------


def _read_rows(stage: Stage) -> list[dict[str, Any]]:
    try:
        lines = stage.rows_file.read_text().splitlines()
    except FileNotFoundError:
        return []
    records: list[dict[str, Any]] = json.loads(f"[{','.join(lines)}]")  # five times as fast as a call for each line
    return records


def _likelihood_units(stage: Stage, metric: str) -> Units | None:
    rows = _read_rows(stage)
    # The rows of the training data's documents come first; further texts have separate metrics.
    model_documents = int(((stage.result() or {}).get("metrics") or {}).get("likelihood/documents", 0))
    kind, _, source = metric.partition("/")
    if source:
        return _units_of_groups(
            losses_by_source([row for row in rows if row["source"] == source], "source", "document"), metric
        )
    return _units_of_groups(
        losses_by_source(
            rows[model_documents:] if kind == "mean_over_corpora" else rows[:model_documents], "source", "document"
        ),
        metric,
    )


def _example_units(stage: Stage, metric: str) -> Units | None:
    return _units_of_groups(losses_by_source(_read_rows(stage), "task", "example"), metric)


def _task_units(stage: Stage, metric: str) -> Units | None:
    """Units of a metric that is a mean over questions; None for any other metric, and for groups of tasks."""
    task, _, rest = metric.partition("/")
    kind, _, way = rest.partition("/")
    scores = {
        str(row["question"]): row[kind]
        for row in _read_rows(stage)
        if row["task"] == task and row["filter"] == (way or "none") and isinstance(row.get(kind), int | float)
    }
    mean = ((stage.result() or {}).get("metrics") or {}).get(f"tasks/{metric}")
    if not scores or mean is None or not math.isclose(math.fsum(scores.values()) / len(scores), mean, abs_tol=1e-9):
        return None
    return {question: (float(score), 1.0) for question, score in scores.items()}


_READERS: Mapping[str, Callable[[Stage, str], Units | None]] = {
    "likelihood": _likelihood_units,
    "examples": _example_units,
    "tasks": _task_units,
}
