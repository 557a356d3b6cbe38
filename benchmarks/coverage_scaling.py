"""Coverage of the 95% intervals of scaling laws and of the gate, by simulation.

    python benchmarks/coverage_scaling.py [--replicates 200] [--seed 0] [--laws plain] [--csv table.csv]

Two groups of runs with the same exponent over four decades of FLOPs, of which the second needs twice the compute. Each
size deviates from its law by a lack of fit, and each seed from its size by 1%. Beside the procedure of `lit_llm` stand
two bootstraps: of runs, which takes seeds of one size for independent, and of sizes drawn with replacement.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as student

from lit_llm.statistics.estimates import Estimate, estimate, exponentials
from lit_llm.statistics.scaling.comparison import scaling
from lit_llm.statistics.scaling.gate import gate
from lit_llm.statistics.scaling.laws import Laws, PowerLaw
from lit_llm.statistics.scaling.runs import ScalingRun

Floats = NDArray[np.float64]
Row = dict[str, Any]

LOW, HIGH = 1e17, 1e21
NOISE = 0.01
"""Standard deviation of a seed, relative to the loss."""
TIMES = 2.0
"""Compute that group b needs for a loss of group a."""
DRAWS = 200
"""Fresh ones for each data set, so that their own error averages out."""
PROJECTED = 1e22
UNEQUAL = (5, 5, 1, 1, 3, 2, 5, 1, 4)
"""Seeds of the sizes in turn, where they are unequal."""


@dataclass(frozen=True)
class Scenario:
    """A design with its truth."""

    sizes: int
    seeds: int | None
    """None: unequal."""
    lack_of_fit: float
    """Standard deviation of a size about its law, relative to the loss."""
    irreducible: bool = False
    luck: float = 0.0
    """Standard deviation of what a seed adds to all sizes of one group alike."""
    models: int | None = None
    """Models of each group, each trained at every x; `lack_of_fit` is then that of a model. None: a size at each x."""

    @property
    def law(self) -> PowerLaw:
        """Of group a."""
        return PowerLaw(1.69, 3.5 * LOW**0.25, 0.25) if self.irreducible else PowerLaw(0.0, 5.0 * LOW**0.1, 0.1)

    @property
    def other(self) -> PowerLaw:
        """Of group b."""
        return replace(self.law, coefficient=self.law.coefficient * TIMES**self.law.exponent)

    @property
    def flops(self) -> Floats:
        return np.geomspace(LOW, HIGH, self.sizes)

    def counts(self) -> tuple[int, ...]:
        return UNEQUAL[: self.sizes] if self.seeds is None else (self.seeds,) * self.sizes

    def named(self) -> Row:
        return {
            "law": "E + A x^-a" if self.irreducible else "A x^-a",
            "sizes": self.sizes,
            "seeds": self.seeds or "unequal",
            "lack_of_fit": self.lack_of_fit,
            "luck": self.luck,
            "models": self.models or "",
        }


def scenarios(laws: Sequence[str] = ("plain", "irreducible")) -> list[Scenario]:
    """Few sizes and many, seeds equal and not, with and without lack of fit; and seeds with luck."""
    found = []
    if "plain" in laws:
        cells = itertools.product((4, 5, 7), (1, 2, 5, None), (0.0, 0.035))
        found += [Scenario(*cell) for cell in cells]
        found += [Scenario(9, seeds, 0.035) for seeds in (1, 5)]
        found += [Scenario(5, seeds, 0.0, luck=0.01) for seeds in (2, 3, 5)]
        found += [Scenario(3, 2, off, models=3) for off in (0.0, 0.035)]
    if "irreducible" in laws:
        cells = itertools.product((4, 5, 7), (1, 5), (0.0, 0.035))
        found += [Scenario(*cell, irreducible=True) for cell in cells]
    return found


# --- one data set ---------------------------------------------------------------------------------------------------


def simulate(scenario: Scenario, random: np.random.Generator) -> tuple[list[ScalingRun], dict[str, Floats]]:
    """(runs of both groups, {group: true log loss of its sizes})."""
    runs, truths = [], {}
    for group, law in (("a", scenario.law), ("b", scenario.other)):
        truth = np.log([law.at(x) for x in scenario.flops])
        if scenario.models is None:
            truth = truth + random.normal(0, scenario.lack_of_fit, scenario.sizes)
        off = random.normal(0, scenario.lack_of_fit, scenario.models) if scenario.models else [0.0]
        luck = random.normal(0, scenario.luck, max(scenario.counts()))
        truths[group] = truth
        for at, (x, count) in enumerate(zip(scenario.flops, scenario.counts(), strict=True)):
            for (model, share), seed in itertools.product(enumerate(off), range(count)):
                loss = float(np.exp(truth[at] + share + luck[seed] + random.normal(0, NOISE)))
                name = f"{group}{model}/{at}"
                own = f"{group}{model}" if scenario.models else ""
                runs.append(ScalingRun(group, float(x), 1.0, 1.0, loss, name, seed, model=own))
    return runs, truths


Hits = dict[tuple[str, str], tuple[bool, float]]
"""{(procedure, quantity): (whether the interval holds the truth, its width)}; the width of a ratio is in logarithms."""


def hit(found: Estimate | None, truth: float, ratio: bool = False) -> tuple[bool, float] | None:
    """None where there is no interval."""
    if found is None or found.low is None or found.high is None:
        return None
    with np.errstate(divide="ignore"):
        width = float(np.log(found.high) - np.log(found.low)) if ratio else found.high - found.low
    return found.low <= truth <= found.high, width


def by_size(
    scenario: Scenario, runs: Sequence[ScalingRun], random: np.random.Generator
) -> Iterator[tuple[str, tuple[bool, float] | None]]:
    """What `lit_llm` reports."""
    found = scaling(runs, "m", "a", irreducible=scenario.irreducible, draws=DRAWS, random=random)
    yield "exponent", hit(found.curves[0].exponent, scenario.law.exponent)
    for times in found.multipliers:
        yield "multiplier", hit(times.mean, TIMES, ratio=True)
        yield "multiplier at the best loss", hit(times.at_best, TIMES, ratio=True)


def by_gate(
    scenario: Scenario, runs: Sequence[ScalingRun], truths: dict[str, Floats], random: np.random.Generator
) -> Iterator[tuple[str, tuple[bool, float] | None]]:
    """The multiplier of the largest size, the slope, and the projection, judged by one more size of each group."""
    found = gate(runs, "m", "a", PROJECTED, irreducible=scenario.irreducible, draws=DRAWS, random=random)
    trend = next((trend for trend in found.trends if trend.scale == "train_flops"), None)
    if trend is None:
        return
    flops, law = scenario.flops[-1], scenario.law
    multiplier = law.x_for(float(np.exp(truths["b"][-1]))) / flops
    yield "gate: multiplier of a size", hit(trend.sizes[-1].multiplier, multiplier, ratio=True)
    yield "gate: slope", hit(trend.slope, 0.0)
    spread = (scenario.lack_of_fit**2 + NOISE**2 / max(scenario.counts())) ** 0.5
    mine, its = random.normal(0, spread, 2)
    reached = float(np.exp(np.log(scenario.other.at(PROJECTED)) + mine - its))
    yield "gate: projection", hit(trend.projection, law.x_for(reached) / PROJECTED, ratio=True)


def by_bootstrap(
    scenario: Scenario, runs: Sequence[ScalingRun], random: np.random.Generator, resampled: Callable[..., Laws]
) -> Iterator[tuple[str, tuple[bool, float] | None]]:
    """A bootstrap of plain laws: exponent, and multiplier at the middle of the losses that both reach."""
    laws, drawn, ends = {}, {}, []
    for group in "ab":
        x, y = (np.log([getattr(run, name) for run in runs if run.group == group]) for name in ("train_flops", "loss"))
        laws[group] = Laws.fit(x, y[None], np.ones(len(x)), irreducible=False)
        drawn[group] = resampled(x, y, laws[group], random)
        ends.append(laws[group].log_loss([x.min(), x.max()])[0])
    yield "exponent", hit(estimate(0.0, drawn["a"].exponent), scenario.law.exponent)
    worst, best = min(e[0] for e in ends), max(e[1] for e in ends)
    if best < worst:
        loss = np.array([(worst + best) / 2])
        ratios = drawn["b"].log_x(loss) - drawn["a"].log_x(loss)
        yield "multiplier", hit(exponentials(estimate(0.0, ratios[:, 0])), TIMES, ratio=True)


def of_runs(x: Floats, y: Floats, law: Laws, random: np.random.Generator) -> Laws:
    """Residuals of all runs are dealt out anew, whatever their size, with the corrections for few runs."""
    fitted = law.log_loss(x)[0]
    residuals, free = y - fitted, len(x) - 2
    grown = (residuals - residuals.mean()) * (len(x) / free) ** 0.5 * student.ppf(0.975, free) / norm.ppf(0.975)
    again = fitted + random.choice(grown, (DRAWS, len(x)))
    return Laws.fit(x, again, np.ones(len(x)), irreducible=False)


def of_sizes(x: Floats, y: Floats, law: Laws, random: np.random.Generator) -> Laws:
    """Sizes are drawn with replacement, each with all its runs; samples of one size alone are left out."""
    places, of = np.unique(x, return_inverse=True)
    counts = random.multinomial(len(places), np.full(len(places), 1 / len(places)), 2 * DRAWS)
    weights = counts[(counts > 0).sum(axis=1) > 1][:DRAWS][:, of]
    u, total = x - law.middle, weights.sum(axis=1)
    mean_u, mean_y = weights @ u / total, weights @ y / total
    slope = (weights @ (u * y) / total - mean_u * mean_y) / (weights @ u**2 / total - mean_u**2)
    return Laws(np.full(len(slope), -np.inf), mean_y - slope * mean_u, -slope, law.middle)


# --- tables ---------------------------------------------------------------------------------------------------------


def coverage_table(
    replicates: int, seed: int, designs: Sequence[Scenario] | None = None, gates: bool = True, peers: bool = True
) -> list[Row]:
    """A row for each design, procedure and quantity: coverage, its simulation error, median width.

    Args:
        replicates: data sets of each design.
        seed: of the simulation.
        designs: all of `scenarios()` when None.
        gates: whether the gate is judged too.
        peers: whether the two bootstraps stand beside it.
    """
    rows = []
    for scenario in scenarios() if designs is None else designs:
        random = np.random.default_rng([seed, scenario.sizes, scenario.seeds or 0, int(1e4 * scenario.lack_of_fit)])
        hits = [_hits(scenario, random, gates, peers) for _ in range(replicates)]
        for key in dict.fromkeys(key for each in hits for key in each):
            rows.append(_row(scenario, key, [each[key] for each in hits if key in each]))
    return rows


def _hits(scenario: Scenario, random: np.random.Generator, gates: bool, peers: bool) -> Hits:
    runs, truths = simulate(scenario, random)
    found: dict[str, Iterator[tuple[str, tuple[bool, float] | None]]] = {"by size": by_size(scenario, runs, random)}
    if gates and not scenario.irreducible and scenario.models is None:
        found["gate"] = by_gate(scenario, runs, truths, random)
    if peers and not scenario.irreducible:
        found["runs resampled"] = by_bootstrap(scenario, runs, random, of_runs)
        found["sizes resampled"] = by_bootstrap(scenario, runs, random, of_sizes)
    return {(name, quantity): one for name, each in found.items() for quantity, one in each if one is not None}


def _row(scenario: Scenario, key: tuple[str, str], hits: Sequence[tuple[bool, float]]) -> Row:
    held, widths = zip(*hits, strict=True)
    coverage = float(np.mean(held))
    return {
        **scenario.named(),
        "procedure": key[0],
        "quantity": key[1],
        "coverage": coverage,
        "error": (0.95 * 0.05 / len(held)) ** 0.5,
        "width": float(np.median(widths)),
        "data_sets": len(held),
    }


def aligned(rows: Sequence[Row]) -> str:
    """The table as text, a column for each procedure and quantity, coverage with the median width."""
    names = list(dict.fromkeys((row["procedure"], row["quantity"]) for row in rows))
    design = ("law", "sizes", "seeds", "lack_of_fit", "luck", "models")
    cells: dict[tuple[Any, ...], dict[tuple[str, str], str]] = {}
    for row in rows:
        mine = cells.setdefault(tuple(row[name] for name in design), {})
        mine[row["procedure"], row["quantity"]] = f"{row['coverage']:.3f} ({row['width']:.2g})"
    head = [*design, *(f"{quantity}, {procedure}" for procedure, quantity in names)]
    table = [head] + [[*map(str, key), *(each.get(name, "") for name in names)] for key, each in cells.items()]
    return "\n".join(" | ".join(row) for row in table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--laws", nargs="+", choices=["plain", "irreducible"], default=["plain", "irreducible"])
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    began, rows = time.perf_counter(), []
    for scenario in scenarios(options.laws):
        mine = coverage_table(options.replicates, options.seed, [scenario])
        print(aligned(mine), flush=True)
        rows += mine
    worst = [min(mine, key=lambda row: float(row["coverage"])) for mine in _by_quantity(rows).values()]
    for row in worst:
        print(f"lowest: {row['quantity']}, {row['procedure']}: {row['coverage']:.3f} of {row}", flush=True)
    print(f"{time.perf_counter() - began:.0f} s")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def _by_quantity(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["procedure"], row["quantity"]), []).append(row)
    return found


if __name__ == "__main__":
    main()
