"""What an evaluation of a finished model has found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Progress = Callable[[int, int], None]
"""Called with (how many are done, how many in all)."""


@dataclass
class EvaluationResult:
    """The result of one evaluation."""

    metrics: dict[str, float]
    """Flat names, that of the evaluation first: `likelihood/nll`, `likelihood/nll/<source>`."""
    rows: list[dict[str, Any]]
    """Plain JSON records, to be kept beside the stage's result as `<evaluation>.jsonl`."""
