"""The simulation of studies that add seeds in rounds: false alarms, also when seeds are added later, and bias."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from lit_llm.statistics.sequential import InterimRule, Rounds, arm_statuses
from tests.statistics.simulated import within

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def simulation() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import coverage_sequential

        yield coverage_sequential
        sys.modules.pop("coverage_sequential", None)


def check(rows: list[dict[str, object]], replicates: int) -> None:
    """No procedure that is offered exceeds 5%, within simulation error; those that are not offered do."""
    for row in rows:
        value = float(row["value"])
        if row["quantity"] == "bias":
            continue
        if "not offered" in str(row["procedure"]):
            assert value > 0.05, row
        else:
            assert value <= 0.05 + within(0.05, replicates), row
    biases = [row for row in rows if row["quantity"] == "bias"]
    for naive, adjusted in zip(biases[::2], biases[1::2], strict=True):
        assert (naive["procedure"], adjusted["procedure"]) == ("naive", "bias-adjusted")
        assert naive["design"] == adjusted["design"]
        noise = 3 * float(adjusted["simulation_error"])
        assert abs(float(adjusted["value"])) < max(abs(float(naive["value"])) / 2, noise), (naive, adjusted)


def test_no_offered_procedure_exceeds_five_percent(simulation: ModuleType) -> None:
    rows = simulation.coverage_table(2000, seed=1)
    assert set(rows[0]) == {"procedure", "design", "quantity", "value", "simulation_error", "nominal"}
    check(rows, 2000)


@pytest.mark.slow
def test_no_offered_procedure_exceeds_five_percent_in_many_studies(simulation: ModuleType) -> None:
    check(simulation.coverage_table(20_000, seed=2), 20_000)


def test_the_simulation_decides_as_the_comparison_does(simulation: ModuleType) -> None:
    """The same seeds at which an arm alone with its baseline is decided, by `arm_statuses` study by study."""
    rounds = Rounds(3, 8)
    data = simulation.null_arms(np.random.default_rng(3), 60, 1, 8, effect=0.8)
    found = simulation.decided_at(data, rounds)[:, 0]
    for d, size in zip(data[:, 0], found, strict=True):
        values = {"0": dict.fromkeys(range(8), 0.0), "1": dict(enumerate(map(float, d)))}
        statuses = arm_statuses(values, "0", InterimRule("val/target_nll", range(8), rounds))["1"]
        assert (statuses.seeds if statuses.decided else 0) == size
