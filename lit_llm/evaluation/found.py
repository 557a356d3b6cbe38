"""What an evaluation has found: numbers by name, and the records they were made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Found:
    """What an evaluation has found: numbers by name, and the records they were made of."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]
