"""A damaged file costs the run that it belongs to, never the study; what can be had again is, bit for bit."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lit_llm.cli import app
from lit_llm.config.problems import InputError
from lit_llm.report.pages.study import write_report
from lit_llm.runs.trained_model import export_finished, open_finished
from lit_llm.store.files import remove
from lit_llm.store.store import Store
from lit_llm.studies.analysis_plan import FROZEN, LOG
from lit_llm.studies.load import load_study
from lit_llm.studies.run import Finished, Observer, run_study
from lit_llm.studies.runs import Run, runs_of
from tests.damages import DAMAGES, copied, damage
from tests.mlflow_runs import mirrored

pytestmark = pytest.mark.xdist_group("damaged-files")
AGAIN = "`lit-llm run STUDY --rerun failed` computes it again"
TIMES = ("started", "finished", "seconds")


class Told(Observer):
    """A observer that remembers what it was told."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.todo: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def launching(self, runs: object, todo: list[Run], max_parallel: int) -> None:
        self.todo = [run.name for run in todo]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> tuple[Path, Path]:
    """A study of two arms that were pretrained and evaluated, and its store."""
    folder = tmp_path_factory.mktemp("ran")
    path = folder / "damaged.yaml"
    path.write_text(
        f"""
study: damaged
question: What is lost?
extends: redllm-tiny
base:
  model: {{d_model: 16, vocabulary: 258, attention: {{heads: 2}}, feed_forward: {{d_ff: 32}}}}
  pretrain:
    data: {{corpus: {{kind: text, files: ["{corpus}/*.txt"]}}, tokenizer: bytes, sequence_length: 32, batch_size: 4}}
    training: {{max_steps: 6, schedule: {{warmup_steps: 2}}, execution: {{log_every: 2}}}}
    validation: {{times: 2, sequences: 8}}
  evaluate: {{after: [pretrain], likelihood: {{documents: 4}}}}
arms: {{red: {{}}, dec: {{extends: decllm-tiny}}}}
seeds: [0]
allow: [{{key: budget, because: small arms cost what they cost}}]
"""
    )
    assert run_again(path, folder / "store", Told()).exit_code == 0
    return path, folder / "store"


def run_again(path: Path, store: Path, observer: Told, rerun: str | None = None, reported: bool = True) -> Finished:
    report = write_report if reported else lambda *_: []
    return run_study(load_study(path), Store(store), observer=observer, max_parallel=1, rerun=rerun, report=report)


def do_as_told(error: InputError, file: Path) -> None:
    """Follow the advice of a message that names a damaged file."""
    advice = re.fullmatch(r"(\S+): .*(delete the folder (\S+) and|delete the file and|remove it if).*", str(error))
    assert advice, (file, str(error))
    assert Path(advice[1]) == file
    remove(Path(advice[3] or file))


def command(*arguments: object) -> str:
    """What a command prints; it ends well."""
    done = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "400"}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def run_of(path: Path, store: Path, arm: str = "red") -> Run:
    return next(run for run in runs_of(load_study(path), Store(store)) if run.arm.name == arm)


def records(run: Run) -> list[object]:
    """All that its stages have found, without the time that it took."""
    found: list[object] = []
    for step in run.steps:
        result = step.stage.result()
        assert result is not None
        metrics = {name: value for name, value in result["metrics"].items() if not name.startswith("throughput/")}
        rest = {key: value for key, value in result.items() if key not in (*TIMES, "metrics", "files", "notes")}
        files = [step.stage.folder / name for name in ("losses.jsonl", "rows.jsonl", "checkpoints/model.safetensors")]
        found += [metrics, rest, *[file.read_bytes() for file in files if file.exists()]]
    return found


def test_one_damaged_result_is_reported_by_name_and_computed_again(ran: tuple[Path, Path], tmp_path: Path) -> None:
    path, store = ran[0], copied(ran[1], tmp_path / "store")
    before, other = records(run_of(path, store)), run_of(path, store, "dec").result().result["metrics"]
    file = run_of(path, store).steps[0].stage.folder / "result.json"
    damage(file, "flipped")

    said = f"red/seed 0 is left out: {file}: is damaged: its content is not that of its digest; {AGAIN}"
    assert said in command("report", path, "--store", store)
    assert json.loads(command("report", path, "--store", store, "--json"))["left_out"] == [said]
    rows = json.loads(command("status", path, "--store", store, "--json"))["runs"]
    assert [(row["arm"], row["state"]) for row in rows if row["state"] != "done"] == [("red", "failed")]
    with pytest.raises(InputError, match=f"{file}: is damaged"):
        open_finished(Store(store), file.parent.name)
    page = (store / "studies" / "damaged" / "report.html").read_text()
    assert "what did not end well" in page
    assert f"{file}: is damaged" in page
    told = Told()
    finished = run_again(path, store, told)
    assert (finished.exit_code, told.todo) == (1, [])
    assert said in told.messages
    assert run_of(path, store, "dec").result().result["metrics"] == other

    told = Told()
    finished = run_again(path, store, told, rerun="failed")
    assert (finished.exit_code, told.todo) == (0, ["red/seed 0"])
    assert records(run_of(path, store)) == before


def test_damaged_weights_are_refused_by_name_and_trained_again(ran: tuple[Path, Path], tmp_path: Path) -> None:
    """The evaluation after them stays: it was made with the weights that come again."""
    path, store = ran[0], copied(ran[1], tmp_path / "store")
    run = run_of(path, store)
    before, evaluated = records(run), (run.last.folder / "result.json").stat().st_mtime_ns
    weights = run.steps[0].stage.checkpoints / "model.safetensors"
    damage(weights, "flipped")
    for use in (
        lambda: open_finished(Store(store), run.steps[0].node.fingerprint),
        lambda: export_finished(Store(store), run.steps[0].node.fingerprint, tmp_path / "exported"),
    ):
        with pytest.raises(InputError, match=f"{weights}: is damaged.*; {AGAIN}"):
            use()
    told = Told()
    assert run_again(path, store, told, rerun="failed").exit_code == 0
    assert told.todo == ["red/seed 0"]
    assert records(run_of(path, store)) == before
    assert (run.last.folder / "result.json").stat().st_mtime_ns == evaluated
    open_finished(Store(store), run.steps[0].node.fingerprint)


@pytest.mark.parametrize("how", ["flipped", "emptied", "deleted", "unreadable"])
def test_a_damaged_configuration_is_written_again(ran: tuple[Path, Path], tmp_path: Path, how: str) -> None:
    path, store = ran[0], copied(ran[1], tmp_path / "store")
    file = run_of(path, store).steps[0].stage.config_file
    whole = file.read_bytes()
    damage(file, how)
    with pytest.raises(InputError, match=file.parent.name):
        open_finished(Store(store), file.parent.name)
    told = Told()
    assert run_again(path, store, told).exit_code == 0
    assert f"{file} was damaged or missing; it is written again" in told.messages
    assert file.read_bytes() == whole


def test_weights_have_the_mode_of_their_neighbours(ran: tuple[Path, Path], tmp_path: Path) -> None:
    path, store = ran
    for step in run_of(path, store).trained:
        folder = step.stage.checkpoints
        modes = {file.name: file.stat().st_mode for file in (*folder.iterdir(), *step.stage.folder.glob("*.json"))}
        assert set(modes.values()) == {step.stage.config_file.stat().st_mode}
        export_finished(Store(store), step.node.fingerprint, tmp_path / "exported")
    assert len({file.stat().st_mode for file in (tmp_path / "exported").iterdir()}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("how", DAMAGES)
def test_no_damage_of_a_file_of_a_finished_stage_ends_in_a_traceback(
    ran: tuple[Path, Path], tmp_path: Path, how: str
) -> None:
    """Each file, one at a time: `run` and `report` show what they showed before, or name the file and the next step.

    `--rerun failed` then brings back what was computed, bit for bit. `docs/running.md` has the tables.
    """
    path, store = ran
    run = run_of(path, store)
    before = records(run)
    files = sorted(
        file.relative_to(store) for step in run.steps for file in step.stage.folder.rglob("*") if file.is_file()
    )
    assert len(files) > 10
    for name in files:
        place = copied(store, tmp_path / "store")
        if not (place / name).stat().st_size:
            shutil.rmtree(place)  # the lock: there is nothing in it
            continue
        damage(place / name, how)
        told = Told()
        finished = run_again(path, place, told, reported=False)
        if finished.exit_code:
            printed = command("report", path, "--store", place)
            said = [line for line in (*told.messages, printed) if f"{place / name}: " in line and AGAIN in line]
            assert len(said) == 2, (name, told.messages, printed)
        run_again(path, place, Told(), rerun="failed", reported=False)
        assert records(run_of(path, place)) == before, name
        shutil.rmtree(place)


@pytest.mark.slow
@pytest.mark.parametrize("how", DAMAGES)
def test_no_damage_of_another_file_of_the_store_ends_in_a_traceback(
    ran: tuple[Path, Path], tmp_path: Path, how: str
) -> None:
    """Tokenised text, what a study keeps for programs, MLflow's database: each is healed, or named with what to do, and
    that heals it. What `report` draws is damaged all at once: it is only ever written."""
    path, store = ran
    command("report", path, "--store", store)
    before = records(run_of(path, store))
    files = sorted(file.relative_to(store) for file in store.rglob("*") if file.is_file() and file.stat().st_size)
    drawn = [name for name in files if name.suffix not in (".json", ".jsonl") and name.parts[0] == "studies"]
    single = [name for name in files if name not in drawn and name.parts[0] in ("data", "studies", "store.json")]
    assert len(drawn) > 5
    assert len(single) > 15
    for number, names in enumerate([drawn, *([name] for name in single)]):
        place = copied(store, tmp_path / f"store{number}")  # MLflow remembers a database by its name
        for name in names:
            damage(place / name, how)
        of_study, told = names[0].parts[0] == "studies", Told()
        try:
            finished = run_again(path, place, told, reported=of_study)
        except InputError as error:
            do_as_told(error, place / names[0])
            finished = run_again(path, place, Told(), reported=False)
        assert finished.exit_code == 0, names
        assert records(run_of(path, place)) == before, names
        if names[0].name == FROZEN:  # what was frozen before there was a result cannot be had again
            assert f"{place / names[0]} " in command("report", path, "--store", place)
        elif names[0].name == LOG and how in ("emptied", "deleted"):
            assert any(f"{place / names[0]} holds no comparison" in message for message in told.messages)
        elif names[0].name == LOG and how == "unreadable":  # a folder, which is left where it is
            assert f"{place / names[0]} cannot be read" in command("report", path, "--store", place)
        elif of_study:
            assert [name for name in names if not (place / name).is_file()] == []
            assert command("status", "damaged", "--store", place).count("done") > 1
        shutil.rmtree(place)


@pytest.mark.slow
@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_database_of_mlflow_is_made_anew_from_what_is_on_disk(
    ran: tuple[Path, Path], tmp_path: Path, how: str
) -> None:
    path, place = ran[0], copied(ran[1], tmp_path / "store")
    damage(place / "mlflow.db", how)
    told = Told()
    assert run_again(path, place, told).exit_code == 0
    if any("is broken" in message for message in told.messages):
        assert any("`lit-llm store rebuild-mlflow --store" in message for message in told.messages)
    command("store", "rebuild-mlflow", "--store", place)
    found, stages = mirrored(place), [folder.name for folder in (place / "stages").iterdir()]
    assert set(found.values()) == {1}
    assert found.keys() <= set(stages)
    assert len(found) == 2
