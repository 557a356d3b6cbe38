"""A sweep on the command line: what it prints, what it writes, how it fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest

from lit_llm.config.tree import read_file
from lit_llm.experiment.load import load_experiment
from lit_llm.store.store import Store
from lit_llm.sweeps.json_schema import sweep_schema
from tests.commands import in_a_process, lit_llm
from tests.equal_budgets import budgets_allowed
from tests.pages import ReadPage

pytestmark = pytest.mark.xdist_group("sweep-commands")
ROOT = Path(__file__).parents[1]
ARMS = "arms: {red: {}, dec: {extends: decllm-tiny}}"
SPACE = (
    "space: {pretrain.training.optimizer.lr: {log_uniform: [1e-4, 1e-1]}, model.feed_forward.d_ff: {choice: [32, 64]}}"
)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> tuple[Path, Path, str]:
    """(sweep file, store, what the command printed) of a small search."""
    folder = tmp_path_factory.mktemp("searched")
    corpus = shutil.copytree(corpus, folder / "corpus")
    base = f"""
  model: {{d_model: 16, vocabulary: 258, attention: {{heads: 2}}, feed_forward: {{d_ff: 32}}}}
  pretrain:
    data: {{corpus: {{kind: text, files: ["{corpus}/*.txt"]}}, tokenizer: bytes, sequence_length: 32, batch_size: 4}}
    training: {{max_steps: 8, schedule: {{warmup_steps: 2}}}}
    validation: {{times: 2, sequences: 8}}
"""
    path = folder / "small.yaml"
    head = "sweep: small\nquestion: Which *rate*?\nextends: redllm-tiny\n"
    path.write_text(budgets_allowed(f"{head}base: {base}\n{ARMS}\n{SPACE}\ntrials: 4\nwinners: {{seeds: [5, 6]}}\n"))
    done = lit_llm("sweep", path, "--store", folder / "store", "-j", 2)
    assert done.returncode == 0, done.stderr
    return path, folder / "store", done.stdout


def test_a_sweep_ends_with_what_each_arm_spent_and_with_the_winners(searched: tuple[Path, Path, str]) -> None:
    path, store, printed = searched
    found = json.loads(lit_llm("report", path, "--store", store, "--json").stdout)
    for arm in found["arms"]:
        assert arm["states"] == {"done": 4}
        assert arm["tokens"] == 4 * 8 * 4 * 32
        assert f"{arm['best']['values']['val/target_nll']:.3f}" in printed
        assert arm["best"]["values"]["val/target_nll"] <= arm["own"]["values"]["val/target_nll"]
    assert "small-winners" in printed
    assert "Traceback" not in printed


def test_status_shows_every_trial_and_a_second_sweep_has_nothing_to_do(searched: tuple[Path, Path, str]) -> None:
    path, store, _ = searched
    before = json.loads(lit_llm("status", path, "--store", store, "--json").stdout)
    assert [trial["state"] for trial in before["trials"] if trial["state"] == "done"] == ["done"] * 8
    assert {tuple(trial["setting"]) for trial in before["trials"]} == {
        ("pretrain.training.optimizer.lr", "model.feed_forward.d_ff")
    }
    again = lit_llm("sweep", path, "--store", store)
    assert again.returncode == 0
    assert "0 of 2 arms x 4 trials to do" in again.stdout
    assert json.loads(lit_llm("status", path, "--store", store, "--json").stdout) == before


def test_report_draws_what_optuna_draws_into_files(searched: tuple[Path, Path, str]) -> None:
    path, store, _ = searched
    shown = lit_llm("report", path, "--store", store)
    assert shown.returncode == 0, shown.stderr
    folder = store / "studies" / "small" / "figures"
    names = {f"{arm}-{name}.png" for arm in ("red", "dec") for name in ("history", "slices", "importance", "parallel")}
    assert {file.name for file in folder.glob("*.png")} == names | {"tuning.png"}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in folder.glob("*.png"))
    assert f"optuna-dashboard {store}/studies/small/optuna.journal" in shown.stdout
    page = ReadPage(folder.parent / "report.html")
    assert page.texts["p"][1].startswith("Best val/target_nll: red ")
    assert "\n\nWhich \\*rate\\*?\n\n" in (folder.parent / "sweep.md").read_text()
    assert len(page.images) == len(names) + 1
    assert all(image["alt"] for image in page.images)
    (trials,) = [table for table in page.tables if table.head[0] == "trial"]
    status = json.loads(lit_llm("status", path, "--store", store, "--json").stdout)["trials"]
    assert [row[1] for row in trials.rows] == [trial["state"] for trial in status]
    (winners,) = [node for node in page.links if node.endswith("small-winners/report.html")]
    assert (folder.parent / winners).exists()


def test_the_best_setting_is_an_experiment_that_train_takes(searched: tuple[Path, Path, str]) -> None:
    path, store, _ = searched
    best = json.loads(lit_llm("report", path, "--store", store, "--json").stdout)["arms"][1]["best"]
    file = store / "studies" / "small" / "best" / "dec.yaml"
    experiment = load_experiment(file)
    assert experiment.pretrain.training.optimizer.lr == best["setting"]["pretrain.training.optimizer.lr"]
    assert str(experiment.model.feed_forward.d_ff) == best["setting"]["model.feed_forward.d_ff"]
    done = lit_llm("train", file, "--store", store)  # it is there already
    assert done.returncode == 0, done.stderr
    assert "1 are there already" in done.stdout
    assert f"{best['values']['val/target_nll']:.3f}" in done.stdout


def test_a_sweep_is_opened_by_its_name_where_its_file_and_its_text_are_gone(
    searched: tuple[Path, Path, str], tmp_path: Path
) -> None:
    path, store, _ = searched
    asked = [[command, "--store", store, "--json"] for command in ("plan", "status", "report")]
    from_file = [json.loads(lit_llm(first, path, *rest).stdout) for first, *rest in asked]
    shutil.copytree(store, tmp_path / "moved")
    away = [[word if word != store else tmp_path / "moved" for word in words] for words in asked]
    gone = [(place, place.with_name(f"gone-{place.name}")) for place in (path, path.parent / "corpus", store)]
    for place, elsewhere in gone:
        place.rename(elsewhere)
    try:
        by_name = [json.loads(lit_llm(first, "small", *rest).stdout) for first, *rest in away]
        assert by_name[1:] == from_file[1:]
        assert [arm["parameters"] for arm in by_name[0]["arms"]] == [arm["parameters"] for arm in from_file[0]["arms"]]
        again = in_a_process("sweep", "small", "--store", tmp_path / "moved")
        assert (again.returncode, again.stderr) == (0, "")
        assert "0 of 2 arms x 4 trials to do" in again.stdout
        assert "small-winners" in again.stdout
        run = lit_llm("run", "small", "--store", tmp_path / "moved")
        assert (run.returncode, f"use `lit-llm sweep small --store {tmp_path}/moved`" in run.stderr) == (2, True)
    finally:
        for place, elsewhere in gone:
            elsewhere.rename(place)


def test_the_last_line_is_the_next_step_where_the_winners_were_not_done(
    write_sweep: Callable[..., Path], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every trial is done: whoever presses Ctrl-C then goes on, and what failed is told of the winners' study."""
    space = "space: {pretrain.training.optimizer.lr: {log_uniform: [1e-4, 1e-1]}}"
    path = write_sweep("unfinished", f"{ARMS}\n{space}\nseeds: [710]\nwinners: {{seeds: [711]}}", trials=1)
    last = {
        True: (130, f"Interrupted; `lit-llm sweep {path} --store {store.root}` goes on."),
        False: (
            1,
            "Some runs of the winners failed: "
            f"`lit-llm status {store.root}/studies/unfinished/winners.yaml --store {store.root}` says why.",
        ),
    }
    for interrupted, (code, line) in last.items():
        monkeypatch.setattr("lit_llm.studies.execute.Execution.execute", lambda *_, said=interrupted: said)
        ended = lit_llm("sweep", path, "--store", store.root)
        assert ended.returncode == code
        assert ended.stdout.rstrip().endswith(line)
        assert "Some trials" not in ended.stdout


def test_plan_of_a_sweep_says_what_is_searched_and_what_it_comes_to(tmp_path: Path) -> None:
    shown = lit_llm("plan", "sweeps/fair_lr.yaml", "--store", tmp_path, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    text = " ".join(shown.stdout.split())
    assert "3 arms x 24 trials = 72 runs" in text
    assert "hyperband by steps" in text
    found = json.loads(lit_llm("plan", "sweeps/fair_lr.yaml", "--store", tmp_path, "--json", cwd=ROOT).stdout)
    assert {"study", "question", "arms", "findings", "sweep", "searched"} <= found.keys()
    assert found["searched"]["dec"] == list(found["sweep"]["space"])
    assert not list(tmp_path.iterdir())


def test_a_wrong_sweep_is_one_message_and_nothing_is_started(write_sweep: Callable[..., Path], tmp_path: Path) -> None:
    path = write_sweep("wrong", "space: {pretrain.training.optimizer.lrr: {log_uniform: [1, 1e-1]}}")
    for command in ("sweep", "plan", "status", "report"):
        done = lit_llm(command, path, "--store", tmp_path / "store")
        assert done.returncode == 2
        assert f"{path}:11: space.pretrain.training.optimizer.lrr.log_uniform: the lowest" in done.stderr
        assert "nothing was started" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "store").exists()


def test_a_study_is_no_sweep_and_a_sweep_no_study(tmp_path: Path) -> None:
    one = lit_llm("run", "sweeps/quickstart.yaml", "--store", tmp_path / "store", cwd=ROOT)
    assert (one.returncode, f"use `lit-llm sweep sweeps/quickstart.yaml --store {tmp_path}/store`" in one.stderr) == (
        2,
        True,
    )
    other = lit_llm("sweep", "ablations/quickstart.yaml", "--store", tmp_path / "store", cwd=ROOT)
    assert (other.returncode, "`lit-llm run` takes a study" in other.stderr) == (2, True)


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_schema_takes_every_shipped_sweep(path: Path) -> None:
    jsonschema.validate(read_file(path).plain(), sweep_schema())
