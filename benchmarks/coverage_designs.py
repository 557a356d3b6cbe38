"""Coverage and errors of what a study shows beside its arms: effects, factors, documents, diverged runs; by simulation.

    python benchmarks/coverage_designs.py [--replicates 2000] [--seed 0]

No arm differs in truth, so an interval that excludes zero, a p-value below 0.05 and a verdict are errors. Effects are
of a factorial of three factors with two levels; factors with more levels are tested in a factorial of 3 x 2; documents
are of lognormal sizes; a study with diverged runs loses the half of an arm's runs that came out worst.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from coverage_paired import Floats, aligned
from scipy.special import stdtrit

from lit_llm.statistics import contrasts
from lit_llm.statistics.anova import FactorLayout, anova
from lit_llm.statistics.baselines import Noise, block_differences
from lit_llm.statistics.comparison import compare
from lit_llm.statistics.document_noise import Influence, influence
from lit_llm.statistics.run_results import RunResult

Row = dict[str, Any]
SEEDS = (2, 3, 5, 10)


def coverage_table(replicates: int, seed: int) -> list[Row]:
    """A row for every design, scenario, number of seeds and procedure: coverage, or rate of errors."""
    random = np.random.default_rng(seed)
    slow = max(50, replicates // 2)  # through the library's own functions, study by study
    return [
        *effects_rows(random, replicates),
        *factor_rows(random, slow),
        *document_rows(random, slow),
        *divergence_rows(random, max(50, slow // 4)),
    ]


# --- effects of factors with two levels ------------------------------------------------------------------------------

CELLS = np.array(list(itertools.product((-1, 1), repeat=3)))
EFFECTS = [members for size in (1, 2) for members in itertools.combinations(range(3), size)]
SIGNS = np.array([np.prod(CELLS[:, list(members)], axis=1) for members in EFFECTS])
"""Three main effects and three interactions, a row each, over the eight arms."""
EFFECT_SCENARIOS: dict[str, dict[str, float]] = {
    "iid": {},
    "a factor that reacts to the seed": {"reaction": 1.0},
    "a factor that reacts to the seed, 10 x": {"reaction": 10.0},
    "an arm 3 x as wide": {"wide": 3.0},
    "an arm 10 x as wide": {"wide": 10.0},
    "t3 tails": {"heavy_tails": 1.0},
}


def effects_rows(random: np.random.Generator, replicates: int) -> Iterator[Row]:
    for (scenario, kind), seeds in itertools.product(EFFECT_SCENARIOS.items(), SEEDS):
        shape = (replicates, 8, seeds)
        y = random.standard_t(3, shape) if kind.get("heavy_tails") else random.standard_normal(shape)
        y[:, -1] *= kind.get("wide", 1.0)
        y += kind.get("reaction", 0.0) * CELLS[:, 0, None] * random.standard_normal((replicates, 1, seeds))
        samples = np.einsum("ea,ras->res", SIGNS, y) / 4
        mean, own = samples.mean(axis=2), samples.var(axis=2, ddof=1)
        others = (own.sum(axis=1, keepdims=True) - own) / (len(SIGNS) - 1)
        spreads = {"paired t": (own, np.full_like(own, seeds - 1.0))}
        spreads["moderated"] = contrasts.moderated(own, np.full_like(own, seeds - 1.0), others)
        residuals = y - y.mean(axis=2, keepdims=True)
        residuals -= residuals.mean(axis=1, keepdims=True)
        common = (residuals**2).sum(axis=(1, 2)) / (7 * (seeds - 1)) / 2  # of an effect over eight arms
        spreads["pooled"] = (np.repeat(common[:, None], len(SIGNS), 1), np.full_like(own, 7.0 * (seeds - 1)))
        for procedure, (variance, degrees) in spreads.items():
            half = -stdtrit(degrees, 0.025) * np.sqrt(variance / seeds)
            yield row("effects", scenario, seeds, procedure, coverage=worst(np.abs(mean) <= half))


def worst(covered: Floats) -> float:
    """Coverage of the effect, or document, where it is lowest."""
    return float(covered.mean(axis=0).min())


# --- factors with several levels -------------------------------------------------------------------------------------


def factor_rows(random: np.random.Generator, replicates: int) -> Iterator[Row]:
    places = dict(enumerate(itertools.product(range(3), range(2))))
    layout = FactorLayout("", {"a": "xyz", "b": "01"}, {str(arm): place for arm, place in places.items()})
    for wild, seeds in itertools.product((0.0, 1.0, 3.0, 10.0), SEEDS):
        errors, covered = np.zeros(3), []
        for _ in range(replicates):
            y = random.standard_normal((6, seeds)) + random.standard_normal(seeds)
            reaction = wild * random.standard_normal(seeds)
            y[[arm for arm, place in places.items() if place[0] == 2]] += reaction
            table = anova(layout, {str(arm): dict(enumerate(values)) for arm, values in enumerate(y)})
            errors += [term.p is not None and term.p < 0.05 for term in table.terms]
            covered.append([abs(level.difference.mean) <= level.difference.half_width() for level in table.levels])  # type: ignore[union-attr]
        scenario = "iid" if not wild else f"a level that reacts to the seed, {wild:g} x"
        yield row("factor F", scenario, seeds, "Greenhouse-Geisser", error=float(errors.max() / replicates))
        yield row("levels", scenario, seeds, "moderated", coverage=worst(np.array(covered)))


# --- documents -------------------------------------------------------------------------------------------------------


def document_rows(random: np.random.Generator, replicates: int) -> Iterator[Row]:
    for documents, seeds, (by_seed, by_document) in itertools.product(
        (10, 27, 100), SEEDS, ((1.0, 0.0), (1.0, 1.0), (0.0, 1.0), (0.3, 1.0))
    ):
        covered = np.zeros(2)
        for _ in range(replicates):
            d = _judged_on_documents(random, documents, seeds, by_seed, by_document)
            covered += [d.low <= 0 <= d.high, d.seeds_low <= 0 <= d.seeds_high]
        scenario = f"{documents} documents, sd {by_seed:g} by seed, {by_document:g} by document"
        for procedure, count in zip(("seeds and documents", "seeds alone"), covered, strict=True):
            yield row("documents", scenario, seeds, procedure, coverage=float(count / replicates))


def _judged_on_documents(
    random: np.random.Generator, documents: int, seeds: int, by_seed: float, by_document: float
) -> Any:
    """Difference of two arms; by_seed: of the mean loss, by_document: of the mean over all documents."""
    weights = random.lognormal(0, 1, documents)
    share = weights / weights.sum()
    shift = random.normal(0, by_document / np.sqrt((share**2).sum()), documents)
    values: dict[str, dict[int, float]] = {"0": {}, "1": {}}
    influences: dict[tuple[str, int], Influence] = {}
    for seed in range(seeds):
        losses = {"0": np.zeros(documents), "1": shift + by_seed * random.standard_normal()}
        for arm, loss in losses.items():
            loss = loss + 0.1 * random.standard_normal(documents)
            values[arm][seed] = float(share @ loss)
            units = {f"{g:03}": (x * w, w) for g, (x, w) in enumerate(zip(loss, weights, strict=True))}
            influences[arm, seed] = influence(units)  # type: ignore[assignment]
    return block_differences(values, "0", Noise(influences=influences))["1"]


# --- diverged runs ---------------------------------------------------------------------------------------------------


def divergence_rows(random: np.random.Generator, replicates: int) -> Iterator[Row]:
    metric = "val/target_nll"
    for seeds in (4, 10):
        called = {"means of what is left": 0, "verdict": 0}
        for _ in range(replicates):
            y = random.standard_normal((2, seeds))
            worst_half = set(np.argsort(y[1] - y[0])[seeds - seeds // 2 :].tolist())
            runs = [
                RunResult(
                    str(arm),
                    "0",
                    seed,
                    state,
                    {"metrics": {metric: float(y[arm, seed])}, "parameters": 1, "flops": 1.0},
                )
                for arm in (0, 1)
                for seed in range(seeds)
                for state in ["diverged" if arm and seed in worst_half else "done"]
            ]
            called["verdict"] += compare(runs, metric).rows[1].verdict == "better"
            kept = [run for run in runs if run.state == "done"]
            called["means of what is left"] += compare(kept, metric).rows[1].verdict == "better"
        for procedure, count in called.items():
            yield row("divergence", "the worse half diverges", seeds, procedure, error=count / replicates)


def row(
    design: str,
    scenario: str,
    seeds: int,
    procedure: str,
    coverage: float | None = None,
    error: float | None = None,
) -> Row:
    return {
        "design": design,
        "scenario": scenario,
        "seeds": seeds,
        "procedure": procedure,
        "coverage": coverage,
        "error": error,
    }


def worst_of(rows: list[Row]) -> list[Row]:
    """For every design, procedure and number of seeds the scenario with the lowest coverage or the most errors."""
    found = []
    for key in dict.fromkeys((r["design"], r["procedure"], r["seeds"]) for r in rows):
        mine = [r for r in rows if (r["design"], r["procedure"], r["seeds"]) == key]
        found.append(min(mine, key=lambda r: r["coverage"] if r["coverage"] is not None else -r["error"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(aligned(worst_of(coverage_table(options.replicates, options.seed))))


if __name__ == "__main__":
    main()
