"""Final tables read the test split; what is chosen, stopped or added is chosen by the validation split."""

from __future__ import annotations

import json

import pytest
import yaml

from lit_llm.config.problems import InputError
from lit_llm.report.tables.comparison import comparison_tables
from lit_llm.runs.stage_graph import final_metric, validation_metric
from lit_llm.statistics.comparison import Design, compare
from lit_llm.statistics.run_results import RunResult
from lit_llm.store.store import Store
from lit_llm.studies import mlflow_runs
from lit_llm.studies.audit.differing_keys import audit
from lit_llm.studies.estimable_effects import lr_factors
from lit_llm.studies.load import load_study
from lit_llm.studies.plan import plan
from lit_llm.studies.runs import Run, runs_of
from lit_llm.studies.schema import Compare
from lit_llm.sweeps.sweep import load_sweep

TEST, VALIDATION, LR = "test/target_nll", "val/target_nll", "pretrain.training.optimizer.lr"
TWO = "arms: {red: {}, dec: {extends: decllm-tiny}}\n"
NO_TEST = "pretrain.data.test_fraction=0"


@pytest.mark.parametrize(
    ("test", "validation"),
    [
        (TEST, VALIDATION),
        ("finetune/test/bits_per_byte", "finetune/val/bits_per_byte"),
        ("source/test/target_nll/books", "source/val/target_nll/books"),
    ],
)
def test_every_metric_of_one_split_has_a_sibling_of_the_other(test, validation):
    assert (validation_metric(test), final_metric(validation)) == (validation, test)
    assert (validation_metric(validation), final_metric(test)) == (validation, test)


@pytest.mark.parametrize("name", ["eval/tasks/test/acc", "finetune/eval/likelihood/nll/val", "train/loss"])
def test_a_metric_of_no_split_is_its_own_sibling(name):
    assert validation_metric(name) == final_metric(name) == name


# --- what a study compares -----------------------------------------------------------------------------------------


def test_a_study_compares_on_the_test_split_unless_it_asks_otherwise(write_study):
    assert load_study(write_study("default", TWO)).study.compare.metric == TEST == Compare().metric
    for metric in ("finetune/test/target_nll/qa", "test/target_nll/books", "test/masked_nll", "test/objective_loss"):
        assert Compare(metric=metric).metric == metric
    with pytest.raises(ValueError, match=r"did you mean 'test/target_nll'"):
        Compare(metric="test/target_nl")
    with pytest.raises(ValueError, match="is not possible"):
        Compare(metric="finetune/test/objective_loss")


def test_a_study_without_a_test_split_is_refused_with_both_ways_out(write_study):
    path = write_study("none", TWO)
    with pytest.raises(InputError) as caught:
        load_study(path, [NO_TEST])
    (problem,) = caught.value.problems
    assert problem.key == "compare.metric"
    assert "pretrain.data.test_fraction is 0" in problem.message
    assert "set it above 0" in problem.message
    assert f"`metric: {VALIDATION}`" in problem.message
    chosen = load_study(write_study("chosen", f"{TWO}compare: {{metric: {VALIDATION}}}"), [NO_TEST])
    assert chosen.study.compare.metric == VALIDATION
    assert load_study("redllm-tiny", [NO_TEST]).study.compare.metric == VALIDATION, "one experiment compares nothing"


def test_a_finetuning_has_a_test_split_of_its_own(write_study, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"inputs": "a", "targets": "b"}\n')
    data = (
        f"{{examples: {{kind: jsonl, files: ['{tmp_path}/t.jsonl']}}, input_length: 8, target_length: 4, batch_size: 2"
    )
    tuned = "arms: {{red: {{finetune: {{data: {}, training: {{max_steps: 2}}}}}}}}\ncompare: {{metric: {}}}"
    metric = "finetune/test/target_nll"
    assert load_study(write_study("with", tuned.format(data + "}", metric)), [NO_TEST]).study.compare.metric == metric
    without = write_study("without", tuned.format(data + ", test_fraction: 0}", metric))
    with pytest.raises(InputError, match=r"finetune.data.test_fraction is 0.*metric: finetune/val/target_nll"):
        load_study(without)
    files = f", test_fraction: 0, test_files: {{kind: jsonl, files: ['{tmp_path}/t.jsonl']}}}}"
    load_study(write_study("files", tuned.format(data + files, metric)))


@pytest.mark.parametrize(
    ("key", "levels"),
    [("pretrain.data.test_fraction", "[0.05, 0.2]"), ("pretrain.validation.final_sequences", "[8, 4]")],
)
def test_what_moves_the_test_documents_is_refused(write_study, key, levels):
    body = f"grid: {{factors: {{{key}: {levels}}}}}"
    refused = [
        finding for finding in audit(load_study(write_study("moved", body)), built=False) if finding.kind == "refused"
    ]
    assert [finding.key for finding in refused] == [key]
    assert f"so {TEST} is not measured on the same target tokens" in refused[0].message


def test_refusals_name_a_metric_of_the_same_split(write_study):
    def messages(body, *overrides):
        found = audit(load_study(write_study("split", body), overrides), built=False)
        return " ".join(finding.message for finding in found if finding.kind == "refused")

    assert f"use {TEST}" in messages(f"{TWO}compare: {{metric: test/masked_nll}}")
    encoder = "arms: {a: {extends: modernbert-tiny}, b: {extends: modernbert-tiny}}\n"
    assert "use test/masked_nll" in messages(encoder, "model.vocabulary=300")
    other = "arms: {a: {}, b: {extends: redllm-tiny, pretrain: {objective: span_corruption}}}\n"
    found = messages(f"{other}compare: {{metric: test/objective_loss}}", "model.vocabulary=400")
    assert f"test/objective_loss of another objective than a's is another quantity; use {TEST}" in found


# --- what is chosen by the validation split ------------------------------------------------------------------------


def made_up(run: Run, validation: float, test: float) -> None:
    metrics = {VALIDATION: validation, TEST: test}
    run.last.folder.mkdir(parents=True)
    run.last.finish({"state": "done", "metrics": metrics, "provenance": run.provenance_of(run.steps[0]), "flops": 1.0})


def test_seeds_are_added_by_the_validation_split(write_study, tmp_path):
    """On the validation split b is plainly worse, on the test split nothing is to be seen: no seed is added. With the
    two exchanged one is."""
    ablation = load_study(
        write_study("more", "arms: {a: {}, b: {extends: decllm-tiny}}\nmore_seeds: {max: 5}", [0, 1, 2])
    )
    for name, swapped, seeds in (("decided", False, 3), ("open", True, 4)):
        store = Store(tmp_path / name)
        for run in runs_of(ablation, store):
            clear = 2.0 + (run.arm.name == "b") + 0.001 * run.seed * (1 + (run.arm.name == "b"))
            values = clear, 2.0 + 0.1 * ((run.seed * 7 + (run.arm.name == "b") * 3) % 5)
            made_up(run, *(reversed(values) if swapped else values))
        assert [run.seed for run in runs_of(ablation, store) if run.arm.name == "b"] == list(range(seeds))


def test_the_table_of_learning_rates_is_of_the_validation_split(write_study):
    """The lowest validation loss is at 1e-2, the lowest test loss at 1e-3."""
    ablation = load_study(write_study("rates", f"grid: {{factors: {{{LR}: [1e-3, 1e-2]}}}}"))
    losses = {"baseline": (3.0, 1.0), "baseline/lr=0.01": (2.0, 5.0)}
    runs = [
        RunResult(
            arm.name, arm.baseline, 0, "done",
            {"metrics": dict(zip((VALIDATION, TEST), losses[arm.name], strict=True)), "parameters": 1, "flops": 1.0},
        )
        for arm in ablation.arms
    ]  # fmt: skip
    found = compare(runs, TEST, Design(lr_factors=lr_factors(ablation)))
    assert {row.arm: row.mean for row in found.rows} == {arm: test for arm, (_, test) in losses.items()}
    (rates,) = found.learning_rates
    assert [(cell.lr, cell.losses) for cell in rates.rows[0].cells] == [(1e-3, {0: 3.0}), (1e-2, {0: 2.0})]
    titles = [part.title for part in comparison_tables(found)]
    assert any(title.startswith(f"{VALIDATION} by") for title in titles), titles


def test_charts_of_the_course_show_what_is_validated_and_points_the_test(write_study, monkeypatch, tmp_path):
    monkeypatch.setattr(mlflow_runs, "experiment_tags", lambda text, columns, charts: charts)
    charts = mlflow_runs.tags_of(plan(load_study(write_study("charts", TWO)), built=False), Store(tmp_path))
    assert {("LINE", VALIDATION), ("SCATTER", TEST)} < set(charts)
    assert not {("LINE", TEST), ("SCATTER", VALIDATION)} & set(charts)


# --- sweeps --------------------------------------------------------------------------------------------------------


def test_a_sweep_cannot_search_on_the_test_split_and_needs_none(write_sweep):
    space = f"space: {{{LR}: {{log_uniform: [1e-3, 1e-2]}}}}\n"
    with pytest.raises(InputError, match=r"kept for the study of the winners; use 'val/target_nll'"):
        load_sweep(write_sweep("tested", f"{space}optimize: [{{metric: {TEST}}}]"))
    search = load_sweep(write_sweep("plain", space), [NO_TEST])
    assert search.ablation.study.compare.metric == VALIDATION


def test_stages_of_a_run_give_the_units_of_their_metrics(write_study, tmp_path):
    """A stage that is not done has none, and neither has a result that keeps no records."""
    (run,) = runs_of(load_study(write_study("units", "arms: {a: {}}")), Store(tmp_path / "store"))
    assert run.result().units(TEST) is None
    made_up(run, 2.0, 2.5)
    assert run.result().units(TEST) is None
    line = {"split": "test", "metric": "target_nll", "source": "", "weight": 1.0, "unit": "document"}
    line |= {"units": [0, 4], "nats": [2.0, 8.0], "tokens": [1, 3], "bytes": None}
    run.last.losses_file.write_text(json.dumps(line) + "\n")
    assert run.result().units(TEST) == {"0": (2.0, 1.0), "4": (8.0, 3.0)}
    assert run.result().units("test/bits_per_byte") is None, "the result has no such metric"
    assert RunResult("a", "a", 0, "done", {"metrics": {TEST: 2.5}}).units(TEST) is None


def test_shipped_studies_compare_on_text_that_nothing_was_chosen_by():
    from pathlib import Path

    files = sorted((Path(__file__).parents[2] / "ablations").glob("*.yaml"))
    metrics = {file.name: (yaml.safe_load(file.read_text()).get("compare") or {}).get("metric", TEST) for file in files}
    assert metrics
    assert {
        name: metric for name, metric in metrics.items() if metric.removeprefix("finetune/").startswith("val/")
    } == {}
