"""What an evaluation has found: numbers by name, and the records they were made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Found:
    """The outcome of one evaluation."""

    metrics: dict[str, float]
    """Numbers by name."""
    rows: list[dict[str, Any]]
    """Plain records, kept beside the stage's result as JSON lines."""
