"""The runs of a study, with their states and results in the store."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from lit_llm.config.metrics import TOKENS_PER_SECOND
from lit_llm.config.problems import InputError, Problem, did_you_mean
from lit_llm.config.tree import leaves
from lit_llm.evaluation.unit_losses import Units, units_of
from lit_llm.experiment.schema import Experiment
from lit_llm.runs.provenance import provenance, same_provenance, weights_digest
from lit_llm.runs.run_one_stage import experiment_yaml
from lit_llm.runs.stage_graph import PRETRAINS, StageNode, stage_graph
from lit_llm.runs.trainer_parts import TrainerParts
from lit_llm.statistics.interims import InterimAnalyses, interim_statuses
from lit_llm.statistics.run_results import RunResult, of_newest_provenance
from lit_llm.store.store import FINAL, Stage, Store, read_metrics
from lit_llm.studies.analysis_plan import register, registration_of
from lit_llm.studies.interim_analyses import all_seeds, interims_of, procedure_of, seeds_analysed_in_force
from lit_llm.studies.load import Ablation, Arm, file_and_arm
from lit_llm.studies.preflight import check_texts
from lit_llm.studies.stored import open_study

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class StoredStage:
    """A stage of a run, with its place in the store."""

    node: StageNode
    stage: Stage

    def status(self) -> dict[str, Any]:
        return self.stage.status()


@dataclass(frozen=True)
class Run:
    """An arm with a seed."""

    arm: Arm
    seed: int
    steps: tuple[StoredStage, ...]
    """Stages, each after its parents."""

    @classmethod
    def of(cls, arm: Arm, seed: int, store: Store) -> Run:
        """The run of an arm with a seed. Reads the data for its digests."""
        return cls(
            arm, seed, tuple(StoredStage(node, store.stage(node.fingerprint)) for node in stage_graph(arm.seeded(seed)))
        )

    @property
    def name(self) -> str:
        return f"{self.arm.name}/seed {self.seed}"

    def name_at(self, step: StoredStage) -> str:
        """The run's name, with the stage where it has several."""
        return self.name if len(self.steps) == 1 else f"{self.name}: {step.node.name}"

    @property
    def experiment(self) -> Experiment:
        return self.arm.seeded(self.seed)

    def experiment_at(self, step: StoredStage) -> Experiment:
        """The experiment of a stage: the run's, or that of a source."""
        return step.node.source or self.experiment

    @property
    def last(self) -> Stage:
        """The last stage."""
        return self.steps[-1].stage

    def status(self) -> dict[str, Any]:
        """State, error, metrics and notes of the run: done when all stages are, else as the first that is not.

        A run diverges with its stage, as later stages never run.
        """
        statuses = [step.status() for step in self.steps]
        at = next((status for status in statuses if status["state"] != "done"), statuses[-1])
        notes = [note for status in statuses for note in status.get("notes", ())]
        return {**at, "metrics": self.metrics(), "notes": notes}

    def current(self) -> StoredStage:
        """The first stage that is not done; the last one where all are."""
        return next((step for step in self.steps if step.status()["state"] != "done"), self.steps[-1])

    def metrics(self) -> dict[str, float]:
        """The metrics of all finished stages, each under its prefix."""
        return _prefixed_values(_counted(self._ended()), "metrics")

    def _ended(self) -> Ended:
        return [(step, result) for step in self.steps if (result := step.stage.result()) is not None]

    @property
    def logged(self) -> tuple[StoredStage, ...]:
        """The stages that together log each step once: a trunk only while no later stage has logged its steps."""
        begun = [step for step in self.steps if step.node.kind in PRETRAINS and step.stage.metrics_file.exists()]
        last = {step.node.place: step for step in begun}
        return tuple(
            step for step in self.steps if step.node.kind not in PRETRAINS or last.get(step.node.place) is step
        )

    def result(self) -> RunResult:
        """The last training's result, with the metrics of all stages and their summed cost, for the comparison."""
        ended = self._ended()  # read once, as there may be thousands of runs
        finished, read = _counted(ended), {step.node.scope: result["state"] for step, result in ended}
        states = {step.node.scope: read.get(step.node.scope) or step.status()["state"] for step in self.steps}
        whole: dict[str, Any] = {}
        for step, result in finished:
            if step.node.kind != "evaluate":
                whole = dict(result)
        if whole:  # else its training is damaged, and its evaluations are left out too
            results = [result for _, result in finished]
            whole |= {
                "metrics": _prefixed_values(finished, "metrics"),
                "initial": _prefixed_values(finished, "initial"),
                "flops": sum(result.get("flops", 0.0) for result in results),
                "training_seconds": training_seconds(
                    result for step, result in finished if step.node.kind != "evaluate"
                ),
                "origins": [result["provenance"] for _, result in ended],
                "stopped": [
                    f"{step.node.name} at step {result['steps']} by {result['stopped_by']}"
                    for step, result in finished
                    if result.get("stopped_by")
                ],
            }
        state = next((state for state in states.values() if state != "done"), "done")
        return RunResult(self.arm.name, self.arm.baseline, self.seed, state, whole, states, self.units)

    def row(self, result: RunResult) -> dict[str, Any]:
        """Row of a table of runs: names, factor levels, state, costs and metrics. result: that of `result()`."""
        head = {"arm": self.arm.name, "baseline": self.arm.baseline, "seed": self.seed, **self.arm.levels}
        costs = {key: result.result.get(key) for key in ("parameters", "tokens", "flops")}
        return {**head, "state": result.state, **costs, **result.result.get("metrics", {})}

    def to_frame(self) -> pandas.DataFrame:
        """The logged steps of its stages, as a data frame: a row for each step, a column for each metric."""
        import pandas

        lines = [(step, line) for step in self.logged for line in read_metrics(step.stage.metrics_file)]
        return pandas.DataFrame(
            [{"stage": step.node.name, "step": line["step"], **line["metrics"]} for step, line in lines]
        )

    def units(self, metric: str) -> Units | None:
        """{document, example or question: (sum of its losses, its weight)} of a metric, with its stage's prefix.

        None where the stage that measured it keeps no such losses.
        """
        step = self.step_of(metric)
        return None if step is None else units_of(step.stage, metric.removeprefix(step.node.prefix))

    def step_of(self, metric: str) -> StoredStage | None:
        """The stage that measures a metric, by the prefix of its name."""
        scoped = [step for step in self.steps if metric.startswith(step.node.scope)]
        return max(scoped, key=lambda step: len(step.node.scope), default=None)

    @cached_property
    def params(self) -> dict[str, Any]:
        """The flattened configuration, and the levels of the factors."""
        levels = {f"arm.{name}": label for name, label in self.arm.levels.items()}
        return {**dict(leaves(self.experiment.model_dump(mode="json"))), **levels}

    @cached_property
    def config_yaml(self) -> str:
        return experiment_yaml(self.experiment)

    def stale(self, trainer: TrainerParts | None = None) -> bool:
        """True where a stage's result has another provenance (code, device, threads, ...) than it would have now.

        trainer: as in `stale_at`.
        """
        return any(self.stale_at(step, trainer=trainer) for step in self.steps)

    def stale_at(
        self, step: StoredStage, result: Mapping[str, Any] | None = None, trainer: TrainerParts | None = None
    ) -> bool:
        """True where a stage's result has another provenance than it would have now.

        result: read when absent. trainer: what the user adds to the Trainer; asked for when absent.
        """
        result = result or step.stage.result()
        return result is not None and not same_provenance(result["provenance"], self.provenance_of(step, trainer))

    def provenance_of(self, step: StoredStage, trainer: TrainerParts | None = None) -> dict[str, Any]:
        """The provenance that a stage's result would have now. trainer: as in `stale_at`."""
        # A trunk's weights do not depend on where the stages before it end, so none of them is named.
        alone = step.node.kind == "trunk"
        stages = {
            other.node.fingerprint: other.stage for other in self.steps if not (alone and other.node.kind == "trunk")
        }
        begins = [(stages[name].result() or {}).get("weights") for name in step.node.parents if name in stages]
        experiment, evaluates = self.experiment_at(step), step.node.kind == "evaluate"
        return provenance(experiment, step.node.after, evaluates, weights_digest(begins), trainer)

    @property
    def trained(self) -> list[StoredStage]:
        """The stages that train, those of its sources first."""
        return [step for step in self.steps if step.node.kind != "evaluate"]


Ended = list[tuple[StoredStage, dict[str, Any]]]
"""Stages with their results."""


def _counted(ended: Ended) -> Ended:
    """The stages that together have each step once.

    A trunk's steps and metrics are also in the results of its branches. A trunk that diverged has no branches.
    """
    places = {step.node.place for step, _ in ended if step.node.kind == "pretrain"}

    def counts(step: StoredStage, result: Mapping[str, Any]) -> bool:
        return step.node.kind != "trunk" or (result["state"] != "done" and step.node.place not in places)

    return [(step, result) for step, result in ended if counts(step, result)]


def training_seconds(results: Iterable[Mapping[str, Any]]) -> float | None:
    """Wall-clock seconds of the training steps of all stages, evaluations excluded; None where one was not measured.

    Computed from tokens per second, which leave out each process's first step (compilation, warm-up). For a stage of
    one step, the time of that step.
    """
    total = 0.0
    for result in results:
        rate = result.get("metrics", {}).get(TOKENS_PER_SECOND.name)
        seconds = (
            result["tokens"] / rate if rate and result.get("tokens") else result.get("seconds", {}).get("training")
        )
        if not seconds:
            return None
        total += seconds
    return total or None


def _prefixed_values(results: Iterable[tuple[StoredStage, Mapping[str, Any]]], key: str) -> dict[str, float]:
    """{prefix of the stage + name: value} of one section of all results."""
    return {f"{step.node.prefix}{name}": value for step, one in results for name, value in (one.get(key) or {}).items()}


def runs_of(ablation: Ablation, store: Store) -> list[Run]:
    """All runs, arm by arm; with `more_seeds`, also the seeds that the results so far ask for.

    Seeds are added by the metric of the validation split, never by the test split.
    """
    check_texts(ablation)
    study, interims = ablation.study, interims_in(store, ablation)
    runs = {arm.name: [Run.of(arm, seed, store) for seed in study.seeds] for arm in ablation.arms}
    grown, results = interims is not None, dict[str, RunResult]()
    while grown and interims is not None:
        for run in (run for arm_runs in runs.values() for run in arm_runs if run.name not in results):
            results[run.name] = replace(run.result(), read_units=cache(run.units))  # each round reads them
        kept = of_newest_provenance([*results.values()], [])
        statuses = interim_statuses(kept, ablation.baselines, study.compare.metric, interims, procedure_of(ablation))
        grown = False
        for arm in ablation.arms:
            arm_runs = runs[arm.name]
            for seed in interims.seeds[len(arm_runs) : statuses[arm.name].more]:
                arm_runs.append(Run.of(arm, seed, store))
                grown = True
    return [run for arm_runs in runs.values() for run in arm_runs]


def interims_in(store: Store, ablation: Ablation) -> InterimAnalyses | None:
    """The interim analyses of a study, past ones from this store; None where its number of seeds is fixed."""
    return interims_of(ablation, registration_of(store.study(ablation.study.study)), _results_of(store, ablation))


def register_analysis(store: Store, ablation: Ablation, runs: Sequence[Run]) -> list[str]:
    """Freeze a study's analysis, or log its changes. Returns why nothing could be written, as sentences.

    runs: the study's runs. Finished ones are counted, those with seeds of the previous plan included.
    """
    folder = store.study(ablation.study.study)

    def seeds_analysed() -> int:
        return seeds_analysed_in_force(ablation, registration_of(folder), _results_of(store, ablation))

    def finished() -> int:
        registration = registration_of(folder)
        seeds = all_seeds(registration.current) if registration is not None and registration.plan else ()
        before = [Run.of(arm, seed, store) for arm in ablation.arms for seed in seeds]
        return sum(run.status()["state"] in FINAL for run in {run.name: run for run in (*runs, *before)}.values())

    return register(store, ablation, finished, seeds_analysed)


def _results_of(store: Store, ablation: Ablation) -> Callable[[Sequence[int]], list[RunResult]]:
    return lambda seeds: [Run.of(arm, seed, store).result() for arm in ablation.arms for seed in seeds]


def runs_of_arm(source: str, overrides: Sequence[str], store: Store) -> list[Run]:
    """The runs of `STUDY:ARM`, or all runs of a study's file, a study in the store, an experiment or a preset."""
    file, arm = file_and_arm(source)
    ablation = open_study(file, overrides, store)
    names = [each.name for each in ablation.arms]
    if arm and arm not in names:
        raise InputError(Problem(f"{file} has no arm {arm!r}{did_you_mean(arm, names)}"))
    return [run for run in runs_of(ablation, store) if arm in ("", run.arm.name)]


def runs_of_one_arm(source: str, overrides: Sequence[str], store: Store) -> list[Run]:
    """The same, of a source that names one arm. Raises InputError for several arms."""
    runs = runs_of_arm(source, overrides, store)
    if len({run.arm.name for run in runs}) > 1:
        arms = ", ".join(f"{source}:{name}" for name in dict.fromkeys(run.arm.name for run in runs))
        raise InputError(Problem(f"{source} has several arms; name one: {arms}"))
    return runs


def trained_fingerprint(source: str, overrides: Sequence[str], store: Store, seed: int | None, after: str) -> str:
    """Fingerprint of the trained stage named by `STUDY:ARM`, an experiment file, a preset, or a fingerprint.

    seed: the study's first when None; after: pretrain, finetune, or the last trained stage when empty. Raises
    InputError.
    """
    if re.fullmatch(r"[0-9a-f]{16}", source):
        if seed is not None or after:
            raise InputError(Problem(f"{source} is a stage: it has one seed and no --after of its own"))
        return source
    runs = runs_of_one_arm(source, overrides, store)
    return trained_stage(runs, source, seed, after)[1].node.fingerprint


def trained_stage(runs: Sequence[Run], source: str, seed: int | None, after: str) -> tuple[Run, StoredStage]:
    """The run of an arm, and its trained stage; see `trained_fingerprint`. source: the user's name of the arm."""
    mine = [run for run in runs if seed in (None, run.seed)]
    if not mine:
        seeds = ", ".join(str(run.seed) for run in runs)
        raise InputError(Problem(f"{source} has no seed {seed}; it has {seeds}", "--seed"))
    steps = {step.node.name: step for step in mine[0].trained}
    if after and after not in steps:
        raise InputError(Problem(f"{source} has no stage {after!r}; it has {', '.join(steps)}", "--after"))
    return mine[0], steps[after] if after else mine[0].trained[-1]
