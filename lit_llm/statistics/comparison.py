"""The comparison of a study: for each arm its mean, its difference from its baseline, and its cost.

Only finished results have numbers; all other runs are counted by state.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from lit_llm.config.markup import spreadsheet_cell
from lit_llm.config.metrics import EVALUATED, FINETUNED, LOSS_SPIKES, SPLITS, TOKENS_PER_SECOND, direction
from lit_llm.config.problems import did_you_mean
from lit_llm.runs.stage_graph import validation_metric
from lit_llm.statistics.anova import Anova, FactorLayout, anova, judged_terms
from lit_llm.statistics.baselines import Noise, differences_from_baselines
from lit_llm.statistics.before_after import BeforeAfter, before_after
from lit_llm.statistics.divergence import Divergence, Outcomes, divergences
from lit_llm.statistics.effects import Effects, Layout, effects, judged_effects
from lit_llm.statistics.interims import InterimAnalyses, interim_statuses, judge_at_interims
from lit_llm.statistics.learning_rates import LearningRates, LRFactor, learning_rates
from lit_llm.statistics.lr_sensitivity import LRRun
from lit_llm.statistics.multiple_comparisons import Correction
from lit_llm.statistics.notes import comparison_notes
from lit_llm.statistics.paired import Difference, Variance
from lit_llm.statistics.pareto import ParetoFront
from lit_llm.statistics.procedure import Procedure
from lit_llm.statistics.run_results import (
    RunResult,
    missing_reason,
    noise_of_kept,
    of_newest_provenance,
    values_by_arm,
)
from lit_llm.statistics.scaling.comparison import Scaling
from lit_llm.statistics.scaling.gate import Gate
from lit_llm.statistics.sequential import bias_adjusted
from lit_llm.statistics.sequential_notes import rounds_notes
from lit_llm.statistics.unadjusted import UNTESTED, UNTESTED_CHANGES, untested_anova, untested_effects
from lit_llm.statistics.verdicts import Judgement, judgements, without_lost_runs

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Row:
    """One arm of a comparison."""

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
    """FLOPs of one finished run, forward and backward, our convention."""
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
    """Comparison of all arms with their baselines, with notes on the numbers."""

    metric: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    effects: tuple[Effects, ...] = ()
    """Effects of the factors, where the design estimates them; empty elsewhere."""
    before_after: BeforeAfter | None = None
    """Arms in an evaluation that was made after pretraining and after finetuning."""
    front: ParetoFront | None = None
    """The metric against a cost, where the study asks for it."""
    learning_rates: tuple[LearningRates, ...] = ()
    """One for each factor that is a learning rate, where a validation loss is compared."""
    correction: Correction = "none"
    """Correction for the number of comparisons."""
    margin: float | None = None
    """Largest difference that does not matter, in the metric's unit."""
    anova: tuple[Anova, ...] = ()
    """F tests of the factors of a full factorial, where any has more than two levels."""
    scaling: Scaling | None = None
    """Power laws of the metric, where the study asks for them."""
    divergences: tuple[Divergence, ...] = ()
    """Counts for the arms that lost runs, or whose baseline did."""
    variance: Variance = "moderated"
    """Source of the variance of a difference."""
    gate: Gate | None = None
    """Multipliers of compute and time at each size, where the study asks for them."""
    bias_adjusted: Mapping[str, float] | None = None
    """Differences of the arms that stopped before the most seeds, without the bias of stopping; None where the number
    of seeds was fixed."""

    @property
    def has_results(self) -> bool:
        """True where any run has ended with a value or diverged."""
        return any(row.mean is not None or row.diverged for row in self.rows)

    def csv(self) -> str:
        """One line per arm; a field without a number is empty."""
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

    def to_frame(self) -> pandas.DataFrame:
        """The arms as a data frame: the columns of comparison.csv."""
        import pandas

        return pandas.read_csv(io.StringIO(self.csv()))

    def as_json(self) -> dict[str, Any]:
        """The comparison as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Design:
    """Parts of a study's design that decide what is estimated."""

    layouts: Sequence[Layout] = ()
    """Groups of arms whose factors have two levels: effects are estimated."""
    factor_layouts: Sequence[FactorLayout] = ()
    """Full factorials with more than two levels: F tests are computed."""
    lr_factors: Sequence[LRFactor] = ()
    """Factors that are learning rates."""
    interims: InterimAnalyses | None = None
    """None where the number of seeds is fixed."""


def compare(
    runs: Sequence[RunResult], metric: str, design: Design = Design(), procedure: Procedure = Procedure()
) -> Comparison:
    """Compare every arm with its baseline on one metric. Results of different code or machines are not mixed."""
    notes: list[str] = []
    kept = of_newest_provenance(runs, notes)
    arms = list(dict.fromkeys(run.arm for run in runs))
    values = values_by_arm(kept, arms, metric)
    baselines = {run.arm: run.baseline for run in runs}
    noise = noise_of_kept(kept, metric, procedure)
    differences = differences_from_baselines(values, baselines, noise)
    judged = judgements(differences, baselines, metric, procedure.correction, procedure.margin)
    unbiased: Mapping[str, float] | None = None
    interims = design.interims
    if interims is not None:
        # An arm is judged at the analysis that stopped it, else at the last one; before the first it has no judgement.
        statuses = interim_statuses(kept, baselines, metric, interims, procedure)
        judged = judge_at_interims(values, baselines, statuses, interims.rule(metric, procedure, noise))
        differences = dict[str, Difference | None]({arm: each.difference for arm, each in judged.items()})
        unbiased = bias_adjusted(statuses, interims.rounds, interims.comparisons, procedure.margin)
        notes += rounds_notes(statuses, interims.rounds, interims.comparisons, unbiased)
    outcomes = _outcomes(kept, arms, metric)
    lost = {arm for arm, outcome in outcomes.items() if outcome.diverged}
    judged = {arm: without_lost_runs(each, metric, arm in lost, baselines[arm] in lost) for arm, each in judged.items()}
    every, ended = _by_arm(runs), _by_arm(kept)
    rows = tuple(
        _row(arm, metric, every[arm], ended.get(arm, ()), baselines[arm], values[arm], judged.get(arm)) for arm in arms
    )
    if not any(values.values()) and (measured := sorted({name for run in kept for name in run.result["metrics"]})):
        notes.append(f"no run that has ended has {metric}{did_you_mean(metric, measured)}")
    notes += [*_not_finite(kept, metric), *_of_different_devices(kept), *_stopped(kept)]
    shared = interims is not None and interims.comparisons > 1
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
    return compared if interims is None else _untested(compared)


def _untested(compared: Comparison) -> Comparison:
    """The comparison of a study in rounds, whose interim levels hold for its arms alone, without any other test."""
    return replace(
        compared,
        effects=untested_effects(compared.effects),
        anova=untested_anova(compared.anova),
        learning_rates=tuple(replace(rates, notes=(*rates.notes, UNTESTED)) for rates in compared.learning_rates),
        notes=(*compared.notes, *[UNTESTED_CHANGES] * (compared.before_after is not None)),
    )


def _outcomes(kept: Sequence[RunResult], arms: Sequence[str], metric: str) -> dict[str, Outcomes]:
    values = values_by_arm(kept, arms, metric)
    initial: dict[str, dict[int, float | None]] = {arm: {} for arm in arms}
    for run in kept:
        if run.arm in initial and run.state_of(metric) == "diverged":
            initial[run.arm][run.seed] = run.result.get("initial", {}).get(validation_metric(metric))
    return {arm: Outcomes(values[arm], initial[arm]) for arm in arms}


def _not_finite(kept: Sequence[RunResult], metric: str) -> Iterator[str]:
    """A note on runs whose training is done although their value is not finite."""
    counts = Counter(run.arm for run in kept if run.state == "done" and run.state_of(metric) == "diverged")
    if counts:
        named = ", ".join(f"{arm} {count}" for arm, count in counts.items())
        yield f"{metric} is not finite in runs that were trained to the end, which count as diverged: {named}"


def _of_different_devices(kept: Sequence[RunResult]) -> Iterator[str]:
    """A note on runs that were trained on different numbers of devices, or by different strategies."""
    arms: dict[str, dict[str, None]] = {}
    for run in kept:
        arms.setdefault(run.devices, {})[run.arm] = None
    if len(arms) > 1:
        named = "; ".join(f"{', '.join(names)} on {devices}" for devices, names in arms.items())
        yield f"runs were trained on different devices, which changes a result by rounding: {named}"


def _stopped(kept: Sequence[RunResult]) -> Iterator[str]:
    """A note on runs that a callback of the user's ended before their last step."""
    if stopped := [run for run in kept if run.result.get("stopped")]:
        named = "; ".join(f"{run.arm}/seed {run.seed}: {', '.join(run.result['stopped'])}" for run in stopped)
        yield f"runs have read fewer tokens than planned, as a callback ended them before their schedule: {named}"


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
    lacking = {(run.arm, run.seed): missing_reason(run, metric) for run in runs if run.seed not in values[run.arm]}
    estimated = [
        effects(layout, values, lacking, noise) for layout in design.layouts if any(values[arm] for arm in layout.arms)
    ]
    groups = {layout.group for layout in design.layouts if lost & {*layout.arms}}
    return judged_effects(estimated, metric, procedure.correction, procedure.margin, groups)


def _anova(
    values: Mapping[str, Mapping[int, float]],
    metric: str,
    design: Design,
    noise: Noise,
    procedure: Procedure,
    lost: Set[str],
) -> tuple[Anova, ...]:
    """lost: arms of which a run diverged."""
    estimated = [
        anova(layout, values, noise) for layout in design.factor_layouts if any(values[arm] for arm in layout.arms)
    ]
    groups = {layout.group for layout in design.factor_layouts if lost & {*layout.arms}}
    return judged_terms(estimated, metric, procedure.correction, procedure.margin, groups)


def _by_arm(runs: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    by_arm: dict[str, list[RunResult]] = {}
    for run in runs:
        by_arm.setdefault(run.arm, []).append(run)
    return by_arm


def _before_after(
    kept: Sequence[RunResult],
    arms: Sequence[str],
    metric: str,
    baselines: Mapping[str, str],
    procedure: Procedure,
) -> BeforeAfter | None:
    """Arms before and after finetuning; None where the compared metric is not of an evaluation at both times."""
    name = metric.removeprefix(FINETUNED)
    if not name.startswith(EVALUATED):
        return None
    before, after = (values_by_arm(kept, arms, prefix + name) for prefix in ("", FINETUNED))
    if not any(before.values()) or not any(after.values()):
        return None
    noise = (noise_of_kept(kept, name, procedure), noise_of_kept(kept, FINETUNED + name, procedure))
    return before_after(name, before, after, baselines, noise)


def _learning_rates(kept: Sequence[RunResult], metric: str, factor: LRFactor) -> LearningRates | None:
    """Sensitivity to a learning rate on the validation split, which learning rates are chosen by.

    None where the compared metric is not a loss, and while no run has ended.
    """
    metric = validation_metric(metric)
    prefix = FINETUNED if metric.startswith(FINETUNED) else ""
    if not metric.removeprefix(prefix).startswith(SPLITS["validation"]):
        return None
    arms = {arm: (group.name, lr) for group in factor.groups for arm, lr in group.arms.items()}
    # The loss at initialisation does not depend on the learning rate of the same stage.
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


def _row(
    arm: str,
    metric: str,
    runs: Sequence[RunResult],
    kept: Sequence[RunResult],
    baseline: str,
    values: Mapping[int, float],
    judged: Judgement | None,
) -> Row:
    """The row of one arm. runs: all runs of the arm; kept: its runs whose results are compared."""
    ended = [run.result for run in kept]
    done = [run.result for run in kept if run.state_of(metric) == "done"]

    def mean_of(name: str) -> float | None:
        measured = [r["metrics"][name] for r in ended if r.get("metrics", {}).get(name) is not None]
        return statistics.fmean(measured) if measured else None

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
