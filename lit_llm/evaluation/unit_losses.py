"""Losses of single documents, examples and questions: what a metric is the ratio of sums of.

A metric such as val/target_nll is a sum of nats over a sum of tokens. Both sums run over units: the documents of
held-out text, the examples of instruction data, the questions of a task. A training keeps those of its last evaluation
in `losses.jsonl`, a line for each split and source:

    {"split": "validation", "metric": "target_nll", "source": "", "weight": 1.0, "unit": "document",
     "units": [0, 3, 4], "nats": [97.2, ...], "tokens": [31, ...], "bytes": [102, ...]}

A document's number is its place among the documents of its source's split, so it is the same for all arms and seeds
that read the same text. An evaluation of a finished model keeps a record for each unit in `rows.jsonl`.
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
"""{unit: (sum of its losses, its weight)}: the sum of the first over the sum of the second is the metric."""


@dataclass(frozen=True)
class UnitLosses:
    """Losses of the units of one source, by one evaluation."""

    source: str
    """Of a mixture, or the task of an example; empty where there is one alone."""
    units: Sequence[int | str]
    """What tells a unit from the others of its source, the same for every model that reads the same."""
    nats: Sequence[float]
    """Sum over the unit's target tokens."""
    tokens: Sequence[int]
    """The unit's target tokens."""
    bytes: Sequence[int] | None
    """Bytes of their text; None where a tokenizer's are not known."""
    weight: float = 1.0
    """Of each of its nats, tokens and bytes among those of all sources."""
    split: str = "validation"
    metric: str = "target_nll"
    """The loss per token that they are of, without the split."""
    unit: str = "document"
    """What a unit is."""


def write_losses(file: Path, losses: Iterable[UnitLosses]) -> None:
    """Write `losses.jsonl`, whole or not at all."""
    write_text(file, "".join(_line(each) + "\n" for each in losses), durable=True)


def _line(losses: UnitLosses) -> str:
    names = ("split", "metric", "source", "weight", "unit", "units", "nats", "tokens", "bytes")  # the split first
    return json.dumps({name: getattr(losses, name) for name in names})


def grouped(
    rows: Sequence[Mapping[str, Any]], source: str, unit: str, split: str = "validation", metric: str = "nll"
) -> list[UnitLosses]:
    """Rows with tokens, bytes and nats, by what stands under `source`. unit: the key of what a row is of."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row[source], []).append(row)
    found = []
    for name, mine in groups.items():
        units, nats, tokens, sizes = ([row[key] for row in mine] for key in (unit, "nats", "tokens", "bytes"))
        known = None if None in sizes else sizes
        found.append(UnitLosses(name, units, nats, tokens, known, split=split, metric=metric, unit=unit))
    return found


def read_losses(file: Path, split: str) -> list[UnitLosses]:
    """Those of one split; none where there is no such file. The lines of other splits are not parsed."""
    begin = f'{{"split": {json.dumps(split)}, '
    try:
        lines = file.read_text().splitlines()
    except FileNotFoundError:
        return []
    return [UnitLosses(**json.loads(line)) for line in lines if line.startswith(begin)]


def units_of(stage: Stage, metric: str) -> Units | None:
    """The units of a metric that a finished stage has measured; None where no records of them are kept.

    metric: as the stage's own result names it, `test/target_nll`, `likelihood/nll/<source>`. A perplexity has the
    units of the loss that it is the exponential of. The mean over a mixture's sources or over tasks has units too, each
    weighted so that every source counts the same.
    """
    head, _, rest = metric.partition("/")
    split = next((split for split, begin in SPLITS.items() if begin == f"{head}/"), None)
    if split is not None:
        return _units(read_losses(stage.losses_file, split), rest)
    reader = _READERS.get(head)
    return None if reader is None else reader(stage, rest)


def _units(groups: Sequence[UnitLosses], metric: str) -> Units | None:
    """The units of a metric without its split: `target_nll`, `bits_per_byte/<source>`, `mean_over_tasks`."""
    kind, _, source = metric.partition("/")
    if kind.startswith("mean_over_") and not source:
        named = [group for group in groups if group.source]
        return _joined(named, lambda group: 1 / sum(group.tokens)) if len(named) > 1 else None
    chosen = [group for group in groups if source in ("", group.source)]
    if kind == "perplexity" and not source:
        kind = "target_nll" if all(group.metric == "target_nll" for group in chosen) else "nll"

    def weight(group: UnitLosses) -> float:
        return 1.0 if source else group.weight

    if kind == BITS_PER_BYTE.name:
        return _joined(chosen, weight, by_byte=True)
    return _joined(chosen, weight) if all(group.metric == kind for group in chosen) else None


def _joined(groups: Sequence[UnitLosses], weight: Callable[[UnitLosses], float], by_byte: bool = False) -> Units | None:
    """The units of all groups, each group's losses and weights multiplied by one number; None where nothing counts.

    by_byte: bits and bytes, in place of nats and tokens.
    """
    found: Units = {}
    for group in groups:
        sizes = group.bytes if by_byte else group.tokens
        if sizes is None:
            return None
        times = weight(group)
        per_nat = times / math.log(2) if by_byte else times
        pairs = [(per_nat * nats, times * size) for nats, size in zip(group.nats, sizes, strict=True)]
        found.update(zip(_names(group.source, tuple(group.units)), pairs, strict=True))
    return found if sum(size for _, size in found.values()) > 0 else None


@lru_cache(maxsize=256)
def _names(source: str, units: tuple[int | str, ...]) -> tuple[str, ...]:
    """The names of units among those of all sources; once for all runs that read the same."""
    return tuple(f"{source}/{unit}" if source else str(unit) for unit in units)


# --- records of evaluations ----------------------------------------------------------------------------------------


def _rows(stage: Stage) -> list[dict[str, Any]]:
    try:
        lines = stage.rows_file.read_text().splitlines()
    except FileNotFoundError:
        return []
    found: list[dict[str, Any]] = json.loads(f"[{','.join(lines)}]")  # a fifth of the time of a call for each
    return found


def _of_likelihood(stage: Stage, metric: str) -> Units | None:
    rows = _rows(stage)
    # The documents of the model's own data stand first; those of other texts have metrics of their own.
    own = int(((stage.result() or {}).get("metrics") or {}).get("likelihood/documents", 0))
    kind, _, source = metric.partition("/")
    if source:
        return _units(grouped([row for row in rows if row["source"] == source], "source", "document"), metric)
    return _units(grouped(rows[own:] if kind == "mean_over_corpora" else rows[:own], "source", "document"), metric)


def _of_examples(stage: Stage, metric: str) -> Units | None:
    return _units(grouped(_rows(stage), "task", "example"), metric)


def _of_tasks(stage: Stage, metric: str) -> Units | None:
    """Of a metric that is the mean of one number for each question; None for any other, and for groups of tasks."""
    task, _, rest = metric.partition("/")
    kind, _, way = rest.partition("/")
    scores = {
        str(row["question"]): row[kind]
        for row in _rows(stage)
        if row["task"] == task and row["filter"] == (way or "none") and isinstance(row.get(kind), int | float)
    }
    mean = ((stage.result() or {}).get("metrics") or {}).get(f"tasks/{metric}")
    if not scores or mean is None or not math.isclose(math.fsum(scores.values()) / len(scores), mean, abs_tol=1e-9):
        return None
    return {question: (float(score), 1.0) for question, score in scores.items()}


_READERS: Mapping[str, Callable[[Stage, str], Units | None]] = {
    "likelihood": _of_likelihood,
    "examples": _of_examples,
    "tasks": _of_tasks,
}
