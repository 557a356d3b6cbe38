"""`lit-llm report`: what a study leaves to be read, finished or not, judged by what is in the store."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lit_llm.cli import app
from lit_llm.report.pages.study import write_report
from lit_llm.store.store import Store
from lit_llm.studies.load import load_study
from lit_llm.studies.plan import plan as make_plan
from lit_llm.studies.plan import with_earlier_findings
from lit_llm.studies.run import Observer, run_study
from lit_llm.studies.runs import runs_of
from tests.pages import ReadPage

pytestmark = pytest.mark.xdist_group("report")

NLL = "test/target_nll"


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> tuple[Path, Store]:
    """A study that ran whole, with its report; and its store."""
    folder = tmp_path_factory.mktemp("reported")
    path = folder / "reported.yaml"
    path.write_text(
        f"""
study: reported
question: Is <b>every</b> number here?
extends: redllm-tiny
base:
  model: {{d_model: 16, vocabulary: 258, attention: {{heads: 2}}, feed_forward: {{d_ff: 32}}}}
  pretrain:
    data: {{corpus: {{kind: text, files: ["{corpus}/*.txt"]}}, tokenizer: bytes, sequence_length: 32, batch_size: 4}}
    training: {{max_steps: 6, schedule: {{warmup_steps: 2}}, execution: {{log_every: 2}}}}
    validation: {{times: 2, sequences: 8}}
arms:
  red: {{}}
  dec: {{extends: decllm-tiny, pretrain: {{objective: prefix_lm}}}}
  bare: {{model: {{attention: {{output_norm: none}}}}}}
compare: {{margin: 0.5}}
seeds: [0, 1]
allow: [{{key: budget, because: small arms cost what they cost}}]
"""
    )
    store = Store(folder / "store")
    finished = run_study(load_study(path), store, observer=Observer(), max_parallel=2, report=write_report)
    assert finished.exit_code == 0
    return path, store


def report(path: Path, store: Store, *options: str) -> str:
    result = CliRunner().invoke(app, ["report", str(path), "--store", str(store.root), *options])
    assert result.exit_code == 0, result.output
    return result.output


def copied(reported: tuple[Path, Store], folder: Path) -> tuple[Path, Store]:
    """The same without MLflow's database, to be changed."""
    path, store = reported
    shutil.copytree(store.root, folder / "store", ignore=shutil.ignore_patterns("mlflow*", "artifacts"))
    return path, Store(folder / "store")


def test_the_page_holds_question_answer_tables_figures_and_commands(reported: tuple[Path, Store]) -> None:
    path, store = reported
    folder = store.study("reported")
    page = ReadPage(folder / "report.html")
    assert page.texts["h1"] == ["reported"]
    assert "Is <b>every</b> number here?" in page.texts["p"]
    assert page.texts["h2"] == [
        "Results",
        "Figures",
        "Signal and noise of the metrics",
        "Design, and what was controlled",
        "Runs",
        "Reproduce",
    ]
    comparison = json.loads((folder / "comparison.json").read_text())
    means = page.tables[0].column(NLL)
    assert {arm: cell.split()[0] for arm, cell in means.items()} == {
        row["arm"]: f"{row['mean']:.3f}" for row in comparison["rows"]
    }
    assert len(page.images) == len([*(folder / "figures").glob("*.svg")]) > 3
    assert [text for text in page.texts["figcaption"] if not text.strip()] == []
    command, source = page.texts["pre"]
    assert command.splitlines() == [f"lit-llm {name} {path} --store {store.root}" for name in ("plan", "run", "report")]
    assert source == path.read_text().rstrip()
    assert "model.attention.output_norm: head → none" in [row[1] for table in page.tables for row in table.rows]


def test_the_page_needs_nothing_but_itself(reported: tuple[Path, Store]) -> None:
    """No script, and nothing that a browser would fetch; what links lead to lies in the store or is MLflow's."""
    _, store = reported
    file = store.study("reported") / "report.html"
    page = ReadPage(file)
    assert not {"script", "iframe", "object", "embed"} & page.tags
    assert all(address.startswith("data:") for address in page.loaded)
    assert not re.search(r"url\(|@import", file.read_text())
    inside = [link for link in page.links if link.startswith("../")]
    assert len(inside) == 6
    assert all((file.parent / link).resolve().exists() for link in inside)
    others = {link.split("#")[0] for link in page.links if not link.startswith(("../", "#"))}
    assert others == {"http://127.0.0.1:5000/"}


def test_every_run_leads_to_its_own_run_in_mlflow(reported: tuple[Path, Store]) -> None:
    import mlflow

    from lit_llm.tracking.address import default_tracking

    _, store = reported
    client = mlflow.MlflowClient(default_tracking(store.root))
    links = [link for link in ReadPage(store.study("reported") / "report.html").links if "/runs/" in link]
    found = [client.get_run(link.rsplit("/", 1)[1]) for link in links]
    arms = [(run.data.tags["lit_llm.arm"], run.data.tags["lit_llm.seed"]) for run in found]
    assert arms == [(arm, seed) for arm in ("red", "dec", "bare") for seed in "01"]
    assert {link.split("/experiments/")[1].split("/")[0] for link in links} == {found[0].info.experiment_id}


def test_mlflow_holds_the_report_with_the_parent(reported: tuple[Path, Store]) -> None:
    import mlflow

    from lit_llm.tracking.address import default_tracking

    _, store = reported
    client = mlflow.MlflowClient(default_tracking(store.root))
    experiment = client.get_experiment_by_name("reported")
    (parent,) = client.search_runs([experiment.experiment_id], "tags.`lit_llm.study` = 'reported'")
    names = {artifact.path for artifact in client.list_artifacts(parent.info.run_id)}
    assert {
        "report.html",
        "comparison.md",
        "comparison.csv",
        "tables.tex",
        "runs.csv",
        "plan.json",
        "tables",
        "figures",
    } <= names


def test_the_csv_of_runs_holds_every_metric_in_full(reported: tuple[Path, Store]) -> None:
    path, store = reported
    rows = {(row["arm"], row["seed"]): row for row in csv.DictReader((store.study("reported") / "runs.csv").open())}
    for run in runs_of(load_study(path), store):
        result = run.last.result()
        row = rows.pop((run.arm.name, str(run.seed)))
        assert row["state"] == "done"
        assert {name: float(row[name]) for name in result["metrics"]} == result["metrics"]
        assert float(row["flops"]) == result["flops"]
    assert not rows


def test_latex_and_markdown_have_a_table_for_each_csv(reported: tuple[Path, Store]) -> None:
    folder = reported[1].study("reported")
    names = {file.stem for file in (folder / "tables").glob("*.csv")}
    written = (folder / "tables.tex").read_text()
    assert {*re.findall(r"\\label\{tab:(.*?)\}", written)} == names
    for arm in ("red", "dec", "bare"):
        assert re.search(rf"^{arm} & 2 & ", written, re.MULTILINE)
        assert re.search(rf"^\| {arm} \| 2 \| ", (folder / "comparison.md").read_text(), re.MULTILINE)


def test_an_unfinished_study_reports_what_is_there_and_what_is_missing(
    reported: tuple[Path, Store], tmp_path: Path
) -> None:
    path, store = copied(reported, tmp_path)
    runs = {run.name: run.last for run in runs_of(load_study(path), store)}
    shutil.rmtree(runs["dec/seed 1"].folder)
    lost = {
        "red/seed 1": ("failed", "Traceback\nValueError: the <text> was lost"),
        "bare/seed 0": ("out_of_memory", "out of memory"),
        "bare/seed 1": ("interrupted", None),
    }
    for name, (state, error) in lost.items():
        (runs[name].folder / "result.json").unlink()
        runs[name].set_state(state, error)
        runs[name].log_file.write_text("...")
    output = report(path, store)
    page = ReadPage(store.study("reported") / "report.html")
    first = page.texts["p"][1]
    assert first.startswith(
        "So far, with 2 of 6 runs finished: in test/target_nll (lower is better), dec differs from red"
    )
    assert first in re.sub(r"\s+", " ", output)
    assert (
        f"1 run has not begun (dec 1); lit-llm run {path} --store {store.root} runs what is missing." in page.texts["p"]
    )
    assert f"lit-llm run {path} --store {store.root} --rerun failed tries those that failed again." in page.texts["p"]
    (missing,) = [table for table in page.tables if table.head == ["run", "state", "why", "log"]]
    assert missing.rows == [
        ["red/seed 1", "failed", "ValueError: the <text> was lost", "log.txt"],
        ["bare/seed 0", "out of memory", "out of memory", "log.txt"],
        ["bare/seed 1", "interrupted", "–", "log.txt"],
    ]
    logs = [link for link in page.links if link.endswith("/log.txt")]
    assert all((store.study("reported") / link).exists() for link in logs)
    assert len(logs) == 3


def test_of_a_study_that_has_finished_nothing_an_earlier_report_stays(
    reported: tuple[Path, Store], tmp_path: Path
) -> None:
    path, store = copied(reported, tmp_path)
    page = store.study("reported") / "report.html"
    before = page.read_bytes()
    shutil.rmtree(store.root / "stages")
    lines = report(path, store).splitlines()
    assert lines[1] == "Not answered yet: none of 6 runs has ended with a result."
    assert "Nothing is finished yet" in lines[2]
    assert page.read_bytes() == before
    assert [*(store.study("reported") / "figures").glob("validation*.svg")]


def test_a_report_writes_nothing_for_a_study_that_never_ran(tmp_path: Path, write_study: Callable[..., Path]) -> None:
    path, store = write_study("unheard", "arms: {red: {}}"), Store(tmp_path / "store")
    assert "Nothing is finished yet" in report(path, store)
    assert not store.root.exists()


def test_the_report_keeps_what_the_plan_found_when_it_built_the_arms(
    reported: tuple[Path, Store], tmp_path: Path
) -> None:
    """A look at results builds no models; of the same runs it says what was found when they ran, of others not."""
    path, store = copied(reported, tmp_path)
    file = store.study("reported") / "plan.json"
    plan = json.loads(file.read_text())
    plan["findings"].append({"kind": "no_op", "arm": "bare", "key": "", "message": "computes what red computes"})
    file.write_text(json.dumps(plan))
    report(path, store)
    written = store.study("reported") / "report.html"
    assert "no-op: bare: computes what red computes" in ReadPage(written).texts["li"]
    other = load_study(path, ["pretrain.training.max_steps=4"])
    planned = with_earlier_findings(make_plan(other, built=False, runs=runs_of(other, store)), file)
    assert "computes what red computes" not in {finding.message for finding in planned.findings}
    for damaged in ("", "{", "[]", '{"arms": [{}]}', '{"arms": 3}'):
        file.write_text(damaged)
        assert with_earlier_findings(planned, file) is None, damaged
    report(path, store)  # it is a cache: the report goes without


def test_results_of_several_origins_are_told(reported: tuple[Path, Store], tmp_path: Path) -> None:
    path, store = copied(reported, tmp_path)
    first = runs_of(load_study(path), store)[0].last
    result = first.result()
    result["provenance"]["torch"] = "1.0"
    (first.folder / "result.json").write_text(json.dumps(result))
    report(path, store)
    page = ReadPage(store.study("reported") / "report.html")
    (versions,) = [table for table in page.tables if "lit-llm" in [row[0] for row in table.rows]]
    assert versions.column("value")["torch"].split(", ")[0] == "1.0"
    assert len(versions.column("value")["torch"].split(", ")) == 2
    assert any(note.startswith("1 result(s) of other code") for note in page.texts["li"])
