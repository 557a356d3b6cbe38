"""Signal, noise and decision accuracy of each metric at each size, from the finished runs of studies.

A size is a study, or one level of its `compare.stratify_by`. Arms of two sizes are the same where their names agree,
without the levels of these factors. The largest size is the one with the most training FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from statistics import fmean, median
from typing import Any

from lit_llm.config.metrics import EVALUATED, FINETUNED, SPLITS, direction, metric_of
from lit_llm.config.problems import InputError, Problem, did_you_mean
from lit_llm.evaluation.config import ExampleValidationConfig
from lit_llm.runs.stage_graph import validation_metric
from lit_llm.statistics.estimates import joined
from lit_llm.statistics.paired import Values
from lit_llm.statistics.run_results import RunResult, of_newest_provenance, values_by_arm
from lit_llm.statistics.signal_and_noise import (
    FEWEST_ARMS,
    FEWEST_SEEDS,
    LAST_VALIDATIONS,
    DecisionAccuracy,
    SignalAndNoise,
    checkpoint_noise,
    decision_accuracy,
    last_validations,
    signal_and_noise,
)
from lit_llm.store.store import Store, metric_lines
from lit_llm.studies.design.factors import short_names
from lit_llm.studies.load import Ablation, Arm
from lit_llm.studies.runs import Run, StoredStage, runs_of
from lit_llm.studies.stored import open_study, version_of

UNEQUAL = 2.0
"""Ratio of the parameters of two arms of one size from which a note says that their size is part of the signal."""

RunWithResult = tuple[Run, RunResult]
Courses = Mapping[str, Sequence[tuple[int, float]]]
"""{metric: its last (step, value)} of one run."""


@dataclass(frozen=True)
class MetricNoise:
    """One metric at one size."""

    study: str
    stratum: str
    """Levels of `compare.stratify_by`; empty without strata."""
    parameters: float
    """Median over the arms."""
    train_flops: float
    """Median over the arms, of one run."""
    metric: str
    values: SignalAndNoise
    checkpoint_noise: float | None
    """Relative standard deviation of the last validations of a run."""
    decisions: DecisionAccuracy | None
    """How well this size decides for the largest one; None for the largest, and below three common arms."""
    largest: str
    """Study and levels of the largest size that has the metric; empty for that size itself."""

    @property
    def size(self) -> str:
        """Study and stratum in one name."""
        return _name(self.study, self.stratum)


@dataclass(frozen=True)
class NoiseReport:
    """Signal and noise of each metric at each size, with notes."""

    rows: tuple[MetricNoise, ...]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The object that `noise --json` prints. Keys may be added, none is renamed."""
        return asdict(self)


@dataclass(frozen=True)
class _Size:
    """Arms that are compared with each other at one size, with the results of their study."""

    study: str
    stratum: str
    arms: Mapping[str, str]
    """{arm: its name at every size}."""
    kept: Sequence[RunWithResult]
    """All runs of the study whose results are of its newest provenance."""
    primary: str

    @property
    def name(self) -> str:
        return _name(self.study, self.stratum)

    @cached_property
    def finished(self) -> list[Mapping[str, Any]]:
        return [run.result for _, run in self.kept if run.arm in self.arms and run.result.get("parameters")]

    @cached_property
    def parameters(self) -> float:
        return float(median(result["parameters"] for result in self.finished))

    @cached_property
    def train_flops(self) -> float:
        return float(median(result["flops"] for result in self.finished))

    def values(self, metric: str) -> dict[str, Values]:
        """{arm by its name at every size: {seed: value}}, without arms that have no value."""
        values = values_by_arm([result for _, result in self.kept], list(self.arms), metric)
        return {name: values[arm] for arm, name in self.arms.items() if values[arm]}

    @cached_property
    def courses(self) -> list[tuple[RunResult, Courses]]:
        """Results with the last validations of their runs."""
        return [(result, _courses(run)) for run, result in self.kept if result.arm in self.arms]

    def validations(self, metric: str) -> list[Sequence[tuple[int, float]]]:
        """The last validations of each run that has a value of a metric: neither unfinished nor diverged ones."""
        name = validation_metric(metric)
        return [found[name] for result, found in self.courses if result.metric(metric) is not None and found.get(name)]


def noise_of_studies(
    sources: Sequence[str], overrides: Sequence[str], store: Store, metrics: str | None = None
) -> NoiseReport:
    """Signal and noise of the metrics of studies in a store.

    metrics: a pattern of their names, `eval/tasks/*`; all that decide between arms when None. Raises InputError.
    """
    opened = [version_of(store, open_study(source, overrides, store)) for source in sources]
    studies = {ablation.study.study: ablation for ablation in opened}.values()
    return noise_of([(each, [(run, run.result()) for run in runs_of(each, store)]) for each in studies], metrics)


def noise_of(studies: Sequence[tuple[Ablation, Sequence[RunWithResult]]], metrics: str | None = None) -> NoiseReport:
    """Signal and noise of the metrics of studies whose results are read. Raises InputError where no metric matches."""
    sizes, notes = list[_Size](), list[str]()
    for ablation, seen in studies:
        left_out: list[str] = []
        newest = {id(result) for result in of_newest_provenance([result for _, result in seen], left_out)}
        kept = [(run, result) for run, result in seen if id(result) in newest]
        sizes += _sizes(ablation, kept)
        without = [] if kept else ["no run has ended with a result"]
        notes += [f"{ablation.study.study}: {note}" for note in (*without, *left_out)]
    sizes = sorted((size for size in sizes if size.finished), key=lambda size: size.train_flops)
    measured = _metrics(sizes)
    chosen = [name for name in measured if metrics is None or fnmatchcase(name, metrics)]
    if measured and not chosen:
        raise InputError(Problem(f"no metric matches {metrics!r}{did_you_mean(metrics or '', measured)}", "--metric"))
    rows = [row for name in chosen for row in _rows(name, sizes)]
    return NoiseReport(tuple(rows), (*notes, *_notes(sizes, rows)))


def decides(name: str) -> bool:
    """True where arms are compared by a tracked metric: a loss or a score of held-out text or of an evaluation."""
    known, bare = metric_of(name), name.removeprefix(FINETUNED)
    across = known is None or known.across_objectives
    return bare.startswith((*SPLITS.values(), EVALUATED)) and direction(name) is not None and across


def _metrics(sizes: Sequence[_Size]) -> list[str]:
    """Metrics of the finished runs, primary ones first; those of the validation split where there is no test split."""
    found = {name for size in sizes for result in size.finished for name in result.get("metrics", {}) if decides(name)}
    of_tests = {validation_metric(name) for name in found if validation_metric(name) != name}
    primary = [size.primary for size in sizes if size.primary in found]
    return list(dict.fromkeys([*primary, *sorted(found - of_tests)]))


def _sizes(ablation: Ablation, kept: Sequence[RunWithResult]) -> Iterator[_Size]:
    study, short = ablation.study, short_names(list(ablation.factors))
    strata: dict[str, dict[str, str]] = {}

    def named(arm: Arm, within: bool) -> list[str]:
        strata_of = study.compare.stratify_by
        return [f"{short[name]}={level}" for name, level in arm.levels.items() if (name in strata_of) == within]

    for arm in ablation.arms:
        strata.setdefault(", ".join(named(arm, True)), {})[arm.name] = "/".join([arm.group, *named(arm, False)])
    for stratum, arms in strata.items():
        yield _Size(study.study, stratum, arms, kept, study.compare.metric)


def _rows(metric: str, sizes: Sequence[_Size]) -> Iterator[MetricNoise]:
    """One metric at every size that has it. sizes: by training FLOPs, the largest last."""
    values = {size.name: found for size in sizes if (found := size.values(metric))}
    means = {name: {arm: fmean(v.values()) for arm, v in arms.items()} for name, arms in values.items()}
    having = [size for size in sizes if size.name in values]
    for size in having:
        measured = signal_and_noise(values[size.name])
        assert measured is not None
        target = _largest(size, having)
        yield MetricNoise(
            size.study,
            size.stratum,
            size.parameters,
            size.train_flops,
            metric,
            measured,
            checkpoint_noise(size.validations(metric)),
            decision_accuracy(means[size.name], means[target.name]) if target else None,
            target.name if target else "",
        )


def _largest(size: _Size, sizes: Sequence[_Size]) -> _Size | None:
    """The size with the most training FLOPs, if it has more than this one; of several, that with most common arms."""
    most = max(each.train_flops for each in sizes)
    if size.train_flops >= most:
        return None
    largest = [each for each in sizes if each.train_flops == most]
    return max(largest, key=lambda each: len({*each.arms.values()} & {*size.arms.values()}))


def _courses(run: Run) -> dict[str, list[tuple[int, float]]]:
    """The last validations of all trainings of a run, by metric with the prefix of its stage."""
    return {
        f"{step.node.prefix}{name}": last_validations(course, _end_alike(run, step))
        for step in run.trained
        if not step.node.source
        for name, course in _validations(step).items()
    }


def _end_alike(run: Run, step: StoredStage) -> bool:
    """True where the validation after the last step reads as many sequences or examples as those before it.

    Other text has another loss, which would count as noise.
    """
    section = run.experiment_at(step).section(step.node.after).validation
    if isinstance(section, ExampleValidationConfig):
        return section.most_examples == section.examples
    return section.most_sequences == section.sequences


def _validations(step: StoredStage) -> dict[str, list[tuple[int, float]]]:
    """{metric: (step, value) of the last validations} of one training."""
    begin = SPLITS["validation"]
    try:
        lines = step.stage.metrics_file.read_bytes().split(b"\n")[:-1]  # the last may be half written
    except OSError:
        return {}
    marked = [line for line in lines if f'"{begin}'.encode() in line]
    courses: dict[str, dict[int, float]] = {}
    for line in metric_lines(marked[-LAST_VALIDATIONS - 1 :]):  # one more, as the last may be left out
        for name, value in line["metrics"].items():
            if name.startswith(begin) and isinstance(value, int | float) and math.isfinite(value):
                courses.setdefault(name, {})[int(line["step"])] = float(value)
    return {name: sorted(course.items()) for name, course in courses.items()}


def _notes(sizes: Sequence[_Size], rows: Sequence[MetricNoise]) -> Iterator[str]:
    seen = {row.size: row.values for row in reversed(rows)}  # the first metric of a size speaks for it
    if few := [name for name, values in seen.items() if values.seeds < FEWEST_SEEDS]:
        yield f"no noise without two seeds that the arms share: {joined(few)}; run them with `seeds: [0, 1, 2]`"
    if few := [name for name, values in seen.items() if values.arms < FEWEST_ARMS]:
        yield f"no signal of fewer than {FEWEST_ARMS} arms with different runs: {joined(few)}"
    for size in sizes:
        counts = [result["parameters"] for result in size.finished]
        if max(counts) >= UNEQUAL * min(counts):
            ratio = max(counts) / min(counts)
            yield f"{size.name}: its arms differ {ratio:.1f} times in parameters, so their size is part of the signal"
    if rows and len({row.size for row in rows}) == 1:
        yield "one size: give a study of the same arms at another size too, and its decisions are compared"
    elif rows and not any(row.decisions for row in rows):
        yield f"no decision accuracy: no smaller size has {FEWEST_ARMS} arms by the names of the largest"
    diverged = {
        run.arm: None for size in sizes for _, run in size.kept if run.arm in size.arms and run.state == "diverged"
    }
    if diverged:
        yield f"diverged runs are left out, of {joined(list(diverged))}: what is left scatters less than the arms do"


def _name(study: str, stratum: str) -> str:
    return f"{study} ({stratum})" if stratum else study
