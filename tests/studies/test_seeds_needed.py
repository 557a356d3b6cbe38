"""`lit-llm plan --power`: where the scatter comes from, and the seeds that follow; judged by statsmodels."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from statsmodels.stats.power import TTestPower
from typer.testing import CliRunner

from lit_llm.cli import app
from lit_llm.config.problems import InputError
from lit_llm.store.store import Store
from lit_llm.studies.load import load_study
from lit_llm.studies.plan import plan
from lit_llm.studies.seeds_needed import PowerPlan, seeds_needed
from tests.studies.chosen_results import NLL, finish

Study = Callable[..., Path]
ARMS = "arms: {a: {}, b: {model: {attention: {output_norm: none}}}, c: {model: {attention: {qkv_norm: []}}}}\n"
VALUES = {"a": [3.0, 3.1, 2.9], "b": [3.1, 3.0, 2.95], "c": [3.3, 3.41, 3.18]}


@pytest.fixture
def place(tmp_path: Path) -> Store:
    return Store(tmp_path / "store").open()


def asked(path: Path, store: Store, difference: float = 0.05, pilot: str | None = None) -> PowerPlan:
    return seeds_needed(plan(load_study(path), built=False), store, difference, pilot)


def sd(arm: str) -> float:
    return statistics.stdev(x - y for x, y in zip(VALUES[arm], VALUES["a"], strict=True))


def seeds_by_statsmodels(difference: float, scatter: float, level: float) -> int:
    exact = TTestPower().solve_power(effect_size=difference / scatter, power=0.8, alpha=level)
    return max(2, math.ceil(float(np.squeeze(exact))))


def report(path: Path, store: Store) -> None:
    """As a study that ran: with its folder and its report."""
    store.study(load_study(path).study.study).mkdir(parents=True)
    result = CliRunner().invoke(app, ["report", str(path), "--store", str(store.root)])
    assert result.exit_code == 0, result.output


def test_the_studys_own_runs_come_first(write_study: Study, place: Store) -> None:
    """Each arm's own scatter with three seeds; the level is Bonferroni's under Holm."""
    path = write_study("own", ARMS + "compare: {correction: holm}", seeds=[0, 1, 2])
    finish(load_study(path), place, VALUES)
    found = asked(path, place)
    assert found.level == pytest.approx(0.025)
    assert [(row.arm, row.baseline, row.source) for row in found.rows] == [
        (arm, "a", "this study, 3 seeds") for arm in "bc"
    ]
    assert [row.sd for row in found.rows] == pytest.approx([sd("b"), sd("c")])
    assert [row.seeds for row in found.rows] == [seeds_by_statsmodels(0.05, sd(arm), 0.025) for arm in "bc"]
    # Its own search for the difference ends too early here; the power at ours is what was asked for.
    shown = [TTestPower().power((row.detectable or 0) / sd(row.arm), 3, 0.025) for row in found.rows]
    assert shown == pytest.approx([0.8, 0.8], abs=1e-6)
    assert all(row.cautious_seeds is None or row.cautious_seeds >= (row.seeds or 0) for row in found.rows)
    assert "0.05 / 2 arms" in found.notes[0]


def test_with_two_seeds_the_arms_of_the_study_are_pooled(write_study: Study, place: Store) -> None:
    path = write_study("own", ARMS, seeds=[0, 1])
    finish(load_study(path), place, VALUES)
    found = asked(path, place)
    two = [statistics.stdev(x - y for x, y in zip(VALUES[arm][:2], VALUES["a"][:2], strict=True)) for arm in "bc"]
    pooled = (statistics.fmean(each**2 for each in two)) ** 0.5
    assert [row.sd for row in found.rows] == pytest.approx([pooled, pooled])
    assert {row.source for row in found.rows} == {"this study, pooled over 2 arms"}


def by_hand(store: Store, study: str, metric: str, parameters: float) -> None:
    """The runs.csv of a report, of one arm that scatters far more than those of `VALUES`."""
    rows = [
        f"{arm},a,{seed},done,{parameters},5000,{value}"
        for arm, values in (("a", (1.0, 1.0)), ("b", (1.0, 9.0)))
        for seed, value in enumerate(values)
    ]
    store.study(study).mkdir(parents=True)
    head = f"arm,baseline,seed,state,parameters,tokens,{metric}"
    (store.study(study) / "runs.csv").write_text("\n".join([head, *rows, ""]))


def test_without_runs_the_nearest_study_of_the_store_with_the_same_metric(write_study: Study, place: Store) -> None:
    """The planned arm has 14 thousand parameters; those of `earlier` have 1,000, others are farther or measure
    something else."""
    earlier = write_study("earlier", ARMS, seeds=[0, 1, 2])
    finish(load_study(earlier), place, VALUES)
    report(earlier, place)
    by_hand(place, "as_large", "val/bits_per_byte", 14_000)
    by_hand(place, "far", NLL, 1e9)
    new = write_study("new", "arms: {x: {}, y: {extends: decllm-tiny}}", [5])
    (row,) = asked(new, place).rows
    assert row.source.startswith("earlier, pooled over 2 arms, far: 0.0")
    assert row.sd == pytest.approx(statistics.fmean([sd("b") ** 2, sd("c") ** 2]) ** 0.5)
    assert row.detectable is None  # one seed is planned
    (place.study("earlier") / "runs.csv").write_text("arm,seed\nx")
    (next_best,) = asked(new, place).rows
    assert next_best.source.startswith("far, pooled over 1 arm, far: ")


def test_a_pilot_is_asked_where_it_is_named(write_study: Study, place: Store) -> None:
    pilot = write_study("pilot", ARMS, seeds=[0, 1, 2])
    path = write_study("new", ARMS.replace("c:", "d:"), seeds=[0])
    with pytest.raises(InputError, match="pilot has no arm with test/target_nll in two seeds"):
        asked(path, place, pilot=str(pilot))
    finish(load_study(pilot), place, VALUES)
    found = asked(path, place, pilot=str(pilot))
    assert [row.source for row in found.rows] == ["pilot pilot, 3 seeds", "pilot pilot, pooled over 2 arms"]


def test_without_any_scatter_the_plan_says_how_to_get_one(write_study: Study, place: Store) -> None:
    path = write_study("first", ARMS + "more_seeds: {max: 6}", seeds=[0, 1, 2])
    result = CliRunner().invoke(app, ["plan", str(path), "--store", str(place.root), "--power", "0.02"])
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "run this study with `seeds: [0, 1, 2]` first" in text
    assert "the level of the last of 4 interim analyses is" in text


def test_the_command_prints_the_table_and_its_json(write_study: Study, place: Store) -> None:
    path = write_study("own", ARMS, seeds=[0, 1, 2])
    finish(load_study(path), place, VALUES)
    command = ["plan", str(path), "--store", str(place.root)]
    shown = CliRunner().invoke(app, [*command, "--power", "0.05"])
    assert f"seeds that show a difference of 0.05 in {NLL} with 80% power" in shown.output
    assert "this study, 3 seeds" in shown.output
    power = json.loads(CliRunner().invoke(app, [*command, "--power", "0.05", "--json"]).output)["power"]
    assert [row["seeds"] for row in power["rows"]] == [seeds_by_statsmodels(0.05, sd(arm), 0.05) for arm in "bc"]
    refused = CliRunner().invoke(app, [*command, "--pilot", str(path)])
    assert isinstance(refused.exception, InputError)
