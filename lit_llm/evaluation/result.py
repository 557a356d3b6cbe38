"""Result of an evaluation of a trained model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Progress = Callable[[int, int], None]
"""Callback that gets (number done, total number)."""


@dataclass
class EvaluationResult:
    """Metrics and records of one evaluation."""

    metrics: dict[str, float]
    """Values by flat names that begin with the evaluation: `likelihood/nll`, `likelihood/nll/<source>`."""
    rows: list[dict[str, Any]]
    """Plain JSON records, stored beside the stage's result as `<evaluation>.jsonl`."""
