"""Studies with a known truth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def study(
    random: np.random.Generator, effects: Sequence[float], seeds: int, scatter: float = 0.1
) -> dict[str, dict[int, float]]:
    """{arm: {seed: value}}: each arm's effect, the luck of the seed, which all arms share, and an arm's own scatter."""
    luck = random.normal(3.0, 1.0, seeds)
    return {
        str(arm): dict(enumerate(map(float, effect + luck + random.normal(0, scatter, seeds))))
        for arm, effect in enumerate(effects)
    }


def within(rate: float, count: int) -> float:
    """Three standard deviations of a share among so many independent trials."""
    return float(3 * (rate * (1 - rate) / count) ** 0.5)
