"""Runs at once: the default of this machine, and a suggestion from measured throughputs. Loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from lit_llm.launch import cores
from lit_llm.launch.devices import visible_gpus
from lit_llm.runs.step_timing import MOST_PROCESSES, Setting, StepTiming, TimedStep, steps_per_second
from lit_llm.runs.time_estimate import available_memory
from lit_llm.studies.duration import parallel_runs, resident_bytes, runs_that_fit, steps_of
from lit_llm.studies.load import Ablation
from lit_llm.studies.plan import Plan, Throughput

LONG_STEP = 1.0
"""CPU seconds of a step above which nothing is measured: each measurement would take more than a few seconds."""


def max_parallel(ablation: Ablation, slots_per_device: int) -> int:
    """Default number of parallel runs here: `slots_per_device` on each GPU, else as many as the cores allow."""
    executions = [arm.experiment.pretrain.training.execution for arm in ablation.arms]
    devices = devices_of(ablation)
    gpus = visible_gpus() if any(arm.may_use_gpu for arm in ablation.arms) else []
    if gpus:
        return max(1, len(gpus) * slots_per_device // devices)
    return max(1, cores() // (devices * max(execution.threads for execution in executions)))


def devices_of(ablation: Ablation) -> int:
    """Devices of the run that takes most."""
    return max(arm.experiment.pretrain.training.execution.devices for arm in ablation.arms)


def with_throughputs(
    plan: Plan,
    max_parallel: int,
    timings: Mapping[str, StepTiming],
    trials: int = 1,
    log: Callable[[str], None] = lambda _: None,
) -> Plan:
    """The plan with the throughputs of its typical run for several `-j` and `threads`, measured now, fastest first.

    The typical run is the one with the median step. The plan is unchanged where that step runs on a GPU or takes long,
    and where there is one choice only.

    Args:
        plan: The plan.
        max_parallel: Number of parallel runs for which `timings` were measured.
        timings: Timings of the plan's steps.
        trials: Runs for each arm and seed; more than one in a sweep.
        log: Called with a line before each measurement.

    Raises:
        InputError: A measuring process failed.
    """
    steps = [timed for timed in steps_of(plan, max_parallel).values() if timed.stage == "pretrain"]
    steps.sort(key=lambda timed: timings[timed.key].seconds)
    typical = steps[(len(steps) - 1) // 2]
    long = timings[typical.key].seconds * typical.setting.threads > LONG_STEP
    if long or any(timed.setting.device != "cpu" for timed in steps):
        return plan
    most = min(cores(), trials * parallel_runs(plan, cores()))
    fitting = runs_that_fit(plan.arms * trials, most, available_memory(), resident_bytes(timings.values()))
    choices = choices_of(cores(), fitting)
    if len(choices) < 2:
        return plan
    found = []
    for count, threads in choices:
        log(f"timing -j {count} with threads {threads} ...")
        at_once = min(count, MOST_PROCESSES)
        rate = steps_per_second(TimedStep(typical.experiment, "pretrain", Setting("cpu", threads, at_once)))
        found.append(Throughput(count, threads, rate * count / at_once))
    return replace(plan, throughputs=fastest_first(found))


def choices_of(cores: int, most: int) -> list[tuple[int, int]]:
    """(parallel runs, threads of each) with as many threads in all as there are cores, or with `most` runs."""
    divisors = [threads for threads in range(1, cores + 1) if cores % threads == 0]
    return [(min(cores // threads, most), threads) for threads in divisors] if most else []


def fastest_first(throughputs: list[Throughput]) -> tuple[Throughput, ...]:
    """The throughputs, sorted by steps per second of all runs together."""
    return tuple(sorted(throughputs, key=lambda each: each.steps_per_second, reverse=True))
