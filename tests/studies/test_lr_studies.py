"""A study with a learning rate among its factors: which arms belong together, and what it says once it has run."""

from __future__ import annotations

import re
from statistics import fmean

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from lit_llm.data.batches import spread_windows
from lit_llm.data.prepare import open_prepared
from lit_llm.models.build import build_model
from lit_llm.objectives.config import BOS
from lit_llm.report.pages.study import markdown_of
from lit_llm.report.tables.comparison import render_comparison
from lit_llm.runs.stage_config import load_stage_config
from lit_llm.studies.estimable_effects import lr_factors
from lit_llm.studies.load import load_study
from lit_llm.studies.run import Observer, run_study

LR, NORM, NLL = "pretrain.training.optimizer.lr", "model.attention.output_norm", "val/target_nll"
TWO = "arms: {red: {}, dec: {extends: decllm-tiny}}\n"


def groups(path, *overrides):
    return {f.name: {g.name: (g.baseline, dict(g.arms)) for g in f.groups} for f in lr_factors(load_study(path))}


@pytest.mark.parametrize("within", ["", f"compare: {{stratify_by: [{LR}]}}"], ids=["first", "within"])
def test_a_factorial_has_a_group_for_each_of_its_other_combinations(write_study, within):
    grid = f"grid: {{design: factorial, factors: {{{NORM}: [head, none], {LR}: [1e-3, 1e-2]}}}}\n"
    assert groups(write_study("factorial", TWO + grid + within)) == {
        LR: {
            "red": ("red", {"red": 1e-3, "red/lr=0.01": 1e-2}),
            "red/output_norm=none": ("red", {"red/output_norm=none": 1e-3, "red/output_norm=none/lr=0.01": 1e-2}),
            "dec": ("red", {"dec": 1e-3, "dec/lr=0.01": 1e-2}),
            "dec/output_norm=none": ("red", {"dec/output_norm=none": 1e-3, "dec/output_norm=none/lr=0.01": 1e-2}),
        }
    }


def test_one_at_a_time_varies_the_learning_rate_of_the_baseline_alone(write_study):
    grid = f"grid: {{factors: {{{NORM}: [head, none], {LR}: [1e-3, 1e-2, 1e-1]}}}}"
    assert groups(write_study("alone", grid)) == {
        LR: {"baseline": ("baseline", {"baseline": 1e-3, "baseline/lr=0.01": 1e-2, "baseline/lr=0.1": 1e-1})}
    }


def test_muons_two_learning_rates_are_two_factors(write_study):
    rest = "pretrain.training.optimizer.adamw.lr"
    grid = "arms: {a: {pretrain: {training: {optimizer: {kind: muon}}}}}\n"
    grid += f"grid: {{design: factorial, factors: {{{LR}: [1e-3, 1e-2], {rest}: [1e-4, 1e-3]}}}}"
    found = groups(write_study("muon", grid))
    assert found[LR] == {
        "a": ("a", {"a": 1e-3, "a/optimizer.lr=0.01": 1e-2}),
        "a/adamw.lr=0.001": ("a", {"a/adamw.lr=0.001": 1e-3, "a/optimizer.lr=0.01/adamw.lr=0.001": 1e-2}),
    }
    assert found[rest]["a"] == ("a", {"a": 1e-4, "a/adamw.lr=0.001": 1e-3})


@pytest.mark.parametrize(
    "rest",
    [
        f"grid: {{factors: {{{NORM}: [head, none]}}}}",
        TWO,
        f"grid: {{design: paired, factors: {{{NORM}: [head, none], {LR}: [1e-3, 1e-2]}}}}",
    ],
    ids=["no_rate", "no_grid", "paired"],
)
def test_where_no_arms_differ_in_the_learning_rate_alone_there_is_nothing(write_study, rest):
    assert groups(write_study("nothing", rest)) == {}


def plain_loss(stage, store):
    """Nats per token on the second half of every held-out window, by torch alone, of the model as it is drawn."""
    frozen = load_stage_config(stage)
    experiment = frozen.experiment
    data = open_prepared(experiment.pretrain.data, store.data, frozen.data)
    (source,) = data.sources
    count = experiment.pretrain.validation.sequences
    windows_BT = torch.from_numpy(spread_windows(data, source, "validation", count)).long()
    half = windows_BT.shape[1] // 2
    model = build_model(experiment.model, experiment.seed).eval()
    first_B1 = torch.full((len(windows_BT), 1), BOS)
    with torch.no_grad():
        if experiment.model.family == "encoder_decoder":
            logits = model(windows_BT[:, :half], torch.cat([first_B1, windows_BT[:, half:-1]], 1))
        else:
            logits = model(torch.cat([first_B1, windows_BT[:, :-1]], 1))[:, half:]
    return float(F.cross_entropy(logits.flatten(0, 1).double(), windows_BT[:, half:].flatten()))


@pytest.mark.slow
def test_a_study_that_has_run_answers_with_the_sensitivity_of_its_own_results(write_study, store):
    grid = f"grid: {{design: factorial, factors: {{{NORM}: [head, none], {LR}: [1e-3, 1e-2, 1e20]}}}}\n"
    compare = f"compare: {{stratify_by: [{LR}], metric: {NLL}}}"
    finished = run_study(
        load_study(write_study("rates", TWO + grid + compare, seeds=[300, 301])),
        store,
        observer=Observer(),
        max_parallel=2,
    )
    assert finished.exit_code == 0
    by_name = {run.name: run for run in finished.runs}
    for family in ("red", "dec"):
        stage = by_name[f"{family}/seed 300"].last
        assert stage.result()["initial"][NLL] == pytest.approx(plain_loss(stage, store), rel=1e-5)
    (found,) = finished.comparison.learning_rates
    assert [row.group for row in found.rows] == ["red", "red/output_norm=none", "dec", "dec/output_norm=none"]
    assert any(run.status()["state"] == "diverged" for run in finished.runs)
    means = {}
    for row in found.rows:
        values = []
        for seed in (300, 301):
            results = [by_name[f"{row.group}{lr}/seed {seed}"].result().result for lr in ("", "/lr=0.01", "/lr=1e+20")]
            (initial,) = {result["initial"][NLL] for result in results}
            losses = [r["metrics"].get(NLL, initial) if r["state"] == "done" else initial for r in results]
            values.append(fmean(min(loss, initial) for loss in losses) - min(losses))
        assert list(row.sensitivity.by_seed.values()) == pytest.approx(values)
        means[row.group] = fmean(values)
    for row in found.rows[1:]:
        assert row.difference.mean == pytest.approx(means[row.group] - means["red"])
    logits = [
        run.result().result["metrics"]["stability/max_attention_logit"] for n, run in by_name.items() if "red/s" in n
    ]
    assert found.rows[0].cells[0].max_attention_logit == max(logits)
    for width in (80, 120):
        console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(render_comparison(finished.comparison, width))
        assert max(map(len, console.export_text().splitlines())) <= width
    markdown = markdown_of(finished.plan.ablation, finished.comparison)
    assert "## sensitivity of " in markdown
    assert re.search(r"^\| red \| head \| \d\.\d+ \| \d\.\d+ \| †2 \|$", markdown, re.MULTILINE)
