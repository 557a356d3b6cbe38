"""How long a study takes and whether it fits, from times of steps that are made up, or that finished runs took."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lit_llm.report.tables.plan import render_plan
from lit_llm.runs.kernels import COMPILE_SECONDS, SAVED
from lit_llm.runs.step_timing import StepTiming, keep
from lit_llm.store.store import Store
from lit_llm.studies import duration
from lit_llm.studies.audit.differing_keys import Finding
from lit_llm.studies.duration import estimated, steps_of, timings_of
from lit_llm.studies.load import Ablation
from lit_llm.studies.load import load_study as load
from lit_llm.studies.plan import Plan, plan

TWO = "arms: {red: {}, dec: {extends: decllm-tiny}}"
SLOW = StepTiming(6.0)
# 12 steps and 5 evaluations of two batches: one before the first step, two at intervals, and after the last step one
# of each of two splits. An evaluation is a third of a pass, and for causal_lm there are two of it, since the primary
# metric is another objective.
RED = 0.2 + 12 * 6 + 5 * 2 * 6 / 3
DEC = RED + 5 * 2 * 6 / 3


def load_study(path: Path) -> Ablation:
    """The last evaluation reads no more windows than those before it."""
    return load(path, ["pretrain.validation.final_sequences=8"])


@pytest.fixture
def planned(write_study: Callable[..., Path]) -> Plan:
    return plan(load_study(write_study("duration", TWO, seeds=[0, 1, 2])))


def at(plan: Plan, max_parallel: int, store: Path, timing: StepTiming | None = SLOW) -> Plan:
    timings = {} if timing is None else dict.fromkeys(steps_of(plan, max_parallel), timing)
    return estimated(plan, max_parallel, timings, Store(store))


def notes(found: Plan) -> list[Finding]:
    return [finding for finding in found.findings if "GB" in finding.message]


def test_a_study_takes_its_runs_one_after_the_other_or_several_at_once(
    planned: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duration, "cores", lambda: 64)
    one, three = (at(planned, max_parallel, tmp_path).estimate for max_parallel in (1, 3))
    assert one is not None
    assert three is not None
    assert one.arms["red"].run == pytest.approx(RED)
    assert one.arms["dec"].run == pytest.approx(DEC)
    assert one.seconds == pytest.approx(3 * RED + 3 * DEC)
    assert three.seconds == pytest.approx(RED + DEC)


def test_more_threads_than_cores_take_turns(planned: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duration, "cores", lambda: 2)
    found = at(planned, 6, tmp_path).estimate
    assert found is not None
    assert found.seconds == pytest.approx(3 * DEC)


def test_what_is_done_takes_no_more_time(planned: Plan, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    for name in planned.arms[0].fingerprints[:2]:
        store.stage(name).folder.mkdir(parents=True)
        store.stage(name).finish({"state": "done"})
    found = at(planned, 1, store.root).estimate
    assert found is not None
    assert found.done == 2
    assert found.seconds == pytest.approx(RED + 3 * DEC)


def test_what_two_arms_share_is_computed_once(write_study: Callable[..., Path], tmp_path: Path) -> None:
    twins = plan(load_study(write_study("twins", "arms: {red: {}, again: {}}")))
    found = at(twins, 2, tmp_path).estimate
    assert found is not None
    assert found.max_parallel == 1
    assert found.seconds == pytest.approx(RED)


def test_evaluations_are_in_it_and_tasks_are_said_not_to_be(write_study: Callable[..., Path], tmp_path: Path) -> None:
    """256 windows of 32 tokens are 64 batches, each a third of a step of six seconds."""
    section = "evaluate: {likelihood: {documents: 256}, tasks: {names: [glosses_x], folder: FOLDER}}"
    (tmp_path / "glosses_x.yaml").write_text("task: glosses_x\n")
    path = write_study("evaluated", f"arms: {{red: {{{section.replace('FOLDER', str(tmp_path))}}}}}", seeds=[0, 1])
    pytest.importorskip("lm_eval")
    found = at(plan(load_study(path)), 1, tmp_path / "store")
    assert found.estimate is not None
    assert found.estimate.seconds == pytest.approx(2 * (RED + 0.2 + 64 * 2))
    assert "without the tasks, whose questions only the harness knows" in " ".join(shown(found, 200).split())


def test_without_a_measurement_there_is_no_time_and_the_plan_says_how_to_get_it(planned: Plan, tmp_path: Path) -> None:
    found = at(planned, 2, tmp_path, None)
    assert found.estimate is None
    assert found.as_json()["estimate"] is None
    assert {arm["seconds"] for arm in found.as_json()["arms"]} == {None}
    assert "--measure" in shown(found, 120)


def test_what_was_measured_is_known_and_what_finished_runs_took_too(planned: Plan, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    assert timings_of(planned, 1, store) == {}
    first, second = steps_of(planned, 1).values()
    keep(first, SLOW)
    assert timings_of(planned, 1, store) == {first.key: SLOW}
    for name, seconds in zip(planned.arms[1].fingerprints[:2], (24.0, 48.0), strict=True):
        store.stage(name).folder.mkdir(parents=True)
        store.stage(name).finish({"state": "done", "steps": 12, "seconds": {"training": seconds, "evaluation": 9.0}})
    found = timings_of(planned, 1, store)
    assert found.keys() == {first.key, second.key}
    assert found[second.key].seconds == pytest.approx(3.0)
    estimate = estimated(planned, 1, found, store).estimate
    assert estimate is not None
    assert estimate.done == 2


def test_json_has_the_seconds_of_each_arm_and_of_all(planned: Plan, tmp_path: Path) -> None:
    found = json.loads(json.dumps(at(planned, 1, tmp_path).as_json()))
    assert found["estimate"].keys() >= {"seconds", "slots", "machine", "runs_done"}
    assert found["estimate"]["seconds"] == pytest.approx(3 * sum(arm["seconds"] for arm in found["arms"]))
    assert found["estimate"]["machine"][0]["threads"] == 1


def shown(found: Plan, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render_plan(found, width))
    return console.export_text()


@pytest.mark.parametrize(("width", "tables"), [(80, 2), (120, 1)])
def test_the_time_of_every_arm_is_legible(
    write_study: Callable[..., Path], tmp_path: Path, width: int, tables: int
) -> None:
    arms = "arms: {red_with_a_longer_name: {}, dec: {extends: decllm-tiny}}"
    text = shown(at(plan(load_study(write_study("wide", arms))), 1, tmp_path), width)
    heads = [line for line in text.splitlines() if line.startswith("arm ")]
    assert len(heads) == tables
    assert heads[-1].split()[-1] == "time"
    rows = [line.rstrip() for line in text[: text.index("what differs")].splitlines()]
    assert sum(line.startswith("red_with_a_longer_name") and line.endswith("92 s") for line in rows) == 1
    assert sum(line.startswith("dec ") and line.endswith("1.9 min") for line in rows) == 1
    assert "about 3.4 min on this machine" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= width


MEMORY = 10_000_000_000


def with_memory(planned: Plan, each: int) -> Plan:
    arms = tuple(replace(arm, cost=replace(arm.cost, memory_bytes=each)) for arm in planned.arms)
    return replace(planned, arms=arms)


@pytest.mark.parametrize(
    ("each", "max_parallel", "resident", "says"),
    [
        (4 * MEMORY // 10, 2, 0, ""),
        (4 * MEMORY // 10, 3, 0, "`-j 2` fits"),
        (4 * MEMORY // 10, 2, 2 * MEMORY // 10, "`-j 1` fits"),
        (11 * MEMORY // 10, 1, 0, "fewer sequences at a time than 4"),
    ],
)
def test_runs_that_do_not_fit_into_memory_are_noted_with_the_next_step(
    planned: Plan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    each: int,
    max_parallel: int,
    resident: int,
    says: str,
) -> None:
    monkeypatch.setattr(duration, "available_memory", lambda: MEMORY)
    found = at(with_memory(planned, each), max_parallel, tmp_path, replace(SLOW, resident_bytes=resident))
    assert [finding.kind for finding in notes(found)] == (["note"] if says else [])
    assert all(says in finding.message for finding in notes(found))
    assert not found.refused


def test_a_state_that_does_not_fit_is_no_matter_of_sequences(
    planned: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duration, "available_memory", lambda: 1000)
    (found,) = notes(at(planned, 1, tmp_path))
    assert found.key == "model"
    assert "larger machine" in found.message


def test_a_gpus_memory_is_its_own(planned: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duration, "available_memory", lambda: 10 * MEMORY)
    setting_of = duration.setting_of
    monkeypatch.setattr(duration, "setting_of", lambda *args: replace(setting_of(*args), device="cuda"))
    here = replace(SLOW, device_bytes=MEMORY, resident_bytes=10 * MEMORY)
    assert not notes(at(with_memory(planned, MEMORY), 1, tmp_path, here))
    assert notes(at(with_memory(planned, MEMORY + 1), 1, tmp_path, here))


@pytest.mark.parametrize(
    ("step", "kernels", "compiler", "noted"),
    [
        (6.0, "auto", "", False),  # 12 steps of 6 seconds: compiling takes as long
        (600.0, "auto", "", True),
        (600.0, "compiled", "", False),
        (600.0, "auto", "there is no C++ compiler", False),
    ],
)
def test_compiled_blocks_are_proposed_where_every_arm_is_long_enough(
    write_study: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: float, kernels: str,
    compiler: str, noted: bool,
) -> None:  # fmt: skip
    """Four runs of 12 steps of 600 seconds, a share of which is saved but for the time that compiling takes."""
    monkeypatch.setattr("lit_llm.runs.kernels._no_compiler", lambda gpu: compiler)
    monkeypatch.setattr("lit_llm.runs.kernels.has_gpu", lambda: False)
    path = write_study("long", TWO, seeds=[0, 1])
    long = plan(load(path, [f"pretrain.training.execution.kernels={kernels}"]))
    found = [finding for finding in at(long, 1, tmp_path, StepTiming(step)).findings if "kernels" in finding.key]
    minutes = 4 * (SAVED * 12 * 600 - COMPILE_SECONDS) / 60
    assert [f"about {minutes:.0f} min" in finding.message for finding in found] == [True] * noted
