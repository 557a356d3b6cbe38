"""The figures of a study that has been run: judged by what its stages left on disk, read plainly here."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from lit_llm.cli import app
from lit_llm.report.figures import from_scaling
from lit_llm.report.figures.from_comparison import forests
from lit_llm.report.figures.inputs import FigureData
from lit_llm.report.figures.study import Drawn, figures_of
from lit_llm.report.figures.training_curves import places, read_curve
from lit_llm.statistics.comparison import Comparison, compare
from lit_llm.statistics.procedure import Procedure
from lit_llm.statistics.run_results import RunResult
from lit_llm.statistics.scaling.comparison import scaling
from lit_llm.statistics.scaling.runs import ScalingRun
from lit_llm.store.store import Store
from lit_llm.studies.comparison import comparison_of
from lit_llm.studies.load import Ablation, load_study
from lit_llm.studies.run import Observer, run_study
from lit_llm.studies.runs import Run, runs_of
from lit_llm.tracking.address import default_tracking

pytestmark = pytest.mark.xdist_group("study-figures")

STUDY = """
study: drawn
question: Can it be seen?
extends: redllm-tiny
base:
  model: {{d_model: 16, vocabulary: 258, attention: {{heads: 2}}, feed_forward: {{d_ff: 32}}}}
  pretrain:
    data: {{corpus: {{kind: text, files: ["{corpus}/*.txt"]}}, tokenizer: bytes, sequence_length: 32, batch_size: 4}}
    training:
      max_steps: 12
      schedule: {{warmup_steps: 2}}
      optimizer: {{lr: 1e-3}}
      stability: {{logit_every: 4}}
      execution: {{log_every: 4}}
    validation: {{times: 3, sequences: 8}}
  evaluate:
    extrapolation: {{lengths: [1, 2], prefixes: [1, half], sequences: 4}}
    attention: {{sequences: 2, sensitivity_sequences: 1, buckets: 4}}
arms:
  red: {{}}
  dec: {{extends: decllm-tiny, grid: false}}
  prefix: {{extends: decllm-tiny, grid: false, baseline: dec, pretrain: {{objective: prefix_lm}}}}
grid:
  design: factorial
  factors:
    model.attention.qkv_norm: [[q, k, v], []]
    pretrain.training.optimizer.lr: [1e-3, 1e-2]
seeds: [0, 1]
allow: [{{key: budget, because: small arms cost what they cost}}]
"""

NAMES = [
    "differences",
    "effects",
    "stepwise",
    "factors",
    "learning_rates",
    "front",
    "validation_pretrain",
    "training_pretrain",
    "stability",
    "extrapolation_by_position_pretrain",
    "extrapolation_by_length_pretrain",
    "attention_pretrain",
    "inference",
]


@pytest.fixture(scope="module")
def study(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "drawn.yaml"
    path.write_text(STUDY.format(corpus=corpus))
    return path


@pytest.fixture(scope="module")
def finished(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store in which all is done, and nothing drawn."""
    store = Store(tmp_path_factory.mktemp("finished"))
    assert run_study(load_study(study), store, observer=Observer(), max_parallel=2).exit_code == 0
    return store


def drawn_of(study: Path, store: Store) -> tuple[dict[str, Drawn], list[Run], Ablation]:
    ablation = load_study(study)
    runs = runs_of(ablation, store)
    return {one.name: one for one in figures_of(ablation, runs, comparison_of(ablation, runs))}, runs, ablation


def lines_of(runs: Sequence[Run], arm: str, file: str = "metrics.jsonl", stage: int = 0) -> list[list[dict[str, Any]]]:
    """For each seed the lines of a file."""
    folders = [run.steps[stage].stage.folder for run in runs if run.arm.name == arm]
    return [[json.loads(line) for line in (folder / file).read_text().splitlines()] for folder in folders]


def close(points: Sequence[tuple[float, float]]) -> Any:
    return pytest.approx(np.array(points), rel=1e-9)


def curve(axes: Any, place: int = 0) -> np.ndarray:
    """The points of a line that is drawn: N x 2."""
    line = axes.lines[place]
    return np.array([line.get_xdata(), line.get_ydata()], dtype=float).T


def test_a_finished_study_has_all_its_figures_with_n_in_the_captions(study: Path, finished: Store) -> None:
    drawn, _, _ = drawn_of(study, finished)
    assert list(drawn) == NAMES
    for name, one in drawn.items():
        assert "n = 2 seeds" in one.caption or name == "inference", name
        assert "arms" not in drawn["validation_pretrain"].caption  # all of them are there


def test_a_learning_curve_is_the_mean_of_the_seeds_files(study: Path, finished: Store) -> None:
    drawn, runs, _ = drawn_of(study, finished)
    # Of tokens each step reads as many in every arm, so that axis would show the steps' curves once more.
    steps, flops, seconds = drawn["validation_pretrain"].figure.axes
    assert steps.get_xlabel() == "optimiser steps (each 128 tokens)"
    seeds = [[line for line in lines if "val/target_nll" in line["metrics"]] for lines in lines_of(runs, "red")]
    means = [statistics.fmean(line["metrics"]["val/target_nll"] for line in both) for both in zip(*seeds, strict=True)]
    assert curve(flops) == close([(line["metrics"]["flops"], y) for line, y in zip(seeds[0], means, strict=True)])
    assert seeds[0][-1]["metrics"]["tokens_seen"] == 128 * seeds[0][-1]["step"]
    assert curve(steps) == close([(line["step"], y) for line, y in zip(seeds[0], means, strict=True)])
    firsts = [lines[0]["time"] for lines in lines_of(runs, "red")]
    passed = [
        statistics.fmean(line["time"] - first for line, first in zip(both, firsts, strict=True))
        for both in zip(*seeds, strict=True)
    ]
    assert [x for x, _ in curve(seconds)] == pytest.approx(passed)


def test_loss_beyond_the_window_is_that_of_the_records(study: Path, finished: Store) -> None:
    drawn, runs, ablation = drawn_of(study, finished)
    kinds = [step.node.evaluation for step in runs[0].steps]
    rows = lines_of(runs, "red", "rows.jsonl", kinds.index("extrapolation"))
    figure = drawn["extrapolation_by_position_pretrain"].figure
    half = ablation.arms[0].experiment.pretrain.data.sequence_length // 2
    assert [axes.get_title("left") for axes in figure.axes] == ["after 1 token", f"after {half} tokens"]
    for axes, prefix in zip(figure.axes, (1, half), strict=True):
        each = [[row for row in seed if row["prefix"] == prefix] for seed in rows]
        means = [statistics.fmean(-row["log_probability"] for row in both) for both in zip(*each, strict=True)]
        assert [y for _, y in curve(axes)] == pytest.approx(means)
    results = [run.metrics() for run in runs if run.arm.name == "red"]
    for axes, prefix in zip(drawn["extrapolation_by_length_pretrain"].figure.axes, ("1", "half"), strict=True):
        keys = {length: f"eval/extrapolation/nll/prefix_{prefix}/length_{length}x" for length in (1, 2)}
        assert curve(axes) == close([(n, statistics.fmean(r[key] for r in results)) for n, key in keys.items()])


def test_attention_by_position_is_that_of_the_records(study: Path, finished: Store) -> None:
    drawn, runs, _ = drawn_of(study, finished)
    kinds = [step.node.evaluation for step in runs[0].steps]
    rows = lines_of(runs, "red", "rows.jsonl", kinds.index("attention"))
    axes = next(a for a in drawn["attention_pretrain"].figure.axes if a.get_ylabel() == "sensitivity to the source")
    each = [[r for r in seed if r["measure"] == "source_sensitivity" and r["layer"] is None] for seed in rows]
    means = [(both[0]["first"], statistics.fmean(r["value"] for r in both)) for both in zip(*each, strict=True)]
    assert curve(axes) == close(means)


def test_each_step_begins_where_the_one_before_it_ends(study: Path, finished: Store) -> None:
    drawn, runs, _ = drawn_of(study, finished)
    values = {
        arm: statistics.fmean(run.metrics()["test/target_nll"] for run in runs if run.arm.name == arm)
        for arm in ("red", "dec", "prefix")
    }
    axes: Any = drawn["stepwise"].figure.axes[0]
    bars = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]
    assert bars == [pytest.approx((values["red"], values["dec"])), pytest.approx((values["dec"], values["prefix"]))]


def test_every_field_of_the_factors_is_the_mean_of_its_arm(study: Path, finished: Store) -> None:
    drawn, runs, _ = drawn_of(study, finished)
    axes = drawn["factors"].figure.axes[0]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("qkv_norm", "lr")
    names = [["red", "red/lr=0.01"], ["red/qkv_norm=none", "red/qkv_norm=none/lr=0.01"]]
    for i, row in enumerate(names):
        for j, arm in enumerate(row):
            mean = statistics.fmean(run.metrics()["test/target_nll"] for run in runs if run.arm.name == arm)
            assert axes.images[0].get_array()[i, j] == pytest.approx(mean)


def judged_so(correction: str, tmp_path: Path) -> tuple[Drawn, Comparison]:
    """The forest of four arms whose differences have p of 0.03, 0.04, 0.2 and 0.0001 when they are taken alone."""
    t = {"a": (0.03, 1), "b": (0.04, -1), "c": (0.2, 1), "d": (0.0001, -1)}
    arms = "".join(f"  {arm}: {{model: {{d_model: {64 + 32 * n}}}}}\n" for n, arm in enumerate(t, 1))
    path, variance = tmp_path / f"{correction}.yaml", "pooled" if correction == "dunnett" else "paired"
    path.write_text(
        f"study: s\nquestion: q\nextends: redllm-tiny\narms:\n  red: {{}}\n{arms}seeds: [0, 1, 2]\n"
        f"compare: {{correction: {correction}, variance: {variance}}}\n"
    )
    ablation, values = load_study(path), {"red": [3.0, 3.5, 4.0]}
    for number, (arm, (p, side)) in enumerate(t.items()):
        scatter = np.roll([-0.1, 0.0, 0.1], number)
        mean = side * float(stats.t.isf(p / 2, 2)) * statistics.stdev(scatter) / math.sqrt(3)
        values[arm] = [luck + mean + x for luck, x in zip(values["red"], scatter, strict=True)]
    results = [
        RunResult(arm, "red", seed, "done", {"metrics": {"val/target_nll": value}, "parameters": 1, "flops": 1.0})
        for arm, seeds in values.items()
        for seed, value in enumerate(seeds)
    ]
    found = compare(results, "val/target_nll", procedure=Procedure(variance, correction))
    return next(forests(FigureData(ablation, [], found))), found


@pytest.mark.parametrize(
    ("correction", "verdicts", "caption"),
    [
        (
            "none",
            ["worse", "better", "undecided", "better"],
            "each alone, n = 3 seeds; markers: the verdict, by p, not",
        ),
        (
            "holm",
            [*3 * ["undecided"], "better"],
            "which hold all at once, n = 3 seeds; markers: the verdict, by p after Holm over 4",
        ),
        ("fdr_bh", [*3 * ["undecided"], "better"], "by p after Benjamini and Hochberg over 4"),
        (
            "dunnett",
            ["worse", "better", "undecided", "better"],
            "hold all at once, n = 3 seeds; markers: the verdict, by p",
        ),
    ],
)
def test_the_forest_and_the_table_have_one_verdict(
    correction: str, verdicts: list[str], caption: str, tmp_path: Path
) -> None:
    """By the p that is corrected: Holm's is 4 × 0.0001, 3 × 0.03; Benjamini's and Hochberg's 4 × 0.0001 and 0.04 × 4/3.
    The intervals hold for as many comparisons, and the caption says so."""
    drawn, found = judged_so(correction, tmp_path)
    assert [row.verdict for row in found.rows[1:]] == verdicts
    (axes,) = drawn.figure.axes
    marks = [line for line in axes.lines if line.get_marker() not in ("None", None, "")]
    shapes = {"worse": "^", "better": "v", "undecided": "o"}
    assert [mark.get_marker() for mark in marks] == [shapes[verdict] for verdict in verdicts]
    assert {entry.get_text() for entry in drawn.figure.legends[0].get_texts()} == set(verdicts)
    assert caption in drawn.caption
    excluding = [row.arm for row in found.rows if (d := row.difference) and d.low and d.high and d.low * d.high > 0]
    assert excluding == [row.arm for row in found.rows[1:] if row.verdict != "undecided"]


def test_scaling_shows_every_run_the_law_and_the_best_sizes(tmp_path: Path) -> None:
    """Of Chinchilla's formula, three sizes at three budgets in two families, with a little noise."""
    ablation, random = load_study(Path(__file__).parents[2] / "ablations" / "scaling.yaml"), np.random.default_rng(9)
    runs = []
    for family in ("decoder", "encoder_decoder"):
        for flops in (1e18, 1e19, 1e20):
            best = (0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62) * (flops / 6) ** (0.28 / 0.62)
            for size in best * np.array([0.5, 1.0, 2.0]):
                loss = 1.69 + 406.4 / size**0.34 + 410.7 / (flops / 6 / size) ** 0.28 + random.normal(0, 1e-4)
                runs.append(ScalingRun(family, flops, float(size), float(flops / 6 / size), float(loss)))
    found = scaling(runs, "val/target_nll", "decoder", irreducible=False, draws=40)
    shown = FigureData(ablation, [], Comparison("val/target_nll", (), (), scaling=found))
    law, profiles = from_scaling.scaling(shown)
    assert [axes.get_xlabel() for axes in law.figure.axes] == ["training FLOPs", "parameters", "tokens read"]
    for axes, x in zip(law.figure.axes, ("train_flops", "parameters", "tokens"), strict=True):
        marks = [line for line in axes.lines if line.get_linestyle() == "None"]
        for family, line in zip(("decoder", "encoder_decoder"), marks, strict=True):
            own = [(getattr(run, x), run.loss) for run in runs if run.group == family]
            assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == own
        assert len(axes.collections) == (2 if x == "train_flops" else 0)  # the bands
    dotted = [line for line in law.figure.axes[0].lines if line.get_linestyle() == ":"]
    crossings = [m.crossing.x.value for m in found.multipliers if m.crossing is not None]
    assert [line.get_xdata()[0] for line in dotted] == crossings
    fitted = np.polyfit(np.log([run.train_flops for run in runs[:9]]), np.log([run.loss for run in runs[:9]]), 1)
    x, y = curve(law.figure.axes[0]).T
    assert np.log(y) == pytest.approx(np.polyval(fitted, np.log(x)))
    assert [axes.get_title("left") for axes in profiles.figure.axes] == ["decoder", "encoder_decoder"]
    stars = [line for line in profiles.figure.axes[0].lines if line.get_marker() == "*"]
    assert [star.get_xdata()[0] for star in stars] == pytest.approx([run.parameters for run in runs[1:9:3]], rel=0.05)
    names = [entry.get_text() for entry in profiles.figure.legends[0].get_texts()]
    assert names == ["1E training FLOPs", "10E training FLOPs", "100E training FLOPs"]


def test_what_is_not_finished_is_drawn_as_far_as_it_is(study: Path, finished: Store, tmp_path: Path) -> None:
    """A seed without a result is a line of its own, in no mean."""
    store = Store(shutil.copytree(finished.root, tmp_path / "store"))
    _, runs, _ = drawn_of(study, store)
    going = next(run for run in runs if run.arm.name == "red" and run.seed == 1).steps[0].stage
    (going.folder / "result.json").unlink()
    lines = going.metrics_file.read_text().splitlines(keepends=True)
    going.metrics_file.write_text("".join(lines[:2]) + lines[2][:20])
    drawn, runs, _ = drawn_of(study, store)
    mean, alone = (curve(drawn["training_pretrain"].figure.axes[0], place) for place in (0, 1))
    done, begun = lines_of(runs[:1], "red")[0], [json.loads(line) for line in lines[:2]]
    assert mean == close([(line["step"], line["metrics"]["train/loss"]) for line in done])
    assert alone == close([(line["step"], line["metrics"]["train/loss"]) for line in begun])


def test_a_run_that_diverged_ends_in_a_cross_and_is_in_no_mean(study: Path, finished: Store, tmp_path: Path) -> None:
    store = Store(shutil.copytree(finished.root, tmp_path / "store"))
    _, runs, _ = drawn_of(study, store)
    file = next(run for run in runs if run.arm.name == "red" and run.seed == 1).steps[0].stage.folder / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"state": "diverged"}))
    drawn, runs, _ = drawn_of(study, store)
    first, second = (
        [(line["step"], line["metrics"]["train/loss"]) for line in lines] for lines in lines_of(runs, "red")
    )
    axes = drawn["training_pretrain"].figure.axes[0]
    assert curve(axes, 0) == close(first)
    assert curve(axes, 1) == close(second)
    assert curve(axes, 2) == close(second[-1:])
    assert axes.lines[2].get_marker() == "x"
    assert [text.get_text() for text in drawn["factors"].figure.axes[0].texts if "†" in text.get_text()] == [
        f"{runs[0].metrics()['test/target_nll']:.3f}\n†1"
    ]


def test_of_a_study_that_never_ran_only_what_is_computed_is_drawn(study: Path, tmp_path: Path) -> None:
    drawn, _, _ = drawn_of(study, Store(tmp_path / "none"))
    assert list(drawn) == ["inference"]
    answer = CliRunner().invoke(app, ["report", str(study), "--store", str(tmp_path / "none")])
    assert answer.exit_code == 0
    assert not (tmp_path / "none").exists()


def test_report_writes_them_and_logs_them_with_the_parent_run(study: Path, finished: Store) -> None:
    from mlflow import MlflowClient

    answer = CliRunner().invoke(app, ["report", str(study), "--store", str(finished.root)])
    assert answer.exit_code == 0, answer.output
    folder = finished.study("drawn") / "figures"
    files = {f"{name}.{kind}" for name in NAMES for kind in ("png", "svg", "pdf")} | {"figures.md"}
    assert {path.name for path in folder.iterdir()} == files
    assert all(f"![{name}]({name}.png)" in (folder / "figures.md").read_text() for name in NAMES)
    client = MlflowClient(default_tracking(finished.root))
    experiment = client.get_experiment_by_name("drawn")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert {Path(found.path).name for found in client.list_artifacts(parent.info.run_id, "figures")} == files
    assert parent.info.status == "FINISHED"


def test_a_long_course_is_thinned_and_keeps_its_ends_and_its_validations(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    with file.open("w") as lines:
        for step in range(1, 5002):
            metrics = {"train/loss": 1.0 / step, "tokens_seen": 32.0 * step}
            metrics |= {"val/target_nll": float(step)} if step % 1000 == 7 else {}
            metrics |= {"train/loss": None} if step == 5001 else {}
            lines.write(json.dumps({"step": step, "time": 100.0 + step, "metrics": metrics}) + "\n")
        lines.write('{"step": 5002, "ti')
    course = read_curve(file)
    assert (course[0]["step"], course[-1]["step"]) == (1, 5001)
    loss = places(course, "train/loss", "tokens")
    assert len(loss) <= 200
    assert loss[1] == (32.0, 1.0)
    assert 5001 not in loss  # null: it was not finite
    gaps = [b - a for a, b in zip(loss, list(loss)[1:], strict=False)]
    assert max(gaps) <= 2 * math.ceil(5001 / 200)
    validated = {step: (step - 1.0, float(step)) for step in range(7, 5001, 1000)}
    assert places(course, "val/target_nll", "seconds") == validated
    assert read_curve(tmp_path / "none.jsonl") == []
