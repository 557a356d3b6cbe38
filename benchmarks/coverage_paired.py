"""Coverage, power and false alarms of every procedure for the differences of a study's arms, by simulation.

    python benchmarks/coverage_paired.py [--replicates 2000] [--seed 0] [--csv table.csv]

A study is y[arm, seed]; every arm is compared with arm 0 over the seeds that both have. The scenarios are designs that
a user can write: arms that scatter alike, families that react to a seed in their own way, an arm or a baseline that
scatters more, heavy tails, missing runs and stopped arms. Coverage is that of nominal 95% intervals, in the group of
arms of a scenario where it is lowest. Width is relative to the paired t interval of the same data. Power is for a true
difference of two residual standard deviations. The printed tables hold the worst scenario of each procedure.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtrc, stdtr, stdtrit

from lit_llm.statistics import contrasts
from lit_llm.statistics.multiple_comparisons import dunnett_critical

Floats = NDArray[np.float64]
Families = NDArray[np.int64]
Row = dict[str, Any]

LEVEL = 0.05
EFFECT = 2.0
"""True difference of the power columns, in residual standard deviations."""
ARMS, SEEDS = (3, 4, 8, 21, 60), (2, 3, 5, 10)


# --- procedures: y[replicate, arm, seed], NaN where a run is missing, and the declared family of each arm ------------


@dataclass(frozen=True)
class Estimates:
    """Differences from arm 0 with their standard errors and degrees of freedom, [replicate, arm - 1] each.

    NaN where a procedure gives no interval.
    """

    mean: Floats
    error: Floats
    degrees: Floats


def paired(y: Floats, families: Families) -> Estimates:
    """Each difference by its own paired t, over the seeds that both arms have."""
    deltas = y[:, 1:] - y[:, :1]
    present = np.isfinite(deltas)
    count = present.sum(axis=2)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(present, deltas, 0).sum(axis=2) / count
        squares = (np.where(present, deltas - mean[:, :, None], 0) ** 2).sum(axis=2)
        error = np.sqrt(np.where(count > 1, squares / (count - 1) / count, np.nan))
    return Estimates(mean, error, np.where(count > 1, count - 1.0, np.nan))


def moderated(y: Floats, families: Families) -> Estimates:
    """The paired t, its variance moderated by the other differences: the library's own formula."""
    plain = paired(y, families)
    nu = np.nan_to_num(plain.degrees)
    variance = np.nan_to_num(plain.error) ** 2 * (nu + 1)
    squares = nu * variance
    other_degrees = nu.sum(axis=1, keepdims=True) - nu
    with np.errstate(invalid="ignore", divide="ignore"):
        others = np.where(other_degrees > 0, (squares.sum(axis=1, keepdims=True) - squares) / other_degrees, np.nan)
        variance, degrees = contrasts.moderated(variance, nu, others)
    known = nu > 0
    return Estimates(
        plain.mean, np.where(known, np.sqrt(variance / (nu + 1)), np.nan), np.where(known, degrees, np.nan)
    )


def pooled(y: Floats, families: Families) -> Estimates:
    """The residual variance of the additive model arm + seed, pooled over all arms."""
    own = paired(y, families)
    squares, degrees = additive(y)
    degrees = np.where(degrees > 0, degrees, np.nan)[:, None]
    error = np.sqrt(2 * squares[:, None] / degrees / (own.degrees + 1))
    return Estimates(own.mean, error, np.where(np.isfinite(error), degrees, np.nan))


def pooled_after_bartlett(y: Floats, families: Families) -> Estimates:
    """Pooled where no run is missing and Bartlett's test sees no unequal scatter, else the paired t."""
    own, arms, degrees = paired(y, families), y.shape[1], y.shape[2] - 1
    rows = (residuals(y) ** 2).sum(axis=2)
    with np.errstate(divide="ignore"):
        unequal = np.log(rows.mean(axis=1)) - np.log(rows).mean(axis=1)
    bias = 1 + (arms - 1 / arms) / (3 * degrees * (arms - 1))
    alike = (chdtrc(arms - 1, arms * degrees * unequal / bias) >= 0.05)[:, None]  # False at NaN: a run is missing
    variance = rows.sum(axis=1, keepdims=True) / ((arms - 1) * degrees)
    error = np.where(alike, np.sqrt(2 * variance / (degrees + 1)), own.error)
    return Estimates(own.mean, error, np.where(alike, (arms - 1.0) * degrees, own.degrees))


def mixed(y: Floats, families: Families) -> Estimates:
    """Mixed model arm + seed + family x seed, Satterthwaite's degrees of freedom; complete data and up to two families.

    The moments' closed form, which is REML's where that estimates no variance as zero but that of family x seed.
    """
    labels, sizes = np.unique(families, return_counts=True)
    if len(labels) == 1 or not np.isfinite(y).all():
        nothing = np.full((y.shape[0], y.shape[1] - 1), np.nan)
        return pooled(y, families) if len(labels) == 1 else Estimates(nothing, nothing, nothing)
    additively, seeds = pooled(y, families), y.shape[2]
    within_degrees = (y.shape[1] - 2) * (seeds - 1)
    within = sum((residuals(y[:, families == label]) ** 2).sum(axis=(1, 2)) for label in labels) / within_degrees
    one, two = (y[:, families == label].mean(axis=1) for label in labels)
    between = (one - two).var(axis=1, ddof=1)
    shares = (1 / sizes).sum()
    lone = (2 - shares) * within
    degrees = (between + lone) ** 2 / (between**2 / (seeds - 1) + lone**2 / within_degrees)
    other = families[1:] != families[0]
    variance = np.where(other, (between + lone)[:, None], 2 * within[:, None])
    family_varies = (between > shares * within)[:, None]
    return Estimates(
        additively.mean,
        np.where(family_varies, np.sqrt(variance / seeds), additively.error),
        np.where(family_varies, np.where(other, degrees[:, None], within_degrees), additively.degrees),
    )


def residuals(y: Floats) -> Floats:
    """Of the additive model arm + seed; NaN for a study with missing runs."""
    centred = y - y.mean(axis=2, keepdims=True)
    return centred - centred.mean(axis=1, keepdims=True)


def additive(y: Floats) -> tuple[Floats, Floats]:
    """Residual sum of squares of least squares on arm + seed, and its degrees of freedom, of every study."""
    present = np.isfinite(y)
    if present.all():
        return (residuals(y) ** 2).sum(axis=(1, 2)), np.full(len(y), (y.shape[1] - 1.0) * (y.shape[2] - 1))
    weight = present.astype(float)
    per_arm = np.maximum(weight.sum(axis=2, keepdims=True), 1)
    centred = np.where(present, y - np.where(present, y, 0).sum(axis=2, keepdims=True) / per_arm, 0)
    # Normal equations of the seeds, the arms eliminated: singular by one for each group of seeds that no arm links.
    normal = -np.matmul(weight.transpose(0, 2, 1), weight / per_arm)
    normal[:, range(y.shape[2]), range(y.shape[2])] += weight.sum(axis=1)
    values, vectors = np.linalg.eigh(normal)
    regular = values > 1e-9
    rotated = np.einsum("rst,rs->rt", vectors, centred.sum(axis=1))
    explained = np.where(regular, rotated**2 / np.where(regular, values, 1), 0).sum(axis=1)
    squares = np.maximum((centred**2).sum(axis=(1, 2)) - explained, 0)
    rank = regular.sum(axis=1) + present.any(axis=2).sum(axis=1)
    return squares, present.sum(axis=(1, 2)) - rank.astype(float)


Procedure = Callable[[Floats, Families], Estimates]
Critical = Callable[[int, Floats], Floats]
"""What |t| of that many differences has to exceed, by their degrees of freedom."""
Adjust = Callable[[Floats], Floats]
"""Adjusted p-values from p[replicate, arm - 1]; a NaN is no test."""


def alone(differences: int, degrees: Floats) -> Floats:
    """For one difference at a time."""
    return by_value(lambda df: -float(stdtrit(df, LEVEL / 2)), degrees)


def bonferroni(differences: int, degrees: Floats) -> Floats:
    """For all differences at once."""
    return by_value(lambda df: -float(stdtrit(df, LEVEL / differences / 2)), degrees)


def dunnett(differences: int, degrees: Floats) -> Floats:
    """For all differences at once, whose arms share the baseline and scatter alike."""
    return by_value(lambda df: dunnett_critical(LEVEL, differences, df), degrees, table=12)


def by_value(function: Callable[[float], float], x: Floats, table: int = 1000) -> Floats:
    """The function at every entry; NaN stays NaN. Beyond so many different entries from a table, even in 1/x."""
    values, place = np.unique(x, return_inverse=True)
    if len(values) > table:
        inverse = np.linspace(1 / np.nanmax(values), 1 / np.nanmin(values), table)
        return np.interp(1 / x, inverse, [function(1 / value) for value in inverse])
    return np.array([function(value) if np.isfinite(value) else np.nan for value in values])[place].reshape(x.shape)


def unadjusted(p: Floats) -> Floats:
    return p


def holm(p: Floats) -> Floats:
    """By Holm's procedure, for each study."""
    order = np.argsort(p, axis=1)  # NaN last
    left = np.isfinite(p).sum(axis=1, keepdims=True) - np.arange(p.shape[1])
    ordered = np.maximum.accumulate(np.take_along_axis(p, order, axis=1) * left, axis=1)
    return restored(ordered, order)


def benjamini_hochberg(p: Floats) -> Floats:
    """By the procedure of Benjamini and Hochberg, for each study."""
    order = np.argsort(p, axis=1)
    tests = np.isfinite(p).sum(axis=1, keepdims=True)
    scaled = np.take_along_axis(p, order, axis=1) * tests / np.arange(1, p.shape[1] + 1)
    return restored(np.fmin.accumulate(scaled[:, ::-1], axis=1)[:, ::-1], order)


def restored(ordered: Floats, order: NDArray[np.int64]) -> Floats:
    adjusted = np.empty_like(ordered)
    np.put_along_axis(adjusted, order, np.minimum(ordered, 1), axis=1)
    return adjusted


PROCEDURES: dict[str, Procedure] = {
    "paired t": paired,
    "moderated": moderated,
    "pooled": pooled,
    "pooled after Bartlett": pooled_after_bartlett,
    "mixed": mixed,
}
"""Ways to a standard error: (y, families) -> mean, error and degrees of freedom of every difference."""
SIMULTANEOUS: dict[str, tuple[str, Critical]] = {
    "simultaneous: moderated": ("moderated", bonferroni),
    "simultaneous: Dunnett": ("pooled", dunnett),
}
"""Intervals for all differences at once, beside the procedures' intervals for one at a time."""
CORRECTIONS: dict[str, tuple[str, Adjust]] = {
    "uncorrected: moderated": ("moderated", unadjusted),
    "Holm: paired t": ("paired t", holm),
    "Holm: moderated": ("moderated", holm),
    "BH: moderated": ("moderated", benjamini_hochberg),
    "Holm: mixed": ("mixed", holm),
}
"""Ways to call differences by their p-values; those of Dunnett are its intervals that exclude zero."""
INTERVALS: dict[str, tuple[str, Critical]] = {name: (name, alone) for name in PROCEDURES} | SIMULTANEOUS


# --- scenarios -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """A design, and how its runs scatter beside the luck of the seed, which all arms share."""

    name: str
    arms: int
    seeds: int
    families: str = "one"
    """one | half (the second half of the arms is another family) | arm, baseline (one of another family)."""
    family_variance: float = 0.0
    """Variance of family x seed, in residual variances."""
    declared: bool = True
    """Whether the procedures know the families."""
    wide: int | None = None
    """The arm that scatters more."""
    factor: float = 3.0
    """By what the wide arm's standard deviation is multiplied."""
    heavy_tails: bool = False
    """Residuals of Student's t with three degrees of freedom."""
    runs: str = "all"
    """all | missing (each with a chance of 10%) | stopped (every second arm has the first half of the seeds only)."""
    harsh: bool = False
    """Beyond what the procedures claim; left out of the worst of all scenarios."""

    def family_of(self) -> Families:
        """The true family of every arm."""
        first = {"one": self.arms, "half": (self.arms + 1) // 2, "arm": self.arms - 1, "baseline": 1}[self.families]
        return (np.arange(self.arms) >= first).astype(int)

    def groups(self) -> list[NDArray[np.int64]]:
        """Differences, numbered from 0, whose intervals behave alike."""
        family, seeds = self.family_of(), self.present()
        kinds = [
            (family[a] == family[0], a == self.wide, bool(seeds[a, -1]) if self.runs == "stopped" else True)
            for a in range(1, self.arms)
        ]
        return [np.flatnonzero([kind == one for kind in kinds]) for one in dict.fromkeys(kinds)]

    def present(self) -> NDArray[np.bool_]:
        """Which runs a study with stopped arms has."""
        late = np.arange(self.seeds) >= (self.seeds + 1) // 2
        return ~((np.arange(self.arms) % 2 == 1)[:, None] & late & (self.runs == "stopped"))


def scenarios(arms: Iterable[int] = ARMS, seeds: Iterable[int] = SEEDS) -> list[Scenario]:
    """Every way to scatter, with all runs, missing runs and stopped arms, at every size."""
    kinds: dict[str, dict[str, Any]] = {"iid": {}}
    kinds |= {
        f"two families, variance {ratio:g}": {"families": "half", "family_variance": ratio} for ratio in (0, 0.5, 1, 3)
    }
    kinds["two families, undeclared"] = {"families": "half", "family_variance": 1.0, "declared": False}
    kinds["an arm of another family"] = {"families": "arm", "family_variance": 1.0}
    kinds["a baseline of another family"] = {"families": "baseline", "family_variance": 1.0}
    kinds |= {"an arm 3 x as wide": {"wide": -1}, "a baseline 3 x as wide": {"wide": 0}}
    kinds["t3 tails"] = {"heavy_tails": True}
    kinds["an arm 10 x as wide"] = {"wide": -1, "factor": 10.0, "harsh": True}
    every = []
    for size, count, runs, (name, kind) in itertools.product(arms, seeds, ("all", "missing", "stopped"), kinds.items()):
        wide = {"wide": kind["wide"] % size} if "wide" in kind else {}
        suffix = {"all": "", "missing": ", 10% missing", "stopped": ", stopped arms"}[runs]
        every.append(Scenario(name + suffix, size, count, runs=runs, **(kind | wide)))
    return every


def simulate(scenario: Scenario, replicates: int, rng: np.random.Generator) -> Floats:
    """y[replicate, arm, seed] of studies whose arms do not differ; NaN where a run is missing."""
    shape = (replicates, scenario.arms, scenario.seeds)
    y = rng.standard_t(3, shape) / np.sqrt(3) if scenario.heavy_tails else rng.standard_normal(shape)
    if scenario.wide is not None:
        y[:, scenario.wide] *= scenario.factor
    y += rng.standard_normal((replicates, 1, scenario.seeds))
    if scenario.family_variance:
        reaction = np.sqrt(scenario.family_variance) * rng.standard_normal((replicates, 2, scenario.seeds))
        y += reaction[:, scenario.family_of()]
    if scenario.runs == "missing":
        y[rng.random(shape) < 0.1] = np.nan
    y[:, ~scenario.present()] = np.nan
    return y


# --- the table -------------------------------------------------------------------------------------------------------


def coverage_table(replicates: int, seed: int, designs: Sequence[Scenario] | None = None) -> list[Row]:
    """A row for every scenario (all of `scenarios()` by default) and procedure; None where a column has no meaning."""
    rows = []
    for number, scenario in enumerate(scenarios() if designs is None else designs):
        y = simulate(scenario, replicates, np.random.default_rng([seed, number]))
        families = scenario.family_of() if scenario.declared else np.zeros(scenario.arms, int)
        estimates = {name: procedure(y, families) for name, procedure in PROCEDURES.items()}
        single = {name: alone(scenario.arms - 1, found.degrees) * found.error for name, found in estimates.items()}
        for name, (procedure, critical) in INTERVALS.items():
            found = estimates[procedure]
            half = single[procedure] if critical is alone else critical(scenario.arms - 1, found.degrees) * found.error
            rows.append(_row(scenario, name, interval_figures(scenario, found.mean, half, single["paired t"])))
        p = {name: p_values(estimates[name]) for name in dict.fromkeys(name for name, _ in CORRECTIONS.values())}
        for name, (procedure, adjust) in CORRECTIONS.items():
            rows.append(_row(scenario, name, correction_figures(*p[procedure], adjust)))
    return rows


FIGURES = ("coverage", "width", "power", "fwer", "fdr")


def _row(scenario: Scenario, procedure: str, figures: Row) -> Row:
    row = {"scenario": scenario.name, "arms": scenario.arms, "seeds": scenario.seeds, "procedure": procedure}
    return row | {name: figures.get(name) for name in FIGURES} | {"harsh": scenario.harsh}


def interval_figures(scenario: Scenario, mean: Floats, half: Floats, paired_half: Floats) -> Row:
    """Coverage, relative width, power, and the share of studies without a true difference that call any."""
    known = np.isfinite(half)
    if not known.any():
        return {}
    outside = known & (np.abs(mean) > half)
    by_group = [1 - outside[:, at].sum() / known[:, at].sum() for at in scenario.groups() if known[:, at].any()]
    called = known & (np.abs(mean + EFFECT) > half)  # an interval moves with the truth, its width does not
    return {
        "coverage": float(min(by_group)),
        "width": float(half[known].mean() / paired_half[known].mean()),
        "power": float(called.sum() / known.sum()),
        "fwer": float(outside.any(axis=1).mean()),
    }


def p_values(estimates: Estimates) -> tuple[Floats, Floats]:
    """Of the studies as they are, where no arm differs, and with a true difference in every second arm."""
    shift = EFFECT * (np.arange(estimates.mean.shape[1]) % 2 == 0)
    null, shifted = (
        2 * stdtr(estimates.degrees, -np.abs(mean) / estimates.error)
        for mean in (estimates.mean, estimates.mean + shift)
    )
    return null, shifted


def correction_figures(null: Floats, shifted: Floats, adjust: Adjust) -> Row:
    """False alarms of studies without true differences; power and false discoveries where every second arm differs."""
    known = np.isfinite(null)
    if not known.any():
        return {}
    true = np.arange(known.shape[1]) % 2 == 0
    alarms, called = adjust(null) < LEVEL, adjust(shifted) < LEVEL
    false = (called & ~true).sum(axis=1) / np.maximum(called.sum(axis=1), 1)
    power = float(called[:, true].sum() / known[:, true].sum()) if known[:, true].any() else None
    return {"power": power, "fwer": float(alarms.any(axis=1).mean()), "fdr": float(false.mean())}


AGAIN = 4
"""How many times as many data sets the worst scenarios are simulated with once more."""


def worst_of(rows: Sequence[Row], replicates: int, seed: int) -> list[Row]:
    """For every procedure and number of seeds the worst over all scenarios and arms; width and power of iid.

    The lowest of many simulated values lies below the truth of its scenario. So each worst scenario is simulated again,
    with other random numbers: `again` is what an interval covers there, and what a test errs there.
    """
    worst, lowest_of, highest_of = [], [], []
    for procedure, seeds in itertools.product(
        {**INTERVALS, **CORRECTIONS}, dict.fromkeys(row["seeds"] for row in rows)
    ):
        mine = [row for row in rows if row["procedure"] == procedure and row["seeds"] == seeds and not row["harsh"]]
        lowest = min((row for row in mine if row["coverage"] is not None), key=lambda r: r["coverage"], default=None)
        highest = max((row for row in mine if row["fwer"] is not None), key=lambda r: r["fwer"])
        plain = [row for row in mine if row["scenario"] == "iid" and row["width"] is not None]
        power = [row["power"] for row in mine if row["scenario"] == "iid"]
        fdr = [row["fdr"] for row in mine if row["fdr"] is not None]
        at = highest if lowest is None else lowest
        lowest_of.append(lowest)
        highest_of.append(highest)
        worst.append(
            {
                "procedure": procedure,
                "seeds": seeds,
                "coverage": lowest and lowest["coverage"],
                "again": None,
                "width": float(np.mean([row["width"] for row in plain])) if plain else None,
                "power": float(np.mean(power)),
                "fwer": highest["fwer"],
                "fwer again": None,
                "fdr": max(fdr) if fdr else None,
                "worst in": f"{at['arms']} arms, {at['scenario']}",
            }
        )
    chosen = {_place(row) for row in [*lowest_of, *highest_of] if row is not None}
    designs = [design for design in scenarios() if (design.name, design.arms, design.seeds) in chosen]
    again = {(*_place(row), row["procedure"]): row for row in coverage_table(AGAIN * replicates, seed + 1, designs)}
    for row, lowest, highest in zip(worst, lowest_of, highest_of, strict=True):
        if lowest is not None:
            row["again"] = again[*_place(lowest), row["procedure"]]["coverage"]
        row["fwer again"] = again[*_place(highest), row["procedure"]]["fwer"]
    return worst


def _place(row: Row) -> tuple[str, int, int]:
    """What tells a scenario from the others."""
    return row["scenario"], row["arms"], row["seeds"]


def aligned(rows: Sequence[Row]) -> str:
    """The rows as text in columns."""
    cells = [list(rows[0])]
    cells += [
        ["-" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="where to write the row of every scenario and procedure")
    options = parser.parse_args()
    began = time.perf_counter()
    rows = coverage_table(options.replicates, options.seed)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    print(f"{options.replicates} studies a scenario, {time.perf_counter() - began:.0f} s\n")
    print(aligned(worst_of(rows, options.replicates, options.seed)))
    harsh = [row for row in rows if row["harsh"] and row["coverage"] is not None and row["scenario"].endswith("wide")]
    if harsh:
        print("\nBeyond what is claimed\n")
        shown = ("scenario", "arms", "seeds", "procedure", "coverage", "width")
        print(aligned([{key: row[key] for key in shown} for row in harsh]))


if __name__ == "__main__":
    main()
