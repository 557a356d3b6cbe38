"""Who runs a sweep may die, be stopped, or be many: no trial is lost, none is run twice, the budget is exact."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import optuna
import psutil
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from lit_llm.store.store import Stage, Store, read_metrics
from lit_llm.sweeps.run import Searched
from tests.sweeps.tiny_sweeps import (
    ALONE,
    LR,
    ONE,
    STEPS,
    TWO,
    Coordinator,
    Seen,
    beside,
    counted,
    longer,
    of,
    pid_of,
    rates,
    stages,
    sweep,
    wait_until,
)

Write = Callable[..., Path]


def seeded(store: Store, seed: int) -> list[Stage]:
    """The stages of this seed, those of other tests in the same store left out."""
    found = [path for path in store.root.glob("stages/*/config.yaml") if f"seed: {seed}\n" in path.read_text()]
    return [Stage(path.parent) for path in found]


def at_work(store: Store, seed: int) -> list[Stage]:
    """Those that have a checkpoint and are being trained."""
    found = [stage for stage in seeded(store, seed) if (stage.checkpoints / "last.ckpt").exists()]
    return [stage for stage in found if stage.status()["state"] == "running"]


def same_bits(left: Stage, right: Stage) -> bool:
    weights = [(stage.checkpoints / "model.safetensors").read_bytes() for stage in (left, right)]
    losses = [
        [(line["step"], line["metrics"]["train/loss"]) for line in read_metrics(stage.metrics_file)]
        for stage in (left, right)
    ]
    return weights[0] == weights[1] and losses[0] == losses[1]


def assert_exact(ended: Searched, trials: int) -> None:
    """Each arm has its trials, all done, at points of their own, and each stage is one trial's."""
    for arm in ended.search.spaces:
        mine = counted(ended, arm)
        assert [trial.state for trial in mine] == ["done"] * trials
        assert len({json.dumps(trial.point) for trial in mine}) == trials
    names = [name for trial in ended.trials if trial.counts for name in trial.fingerprints]
    assert len(names) == len(set(names))


# --- a trial's process dies ----------------------------------------------------------------------------------------


def test_a_killed_trial_goes_on_from_its_checkpoint_and_ends_with_the_same_bits(
    write_sweep: Write, store: Store, tmp_path: Path
) -> None:
    path = longer(write_sweep("killed_trial", f"{ONE}\n{rates()}\nseeds: [400]\n{ALONE}", trials=2), 120)
    killed: dict[Stage, int] = {}

    def kill_one() -> None:
        for stage in at_work(store, 400)[: 1 - len(killed)]:
            killed[stage] = pid_of(stage)
            os.kill(killed[stage], signal.SIGKILL)

    observer = Seen(kill_one)
    disturbed = sweep(path, store, observer)
    assert_exact(disturbed, 2)
    ((victim, pid),) = killed.items()
    assert pid_of(victim) != pid
    assert any("SIGKILL" in message and "last checkpoint" in message for message in observer.messages)
    assert not (victim.checkpoints / "last.ckpt").exists()
    other, tracking = beside(store, tmp_path / "undisturbed")
    undisturbed = sweep(path, other, tracking=tracking)
    assert [trial.values for trial in disturbed.trials] == [trial.values for trial in undisturbed.trials]
    for left, right in zip(disturbed.trials, undisturbed.trials, strict=True):
        assert same_bits(stages(store, left)[0], stages(other, right)[0])


def test_a_trial_that_is_killed_three_times_has_failed_and_the_others_go_on(write_sweep: Write, store: Store) -> None:
    path = longer(write_sweep("killed_often", f"{ONE}\n{rates()}\nseeds: [401]\n{ALONE}", trials=2), 120)
    victims: Counter[Stage] = Counter()
    pids: set[int] = set()

    def kill_the_first() -> None:
        for stage in seeded(store, 401):
            is_mine = not victims or stage.folder == next(iter(victims)).folder
            if is_mine and stage.status()["state"] == "running" and pid_of(stage) not in pids:
                pids.add(pid_of(stage))
                victims[next(iter(victims), stage)] += 1
                os.kill(pid_of(stage), signal.SIGKILL)

    ended = sweep(path, store, Seen(kill_the_first), max_parallel=1)
    assert list(victims.values()) == [3]
    assert [trial.state for trial in counted(ended, "red")] == ["failed", "done"]
    assert "SIGKILL, 3 times" in (ended.trials[0].error or "")
    assert ended.exit_code == 1


@pytest.mark.slow
def test_a_trial_that_somebody_asks_to_stop_does_not_hold_up_the_search(
    write_sweep: Write, tmp_path: Path, store: Store
) -> None:
    """SIGTERM to its process alone, as a batch system or a person may send it."""
    path = longer(write_sweep("asked", f"{ONE}\n{rates()}\nseeds: [402]\n{ALONE}", trials=2), 200)
    coordinator = Coordinator(tmp_path, path, store.root)
    os.kill(pid_of(wait_until(lambda: at_work(store, 402))[0]), signal.SIGTERM)
    assert coordinator.wait() == 0
    assert_exact(sweep(path, store), 2)


# --- the coordinator dies ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_coordinator_loses_no_trial_and_repeats_none(write_sweep: Write, store: Store, tmp_path: Path) -> None:
    """What was done stays as it was written, what was being trained goes on, the rest is drawn."""
    path = longer(write_sweep("orphaned", f"{TWO}\n{rates()}\nseeds: [403]\n{ALONE}", trials=3), 120)
    coordinator = Coordinator(tmp_path, path, store.root, max_parallel=2)
    wait_until(lambda: any(stage.result() for stage in seeded(store, 403)) and at_work(store, 403))
    coordinator.kill()
    before = {stage.folder: stage.result() for stage in seeded(store, 403)}
    written = [
        (folder / "result.json", (folder / "result.json").stat().st_mtime_ns) for folder in before if before[folder]
    ]
    assert 0 < len(written) < 6
    ended = sweep(path, store)
    assert_exact(ended, 3)
    for arm in ("red", "dec"):  # one that was being drawn is drawn again, under another number
        numbers = [trial.number for trial in counted(ended, arm)]
        assert numbers == sorted(set(numbers))
        assert {trial.state for trial in of(ended, arm) if trial.number not in numbers} <= {"lost"}
    assert {store.stage(name).folder for trial in ended.trials for name in trial.fingerprints} >= before.keys()
    assert len(seeded(store, 403)) == 6
    assert all(file.stat().st_mtime_ns == time for file, time in written)
    for stage in seeded(store, 403):
        steps = [line["step"] for line in read_metrics(stage.metrics_file)]
        assert steps == sorted(set(steps))
        assert steps[-1] == 120


FAULTS = {
    "asked for a point, and not yet said who runs it": "Trials._run = lambda *_: die()",
    "said who runs it, and not yet begun": "Telling.began = lambda *_: die()",
    "about to write how it ended": "Trials.finish = lambda *_, **__: die()",
    "written how it ended, and not yet told Optuna": "Trials._settle = lambda *_: die()",
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
@pytest.mark.slow
def test_wherever_the_first_coordinator_dies_the_second_does_the_whole_search(
    write_sweep: Write, store: Store, tmp_path: Path, fault: str
) -> None:
    """The first trial is the arm's own setting, whatever became of the one who drew it; and Optuna knows all values."""
    number = list(FAULTS.values()).index(fault)
    path = write_sweep(f"fault_{number}", f"{ONE}\n{rates()}\nseeds: [{410 + number}]\n{ALONE}", trials=3)
    assert Coordinator(tmp_path, path, store.root, fault=fault).wait() == -signal.SIGKILL
    ended = sweep(path, store)
    assert_exact(ended, 3)
    own = ended.search.ablation.arm("red").experiment.pretrain.training.optimizer.lr
    assert counted(ended, "red")[0].point == {LR: own}
    assert ended.summaries[0].default == counted(ended, "red")[0]
    journal = store.study(f"fault_{number}") / "optuna.journal"
    study = optuna.load_study(
        study_name=f"fault_{number}/red", storage=JournalStorage(JournalFileBackend(str(journal)))
    )
    known = {found.number: found.values for found in study.trials if found.state.name == "COMPLETE"}
    assert known == {trial.number: list(trial.values or ()) for trial in counted(ended, "red")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fault"),
    [
        (
            "sequence_begun",
            """
run = Trials._run
Trials._run = lambda self, trial, *rest: die() if trial.number == 2 else run(self, trial, *rest)
""",
        ),
        (
            "sequence_drawn",
            """
from optuna.samplers import QMCSampler
draw = QMCSampler._sample_qmc
QMCSampler._sample_qmc = lambda self, study, space: (
    draw(self, study, space), die() if len(study.get_trials(deepcopy=False)) == 3 else None
)[0]
""",
        ),
    ],
    ids=["drawn and not begun", "in the draw"],
)
def test_a_point_of_a_sequence_is_not_lost(
    write_sweep: Write, store: Store, tmp_path: Path, name: str, fault: str
) -> None:
    """A Sobol sequence gives each point once: the search is the one that nobody has disturbed."""
    rest = f"{ONE}\n{rates()}\nseeds: [421]\nsampler: qmc\n{ALONE}"
    path = write_sweep(name, rest, trials=4)
    assert Coordinator(tmp_path, path, store.root, fault=fault).wait() == -signal.SIGKILL
    ended = sweep(path, store, max_parallel=1)
    assert_exact(ended, 4)
    assert [trial.state for trial in ended.trials] == ["done", "done", "lost", "done", "done"]
    whole = sweep(write_sweep(f"whole_{name}", rest, trials=4), store, max_parallel=1)
    assert [trial.point for trial in counted(ended, "red")] == [trial.point for trial in whole.trials]


REPEATED = """
if len(sys.argv) > 1:
    import functools
    run_sweep = functools.partial(run_sweep, rerun="failed")
"""


@pytest.mark.slow
def test_a_failed_trial_is_repeated_even_if_the_one_who_drew_it_again_dies(
    write_sweep: Write, store: Store, tmp_path: Path
) -> None:
    path = write_sweep("twice_unlucky", f"{ONE}\n{rates()}\nseeds: [420]\n{ALONE}", trials=1)
    blocked = [True]

    def block() -> None:
        for stage in seeded(store, 420):
            if blocked and stage.status()["state"] == "running":
                with suppress(ProcessLookupError):  # it has just ended by the kill before
                    os.kill(pid_of(stage), signal.SIGKILL)

    ended = sweep(longer(path, 120), store, Seen(block))
    assert [trial.state for trial in ended.trials] == ["failed"]
    blocked.clear()
    fault = REPEATED + FAULTS["asked for a point, and not yet said who runs it"]
    assert Coordinator(tmp_path, path, store.root, fault=fault).wait() == -signal.SIGKILL
    mended = sweep(path, store, rerun="failed")
    assert_exact(mended, 1)
    assert counted(mended, "red")[0].point == ended.trials[0].point


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.slow
def test_an_interrupted_search_keeps_everything_and_the_next_completes_it(
    write_sweep: Write, store: Store, tmp_path: Path, number: signal.Signals
) -> None:
    seed = 430 + number
    path = longer(write_sweep(f"interrupted_{number}", f"{TWO}\n{rates()}\nseeds: [{seed}]\n{ALONE}", trials=1), 300)
    coordinator = Coordinator(tmp_path, path, store.root, max_parallel=2, cold=number == signal.SIGINT)
    wait_until(lambda: len(at_work(store, seed)) == 2)
    coordinator.send(number)
    assert coordinator.wait() == 130
    assert {stage.status()["state"] for stage in seeded(store, seed)} == {"interrupted"}
    assert all((stage.checkpoints / "last.ckpt").exists() for stage in seeded(store, seed))
    first = {stage.folder: read_metrics(stage.metrics_file) for stage in seeded(store, seed)}
    ended = sweep(path, store)
    assert_exact(ended, 1)
    for folder, lines in first.items():
        assert read_metrics(Stage(folder).metrics_file)[: len(lines)] == lines
    assert len(seeded(store, seed)) == 2


# --- many coordinators ---------------------------------------------------------------------------------------------


def test_two_coordinators_share_one_budget(write_sweep: Write, store: Store, tmp_path: Path) -> None:
    path = longer(write_sweep("shared", f"{TWO}\n{rates()}\nseeds: [441]\n{ALONE}", trials=3), 60)
    both = [Coordinator(tmp_path, path, store.root) for _ in range(2)]
    assert [one.wait() for one in both] == [0, 0], "\n".join(one.output for one in both)
    begun = [name for one in both for name in one.begun]
    assert sorted(begun) == [f"{arm}/trial 00{number}" for arm in ("dec", "red") for number in range(3)]
    observer = Seen()
    assert_exact(sweep(path, store, observer), 3)
    assert observer.begun == []


@pytest.mark.slow
def test_a_trial_whose_coordinator_is_killed_is_taken_over_by_the_other(
    write_sweep: Write, store: Store, tmp_path: Path
) -> None:
    """The other waits at a gate, so that it begins a trial of its own before the first has ended one."""
    path = longer(write_sweep("heir", f"{TWO}\n{rates()}\nseeds: [442]\n{ALONE}", trials=1), 300)
    gate = tmp_path / "gate"
    fault = f"""
import pathlib, time
draw = Trials.next
def draw_behind_the_gate(self):
    print("at the gate", flush=True)
    while not pathlib.Path("{gate}").exists():
        time.sleep(0.05)
    return draw(self)
Trials.next = draw_behind_the_gate
"""
    two = Coordinator(tmp_path, path, store.root, fault=fault)
    wait_until(lambda: "at the gate" in two.output)
    one = Coordinator(tmp_path, path, store.root)
    wait_until(lambda: at_work(store, 442))
    gate.touch()
    wait_until(lambda: two.begun)
    one.kill()
    assert two.wait() == 0
    assert sorted(two.begun) == ["dec/trial 000", "red/trial 000"]
    assert_exact(sweep(path, store), 1)


@pytest.mark.slow
def test_four_coordinators_start_on_one_fresh_store(write_sweep: Write, tmp_path: Path) -> None:
    """All at once: 3 x 2 points, each exactly once for each arm, and in MLflow a child for each."""
    space = (
        f"space: {{{LR}: {{choice: [1e-3, 3e-3, 1e-2]}}, pretrain.training.schedule.warmup_steps: {{choice: [0, 2]}}}}"
    )
    path = write_sweep("crowd", f"{TWO}\n{space}\nseeds: [443]\n{ALONE}", trials=6)
    store = Store(tmp_path / "store")
    crowd = [Coordinator(tmp_path, path, store.root) for _ in range(4)]
    assert [one.wait(300) for one in crowd] == [0] * 4, "\n".join(one.output for one in crowd)
    assert not any("Nothing is lost" in one.output for one in crowd)
    begun = [name for one in crowd for name in one.begun]
    ended = sweep(path, store)
    assert_exact(ended, 6)
    assert sorted(begun) == sorted(trial.name for arm in ("red", "dec") for trial in counted(ended, arm))
    assert len(list(store.root.glob("stages/*/result.json"))) == 12
    assert not list(store.study("crowd").glob("coordinators/*"))
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store.root}/mlflow.db")
    experiment = client.get_experiment_by_name("crowd")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert len(runs) == len(children) + 1
    assert sorted(run.data.tags["lit_llm.arm"] for run in children) == sorted(begun)
    assert all(run.data.metrics["tokens_seen"] == STEPS * 4 * 32 for run in children)


@pytest.mark.slow
def test_a_killed_coordinator_leaves_no_process_behind(write_sweep: Write, store: Store, tmp_path: Path) -> None:
    path = longer(write_sweep("childless", f"{TWO}\n{rates()}\nseeds: [444]\n{ALONE}", trials=1), 100_000)
    coordinator = Coordinator(tmp_path, path, store.root, max_parallel=2, cold=True)
    wait_until(lambda: len(at_work(store, 444)) == 2)
    children = psutil.Process(coordinator.pid).children(recursive=True)
    family = [*children, *(psutil.Process(pid_of(stage)) for stage in at_work(store, 444))]
    coordinator.kill()
    assert psutil.wait_procs(family, timeout=200)[1] == []
    assert not any(result for stage in seeded(store, 444) if (result := stage.result()))
