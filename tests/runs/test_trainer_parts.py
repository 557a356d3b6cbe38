"""What a user adds to Lightning's Trainer: real callbacks, loggers and profilers in runs, named where it matters."""

from __future__ import annotations

import csv
import importlib
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, ModelSummary
from lightning.pytorch.callbacks import StochasticWeightAveraging as Averaging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from safetensors.torch import load_file

import lit_llm
from lit_llm.config.code_digest import digest_of_code
from lit_llm.config.problems import InputError
from lit_llm.runs.part_names import code_digest, name_of
from lit_llm.runs.provenance import provenance, same_provenance
from lit_llm.runs.run_one_stage import run_one
from lit_llm.runs.stage_config import load_stage_config
from lit_llm.runs.trainer_parts import TrainerParts, given, in_force
from lit_llm.store.store import Stage, Store, read_metrics
from lit_llm.studies.load import load_study
from lit_llm.studies.observer import Observer
from lit_llm.studies.runs import runs_of
from lit_llm.studies.stage_executor import StageExecutor, Work
from lit_llm.studies.status import status_rows
from lit_llm.studies.supervise import Supervision
from tests.made_up_results import finish, study_of
from tests.stages_in_parts import numbers, prepared_stage, stops_after
from tests.sweeps.tiny_sweeps import sweep

STOPPING = partial(EarlyStopping, "val/target_nll", patience=1, min_delta=100.0)
"""Ends a training at its second evaluation, which is no better by 100 nats."""


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def write_settings(folder: Path, text: str) -> Path:
    file = folder / "config" / "lit-llm" / "settings.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def trained(folder: Path, corpus: Path, parts: TrainerParts, *steps: int) -> Stage:
    """A stage trained with these parts, interrupted at its checks with these numbers."""
    torch.set_num_threads(1)
    stage = prepared_stage(Store(folder), corpus, "decllm-tiny")
    with given(parts):
        if steps:
            assert run_one(folder, stage.fingerprint, stops_after(*steps)) == "interrupted"
        assert run_one(folder, stage.fingerprint) == "done"
    return stage


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Stage:
    return trained(tmp_path_factory.mktemp("plain"), corpus, TrainerParts())


def assert_equal_results(stage: Stage, plain: Stage) -> None:
    assert numbers(stage) == numbers(plain)
    weights, expected = (load_file(each.checkpoints / "model.safetensors") for each in (stage, plain))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_observers_and_loggers_change_no_bit_and_are_in_the_provenance(
    tmp_path: Path, corpus: Path, plain: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    """The logger has the lines of metrics.jsonl, the monitor the steps' rates, the others their text."""
    parts = TrainerParts(
        callbacks=[ModelSummary(max_depth=2), LearningRateMonitor, ModelCheckpoint],
        loggers=[CSVLogger],
        profiler=SimpleProfiler,
    )
    stage = trained(tmp_path, corpus, parts)
    assert_equal_results(stage, plain)
    (file,) = stage.folder.glob("lightning/**/metrics.csv")
    rows = list(csv.DictReader(file.open()))
    lines = {line["step"]: line["metrics"] for line in read_metrics(stage.metrics_file)}
    logged = {int(row["step"]): float(row["train/loss"]) for row in rows if row["train/loss"]}
    assert logged == pytest.approx({step: metrics["train/loss"] for step, metrics in lines.items()})
    rates = {int(row["step"]): float(row["lr-AdamW"]) for row in rows if row.get("lr-AdamW")}
    of_lines = {step - 1: metrics["train/lr"] for step, metrics in lines.items() if step - 1 in rates}
    assert {step: rates[step] for step in of_lines} == pytest.approx(of_lines)
    assert len(of_lines) > 3
    assert "model.embedding" in caplog.text
    assert "run_training_batch" in next(stage.folder.glob("lightning/*profile*.txt")).read_text()
    assert "d_model: 16" in next(stage.folder.glob("lightning/**/hparams.yaml")).read_text()
    result, without = stage.result() or {}, plain.result() or {}
    names = [name.rpartition(":")[2].partition(" ")[0] for name in result["provenance"]["trainer"]["callbacks"]]
    assert names == ["ModelSummary", "LearningRateMonitor", "ModelCheckpoint"]
    assert same_provenance(result["provenance"], without["provenance"])


@pytest.mark.parametrize("interrupted", [(), (6,)])
def test_early_stopping_ends_a_run_as_done_with_the_final_evaluation_of_its_last_step(
    tmp_path: Path, corpus: Path, plain: Stage, interrupted: tuple[int, ...]
) -> None:
    """Evaluations come after steps 5, 9 and 14. Judge: the run without it, whose lines up to step 8 are the same."""
    stage = trained(tmp_path, corpus, TrainerParts(callbacks=[STOPPING]), *interrupted)
    result = stage.result() or {}
    assert (result["state"], result["steps"], result["stopped_by"]) == ("done", 9, "EarlyStopping")
    assert numbers(stage)[:-1] == [line for line in numbers(plain) if line[0] < 9]
    last, whole = numbers(stage)[-1], dict(numbers(plain))
    assert last[0] == 9
    assert last[1]["train/loss"] == whole[9]["train/loss"]
    assert last[1]["val/target_nll"] == pytest.approx(whole[9]["val/target_nll"], rel=0.1)  # of more windows
    assert last[1]["val/target_nll"] == result["metrics"]["val/target_nll"]
    assert (stage.checkpoints / "model.safetensors").exists()
    assert "EarlyStopping ended it at step 9 of 14" in stage.status()["notes"]
    assert not same_provenance(result["provenance"], (plain.result() or {})["provenance"])


class EndsAtStepThree(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == 3


def test_a_callback_may_end_a_run_after_any_step(tmp_path: Path, corpus: Path, plain: Stage) -> None:
    result = trained(tmp_path, corpus, TrainerParts(callbacks=[EndsAtStepThree])).result() or {}
    assert (result["steps"], result["stopped_by"], result["tokens"]) == (3, "EndsAtStepThree", 3 * 4 * 32)
    assert result["metrics"].keys() == (plain.result() or {})["metrics"].keys()


def test_the_note_of_an_early_end_counts_the_weights_in_the_average(tmp_path: Path, corpus: Path) -> None:
    """Of those after steps 2, 6, 10 and 14."""
    torch.set_num_threads(1)
    averaging = "pretrain.training.weight_averaging={kind: last_k, k: 4, every: 4}"
    stage = prepared_stage(Store(tmp_path), corpus, "decllm-tiny", averaging)
    with given(TrainerParts(callbacks=[EndsAtStepThree])):
        assert run_one(tmp_path, stage.fingerprint) == "done"
    assert "EndsAtStepThree ended it at step 3 of 14; its average has 1 of 4 weights" in stage.status()["notes"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TensorBoardLogger", "WandbLogger"])
def test_loggers_of_other_packages_get_the_lines(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    package = {"TensorBoardLogger": "tensorboard", "WandbLogger": "wandb"}[name]
    pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    stage = trained(tmp_path, corpus, TrainerParts(loggers=[f"lightning.pytorch.loggers:{name}"]))
    read = {"tensorboard": losses_of_tensorboard, "wandb": losses_of_wandb}[package]
    assert read(stage.folder / "lightning") == [
        (line["step"], pytest.approx(line["metrics"]["train/loss"])) for line in read_metrics(stage.metrics_file)
    ]


def losses_of_tensorboard(folder: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(folder.glob("**/events.out*")).parent))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def losses_of_wandb(folder: Path) -> list[tuple[int, float]]:
    """Losses of an offline run: protobuf records in LevelDB's log format, after seven bytes; wandb has no reader."""
    import wandb

    Record = importlib.import_module("wandb.proto.wandb_internal_pb2").Record  # it has no types
    wandb.teardown()  # as the end of a run's process does; only then is the file whole
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    content, place, record, rows = file.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:  # the end of a block has no room for a head
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)  # after a checksum
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            items = Record.FromString(record).history.item
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
            record = b""
    return [(row["trainer/global_step"], row["train/loss"]) for row in rows if "train/loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("profiler", "text"),
    [(partial(PyTorchProfiler, export_to_chrome=False), "aten::"), (AdvancedProfiler, "function calls")],
    ids=["PyTorchProfiler", "AdvancedProfiler"],
)
def test_a_profiler_and_a_plugin_reach_the_trainer(
    tmp_path: Path, corpus: Path, plain: Stage, profiler: object, text: str
) -> None:
    stage = trained(tmp_path, corpus, TrainerParts(profiler=profiler, plugins=[TorchCheckpointIO]), 5)
    assert_equal_results(stage, plain)
    assert text in next(stage.folder.glob("lightning/*profile*.txt")).read_text()
    assert "TorchCheckpointIO" in (stage.result() or {})["provenance"]["changing_parts"]


def test_checkpoints_that_are_written_later_are_refused() -> None:
    with pytest.raises(InputError, match=r"trainer.plugins: AsyncCheckpointIO writes a checkpoint later"):
        TrainerParts(plugins=[AsyncCheckpointIO]).build(Path()).added_to({"strategy": "auto"})


def test_parts_of_the_settings_are_in_force_and_named_with_their_arguments(tmp_path: Path) -> None:
    write_settings(
        tmp_path,
        """
[trainer]
callbacks = [{factory = "lightning.pytorch.callbacks:EarlyStopping", monitor = "val/target_nll", patience = 2}]
loggers = ["lightning.pytorch.loggers:CSVLogger"]
""",
    )
    parts = in_force()
    parts.check()
    named = "lightning.pytorch.callbacks:EarlyStopping(monitor='val/target_nll', patience=2)"
    assert parts.names() == {"callbacks": [named], "loggers": ["lightning.pytorch.loggers:CSVLogger"]}
    assert parts.may_change() == [named]
    built = parts.build(tmp_path)
    assert isinstance(built.callbacks[0], EarlyStopping)
    assert built.callbacks[0].patience == 2
    assert built.loggers[0].save_dir == str(tmp_path)
    with given(TrainerParts(callbacks=[Averaging(1e-3)])):
        assert len(in_force().callbacks) == 2
    assert len(in_force().callbacks) == 1


def test_status_looks_at_the_users_settings_once_for_all_results(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = runs_of(study_of(tmp_path, corpus), Store(tmp_path / "store").open())
    for run in runs[:3]:
        finish(run, 1.0)
    looks: list[TrainerParts] = []
    monkeypatch.setattr("lit_llm.runs.trainer_parts.of_settings", lambda: looks.append(TrainerParts()) or looks[-1])
    assert [row["state"] for row in status_rows(runs)].count("done") == 3
    assert len(looks) == 1


def test_wrong_settings_are_refused_with_their_place(tmp_path: Path) -> None:
    write_settings(tmp_path, "[trainer]\ncallbacks = ['EarlyStopping']\n")
    with pytest.raises(
        InputError, match=r'settings.toml: trainer.callbacks.*names no class or function: give it as "pa'
    ):
        in_force()


def test_a_stores_settings_name_no_code(tmp_path: Path) -> None:
    from lit_llm.launch.settings import launch_settings

    (tmp_path / "settings.toml").write_text("[trainer]\ncallbacks = ['os:getcwd']\n")
    with pytest.raises(InputError, match="trainer: names code, which only your own settings may"):
        launch_settings(tmp_path)


def local_class() -> type[L.Callback]:
    class Inner(L.Callback):
        pass

    return Inner


def test_what_a_runs_process_cannot_make_is_refused_with_all_problems_at_once() -> None:
    parts = TrainerParts(
        callbacks=[
            local_class(),
            lambda: EarlyStopping("x"),
            "lightning.pytorch.callbacks:EarlyStoping",
            "no_such:x",
        ],
        loggers=["math:pi"],
    )
    with pytest.raises(InputError) as error:
        parts.check()
    text = str(error.value)
    assert len(error.value.problems) == 5
    assert text.count("cannot be sent to the processes of the runs") == 2
    assert 'or name a factory there: "package.module:make_it"' in text
    assert "trainer.callbacks: lightning.pytorch.callbacks:EarlyStoping cannot be imported: AttributeError" in text
    assert "trainer.callbacks: no_such:x cannot be imported: ModuleNotFoundError" in text
    assert "trainer.loggers: math:pi is no class or function, but float" in text


def test_the_process_of_a_run_gets_the_parts_of_its_study(tmp_path: Path, corpus: Path) -> None:
    """The task of a stage, called as its process does."""
    stage, parts = prepared_stage(store := Store(tmp_path), corpus, "decllm-tiny"), TrainerParts([EndsAtStepThree])
    limits, work = Supervision(), Work("red", stage.fingerprint)
    executor = StageExecutor(store, [work], slots=[{}], observer=Observer(), supervision=limits, trainer=parts)
    task = executor._task(work)
    assert task.function(*task.arguments) == "done"
    assert (stage.result() or {})["stopped_by"] == "EndsAtStepThree"
    assert not in_force()


@pytest.mark.slow
def test_a_study_gives_its_parts_to_the_processes_of_its_runs_and_names_what_they_ended(
    tmp_path: Path, store: Store, write_study: Callable[..., Path]
) -> None:
    """One part by Python and one by the settings; results without them are of another provenance."""
    arguments = 'monitor = "val/target_nll", min_delta = 100.0, patience = 1'
    part = f'{{factory = "lightning.pytorch.callbacks:EarlyStopping", {arguments}}}'
    write_settings(tmp_path, f"[trainer]\ncallbacks = [{part}]\n")
    study = write_study("ended", "arms: {red: {}, plain: {model: {attention: {output_norm: none}}}}", seeds=[7707])
    finished = lit_llm.run(study, store=store.root, jobs=2, trainer=TrainerParts(loggers=[CSVLogger]))
    assert finished.exit_code == 0
    frame, arms = finished.to_frame(), finished.comparison.to_frame()
    assert list(frame["state"]) == ["done", "done"]
    assert list(frame["tokens"]) == [8 * 4 * 32] * 2  # evaluations come after steps 4, 8 and 12
    assert list(arms["mean"]) == pytest.approx(list(frame[finished.comparison.metric]))
    steps = finished.runs[0].to_frame()
    assert list(steps["step"]) == [4, 8]
    (note,) = [note for note in finished.comparison.notes if "a callback ended them" in note]
    assert "red/seed 7707: pretrain at step 8 by EarlyStopping" in note
    for run in finished.runs:
        (file,) = run.last.folder.glob("lightning/**/metrics.csv")
        assert len(list(csv.DictReader(file.open()))) == 2
        assert not run.stale()
    write_settings(tmp_path, "")
    assert all(run.stale() for run in finished.runs)


def test_parts_from_python_are_refused_where_they_would_not_arrive(
    store: Store, write_study: Callable[..., Path]
) -> None:
    study = write_study("wide", "arms: {red: {}}", seeds=[0])
    wide = load_study(study, ["pretrain.training.execution.devices=2"])
    with pytest.raises(InputError, match=r"trainer: parts from Python do not reach the processes of a run on several"):
        lit_llm.run(wide, store=store.root, trainer=TrainerParts(loggers=[CSVLogger]))


def test_parts_from_python_end_with_their_study(
    store: Store, write_study: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[TrainerParts] = []
    monkeypatch.setattr("lit_llm.studies.run.runs_of", lambda *_: seen.append(in_force()) or [])
    study = load_study(write_study("ends", "arms: {red: {}}", seeds=[0]))
    with pytest.raises(InputError, match="no arm matches 'nobody'"):
        lit_llm.run(study, store=store.root, only="nobody", trainer=TrainerParts(callbacks=[STOPPING]))
    assert seen == [TrainerParts(callbacks=(STOPPING,))]
    assert not in_force()


def test_a_wrong_factory_of_the_settings_is_refused_before_a_sweep_starts(
    tmp_path: Path, write_sweep: Callable[..., Path]
) -> None:
    write_settings(tmp_path, "[trainer]\ncallbacks = ['no_such:Callback']\n")
    path = write_sweep("wrong", "arms: {red: {}}\nspace: {pretrain.training.optimizer.lr: {uniform: [0.001, 0.2]}}")
    with pytest.raises(InputError, match="trainer.callbacks: no_such:Callback cannot be imported"):
        sweep(path, Store(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def test_one_part_in_place_of_a_list_is_refused() -> None:
    with pytest.raises(InputError) as error:
        TrainerParts(callbacks="a.b:C", loggers=CSVLogger, plugins={"factory": "a.b:C"})
    assert [problem.key for problem in error.value.problems] == [
        "trainer.callbacks",
        "trainer.loggers",
        "trainer.plugins",
    ]
    assert "trainer.callbacks: is one str: give a list of parts, callbacks=[...]" in str(error.value)


def test_equal_parts_have_one_name_and_others_another() -> None:
    one, other = EarlyStopping("val/target_nll", patience=1), EarlyStopping("val/target_nll", patience=2)
    assert name_of(one) == name_of(EarlyStopping("val/target_nll", patience=1)) != name_of(other)
    assert name_of(STOPPING) == (
        "lightning.pytorch.callbacks.early_stopping:EarlyStopping(0='val/target_nll', min_delta=100.0, patience=1)"
    )


class Holder(L.Callback):
    def __init__(self, content: object) -> None:
        self.content = content


HELD = """
from functools import partial
from lit_llm.runs.part_names import name_of

addresses = [object() for _ in range(int(__import__("os").environ["PYTHONHASHSEED"]) * 100_000)]


class Holder:
    def __init__(self, content):
        self.content = content

    def hook(self):
        pass


def begins():
    pass


words = {"one", "two", "three", "four"}
itself = Holder(None)
itself.content = [itself]
parts = [partial(Holder, begins), {"factory": "a.b:C", "words": words}, Holder({1: begins, "b": words})]
parts += [Holder([Holder(object())]), Holder(begins), Holder(Holder(1).hook), Holder(Holder(2).hook), itself]
"""


def test_names_of_parts_hold_in_other_processes(tmp_path: Path) -> None:
    """Hashes of strings, and addresses of functions and objects, differ between the two processes."""
    (tmp_path / "held.py").write_text(HELD)
    command = [sys.executable, "-c", "import held; print(*map(held.name_of, held.parts), sep='\\n')"]
    path = os.pathsep.join([str(tmp_path), str(Path(lit_llm.__file__).parents[1])])
    processes = [
        subprocess.Popen(
            command, env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path}, stdout=subprocess.PIPE
        )
        for seed in "12"
    ]
    first, second = (process.communicate()[0].decode().splitlines() for process in processes)
    assert first == second
    assert len(set(first)) == len(first) == 8
    code = digest_of_code(tmp_path, ["held.py"])
    assert first[:2] == [f"held:Holder@{code}(0=held:begins@{code})", "a.b:C(words={'four', 'one', 'three', 'two'})"]


def test_an_edited_callback_makes_results_of_the_earlier_one_stale(
    plain: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next study reads the package anew, with what the callback imports; a comment changes nothing."""
    (folder := tmp_path / "edited_parts").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    experiment, parts = load_stage_config(plain).experiment, TrainerParts(callbacks=["edited_parts.here:make"])

    def written(text: str) -> dict[str, object]:
        (folder / "rates.py").write_text(text)
        parts.check()
        with given(parts):
            return provenance(experiment)

    (folder / "__init__.py").touch()
    (folder / "here.py").write_text("from edited_parts.rates import RATE\n\ndef make():\n    return RATE\n")
    before = written("RATE = 0.1\n")
    assert same_provenance(before, written("RATE = 0.1  # a tenth\n"))
    assert not same_provenance(before, written("RATE = 0.2\n"))
    (folder / "rates.py").write_text("RATE = \n")
    with pytest.raises(InputError, match=r"trainer.callbacks: the code of the package edited_parts cannot be read"):
        parts.check()


def test_no_secret_is_in_the_provenance_or_in_its_digests(plain: Stage) -> None:
    """What matches a name of secrets is left out, but numbers, by which trainings differ."""
    keys = {"api_key": "hidden-1", "settings": {"PASSWORD": ["hidden-2"], "max_tokens": 3}}
    address = "postgresql://me:hidden-3@host/db"
    logger = {"factory": "lightning.pytorch.loggers:CometLogger", **keys}
    noticed = {"factory": "my_package:Noticing", **keys, "address": address}
    parts = TrainerParts([noticed, partial(Holder, **keys)], [logger, partial(CSVLogger, **keys)], profiler=logger)
    with given(parts):
        written = provenance(load_stage_config(plain).experiment)
    assert "hidden" not in str(written)
    assert written["trainer"] == {
        "callbacks": [
            "my_package:Noticing(address='postgresql://host/db', api_key=***, settings=(PASSWORD=***, max_tokens=3))",
            f"{__name__}:Holder@{code_digest(__name__)}(api_key=***, settings=(PASSWORD=***, max_tokens=3))",
        ],
        "loggers": ["lightning.pytorch.loggers:CometLogger", "lightning.pytorch.loggers.csv_logs:CSVLogger"],
        "profiler": ["lightning.pytorch.loggers:CometLogger"],
    }
    one, other = (Holder({"token": secret, "steps": 1}) for secret in ("hidden", "other"))
    assert name_of(one) == name_of(other) != name_of(Holder({"token": "hidden", "steps": 2}))


class Restless(L.Callback):
    def __getstate__(self) -> dict[str, object]:
        return {"now": time.time_ns()}


def test_a_part_that_is_another_in_each_process_is_refused() -> None:
    with pytest.raises(InputError, match=r"trainer.callbacks: .*Restless has another content in each process.*make it"):
        TrainerParts(callbacks=[Restless()]).check()
    TrainerParts(callbacks=[Holder(torch.ones(2)), EarlyStopping("val/target_nll"), Averaging(1e-3)]).check()
    assert name_of(Holder(torch.ones(2))) != name_of(Holder(torch.zeros(2)))
    with pytest.raises(InputError, match="generator has no name that holds in other processes"):
        name_of(Holder(each for each in ()))


def test_parts_that_change_no_training_leave_the_provenance_comparable(plain: Stage) -> None:
    experiment = load_stage_config(plain).experiment
    without = provenance(experiment)
    with given(TrainerParts(callbacks=[ModelSummary()], loggers=[CSVLogger], profiler=SimpleProfiler)):
        assert same_provenance(provenance(experiment), without)
    with given(TrainerParts(callbacks=[Averaging(1e-3)])):
        assert not same_provenance(provenance(experiment), without)
        assert same_provenance(provenance(experiment, evaluates=True), without)
