"""The comparison of a study: for each arm its mean, its difference from its baseline, and what that cost.

Reads finished results; whatever is not finished is counted, never turned into a number.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lit_llm.config.markup import spreadsheet_cell
from lit_llm.config.metrics import EVALUATED, FINETUNED, LOSS_SPIKES, SPLITS, TOKENS_PER_SECOND, direction
from lit_llm.config.problems import did_you_mean
from lit_llm.evaluation.unit_losses import Units
from lit_llm.runs.provenance import COMPARABLE
from lit_llm.runs.stage_graph import validation_metric
from lit_llm.statistics.anova import Anova, FactorLayout, anova, judged_terms
from lit_llm.statistics.baselines import Noise, differences_from_baselines
from lit_llm.statistics.before_after import BeforeAfter, before_after
from lit_llm.statistics.divergence import Divergence, Outcomes, divergences
from lit_llm.statistics.document_noise import Influences, influence
from lit_llm.statistics.effects import Effects, Layout, effects, judged_effects
from lit_llm.statistics.learning_rates import LearningRates, LRFactor, learning_rates
from lit_llm.statistics.lr_sensitivity import LRRun
from lit_llm.statistics.multiple_comparisons import Correction
from lit_llm.statistics.notes import comparison_notes
from lit_llm.statistics.paired import Difference, Variance
from lit_llm.statistics.pareto import ParetoFront
from lit_llm.statistics.procedure import Procedure
from lit_llm.statistics.scaling.comparison import Scaling
from lit_llm.statistics.scaling.gate import Gate
from lit_llm.statistics.scaling.runs import ScalingRun
from lit_llm.statistics.sequential import (
    ArmStatus,
    LookRule,
    Rounds,
    arm_statuses,
    bias_adjusted,
    judged_where_they_stand,
)
from lit_llm.statistics.sequential_notes import rounds_notes
from lit_llm.statistics.unadjusted import UNTESTED, UNTESTED_CHANGES, untested_anova, untested_effects
from lit_llm.statistics.verdicts import Judgement, judgements, without_lost_runs


@dataclass(frozen=True)
class RunResult:
    """How one arm ended with one seed."""

    arm: str
    baseline: str
    seed: int
    state: str
    result: Mapping[str, Any] = field(default_factory=dict)
    """The last training's result.json with the metrics and the `initial` of all, and their `origins`; empty while
    there is none."""
    states: Mapping[str, str] = field(default_factory=dict)
    """State of each stage, by how the names of its metrics begin; `state` holds for all of them where it is empty."""
    read_units: Callable[[str], Units | None] = field(default=lambda _: None, repr=False, compare=False)
    """Reads the units of a metric from where they are kept."""

    def units(self, metric: str) -> Units | None:
        """{document, example or question: (sum of its losses, its weight)}, read anew with each call.

        The sum of the losses over the sum of the weights is the metric; of a perplexity, the loss that it is the
        exponential of. None where the run has no value or keeps no records.
        """
        return None if self.metric(metric) is None else self.read_units(metric)

    def state_of(self, metric: str) -> str:
        """The state of the stage that measures it: a later stage that fails takes nothing from an earlier one.

        A run whose training ended with a value that is not finite has diverged, whenever that was noticed.
        """
        state = self._stage_state(metric)
        return "diverged" if state == "done" and self.is_not_finite(metric) else state

    def is_not_finite(self, metric: str) -> bool:
        """Whether it was measured, and is no finite number: null in a result."""
        measured = self.result.get("metrics", {})
        return metric in measured and (measured[metric] is None or not math.isfinite(measured[metric]))

    def _stage_state(self, metric: str) -> str:
        scopes = [scope for scope in self.states if metric.startswith(scope)]
        state = self.states[max(scopes, key=len)] if scopes else self.state
        # It was never begun where an earlier one has ended otherwise.
        return self.state if state == "pending" else state

    def metric(self, name: str) -> float | None:
        value = self.result.get("metrics", {}).get(name) if self.state_of(name) == "done" else None
        return None if value is None else float(value)

    @property
    def origin(self) -> tuple[Any, ...]:
        """The part of its provenance that has to agree with what it is compared with."""
        return tuple({tuple(origin.get(key) for key in COMPARABLE): None for origin in self._origins})

    @property
    def outside_code(self) -> dict[str, str]:
        """{package: digest of its code} of the components from other packages."""
        return {package: code for origin in self._origins for package, code in (origin.get("components") or {}).items()}

    @property
    def _origins(self) -> list[dict[str, Any]]:
        return self.result.get("origins") or [self.result.get("provenance", {})]


@dataclass(frozen=True)
class Row:
    """One arm."""

    arm: str
    baseline: str
    states: Mapping[str, int]
    seeds: int
    """Seeds that have a value."""
    mean: float | None
    deviation: float | None
    """Standard deviation over seeds; None for fewer than two."""
    difference: Difference | None
    """None for a baseline."""
    parameters: int | None
    train_flops: float | None
    """Of one finished run, forward and backward, our convention."""
    tokens_per_second: float | None
    spikes: float | None
    """Loss spikes per run, mean over the runs that ended."""
    p: float | None = None
    """p-value of the two-sided test of no difference, adjusted for multiple comparisons; None for one seed."""
    detectable: float | None = None
    """Smallest true difference that this number of seeds detects with 80% power."""
    verdict: str | None = None
    """The difference in words; None for a baseline."""

    @property
    def diverged(self) -> int:
        return self.states.get("diverged", 0)


COLUMNS = (
    "arm baseline metric seeds mean deviation difference low high degrees pooled p detectable verdict "
    "diverged failed parameters train_flops tokens_per_second spikes documents seeds_low seeds_high"
).split()


@dataclass(frozen=True)
class Comparison:
    """All arms, and what has to be said about them."""

    metric: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    effects: tuple[Effects, ...] = ()
    """Of the factors, where the design shows them; empty elsewhere."""
    before_after: BeforeAfter | None = None
    """Of an evaluation that was made after pretraining and after finetuning."""
    front: ParetoFront | None = None
    """The metric against a cost, where the study asks for it."""
    learning_rates: tuple[LearningRates, ...] = ()
    """One for each factor that is a learning rate, where a validation loss is compared."""
    correction: Correction = "none"
    """For the number of comparisons."""
    margin: float | None = None
    """What a difference has to exceed to be of any matter, in the metric's unit."""
    anova: tuple[Anova, ...] = ()
    """Of the factors of a full factorial, where any has more than two levels."""
    scaling: Scaling | None = None
    """Power laws of the metric, where the study asks for them."""
    divergences: tuple[Divergence, ...] = ()
    """Of the arms that lost runs, or whose baseline did."""
    variance: Variance = "moderated"
    """Where the variance of a difference comes from."""
    gate: Gate | None = None
    """Multipliers of compute and time at each size, where the study asks for them."""
    bias_adjusted: Mapping[str, float] | None = None
    """Differences of the arms that stopped before the most seeds, without the bias of stopping; None where the number
    of seeds was fixed."""

    @property
    def has_results(self) -> bool:
        """Whether any run has ended with something to show: a value, or a divergence."""
        return any(row.mean is not None or row.diverged for row in self.rows)

    def csv(self) -> str:
        """One line per arm; empty where there is no number."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in self.rows:
            d = row.difference
            writer.writerow(
                [
                    spreadsheet_cell(row.arm),
                    spreadsheet_cell(row.baseline),
                    self.metric,
                    row.seeds,
                    row.mean,
                    row.deviation,
                ]
                + ([d.mean, d.low, d.high, d.degrees, d.pooled] if d else [None] * 5)
                + [row.p, row.detectable, row.verdict]
                + [row.diverged, row.states.get("failed", 0) + row.states.get("out_of_memory", 0)]
                + [row.parameters, row.train_flops, row.tokens_per_second, row.spikes]
                + ([d.documents, d.seeds_low, d.seeds_high] if d else [None] * 3)
            )
        return out.getvalue()

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Design:
    """What a study's design asks of its results."""

    layouts: Sequence[Layout] = ()
    """Arms of which effects are estimated too."""
    factor_layouts: Sequence[FactorLayout] = ()
    """Full factorials with more than two levels."""
    lr_factors: Sequence[LRFactor] = ()
    """Arms that differ in a learning rate alone."""
    looks: Looks | None = None
    """Where seeds are added in rounds."""


def compare(
    runs: Sequence[RunResult], metric: str, design: Design = Design(), procedure: Procedure = Procedure()
) -> Comparison:
    """Compare every arm with its baseline on one metric. Results of different code or machines are not mixed."""
    notes: list[str] = []
    kept = _of_one_origin(runs, notes)
    arms = list(dict.fromkeys(run.arm for run in runs))
    values = _values(kept, arms, metric)
    baselines = {run.arm: run.baseline for run in runs}
    noise = _noise(kept, metric, procedure)
    differences = differences_from_baselines(values, baselines, noise)
    judged = judgements(differences, baselines, metric, procedure.correction, procedure.margin)
    unbiased: Mapping[str, float] | None = None
    if design.looks is not None:
        # An arm is judged at the look that stopped it, else at the last one; at neither while the first is not over.
        statuses = in_rounds(runs, metric, design.looks, procedure)
        judged = _at_their_looks(values, baselines, statuses, design.looks.rule(metric, procedure, noise))
        differences = dict[str, Difference | None]({arm: own.difference for arm, own in judged.items()})
        unbiased = bias_adjusted(statuses, design.looks.rounds, design.looks.comparisons, procedure.margin)
        notes += rounds_notes(statuses, design.looks.rounds, design.looks.comparisons, unbiased)
    outcomes = _outcomes(kept, arms, metric)
    lost = {arm for arm, outcome in outcomes.items() if outcome.diverged}
    judged = {arm: without_lost_runs(own, metric, arm in lost, baselines[arm] in lost) for arm, own in judged.items()}
    every, ended = _by_arm(runs), _by_arm(kept)
    rows = tuple(
        _row(arm, metric, every[arm], ended.get(arm, ()), baselines[arm], values[arm], judged.get(arm)) for arm in arms
    )
    if not any(values.values()) and (there := sorted({name for run in kept for name in run.result["metrics"]})):
        notes.append(f"no run that has ended has {metric}{did_you_mean(metric, there)}")
    notes += _not_finite(kept, metric)
    shared = design.looks is not None and design.looks.comparisons > 1
    notes += comparison_notes(judged, differences, procedure, adjusted=shared)
    compared = Comparison(
        metric,
        rows,
        tuple(notes),
        _effects(runs, values, metric, design, noise, procedure, lost),
        _before_after(kept, arms, metric, baselines, procedure),
        learning_rates=tuple(
            rates for factor in design.lr_factors if (rates := _learning_rates(kept, metric, factor)) is not None
        ),
        correction=procedure.correction,
        margin=procedure.margin,
        anova=_anova(values, metric, design, noise, procedure, lost),
        divergences=divergences(outcomes, baselines, direction(metric) == "lower"),
        variance=procedure.variance,
        bias_adjusted=unbiased,
    )
    return compared if design.looks is None else _untested(compared)


def _untested(compared: Comparison) -> Comparison:
    """Of a study in rounds: the levels of its looks are for its arms alone."""
    return replace(
        compared,
        effects=untested_effects(compared.effects),
        anova=untested_anova(compared.anova),
        learning_rates=tuple(replace(rates, notes=(*rates.notes, UNTESTED)) for rates in compared.learning_rates),
        notes=(*compared.notes, *[UNTESTED_CHANGES] * (compared.before_after is not None)),
    )


def _noise(kept: Sequence[RunResult], metric: str, procedure: Procedure) -> Noise:
    return Noise(procedure.variance, _influences(kept, metric), procedure.families)


def _influences(kept: Sequence[RunResult], metric: str) -> Influences:
    """What each document adds to the metric of each run that has recorded it."""
    exponential = "perplexity" in metric.split("/")
    return {
        (run.arm, run.seed): found
        for run in kept
        if run.metric(metric) is not None
        and (units := run.units(metric)) is not None
        and (found := influence(units, exponential)) is not None
    }


def _outcomes(kept: Sequence[RunResult], arms: Sequence[str], metric: str) -> dict[str, Outcomes]:
    values = _values(kept, arms, metric)
    initial: dict[str, dict[int, float | None]] = {arm: {} for arm in arms}
    for run in kept:
        if run.arm in initial and run.state_of(metric) == "diverged":
            initial[run.arm][run.seed] = run.result.get("initial", {}).get(validation_metric(metric))
    return {arm: Outcomes(values[arm], initial[arm]) for arm in arms}


def _not_finite(kept: Sequence[RunResult], metric: str) -> Iterator[str]:
    """A note on runs that their stages call done and that have no value all the same."""
    found = Counter(run.arm for run in kept if run.state == "done" and run.state_of(metric) == "diverged")
    if found:
        named = ", ".join(f"{arm} {count}" for arm, count in found.items())
        yield f"{metric} is not finite in runs that were trained to the end, which count as diverged: {named}"


def _effects(
    runs: Sequence[RunResult],
    values: Mapping[str, Mapping[int, float]],
    metric: str,
    design: Design,
    noise: Noise,
    procedure: Procedure,
    lost: Set[str],
) -> tuple[Effects, ...]:
    """lost: arms of which a run diverged."""
    lacking = {(run.arm, run.seed): _lack(run, metric) for run in runs if run.seed not in values[run.arm]}
    known = [
        effects(layout, values, lacking, noise) for layout in design.layouts if any(values[arm] for arm in layout.arms)
    ]
    groups = {layout.group for layout in design.layouts if lost & {*layout.arms}}
    return judged_effects(known, metric, procedure.correction, procedure.margin, groups)


def _anova(
    values: Mapping[str, Mapping[int, float]],
    metric: str,
    design: Design,
    noise: Noise,
    procedure: Procedure,
    lost: Set[str],
) -> tuple[Anova, ...]:
    """lost: arms of which a run diverged."""
    known = [
        anova(layout, values, noise) for layout in design.factor_layouts if any(values[arm] for arm in layout.arms)
    ]
    groups = {layout.group for layout in design.factor_layouts if lost & {*layout.arms}}
    return judged_terms(known, metric, procedure.correction, procedure.margin, groups)


@dataclass(frozen=True)
class Looks:
    """How seeds are added."""

    seeds: tuple[int, ...]
    """All that there may be, in their order."""
    rounds: Rounds
    comparisons: int = 1
    """Arms that share the 5%."""

    def rule(self, metric: str, procedure: Procedure, noise: Noise) -> LookRule:
        return LookRule(metric, self.seeds, self.rounds, procedure.margin, self.comparisons, noise)


def in_rounds(
    runs: Sequence[RunResult], metric: str, looks: Looks, procedure: Procedure = Procedure()
) -> dict[str, ArmStatus]:
    """Where every arm stands, and with how many seeds it is to be run; a baseline with as many as what needs it.

    By the validation split's sibling of the metric, whichever of the two is named: the test split stops nothing.
    """
    metric = validation_metric(metric)
    arms, baselines = list(dict.fromkeys(run.arm for run in runs)), {run.arm: run.baseline for run in runs}
    kept = _of_one_origin(runs, [])
    values, lost = _values(kept, arms, metric), dict[str, set[int]]()
    for run in kept:
        if run.seed not in values[run.arm] and run.state_of(metric) in ("done", "diverged"):
            lost.setdefault(run.arm, set()).add(run.seed)
    rule = looks.rule(metric, procedure, _noise(kept, metric, procedure))
    found: dict[str, ArmStatus] = {}
    for baseline, block in _blocks(values, baselines):
        for arm, new in arm_statuses(block, baseline, rule, lost).items():
            # In a step-wise comparison an arm stands in two blocks: compared in the one, and a baseline in the other.
            own = new if arm != baseline or arm not in found else found[arm]
            found[arm] = replace(own, more=max(new.more, found[arm].more if arm in found else 0))
    return found


def _at_their_looks(
    values: Mapping[str, Mapping[int, float]],
    baselines: Mapping[str, str],
    statuses: Mapping[str, ArmStatus],
    rule: LookRule,
) -> dict[str, Judgement]:
    judged: dict[str, Judgement] = {}
    for baseline, block in _blocks(values, baselines):
        judged |= judged_where_they_stand(statuses, block, baseline, rule)
    return judged


def _blocks(
    values: Mapping[str, Mapping[int, float]], baselines: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, Mapping[int, float]]]]:
    """Each baseline with the values of the arms that are compared with it, and its own."""
    for baseline in dict.fromkeys(baselines.values()):
        yield baseline, {arm: values[arm] for arm in values if arm == baseline or baselines[arm] == baseline}


def values_of(runs: Sequence[RunResult], metric: str) -> dict[str, dict[int, float]]:
    """{arm: {seed: value}} of all that have one, of one origin."""
    return _values(_of_one_origin(runs, []), list(dict.fromkeys(run.arm for run in runs)), metric)


def noise_of(runs: Sequence[RunResult], metric: str) -> Noise:
    """What the documents add to the metric of each run, of one origin."""
    return _noise(_of_one_origin(runs, []), metric, Procedure())


def _by_arm(runs: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    found: dict[str, list[RunResult]] = {}
    for run in runs:
        found.setdefault(run.arm, []).append(run)
    return found


def _values(kept: Sequence[RunResult], arms: Sequence[str], metric: str) -> dict[str, dict[int, float]]:
    values: dict[str, dict[int, float]] = {arm: {} for arm in arms}
    for run in kept:
        if run.arm in values and (value := run.metric(metric)) is not None:
            values[run.arm][run.seed] = value
    return values


def _before_after(
    kept: Sequence[RunResult],
    arms: Sequence[str],
    metric: str,
    baselines: Mapping[str, str],
    procedure: Procedure,
) -> BeforeAfter | None:
    """Of the metric that is compared, where it is one of evaluations after pretraining and after finetuning."""
    name = metric.removeprefix(FINETUNED)
    if not name.startswith(EVALUATED):
        return None
    before, after = (_values(kept, arms, prefix + name) for prefix in ("", FINETUNED))
    if not any(before.values()) or not any(after.values()):
        return None
    noise = (_noise(kept, name, procedure), _noise(kept, FINETUNED + name, procedure))
    return before_after(name, before, after, baselines, noise)


def _learning_rates(kept: Sequence[RunResult], metric: str, factor: LRFactor) -> LearningRates | None:
    """None where what is compared is not a loss, and while no run has ended. Of the validation split: it is what a
    learning rate is chosen by."""
    metric = validation_metric(metric)
    prefix = FINETUNED if metric.startswith(FINETUNED) else ""
    if not metric.removeprefix(prefix).startswith(SPLITS["validation"]):
        return None
    arms = {arm: (group.name, lr) for group in factor.groups for arm, lr in group.arms.items()}
    # The loss at initialisation is one whatever the learning rate, if that is the learning rate of the same stage.
    same_stage = factor.name.startswith("finetune.") == bool(prefix)
    runs, loss_at_init = [], dict[tuple[str, int], float]()
    for run in kept:
        loss = run.metric(metric)
        if run.arm not in arms or (loss is None and run.state_of(metric) != "diverged"):
            continue
        group, lr = arms[run.arm]
        spikes, logit, norm = (
            run.result["metrics"].get(f"{prefix}stability/{name}")
            for name in ("loss_spikes", "max_attention_logit", "max_grad_norm")
        )
        runs.append(LRRun(group, lr, run.seed, loss, spikes, logit, norm))
        initial = run.result.get("initial", {}).get(metric)
        if same_stage and initial is not None:
            loss_at_init[group, run.seed] = initial
    return learning_rates(factor, runs, loss_at_init) if runs else None


def scaling_runs(
    runs: Sequence[RunResult], metric: str, groups: Mapping[str, str], models: Mapping[str, str]
) -> list[ScalingRun]:
    """The runs that have the metric, all of one origin. groups: {arm: its group}; models: {arm: its named arm}."""
    return [
        ScalingRun(
            groups[run.arm],
            run.result["flops"],
            run.result["parameters"],
            run.result["tokens"],
            loss,
            run.arm,
            run.seed,
            run.result.get("training_seconds"),
            models[run.arm],
        )
        for run in _of_one_origin(runs, [])
        if (loss := run.metric(metric)) is not None
    ]


def lost_sizes(runs: Sequence[RunResult], metric: str, groups: Mapping[str, str]) -> dict[str, list[str]]:
    """{group: its arms of which a run diverged}, of the runs that `scaling_runs` takes. groups: {arm: its group}."""
    lost: dict[str, list[str]] = {}
    for arm in dict.fromkeys(run.arm for run in _of_one_origin(runs, []) if run.state_of(metric) == "diverged"):
        lost.setdefault(groups[arm], []).append(arm)
    return lost


def _lack(run: RunResult, metric: str) -> str:
    """Why a run has no value."""
    if run.state_of(metric) != "done":
        return run.state_of(metric)
    return "of other code or another device" if run.metric(metric) is not None else f"no {metric}"


def _of_one_origin(runs: Sequence[RunResult], notes: list[str]) -> list[RunResult]:
    """The finished runs of the newest provenance, and of the newest code of each package that has components."""
    finished = [run for run in runs if run.result]
    in_order = sorted(finished, key=lambda run: run.result.get("finished", 0))
    outside = {package: digest for run in in_order for package, digest in run.outside_code.items()}
    newest = max(finished, key=lambda run: run.result.get("finished", 0)).origin if finished else ()
    kept = [run for run in finished if run.origin == newest and run.outside_code.items() <= outside.items()]
    if left_out := len(finished) - len(kept):
        notes.append(
            f"{left_out} result(s) of other code, device or thread count are left out; `lit-llm run STUDY --rerun "
            "stale` repeats them"
        )
    return kept


def _row(
    arm: str,
    metric: str,
    runs: Sequence[RunResult],
    kept: Sequence[RunResult],
    baseline: str,
    values: Mapping[int, float],
    judged: Judgement | None,
) -> Row:
    """runs: of the arm; kept: those of them whose results are compared."""
    ended = [run.result for run in kept]
    done = [run.result for run in kept if run.state_of(metric) == "done"]

    def mean_of(name: str) -> float | None:
        found = [r["metrics"][name] for r in ended if r.get("metrics", {}).get(name) is not None]
        return statistics.fmean(found) if found else None

    return Row(
        arm=arm,
        baseline=baseline,
        states=dict(Counter(run.state_of(metric) for run in runs)),
        seeds=len(values),
        mean=statistics.fmean(values.values()) if values else None,
        deviation=statistics.stdev(values.values()) if len(values) > 1 else None,
        difference=judged.difference if judged else None,
        parameters=ended[0]["parameters"] if ended else None,
        train_flops=statistics.fmean(r["flops"] for r in done) if done else None,
        tokens_per_second=mean_of(TOKENS_PER_SECOND.name),
        spikes=mean_of(LOSS_SPIKES.name),
        p=judged.p if judged else None,
        detectable=judged.detectable if judged else None,
        verdict=judged.verdict if judged else None,
    )
