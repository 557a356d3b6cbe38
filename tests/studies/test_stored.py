"""A store speaks for itself: a study by its name, without its file or its text; and versions are never mixed up."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lit_llm.cli import app
from lit_llm.config.problems import InputError
from lit_llm.data.corpora import open_corpus
from lit_llm.report.pages.all_studies import studies_of
from lit_llm.report.pages.study import write_report
from lit_llm.runs.stage_config import save_stage_config
from lit_llm.store.store import Store
from lit_llm.studies.load import Ablation, load_study
from lit_llm.studies.run import Finished, Observer, run_study
from lit_llm.studies.runs import runs_of
from lit_llm.studies.stored import STORED, changes, keep, open_study
from tests.made_up_results import finish

Study = Callable[..., Path]
ARMS = "arms: {a: {}, b: {model: {attention: {output_norm: none}}}}\n"


@pytest.fixture
def place(tmp_path: Path) -> Store:
    return Store(tmp_path / "a store").open()


def kept(ablation: Ablation, store: Store) -> Ablation:
    """As if it had run, with a result for each of its runs."""
    runs, stages = runs_of(ablation, store), dict[str, dict[int, dict[str, str]]]()
    for run in runs:
        finish(run, 3.0 + 0.1 * run.seed + 0.2 * (run.arm.name == "b"))
        stages.setdefault(run.arm.name, {})[run.seed] = {s.node.name: s.node.fingerprint for s in run.trained}
    store.study(ablation.study.study).mkdir(parents=True, exist_ok=True)
    keep(store, ablation, stages)
    return ablation


def command(*words: object) -> Result:
    return CliRunner().invoke(app, [*map(str, words)], env={"COLUMNS": "200"})


def error_of(store: Store, *words: object) -> str:
    answer = command(*words, "--store", store.root)
    assert isinstance(answer.exception, InputError), answer.output
    return answer.exception.report()


def fail(*_: object, **__: object) -> None:
    raise AssertionError("a run was begun")


GROWTH = [
    ("seeds: [0, 1]", "seeds: [0, 1, 2]"),
    ("seeds: [0, 1]", "seeds: [0, 1]\nmore_seeds: {max: 5}"),
    ("{a: {},", "{a: {}, c: {extends: decllm-tiny},"),
    ("seeds: [0, 1]", "seeds: [0, 1]\ncompare: {margin: 0.1, labels: {a: First}}"),
    ("question: Does it hold?", "question: Does it hold at all?"),
    ("sequences: 8}", "sequences: 8}\n  evaluate: {likelihood: {}}"),
    ("log_every: 4", "log_every: 2"),
]


@pytest.mark.parametrize(("old", "new"), GROWTH)
def test_growth_and_what_the_log_of_the_analysis_records_is_no_new_version(
    old: str, new: str, write_study: Study, place: Store
) -> None:
    path = write_study("grown", ARMS, seeds=[0, 1])
    kept(load_study(path), place)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert changes(place, load_study(path)) == []


def test_an_edited_study_is_refused_by_key_and_its_report_stays(
    write_study: Study, place: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study("edited", ARMS, seeds=[0, 1])
    kept(load_study(path), place)
    assert command("report", path, "--store", place.root).exit_code == 0
    before = {file: file.read_bytes() for file in place.study("edited").rglob("*") if file.is_file()}
    path.write_text(path.read_text().replace("max_steps: 12", "max_steps: 9"))
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "max_steps" in text)
    monkeypatch.setattr("lit_llm.studies.stage_executor.run_tasks", fail)
    for name in ("report", "run"):
        said = error_of(place, name, path)
        assert f"{path}:{line}: pretrain.training.max_steps: 4 results have 12, here it is 9" in said
        assert f"`lit-llm report edited --store '{place.root}'` shows them" in said
        assert f"--store '{place.root}' --new-version` keeps them as edited@1" in said
    status = command("status", path, "--store", place.root)
    assert status.exit_code == 0
    assert "4 results have 12, here it is 9" in status.output
    differs = json.loads(command("status", path, "--store", place.root, "--json").output)["differs"]
    assert differs == [f"{path}:{line}: pretrain.training.max_steps: 4 results have 12, here it is 9"]
    assert {file: file.read_bytes() for file in before} == before
    path.write_text(path.read_text().replace("{a: {}, b:", "{x: {}, y:"))
    said = error_of(place, "report", path)
    assert "arms: 4 results have arms that are not here (a, b), and no arm that is" in said


def test_another_text_is_said_to_be_another(write_study: Study, place: Store, corpus: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    shutil.copytree(corpus, texts)
    path = write_study("texts", ARMS)
    path.write_text(path.read_text().replace(str(corpus), str(texts)))
    kept(load_study(path), place)
    (texts / "00.txt").write_text("another document than before " * 90)
    assert "pretrain.data.corpus: 2 results have another text" in error_of(place, "report", path)
    shutil.rmtree(texts)
    path.unlink()
    shown = command("report", "texts", "--store", place.root)
    assert shown.exit_code == 0, shown.output
    assert "better" in shown.output or "one seed" in shown.output
    rows = json.loads(command("status", "texts", "--store", place.root, "--json").output)["runs"]
    assert {row["state"] for row in rows} == {"done"}


def test_every_shipped_study_is_read_from_its_store_as_it_was(place: Store) -> None:
    for path in sorted(Path("ablations").glob("*.yaml")):
        try:
            ablation = load_study(path)
        except InputError:  # a text or a checkpoint that is not here
            continue
        name = ablation.study.study
        place.study(name).mkdir(parents=True)
        keep(place, ablation, {})
        again = open_study(name, store=place)
        assert again.study == ablation.study
        assert again.arms == ablation.arms
        assert again.file == path.read_text()


def test_a_new_version_keeps_the_earlier_one_and_both_are_read(
    write_study: Study, place: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With runs that train: the old ones, the new ones, and the store alone."""
    path = write_study("versions", "arms: {a: {}}")

    def run(source: object, **more: bool) -> Finished:
        ablation = open_study(str(source), store=place)
        return run_study(ablation, place, observer=Observer(), max_parallel=1, report=write_report, **more)

    first = run(path).runs[0].last.fingerprint
    path.write_text(path.read_text().replace("max_steps: 12", "max_steps: 9"))
    second = run(path, new_version=True).runs[0].last.fingerprint
    assert [entry.study for entry in studies_of(place).entries] == ["versions@1", "versions"]
    path.unlink()
    monkeypatch.setattr("lit_llm.studies.stage_executor.run_tasks", fail)
    assert [run(name).runs[0].last.fingerprint for name in ("versions@1", "versions")] == [first, second]
    assert "versions@1" in (page := (place.study("versions@1") / "report.html").read_text())
    assert "max_steps: 12" in page
    said = command("generate", "versions:a", "the", "--max-new-tokens", 2, "--store", place.root)
    assert said.exit_code == 0, said.output
    differs = json.loads(command("diff", "versions@1", "versions:a", "--store", place.root, "--json").output)
    assert differs == {"pretrain.training.max_steps": [12, 9]}
    config = place.stage(first).config_file
    assert load_study(config).study.study == first
    assert runs_of(load_study(config), place)[0].last.fingerprint == first
    assert "there is no preset and no file 'versins', nor a study of this name in" in error_of(
        place, "report", "versins"
    )


def test_an_experiment_begins_a_new_version_by_itself(
    place: Store, write_study: Study, small_base: str, tmp_path: Path
) -> None:
    told: list[str] = []

    class Told(Observer):
        def message(self, text: str) -> None:
            told.append(text)

    path = tmp_path / "one.yaml"
    path.write_text(f"extends: redllm-tiny{small_base}".replace("\n  ", "\n"))
    kept(load_study(path), place)
    other = ["pretrain.training.max_steps=7"]
    run_study(load_study(path, other), place, observer=Told(), max_parallel=1)
    assert any("kept as one@1: " in text and "1 result has 12, here it is 7" in text for text in told)
    (report,) = [command("report", path, "--store", place.root, "--json")]
    assert json.loads(report.output)["study"] == "one@1"
    assert json.loads((place.study("one@1") / STORED).read_text())["overrides"] == []


def test_a_study_that_was_never_compared_is_listed_with_its_state(write_study: Study, place: Store) -> None:
    ablation = load_study(write_study("begun", ARMS, seeds=[0, 1]))
    runs = runs_of(ablation, place)
    place.study("begun").mkdir(parents=True)
    stages = {"a": {run.seed: {"pretrain": run.last.fingerprint} for run in runs if run.arm.name == "a"}}
    finish(runs[0], 3.0)
    keep(place, ablation, stages)
    (entry,) = studies_of(place).entries
    assert (entry.study, entry.question, dict(entry.states)) == ("begun", "Does it hold?", {"done": 1, "pending": 1})
    assert "1 done, 1 pending" in command("studies", "--store", place.root).output


@pytest.mark.parametrize("verb", ["plan", "run", "status", "report", "sweep"])
@pytest.mark.parametrize("name", ["ablations/nope.yaml", "../nope.yaml", "/nope.yaml"])
def test_a_file_that_is_not_there_is_said_to_be_missing(place: Store, verb: str, name: str) -> None:
    assert "nope.yaml" in (said := error_of(place, verb, name))
    assert "leaves the store" not in said
    assert re.search("no such file|no preset and no file|there is no", said, re.IGNORECASE), said


def test_by_its_name_a_study_keeps_in_its_commands_what_was_changed_now(write_study: Study, place: Store) -> None:
    kept(load_study(write_study("changed", ARMS)), place)
    again = open_study("changed", ["pretrain.training.max_steps=9"], place)
    assert again.command("run").endswith("run changed -o pretrain.training.max_steps=9")


def test_a_stage_configuration_is_an_experiment_wherever_the_study_was_written(
    place: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The study lay in the working directory, whose name has brackets, and named its texts from there."""
    folder = tmp_path / "study[1]"
    (folder / "texts").mkdir(parents=True)
    for number in range(30):
        (folder / "texts" / f"{number}.txt").write_text(f"some text {number}")
    data = "{corpus: {kind: text, files: ['texts/*.txt']}, tokenizer: bytes, sequence_length: 8, batch_size: 2}"
    (folder / "own.yaml").write_text(
        f"study: own\nquestion: Is it?\nextends: decllm-tiny\nbase: {{pretrain: {{data: {data}}}}}\n{ARMS}seeds: [0]\n"
    )
    monkeypatch.chdir(folder)
    ablation = load_study("own.yaml")
    run = runs_of(ablation, place)[0]
    save_stage_config(place, run.steps[0].node, run.experiment)
    monkeypatch.chdir(tmp_path)
    experiment = load_study(run.last.config_file).arms[0].experiment
    assert len(open_corpus(experiment.pretrain.data.corpus).parts()) > 0
    assert run.steps[0].node.fingerprint == runs_of(load_study(run.last.config_file), place)[0].last.fingerprint
