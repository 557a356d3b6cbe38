"""Coverage of the intervals of signal, noise and decision accuracy, by simulation.

    python benchmarks/coverage_noise.py [--replicates 2000] [--seed 0]

Runs of one size are an arm's mean, what a seed does to all arms, and a scatter of each run. Decisions are those of arms
whose means at two sizes are normal with a correlation r, so the true share is 1/2 + arcsin(r) / pi (Sheppard 1899);
or of arms of which a third comes out in reverse order at the large size.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from coverage_paired import aligned

from lit_llm.statistics.estimates import Estimate, holds
from lit_llm.statistics.signal_and_noise import SignalAndNoise, decision_accuracy, signal_and_noise

Row = dict[str, Any]
MEAN = 100.0
"""Mean of the simulated metric: far from zero, so that a share of it is as exact as the number itself."""
SCENARIOS: dict[str, dict[str, float]] = {
    "alike": {},
    "seeds move all arms by 3 x": {"shared": 3.0},
    "an arm 3 x as wide": {"wide": 3.0},
    "t3 tails": {"tails": 3.0},
    "no arm differs": {"spread": 0.0},
}
"""Differences from: arms that scatter by 1, seeds that move all of them by 1, arms that differ by a deviation of 1."""


def simulated(
    random: np.random.Generator,
    arms: int,
    seeds: int,
    shared: float = 1.0,
    wide: float = 1.0,
    tails: float = 0.0,
    spread: float = 1.0,
) -> tuple[SignalAndNoise, float, float, float]:
    """(what is found, the true signal, noise and paired noise, relative to the mean) of one size."""
    means = spread * random.normal(size=arms)
    widths = np.ones(arms)
    widths[-1] = wide
    draws = random.standard_t(tails, (arms, seeds)) / 3**0.5 if tails else random.normal(size=(arms, seeds))
    table = MEAN + means[:, None] + shared * random.normal(size=seeds) + widths[:, None] * draws
    found = signal_and_noise({str(at): dict(enumerate(map(float, row))) for at, row in enumerate(table)})
    assert found is not None
    paired = float((widths**2).mean())
    return found, float(np.ptp(means)), (shared**2 + paired) ** 0.5, paired**0.5


def noise_rows(random: np.random.Generator, replicates: int) -> Iterator[Row]:
    """Coverage of signal, noise and paired noise, for every scenario, number of arms and of seeds."""
    for (scenario, kind), arms, seeds in itertools.product(SCENARIOS.items(), (3, 8), (2, 3, 5)):
        hits = np.zeros(3)
        for _ in range(replicates):
            found, *truths = simulated(random, arms, seeds, **kind)
            estimates = (found.signal, found.noise, found.paired_noise)
            hits += [contains(each, truth) for each, truth in zip(estimates, truths, strict=True)]
        names = ("signal", "noise", "paired noise")
        yield {"scenario": scenario, "arms": arms, "seeds": seeds, **dict(zip(names, hits / replicates, strict=True))}


def contains(estimate: Estimate | None, truth: float) -> bool:
    """Whether the interval of a number relative to the found mean holds the truth relative to the true one."""
    assert estimate is not None
    # The intervals are of deviations; their division by the mean, found to a hundredth here, is not part of the claim.
    return holds(estimate, truth / MEAN)


def decision_rows(random: np.random.Generator, replicates: int) -> Iterator[Row]:
    """Coverage and mean width of the interval of a decision accuracy."""
    kinds: tuple[float | str, ...] = (0.0, 0.5, 0.8, 0.95, "a third reversed")
    for kind, arms in itertools.product(kinds, (3, 5, 8, 12, 25)):
        truth, hits, width = true_share(kind), 0, 0.0
        for _ in range(replicates):
            found = decided(random, kind, arms)
            hits += holds(found, truth)
            assert found.low is not None
            assert found.high is not None
            width += found.high - found.low
        row = {"correlation": kind, "share": truth, "arms": arms}
        yield row | {"coverage": hits / replicates, "width": width / replicates}


def true_share(kind: float | str) -> float:
    """The chance that two arms are ordered alike at both sizes."""
    if not isinstance(kind, str):
        return 0.5 + math.asin(kind) / math.pi
    # Of two arms as they are, or two reversed ones, the order is kept or reversed; of a mixed pair by chance.
    return (2 / 3) ** 2 + 2 * (1 / 3) * (2 / 3) / 2


def decided(random: np.random.Generator, kind: float | str, arms: int) -> Estimate:
    """The decision accuracy found with so many arms."""
    small = random.normal(size=arms)
    if isinstance(kind, str):
        large = np.where(random.random(arms) < 1 / 3, -small, small)
    else:
        large = kind * small + (1 - kind**2) ** 0.5 * random.normal(size=arms)
    found = decision_accuracy(*({str(at): float(x) for at, x in enumerate(each)} for each in (small, large)))
    assert found is not None
    return found.share


TABLES = {"Signal and noise": noise_rows, "Decision accuracy": decision_rows}


def coverage_table(name: str, replicates: int, seed: int) -> list[Row]:
    """A row for every scenario and size of a study, of one of the tables."""
    return [*TABLES[name](np.random.default_rng(seed), replicates)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in TABLES:
        print(f"## {name}\n\n{aligned(coverage_table(name, options.replicates, options.seed))}\n")


if __name__ == "__main__":
    main()
