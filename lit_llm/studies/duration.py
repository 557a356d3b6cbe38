"""Estimates of a study's duration on this machine, and of the memory of its parallel runs. Loads no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from lit_llm.experiment.cost import stage_of_most_memory
from lit_llm.experiment.schema import Experiment
from lit_llm.experiment.training_sections import Trained
from lit_llm.launch import cores
from lit_llm.models.resolve import resolve_model
from lit_llm.runs.fingerprints import identity_of_data
from lit_llm.runs.kernels import compiled_saves
from lit_llm.runs.leaks import prepared_examples
from lit_llm.runs.stage_graph import StageNode
from lit_llm.runs.step_timing import StepTiming, TimedStep, cached, setting_of
from lit_llm.runs.time_estimate import PaddedBatch, available_memory, makespan, seconds_of, trunk_seconds
from lit_llm.store.store import Stage, Store
from lit_llm.studies.audit.findings import Finding
from lit_llm.studies.plan import Estimate, Plan, PlannedArm
from lit_llm.training.memory import state_bytes

MICRO_BATCH = "pretrain.training.execution.micro_batch_size"


def steps_of(plan: Plan, max_parallel: int) -> dict[str, TimedStep]:
    """{key: step} of every distinct training step in this plan."""
    used = parallel_runs(plan, max_parallel)
    return {timed.key: timed for planned in plan.arms for timed in _steps(planned, used).values()}


def _steps(planned: PlannedArm, used: int) -> dict[str, TimedStep]:
    """{stage: its step} of an arm, including the pretrainings of its sources."""
    experiment = planned.arm.experiment
    steps: dict[str, TimedStep] = {
        stage: TimedStep(experiment, stage, setting_of(experiment.section(stage).training, used))
        for stage in experiment.trained
    }
    sources = {node.name: node.source for node in planned.stage_graphs[0] if node.source}
    for name, source in sources.items():
        steps[name] = TimedStep(source, "pretrain", setting_of(source.pretrain.training, used))
    return steps


def parallel_runs(plan: Plan, max_parallel: int) -> int:
    """Number of parallel runs, at most the number of distinct computations."""
    return min(max_parallel, len({name for planned in plan.arms for name in planned.fingerprints}))


def timings_of(plan: Plan, max_parallel: int, store: Store) -> dict[str, StepTiming]:
    """{key: timing} of the steps that were measured, or taken from finished runs of this plan."""
    used = parallel_runs(plan, max_parallel)
    timings = dict[str, StepTiming]()
    for planned in plan.arms:
        for name, timed in _steps(planned, used).items():
            if timing := cached(timed):
                timings[timed.key] = timing
                continue
            nodes = [node for nodes in planned.stage_graphs for node in nodes if node.name == name]
            took = [_step_seconds(store.stage(node.fingerprint)) for node in nodes]
            if seconds := [each for each in took if each]:
                timings.setdefault(timed.key, StepTiming(fmean(seconds)))
    return timings


def _step_seconds(stage: Stage) -> float | None:
    """Mean seconds of a step of a finished stage; None where it has not finished, or has trained no step."""
    result = stage.result() or {}
    seconds, steps = (result.get("seconds") or {}).get("training"), result.get("steps")
    return seconds / steps if seconds and steps else None


def estimated(plan: Plan, max_parallel: int, timings: Mapping[str, StepTiming], store: Store) -> Plan:
    """The plan with its estimate, if every step has a timing, and with findings where memory is too small.

    timings: from `timings_of`. Runs with a result in `store` take no time.
    """
    used = parallel_runs(plan, max_parallel)
    findings = (*plan.findings, *memory_findings(plan, used, timings.values()))
    every = steps_of(plan, max_parallel)
    if not every.keys() <= timings.keys():
        return replace(plan, findings=findings)
    arms, todo, done = {}, dict[str, float](), set[str]()
    saved: list[tuple[PlannedArm, Trained, float]] = []
    for planned in plan.arms:
        experiment, steps = planned.arm.experiment, _steps(planned, used)
        seconds: dict[str, float] = {name: timings[timed.key].seconds for name, timed in steps.items()}
        trained = {stage: seconds[stage] for stage in experiment.trained}
        nodes = {node.name: node for node in planned.stage_graphs[0]}
        seconds_of_run = seconds_of(
            experiment,
            trained,
            _padded_batch(experiment, store),
            _validation_tokens(experiment, store),
            nodes["pretrain"].begin,
        )
        # Runs are timed with a core for each thread; more threads than cores take turns.
        setting = steps["pretrain"].setting
        turns = max(1.0, used * setting.threads / cores()) if setting.device == "cpu" else 1
        before = {
            name: _seconds_before(nodes[name], timed.experiment, seconds[name])
            for name, timed in steps.items()
            if name not in trained
        }
        arms[planned.arm.name] = replace(seconds_of_run, before=sum(before.values()))
        takes = {
            "pretrain": seconds_of_run.run,
            "finetune": seconds_of_run.finetune,
            **seconds_of_run.evaluations,
            **before,
        }
        for node in (node for nodes in planned.stage_graphs for node in nodes):
            if store.stage(node.fingerprint).result() is not None:
                done.add(node.fingerprint)
            else:
                todo.setdefault(node.fingerprint, turns * takes.get(node.name, 0.0))
        for stage, seconds_of_step in trained.items():
            saved.append((planned, stage, compiled_saves(experiment, stage, seconds_of_step)))
    total = makespan(todo.values(), used)
    finished = sum(
        all(node.fingerprint in done for node in nodes) for planned in plan.arms for nodes in planned.stage_graphs
    )
    measured = tuple((timed, timings[key]) for key, timed in every.items())
    if not done:  # finished results would be stale
        findings = (*findings, *_compiling_pays(saved))
    return replace(plan, findings=findings, estimate=Estimate(arms, total, used, finished, measured))


def _seconds_before(node: StageNode, experiment: Experiment, step: float) -> float:
    """Seconds of a source or a trunk. step: seconds of one step."""
    if node.kind == "trunk":
        return trunk_seconds(experiment, step, node.begin)
    return seconds_of(experiment, {"pretrain": step}, begin=node.begin).run


def _compiling_pays(saved: Sequence[tuple[PlannedArm, Trained, float]]) -> Iterator[Finding]:
    """A note where compiled blocks save time in every training of every arm, since all arms need the same kernels.

    saved: (arm, stage that it trains, seconds that one run saves).
    """
    if not saved or not all(seconds for _, _, seconds in saved):
        return
    total = sum(seconds * len(planned.fingerprints) for planned, _, seconds in saved)
    stages = dict.fromkeys(stage for _, stage, _ in saved)
    keys = " and ".join(f"{stage}.training.execution.kernels" for stage in stages)
    message = f"`compiled` in all arms saves about {total / 60:.0f} min of computation, shared by runs at once"
    yield Finding("note", saved[0][0].arm.name, keys, message)


def _padded_batch(experiment: Experiment, store: Store) -> PaddedBatch | None:
    """Mean sizes of a finetuning batch; None where the examples are not tokenised yet."""
    examples = prepared_examples(experiment, store)
    if experiment.finetune is None or examples is None:
        return None
    from lit_llm.objectives.packing import rows_of, sizes_of

    data, family = experiment.finetune.data, experiment.model.family
    lengths = examples.sample_of_lengths("train", 64 * data.batch_size)
    batches = [lengths[begin : begin + data.batch_size] for begin in range(0, len(lengths), data.batch_size)]
    sources, targets = ([max(pair[side] for pair in batch) for batch in batches] for side in (0, 1))
    packed = data.packing == "greedy"
    rows = [len(rows_of(sizes_of(batch, family))) for batch in batches] if packed else [data.batch_size]
    return PaddedBatch(fmean(rows), fmean(sources), fmean(targets))


def _validation_tokens(experiment: Experiment, store: Store) -> dict[str, int] | None:
    """Validation tokens of each source; None where the text is not tokenised yet."""
    from lit_llm.data.prepare import is_prepared, open_prepared

    digest = identity_of_data(experiment).digest
    if not is_prepared(store.data, digest):
        return None
    sources = open_prepared(experiment.pretrain.data, store.data, digest).sources
    return {source.name: source.count("validation") for source in sources}


def memory_findings(plan: Plan, max_parallel: int, timings: Collection[StepTiming]) -> list[Finding]:
    """A note for the largest arm where `max_parallel` runs of the largest arms do not fit into memory.

    The limit is the free main memory, or the whole memory of a GPU. Each process counts with its resident memory
    before a model exists, although forked runs share most of that.
    """
    findings = []
    for device in ("cpu", "cuda"):
        mine = [p for p in plan.arms if setting_of(p.arm.experiment.pretrain.training, 1).device == device]
        if not mine:
            continue
        on_gpu = next((timing.device_bytes for timing in timings if timing.device_bytes), None)
        available = available_memory() if device == "cpu" else on_gpu
        resident = resident_bytes(timings) if device == "cpu" else 0
        largest = max(mine, key=lambda planned: planned.cost.memory_bytes)
        if available is not None and (fitting := runs_that_fit(mine, max_parallel, available, resident)) < max_parallel:
            key, message = _too_large(largest, available, max_parallel, fitting)
            findings.append(Finding("note", largest.arm.name, key, message))
    return findings


def resident_bytes(timings: Collection[StepTiming]) -> int:
    """Resident memory of a process without a model; 0 where it was not measured."""
    return max((timing.resident_bytes for timing in timings), default=0)


def runs_that_fit(arms: Sequence[PlannedArm], most: int, available: float, resident: int) -> int:
    """Number of parallel runs, at most `most`, for which `available` bytes suffice even if they are the largest."""
    needs = sorted((_needed(p, resident) for p in arms for _ in p.fingerprints), reverse=True)
    return next((count for count in range(most, 0, -1) if sum(needs[:count]) <= available), 0)


def _needed(planned: PlannedArm, resident: int) -> int:
    """Bytes that the processes of one run need together; devices of a CPU share its memory, GPUs have their own."""
    training = planned.arm.experiment.pretrain.training
    processes = training.execution.devices if setting_of(training, 1).device == "cpu" else 1
    return processes * (planned.cost.memory_bytes + resident)


def _too_large(largest: PlannedArm, available: int, max_parallel: int, fitting: int) -> tuple[str, str]:
    """(key, message) of the finding, with the next step."""
    training = largest.arm.experiment.pretrain.training
    needed, free = f"a run needs {largest.cost.memory_bytes / 1e9:.3g} GB", f"{available / 1e9:.3g} GB are available"
    if fitting:
        return (
            MICRO_BATCH,
            f"{needed}, {max_parallel} go at once, {free}: `-j {fitting}` fits, or fewer sequences at a time",
        )
    state = state_bytes(resolve_model(largest.arm.experiment.model), training)
    if state > available:
        held = f"parameters, gradients and optimiser state alone take {state / 1e9:.3g} GB"
        return "model", f"{needed}, {free}: {held}; it wants a larger machine or a smaller model"
    stage = stage_of_most_memory(largest.arm.experiment)
    section = largest.arm.experiment.section(stage)
    now = section.training.execution.rows_at_once(section.data.batch_size)
    less = "" if section.training.execution.activation_checkpointing else ", or turn activation_checkpointing on"
    key = f"{stage}.training.execution.micro_batch_size"
    return key, f"{needed}, {free}: take fewer sequences at a time than {now}{less}"
