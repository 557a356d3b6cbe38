"""Which `-j` and `threads` a plan suggests, from throughputs that are made up."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lit_llm.report.tables.plan import render_plan
from lit_llm.runs.step_timing import StepTiming, TimedStep
from lit_llm.store.store import Store
from lit_llm.studies import duration, parallelism
from lit_llm.studies.duration import estimated, steps_of
from lit_llm.studies.load import load_study
from lit_llm.studies.parallelism import choices_of, with_throughputs
from lit_llm.studies.plan import Plan, plan

RESIDENT = 10**9


@pytest.fixture
def planned(write_study: Callable[..., Path]) -> Plan:
    """Six runs."""
    return plan(load_study(write_study("parallel", "arms: {red: {}, dec: {extends: decllm-tiny}}", seeds=[0, 1, 2])))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[TimedStep]]:
    """A machine with so many cores, bytes of memory, and steps per second by threads; the list gets what it times."""

    def make(cores: int, rates: dict[int, float], memory: int = 10**15) -> list[TimedStep]:
        timed: list[TimedStep] = []

        def steps_per_second(step: TimedStep) -> float:
            timed.append(step)
            return rates[step.setting.threads]

        for module in (parallelism, duration):
            monkeypatch.setattr(module, "cores", lambda: cores)
        monkeypatch.setattr(parallelism, "available_memory", lambda: memory)
        monkeypatch.setattr(parallelism, "steps_per_second", steps_per_second)
        return timed

    return make


def measured(planned: Plan, seconds: float = 0.01, trials: int = 1) -> Plan:
    timings = dict.fromkeys(steps_of(planned, 1), StepTiming(seconds, resident_bytes=RESIDENT))
    return with_throughputs(planned, 1, timings, trials)


def pairs(planned: Plan) -> list[tuple[int, int]]:
    return [(each.max_parallel, each.threads) for each in planned.throughputs]


def shown(found: Plan) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render_plan(found, 200))
    return console.export_text()


def test_choices_fill_the_cores_with_whole_runs_as_far_as_there_are_runs() -> None:
    assert choices_of(2, 15) == [(2, 1), (1, 2)]
    assert choices_of(6, 4) == [(4, 1), (3, 2), (2, 3), (1, 6)]
    assert choices_of(4, 1) == [(1, 1), (1, 2), (1, 4)]
    assert choices_of(4, 0) == []


@pytest.mark.parametrize(
    ("rates", "order"),
    [
        ({1: 41.0, 2: 23.0, 4: 30.0}, [(4, 1), (1, 4), (2, 2)]),
        ({1: 5.0, 2: 23.4, 4: 9.0}, [(2, 2), (1, 4), (4, 1)]),
    ],
)
def test_the_suggestion_is_the_largest_throughput(
    planned: Plan, machine: Callable[..., list[TimedStep]], rates: dict[int, float], order: list[tuple[int, int]]
) -> None:
    machine(4, rates)
    found = measured(planned)
    assert pairs(found) == order
    assert [each["steps_per_second"] for each in found.as_json()["throughputs"]] == sorted(rates.values(), reverse=True)
    (jobs, threads), best = order[0], max(rates.values())
    assert f"fastest here: -j {jobs} with threads {threads} ({best:.3g} steps/s in all; -j " in shown(found)
    # The study has one thread: others are to be set, as they change results.
    assert ("pretrain.training.execution.threads=2" in shown(found)) == (threads == 2)


def test_throughputs_of_a_busy_machine_are_to_be_measured_again(
    planned: Plan, machine: Callable[..., list[TimedStep]], tmp_path: Path
) -> None:
    """Times of one thread are CPU time, which other load does not change."""
    machine(2, {1: 9.0, 2: 5.0})
    for load, busy in ((0.9, True), (0.1, False)):
        timings = dict.fromkeys(steps_of(planned, 1), StepTiming(0.01, load=load))
        known = estimated(planned, 1, timings, Store(tmp_path))
        assert "busy" not in shown(known)
        assert ("`--measure` again" in shown(with_throughputs(known, 1, timings))) == busy


def test_runs_that_do_not_fit_into_memory_together_are_not_timed(
    planned: Plan, machine: Callable[..., list[TimedStep]]
) -> None:
    each = 10**9
    planned = replace(
        planned, arms=tuple(replace(arm, cost=replace(arm.cost, memory_bytes=each)) for arm in planned.arms)
    )
    rates = {1: 1.0, 2: 1.0, 4: 1.0}
    timed = machine(4, rates, memory=3 * (each + RESIDENT))
    assert sorted(pairs(measured(planned))) == [(1, 4), (2, 2), (3, 1)]
    assert [step.setting.at_once for step in timed] == [3, 2, 1]
    assert machine(4, rates, memory=each + RESIDENT - 1) == []
    assert pairs(measured(planned)) == []


def test_a_sweep_has_more_runs_than_its_arms(
    write_study: Callable[..., Path], machine: Callable[..., list[TimedStep]]
) -> None:
    one = plan(load_study(write_study("one", "arms: {red: {}}")))
    machine(2, {1: 9.0, 2: 5.0})
    assert pairs(measured(one)) == [(1, 1), (1, 2)]
    assert pairs(measured(one, trials=8)) == [(2, 1), (1, 2)]


def test_more_processes_than_are_timed_are_assumed_not_to_slow_each_other(
    write_study: Callable[..., Path], machine: Callable[..., list[TimedStep]]
) -> None:
    many = plan(load_study(write_study("many", "arms: {red: {}}", seeds=list(range(32)))))
    timed = machine(32, {1: 16.0, 2: 20.0, 4: 1.0, 8: 1.0, 16: 1.0, 32: 1.0})
    best = measured(many).throughputs[0]
    assert (best.max_parallel, best.threads, best.steps_per_second) == (32, 1, 32.0)
    assert timed[0].setting.at_once == 16


def test_the_run_with_the_median_step_is_timed(
    write_study: Callable[..., Path], machine: Callable[..., list[TimedStep]]
) -> None:
    sizes = {"wide": 64, "narrow": 16, "middle": 32}
    arms = ", ".join(f"{name}: {{model: {{feed_forward: {{d_ff: {size}}}}}}}" for name, size in sizes.items())
    three = plan(load_study(write_study("three", f"arms: {{{arms}}}")))
    timed = machine(2, {1: 1.0, 2: 1.0})
    seconds = {key: step.experiment.model.feed_forward.d_ff / 1000 for key, step in steps_of(three, 1).items()}
    with_throughputs(three, 1, {key: StepTiming(each) for key, each in seconds.items()})
    assert [step.experiment.model.feed_forward.d_ff for step in timed] == [32, 32]


def test_nothing_is_measured_where_a_step_is_long_or_on_a_gpu_or_there_is_one_core(
    planned: Plan, machine: Callable[..., list[TimedStep]], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = machine(4, {})
    assert measured(planned, seconds=1.1) == planned
    machine(1, {})
    assert measured(planned) == planned
    machine(4, {})
    setting_of = duration.setting_of
    monkeypatch.setattr(duration, "setting_of", lambda *args: replace(setting_of(*args), device="cuda"))
    assert measured(planned) == planned
    assert timed == []
    assert "fastest" not in shown(planned)
