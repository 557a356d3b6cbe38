"""`plan`, and `run` before anything is trained, report what an evaluation lacks."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from lit_llm.cli import main
from lit_llm.config.problems import InputError
from lit_llm.config.section import validate
from lit_llm.config.tree import read_yaml
from lit_llm.evaluation import task_names
from lit_llm.evaluation.config import TasksConfig
from lit_llm.evaluation.suites import REDLLM
from lit_llm.store.store import Store
from lit_llm.studies.load import load_study
from lit_llm.studies.plan import plan
from lit_llm.studies.run import Observer, run_study

harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lit-llm[eval]")


@pytest.fixture
def write(write_study):
    """write("name", "{extrapolation: ...}") -> (a study with that `evaluate`, the line where it stands)."""

    def written(name, evaluate):
        path = write_study(name, f"arms: {{baseline: {{\n  evaluate: {evaluate}}}}}\n", seeds=[0])
        lines = path.read_text().splitlines()
        return path, next(number for number, line in enumerate(lines, 1) if "evaluate:" in line)

    return written


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text("task: my_choose\ntag: my_own\n")
    return tmp_path / "tasks"


def check(**keys):
    told: list[str] = []
    task_names.check_names(validate(TasksConfig, read_yaml(json.dumps(keys), "f")), told.append)
    return told


@harness
@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_task_that_does_not_exist_ends_the_command_with_2_before_anything_is_trained(
    write, folder, tmp_path, command, monkeypatch, capsys
):
    monkeypatch.setattr(task_names, "_indexed", lambda _: frozenset({"my_choose", "boolq"}))  # the slow look-up
    path, line = write("no_task", f"{{tasks: {{names: [my_choose, my_chose], folder: {folder}}}}}")
    monkeypatch.setattr(sys, "argv", ["lit-llm", command, str(path), "--store", str(tmp_path / "store")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    message = "evaluate.tasks.names.1: 'my_chose' is no task - did you mean 'my_choose'?"
    assert f"{path}:{line}: {message}" in capsys.readouterr().err
    assert not list((tmp_path / "store").glob("stages/*"))


def test_without_the_harness_its_tasks_are_refused(write, tmp_path, monkeypatch):
    monkeypatch.setattr(task_names, "find_spec", lambda _: None)
    path, line = write("no_harness", "{tasks: {names: [boolq]}}")
    with pytest.raises(InputError) as error:
        plan(load_study(path))
    assert str(error.value).startswith(f"{path}:{line}: evaluate.tasks.names: needs lm-evaluation-harness: pip install")


@harness
@pytest.mark.parametrize("options", [{"names": ["redllm"]}, {"names": ["my_choose", "my_own", "boolq", "mmlu"]}])
def test_names_of_suites_of_the_folder_and_of_the_harness_are_known_without_loading_it(folder, options, monkeypatch):
    monkeypatch.setattr(task_names, "_indexed", lambda _: pytest.fail("the harness was loaded"))
    assert check(**options, folder=str(folder)) == []


@harness
def test_shots_are_for_tasks_that_are_asked(folder):
    with pytest.raises(InputError, match=r"^shots: 'bolq' is not among the tasks - did you mean 'boolq'\?"):
        check(names=["boolq"], shots={"bolq": 3})


@harness
@pytest.mark.slow
def test_a_line_with_a_name_is_a_name_to_the_harness_itself():
    """Judged by its own index, whose tasks made by code and lists of tags no line holds. `scrolls` is a file that it
    cannot read: asked for, it fails when it is evaluated, by name."""
    from lm_eval.tasks import TaskManager

    folder = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
    known, spelled = set(TaskManager().all_tasks), task_names._spelled(folder)
    assert spelled - known <= {"scrolls"}
    assert REDLLM.keys() <= spelled
    assert len(spelled) > 0.8 * len(known)


@pytest.mark.parametrize("section", ["extrapolation: {lengths: [1, 900]}", "attention: {sequence_length: 99999}"])
def test_held_out_text_that_is_too_short_is_told_after_preparation_and_then_by_the_plan(write, tmp_path, section):
    """60 kB of documents hold out some kB, less than what is asked for; how much is known when they are tokenised."""
    store, (path, line) = Store(tmp_path / "store"), write(f"short_{section[:5]}", f"{{{section}}}")
    study = load_study(path)
    plan(study, store=store)  # nothing is known yet
    where = f"{path}:{line}: evaluate.{section.split(':')[0]}."
    for attempt in (
        lambda: run_study(study, store, observer=Observer(), max_parallel=1),
        lambda: plan(study, store=store),
    ):
        with pytest.raises(InputError, match="held-out text has") as error:
            attempt()
        assert str(error.value).startswith(where)
    assert not list(store.root.glob("stages/*/checkpoints"))
    assert not list(store.root.glob("stages/*/metrics.jsonl"))


def test_what_is_long_enough_is_planned(write, tmp_path):
    store, (path, _) = (
        Store(tmp_path / "store"),
        write("long_enough", "{extrapolation: {lengths: [1, 2], sequences: 2}}"),
    )
    run_study(load_study(path), store, observer=Observer(), max_parallel=1)
    plan(load_study(path), store=store)
