"""The gate of a scaling ladder: planted laws, whose multipliers are known at every compute."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lit_llm.report.answer import answer
from lit_llm.report.figures import from_gate
from lit_llm.report.figures.inputs import FigureData
from lit_llm.report.tables.comparison import comparison_tables
from lit_llm.report.tables.scaling import scaling_sentences
from lit_llm.report.tables.scaling_gate import gate_tables
from lit_llm.statistics.comparison import Comparison
from lit_llm.statistics.estimates import Estimate, estimate, exponentials
from lit_llm.statistics.run_results import RunResult
from lit_llm.statistics.scaling.gate import Gate, Trend, gate
from lit_llm.statistics.scaling.laws import Laws, PowerLaw
from lit_llm.statistics.scaling.runs import ScalingRun
from lit_llm.store.store import Store
from lit_llm.studies.comparison import comparison_of
from lit_llm.studies.load import load_study
from lit_llm.studies.runs import Run, runs_of
from lit_llm.studies.scaling import Measured, ended_runs, scaling_of
from lit_llm.studies.schema import ScalingLaw
from lit_llm.training.config import TrainingConfig
from lit_llm.training.schedules import Constant, Cosine, Schedule, WarmupStableDecay

LADDER = np.geomspace(1e17, 1e20, 5)
BASE = PowerLaw(0.0, 3.5 * 1e17**0.1, 0.1)


def ladder(
    law: PowerLaw, group: str, noise: float, random: np.random.Generator, slower: float = 1.0, seeds: int = 3
) -> list[ScalingRun]:
    """Runs of five sizes at 1e12 FLOPs a second, `slower` times as slow."""
    return [
        ScalingRun(
            group,
            x,
            1.0,
            1.0,
            law.at(x) * float(np.exp(random.normal(0, noise))),
            f"{group}{at}",
            seed,
            slower * x / 1e12,
        )
        for at, x in enumerate(map(float, LADDER))
        for seed in range(seeds)
    ]


def trends(found: Gate) -> dict[str, Trend]:
    return {trend.scale: trend for trend in found.trends}


def ends(found: Estimate | None) -> tuple[float, float]:
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    return found.low, found.high


def test_a_constant_saving_is_the_same_at_each_size_and_beyond() -> None:
    """b needs half the compute at every loss, at two thirds of the speed: 2 in compute, 2 / 1.5 in time, slope 0."""
    half, random = PowerLaw(0.0, BASE.coefficient * 0.5**0.1, 0.1), np.random.default_rng(0)
    runs = [*ladder(BASE, "a", 1e-5, random), *ladder(half, "b", 1e-5, random, slower=1.5)]
    found = trends(gate(runs, "m", "a", project=1e22))
    for scale, multiplier, spent in (("train_flops", 2.0, 1.0), ("seconds", 2.0 / 1.5, 1.5)):
        trend = found[scale]
        values = [size.multiplier.value for size in trend.sizes]
        assert values == pytest.approx([multiplier] * 5, rel=1e-3)
        assert trend.slope is not None
        assert trend.slope.value == pytest.approx(0.0, abs=1e-4)
        assert trend.projection is not None
        assert trend.projection.value == pytest.approx(multiplier, rel=2e-3)
        assert trend.difference is not None
        assert trend.difference.value == pytest.approx(half.at(1e22) - BASE.at(spent * 1e22), rel=5e-3)
        assert trend.verdict == "passes"
    assert [size.train_flops for size in found["train_flops"].sizes] == pytest.approx(list(LADDER))


def test_an_advantage_that_fades_has_the_slope_of_the_exponents_and_fails_where_it_is_gone() -> None:
    """Of A x^-a against B x^-b the log multiplier falls by b / a - 1 with each unit of log compute."""
    flatter = PowerLaw(0.0, BASE.at(1e17) * 0.97 * 1e17**0.09, 0.09)
    random = np.random.default_rng(1)
    runs = [*ladder(BASE, "a", 0.001, random), *ladder(flatter, "b", 0.001, random)]
    found = gate(runs, "m", "a", project=1e22)
    trend = trends(found)["train_flops"]
    low, high = ends(trend.slope)
    assert low < 0.09 / 0.1 - 1 < high < 0
    assert trend.sizes[0].multiplier.value == pytest.approx(0.97 ** (-1 / 0.1), rel=0.1)
    low, high = ends(trend.projection)
    assert low < BASE.x_for(flatter.at(1e22)) / 1e22 < high < 1
    assert trend.verdict == "fails"
    assert any("the multiplier changes with compute" in note for note in found.notes)
    assert trends(gate(runs, "m", "a", at_least=0.5))["train_flops"].verdict == "passes"  # at its largest size


def test_scatter_leaves_equal_laws_undecided() -> None:
    random = np.random.default_rng(2)
    runs = [*ladder(BASE, "a", 0.02, random), *ladder(BASE, "b", 0.02, random)]
    assert {trend.verdict for trend in gate(runs, "m", "a", project=1e22).trends} == {"undecided"}


def test_the_projection_is_wider_than_any_size_and_widens_with_the_distance() -> None:
    random = np.random.default_rng(3)
    runs = [*ladder(BASE, "a", 0.005, random), *ladder(BASE, "b", 0.005, random)]

    def width(found: Estimate | None) -> float:
        low, high = ends(found)
        return float(np.log(high / low))

    near, far = (trends(gate(runs, "m", "a", project=x))["train_flops"] for x in (1e20, 1e23))
    assert width(near.projection) > max(width(size.multiplier) for size in near.sizes)
    assert width(far.projection) > 1.5 * width(near.projection)


RISING = dict(zip(map(float, LADDER[:4]), (2.0, 2.05, 2.1, 2.15), strict=True))
WORSE = dict(zip(map(float, LADDER[:4]), (3.0, 2.9, 2.8, 2.7), strict=True))


def runs_with(losses: dict[float, float], group: str) -> list[ScalingRun]:
    return [
        ScalingRun(group, x, 1.0, 1.0, loss * (1 + 0.001 * seed), f"{group}{at}", seed, x / 1e12)
        for at, (x, loss) in enumerate(losses.items())
        for seed in range(2)
    ]


def test_a_law_that_does_not_fall_reaches_no_loss_but_its_own() -> None:
    """Rows: falling to 1, falling to 0, level at 2, rising, rising from 1."""
    log_e = np.array([0.0, -np.inf, 0.0, -np.inf, 0.0])
    laws = Laws(log_e, np.zeros(5), np.array([0.1, 0.1, 0.0, -0.1, -0.1]), 40.0)
    x = laws.log_x(np.array([np.log(0.5), np.log(4.0), np.nan]))
    assert list(np.isposinf(x[:, 0])) == [True, False, True, False, True]
    assert list(np.isfinite(x[:, 0])) == [False, True, False, False, False]
    assert list(np.isfinite(x[:, 1])) == [True, True, False, False, False]
    assert np.isnan(x[2:, 1]).all()
    assert np.isnan(x[:, 2]).all()
    assert [PowerLaw(1.0, 1.0, a).x_for(0.5) for a in (0.1, 0.0, -0.1)] == [np.inf] * 3
    assert np.isnan([PowerLaw(1.0, 1.0, a).x_for(4.0) for a in (0.0, -0.1)]).all()
    unknown = exponentials(estimate(float("nan"), [float("nan")] * 100))
    assert np.isnan(unknown.value)
    assert (unknown.low, unknown.high) == (0.0, np.inf)


@pytest.mark.parametrize("project", [None, 1e22])
@pytest.mark.parametrize("irreducible", [False, True])
def test_no_group_passes_against_a_baseline_whose_law_does_not_fall(project: float | None, irreducible: bool) -> None:
    """The loss of a rises from 2.00 to 2.15; b is worse at each size."""
    runs = [*runs_with(RISING, "a"), *runs_with(WORSE, "b")]
    found = gate(runs, "m", "a", project, irreducible=irreducible, draws=200)
    assert {trend.verdict for trend in found.trends} == {"undecided"}
    assert all(np.isnan(size.multiplier.value) for trend in found.trends for size in trend.sizes)
    for what in ("compute", "wall-clock"):
        note = f"the law of the baseline a does not fall with {what}: no multiplier is known, and none passes"
        assert note in found.notes
    table, sizes = gate_tables(found)
    assert "nan" not in str((table.rows, sizes.rows))
    ablation = load_study(Path(__file__).parents[2] / "ablations" / "scaling.yaml")
    assert len([*from_gate.gates(FigureData(ablation, [], Comparison("m", (), (), gate=found)))]) == 1


def test_runs_without_measured_seconds_have_no_wall_clock_multiplier() -> None:
    random = np.random.default_rng(4)
    runs = [*ladder(BASE, "a", 0.001, random), *ladder(BASE, "b", 0.001, random)]
    untimed = [ScalingRun(r.group, r.train_flops, 1, 1, r.loss, r.arm, r.seed) for r in runs]
    found = gate(untimed, "m", "a")
    assert [trend.scale for trend in found.trends] == ["train_flops"]
    assert "without measured seconds, so in no wall-clock multiplier: a0, a1, a2, a3, a4 and 5 more" in found.notes


def test_a_baseline_of_one_size_has_no_law_and_no_multiplier() -> None:
    random = np.random.default_rng(5)
    one = [run for run in ladder(BASE, "a", 0.001, random) if run.arm == "a0"]
    found = gate([*one, *ladder(BASE, "b", 0.001, random)], "m", "a")
    assert found.trends == ()
    message = "the law of the baseline a is not known: a power law needs 2 different x or more"
    assert f"no compute multipliers: {message}" in found.notes
    (part,) = gate_tables(found)
    assert part.notes == found.notes


# --- whose schedule had not ended -----------------------------------------------------------------------------------


def measured(arm: str, steps: int, schedule: Schedule) -> Measured:
    result = RunResult(arm, "a", 0, "done", {"metrics": {"m": 3.0}})
    return Measured(result, TrainingConfig(max_steps=500, schedule=schedule), {"steps": steps})


def test_a_run_in_the_midst_of_its_decay_is_refused() -> None:
    """Step 250 of 500: half a cosine to a tenth of the peak stands at 55%."""
    whole, stopped = measured("whole", 500, Cosine()), measured("stopped", 250, Cosine())
    kept, notes = ended_runs([whole, stopped])
    assert kept == [whole.result]
    (note,) = notes
    assert "their schedules had not ended: stopped/seed 0" in note
    assert "measured at step 250 of 500, with 55% of the peak learning rate" in note


def test_a_constant_learning_rate_is_refused_beside_a_decay_and_taken_among_its_like() -> None:
    decayed = measured("decayed", 500, WarmupStableDecay(decay_steps=100))
    flat, other = measured("flat", 500, Constant()), measured("other", 500, Cosine(final_fraction=1.0))
    kept, notes = ended_runs([decayed, flat, other])
    assert kept == [decayed.result]
    assert "does not decay (schedule constant, cosine)" in notes[0]
    assert ended_runs([flat, other]) == ([flat.result, other.result], [])


# --- a study --------------------------------------------------------------------------------------------------------

STUDY = """
study: gated
question: Does the change keep its advantage?
extends: decllm-tiny
base: {{pretrain: {{data: {{corpus: {{kind: text, files: ["{corpus}"]}}, tokenizer: bytes}}}}}}
arms: {{plain: {{}}, gated: {{model: {{output: {{softcap: 30.0}}}}}}}}
grid:
  design: factorial
  factors: {{pretrain.training.max_steps: [100, 200, 400, 800]}}
seeds: [0, 1]
compare: {{stratify_by: [pretrain.training.max_steps], gate: {{project: 1e15}}}}
"""


def finish(run: Run, steps: int, random: np.random.Generator) -> None:
    """A result as a training would have left it: `gated` needs half the steps for a loss, at half the speed."""
    stage, gated = run.last, run.arm.group == "gated"
    stage.folder.mkdir(parents=True, exist_ok=True)
    loss = 8 * (steps * (2 if gated else 1)) ** -0.1 * float(np.exp(random.normal(0, 0.001)))
    rate = 5e4 if gated else 1e5
    result = {
        "state": "done",
        "steps": steps,
        "metrics": {"test/target_nll": loss, "throughput/tokens_per_second": rate},
        "tokens": 1000 * steps,
        "flops": 1e10 * steps,
        "parameters": 10_000,
        "seconds": {"training": 1.0 + 1000 * steps / rate, "evaluation": 1.0},
        "provenance": {},
    }
    (stage.folder / "result.json").write_text(json.dumps(result))


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Store]:
    folder = tmp_path_factory.mktemp("gated")
    (folder / "corpus.txt").write_text("a few words " * 1000)
    path = folder / "gated.yaml"
    path.write_text(STUDY.format(corpus=folder / "corpus.txt"))
    store, random = Store(folder / "store"), np.random.default_rng(6)
    for run in runs_of(load_study(path), store):
        finish(run, run.experiment.pretrain.training.max_steps, random)
    return path, store


def compared(path: Path, store: Store) -> Comparison:
    ablation = load_study(path)
    return comparison_of(ablation, runs_of(ablation, store))


def test_a_study_with_a_gate_reports_compute_and_time_at_each_size_and_the_projection(
    gated: tuple[Path, Store],
) -> None:
    """By tokens per second: half the steps at half the speed is no gain in time."""
    found = compared(*gated)
    assert found.gate is not None
    by_scale = trends(found.gate)
    assert [size.multiplier.value for size in by_scale["train_flops"].sizes] == pytest.approx([2.0] * 4, rel=0.05)
    assert [size.multiplier.value for size in by_scale["seconds"].sizes] == pytest.approx([1.0] * 4, rel=0.05)
    assert (by_scale["train_flops"].verdict, by_scale["seconds"].verdict) == ("passes", "undecided")
    parts = {part.name: part for part in comparison_tables(found)}
    assert [row[0:2] for row in parts["gate"].rows] == [["gated", "compute"], ["gated", "wall-clock"]]
    assert [len(parts["gate-sizes"].rows), parts["gate-sizes"].rows[0][1]] == [4, "2"]
    sentence = answer(found)[0]
    begin = "Gate, gated against plain in test/target_nll, projected to 1P FLOPs: compute multiplier "
    assert sentence.startswith(begin)
    assert "(passes), wall-clock multiplier " in sentence
    assert sentence.endswith("(undecided); 1 passes.")


def test_a_result_that_was_measured_too_early_is_in_no_law(gated: tuple[Path, Store]) -> None:
    path, store = gated
    run = next(run for run in runs_of(load_study(path), store) if run.arm.group == "gated" and run.seed == 1)
    file = run.last.folder / "result.json"
    whole = file.read_text()
    file.write_text(json.dumps(json.loads(whole) | {"steps": 50}))
    try:
        found = compared(path, store).gate
    finally:
        file.write_text(whole)
    assert found is not None
    assert f"their schedules had not ended: {run.name}" in found.notes[0]
    assert [size.seeds for size in trends(found)["train_flops"].sizes] == [1, 2, 2, 2]


def test_the_gate_is_of_the_code_of_the_rows(gated: tuple[Path, Store]) -> None:
    """A run that was repeated with new code, and has not ended: older runs are in no row, and in no law."""
    path, store = gated
    run = next(run for run in runs_of(load_study(path), store) if run.arm.group == "gated" and run.seed == 1)
    file = run.last.folder / "result.json"
    whole = file.read_text()
    newest = {"steps": 50, "finished": json.loads(whole).get("finished", 0) + 1e6, "provenance": {"code": "new"}}
    file.write_text(json.dumps(json.loads(whole) | newest))
    try:
        found = compared(path, store)
    finally:
        file.write_text(whole)
    assert [row.arm for row in found.rows if row.mean is not None] == [run.arm.name]
    assert found.gate is not None
    assert not any(trend.sizes for trend in found.gate.trends)


@pytest.mark.parametrize("group", ["plain", "gated"])
def test_a_group_that_lost_runs_passes_no_gate(gated: tuple[Path, Store], group: str) -> None:
    path, store = gated
    run = next(run for run in runs_of(load_study(path), store) if run.arm.group == group and run.seed == 1)
    file = run.last.folder / "result.json"
    whole = file.read_text()
    file.write_text(json.dumps(json.loads(whole) | {"state": "diverged", "metrics": {}}))
    try:
        ablation = load_study(path)
        found = compared(path, store).gate
        results = [each.result() for each in runs_of(ablation, store)]
        laws = scaling_of(ablation, results, ScalingLaw(irreducible=False))
    finally:
        file.write_text(whole)
    assert found is not None
    assert {trend.verdict for trend in found.trends} == {"undecided: lost runs"}
    note = f"{group} lost runs to divergence, which are in no law and no multiplier: {run.arm.name};"
    assert any(each.startswith(note) for each in found.notes)
    assert any(each.startswith(note) for each in laws.notes)
    assert all(f"runs of {group} were lost" in sentence for sentence in scaling_sentences(laws))


# --- figure ---------------------------------------------------------------------------------------------------------


def test_the_gate_is_drawn_with_its_multipliers_their_bands_and_the_projection() -> None:
    random = np.random.default_rng(0)
    half = PowerLaw(0.0, BASE.coefficient * 0.5**0.1, 0.1)
    runs = [*ladder(BASE, "a", 0.005, random), *ladder(half, "b", 0.005, random, slower=1.5)]
    found = gate(runs, "m", "a", project=1e22)
    ablation = load_study(Path(__file__).parents[2] / "ablations" / "scaling.yaml")
    (drawn,) = from_gate.gates(FigureData(ablation, [], Comparison("m", (), (), gate=found)))
    assert [axes.get_ylabel() for axes in drawn.figure.axes] == ["compute multiplier", "wall-clock multiplier"]
    for axes, trend in zip(drawn.figure.axes, found.trends, strict=True):
        curve, point, passing, projected = axes.lines
        assert list(curve.get_xdata()) == [size.train_flops for size in trend.sizes]
        assert list(curve.get_ydata()) == [size.multiplier.value for size in trend.sizes]
        assert len(axes.collections) == 1  # the band
        assert trend.projection is not None
        assert (list(point.get_xdata()), list(point.get_ydata())) == ([1e22], [trend.projection.value])
        assert list(passing.get_ydata()) == [1.0, 1.0]
        assert list(projected.get_ydata()) == [trend.projection.low, trend.projection.high]
    assert "dotted: 1, which passes" in drawn.caption
    assert [*from_gate.gates(FigureData(ablation, [], Comparison("m", (), ())))] == []
