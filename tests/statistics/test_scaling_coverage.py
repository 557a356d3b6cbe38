"""Do intervals of scaling laws hold what they say? By the simulation of `benchmarks/coverage_scaling.py`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.statistics.simulated import within

FILE = Path(__file__).parents[2] / "benchmarks" / "coverage_scaling.py"
LEAST = 0.93


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    spec = importlib.util.spec_from_file_location(FILE.stem, FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[FILE.stem] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def coverage(rows: list[dict[str, Any]], procedure: str) -> dict[str, float]:
    return {row["quantity"]: row["coverage"] for row in rows if row["procedure"] == procedure}


def low(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of our procedures whose coverage lies below the least, beyond what the simulation's error explains."""
    ours = [row for row in rows if row["procedure"] in ("by size", "gate")]
    return [row for row in ours if row["coverage"] < LEAST - within(LEAST, row["data_sets"])]


def test_five_seeds_and_lack_of_fit_leave_the_intervals_of_sizes_right_and_break_those_of_runs(
    simulation: ModuleType,
) -> None:
    """Nine sizes, 3.5% lack of fit: resampled runs cover about 0.56 of exponents, by Student's t of a variance that
    is taken 43 / 7 times too small."""
    rows = simulation.coverage_table(60, 0, [simulation.Scenario(9, 5, 0.035)], gates=False)
    assert low(rows) == []
    by_run = coverage(rows, "runs resampled")
    assert by_run["exponent"] == pytest.approx(0.56, abs=within(0.56, 60))
    assert by_run["multiplier"] < 0.85


def test_few_sizes_with_unequal_seeds_hold_in_the_laws_and_in_the_gate(simulation: ModuleType) -> None:
    """And three models at three budgets each, whose deviations are not independent."""
    designs = [simulation.Scenario(4, None, off) for off in (0.0, 0.035)]
    designs.append(simulation.Scenario(3, 2, 0.035, models=3))
    rows = simulation.coverage_table(50, 1, designs, peers=False)
    assert low(rows) == []
    assert {row["quantity"] for row in rows} >= {"exponent", "multiplier", "gate: slope", "gate: projection"}


@pytest.mark.slow
def test_no_interval_of_a_plain_law_or_a_gate_covers_less_than_93_percent(simulation: ModuleType) -> None:
    """With equal seeds or not, seeds that move all sizes alike, and models that are trained at several budgets."""
    designs = simulation.scenarios(["plain"])
    assert low(simulation.coverage_table(250, 0, designs, peers=False)) == []


@pytest.mark.slow
def test_no_interval_of_a_law_with_e_covers_less_than_93_percent(simulation: ModuleType) -> None:
    assert low(simulation.coverage_table(60, 0, simulation.scenarios(["irreducible"]))) == []
