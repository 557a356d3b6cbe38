"""The schema of a study file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic.config import JsonDict

from lit_llm.config.metrics import (
    ANSWER_ACCURACY,
    EVALUATED,
    FINETUNED,
    OF_SPLITS,
    OF_TRAINING,
    TARGET_NLL,
    direction,
    on_test,
    on_validation,
)
from lit_llm.config.problems import did_you_mean
from lit_llm.config.section import Items, Section, config_error, nested
from lit_llm.evaluation.config import EVALUATIONS
from lit_llm.experiment.schema import Experiment
from lit_llm.statistics.multiple_comparisons import Correction
from lit_llm.statistics.paired import Variance
from lit_llm.statistics.scaling.runs import X
from lit_llm.studies.fractional_factorial import MOST, Fraction, effect_of, find, members_of

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
LONGEST_NAME = 100
MOST_ARMS, MOST_SEEDS, MOST_RUNS = 2_000, 1_000, 20_000
MOST_FACTORS, MOST_RULES = 100, 1_000
"""Limits of a study, which stop mistakes early: a plan visits every arm and names every run."""


def _plain_name(name: str) -> str:
    if len(name) > LONGEST_NAME:
        raise config_error(("", f"a name has at most {LONGEST_NAME} letters, and this one has {len(name)}"))
    if not _NAME.fullmatch(name):
        raise config_error(("", f"{name!r} is not a plain name: letters, digits, '-', '_' and '.', no path"))
    return name


Name = Annotated[str, AfterValidator(_plain_name)]
"""A name that can be a folder's, of at most 100 characters."""

Seeds = Annotated[Items[Annotated[int, Field(ge=0)]], Field(max_length=MOST_SEEDS, json_schema_extra={"minItems": 1})]

Tree = dict[str, Any]
"""Keys of an experiment, checked when the arms are put together."""


class Grid(Section):
    """Factors and how their levels are combined."""

    design: Literal["factorial", "one_at_a_time", "paired", "fractional_factorial"] = "one_at_a_time"
    """factorial: every combination; one_at_a_time: each level alone, the other factors at their first; paired: the i-th
    levels of all factors together; fractional_factorial: of many factors with two levels, only the combinations that
    separate their effects. A factorial of two-level factors, whole or fractional, also reports effects."""
    factors: dict[str, Items[Any] | Tree] = Field(min_length=1, max_length=MOST_FACTORS)
    """A key with its levels, `model.attention.qkv_norm: [[q, k, v], []]`, or a label with named bundles of keys,
    `split: {3/3: {model.encoder.layers: 3, model.decoder.layers: 3}, 5/1: {...}}`. The first one is the baseline's."""
    exclude: Annotated[Items[Tree], Field(max_length=MOST_RULES)] = ()
    """Combinations to leave out: `{model.attention.window: 64, pretrain.training.optimizer.lr: 1e-2}`. A
    factorial with exclusions is not balanced: its arms are compared, its effects are not estimated."""
    resolution: int = Field(4, ge=3)
    """Resolution of a fractional_factorial. 3: main effects are confounded with two-factor interactions; 4: with those
    of three factors, and two-factor interactions with each other; 5: two-factor interactions with those of three
    factors."""
    interactions: Items[Items[str]] = ()
    """Pairs of factors whose interaction a fractional_factorial must separate from main effects and from all other
    two-factor interactions: `[[model.attention.window, pretrain.training.optimizer.lr]]`."""
    combinations: int | None = None
    """Size of a fractional_factorial, a power of two; the smallest that has the resolution when absent."""

    @property
    def cells(self) -> int:
        """Combinations of levels before any is excluded."""
        counts = [len(levels) for levels in self.factors.values()]
        if self.design == "factorial":
            return prod(counts)
        if self.design == "paired":
            return counts[0]
        return self.fraction.size if self.fraction else 1 + sum(count - 1 for count in counts)

    @property
    def fraction(self) -> Fraction | None:
        """The fraction to run; None for other designs."""
        if self.design != "fractional_factorial":
            return None
        return find(len(self.factors), self.resolution, self.requested, self.combinations)

    @property
    def requested(self) -> tuple[int, ...]:
        """`interactions` as sets of factors, for the fraction."""
        names = list(self.factors)
        return tuple(dict.fromkeys(effect_of(*map(names.index, pair)) for pair in self.interactions))

    @model_validator(mode="after")
    def _has_levels(self) -> Grid:
        findings: list[tuple[str | tuple[str, ...], str]] = []
        for name, levels in self.factors.items():
            key = ("factors", name)  # the name may contain dots
            if len(levels) > MOST_ARMS:
                findings.append((key, f"has {len(levels)} levels, and a study has at most {MOST_ARMS} arms"))
                continue
            listed = levels if isinstance(levels, tuple) else ()
            repeated = any(a == b for i, a in enumerate(listed) for b in listed[:i])
            paired = self.design == "paired"
            if not levels:
                findings.append((key, "has no levels; give at least two, the baseline's first"))
            elif len(levels) == 1 or (paired and repeated and all(level == listed[0] for level in listed)):
                findings.append((key, "has one level, so nothing is switched; set it in `base` instead"))
            elif repeated and not paired:
                findings.append((key, "has the same level twice"))
            elif self.design == "fractional_factorial" and len(levels) != 2:
                what = f"has {len(levels)} {'levels' if isinstance(levels, tuple) else 'bundles'}"
                findings.append((key, f"{what}; a fractional_factorial takes two of each factor, the baseline's first"))
        findings += self._misplaced_keys()
        if not findings:
            findings += self._pairing_problems() if self.design == "paired" else self._fraction_problems()
        if findings:
            raise config_error(*findings)
        return self

    def _misplaced_keys(self) -> Iterator[tuple[str | tuple[str, ...], str]]:
        """Problems of keys that the design does not use."""
        for key in ("resolution", "interactions", "combinations"):
            if key in self.model_fields_set and self.design != "fractional_factorial":
                yield key, f"belongs to `design: fractional_factorial`, and this one is {self.design}"
        if self.exclude and self.design == "fractional_factorial":
            yield "exclude", "a fraction that lacks a combination cannot tell its effects apart; leave the factor out"
        if self.exclude and self.design == "paired":
            yield "exclude", "paired levels stand in the file one by one; take the level out of every factor instead"

    def _pairing_problems(self) -> Iterator[tuple[str | tuple[str, ...], str]]:
        """Problems of levels that make no pairs."""
        counts = [
            f"{name} has {len(levels)}{'' if isinstance(levels, tuple) else ' bundles'}"
            for name, levels in self.factors.items()
        ]
        if len({len(levels) for levels in self.factors.values()}) > 1:
            yield "factors", f"paired factors need equally many levels, and {', '.join(counts)}"
            return
        pairs = list(zip(*self.factors.values(), strict=True))
        for index, pair in enumerate(pairs):
            if pair in pairs[:index]:
                first = pairs.index(pair) + 1
                yield "factors", f"the levels number {first} and {index + 1} of all factors are the same; leave one out"

    def _fraction_problems(self) -> Iterator[tuple[str | tuple[str, ...], str]]:
        """Problems of a design without a fraction, each with a remedy."""
        if self.design != "fractional_factorial":
            return
        count, whole = len(self.factors), 1 << len(self.factors)
        if not 3 <= count <= MOST:
            yield "factors", f"a fractional_factorial takes 3 to {MOST} factors, and there are {count}"
            return
        size = self.combinations
        if size is not None and (size.bit_count() != 1 or not 4 <= size < whole):
            sizes = ", ".join(str(1 << bits) for bits in range(2, count))
            yield "combinations", f"a fraction of {count} factors has {sizes}, not {size}"
            return
        wrong = list(self._wrong_interactions())
        yield from wrong
        if wrong or self.fraction is not None:
            return
        best = find(count, self.resolution, (), size)
        if best is None and size is None:
            highest = next(high for high in range(self.resolution, 2, -1) if find(count, high))
            yield (
                "resolution",
                f"no fraction of {count} factors has resolution {self.resolution}; use `resolution: {highest}` or "
                f"`design: factorial` ({whole} combinations)",
            )
        elif best is None:
            smallest = find(count, self.resolution)
            enough = f"`combinations: {smallest.size}`" if smallest else "`design: factorial`"
            lower = [high for high in range(self.resolution, 2, -1) if find(count, high, (), size)]
            less = f" or `resolution: {lower[0]}`" if lower else ""
            message = f"no fraction of {size} combinations of {count} factors has resolution {self.resolution}"
            yield "combinations", f"{message}; use {enough}{less}"
        else:
            yield "interactions", self._confounded(best)

    def _wrong_interactions(self) -> Iterator[tuple[str | tuple[str, ...], str]]:
        for index, pair in enumerate(self.interactions):
            for name in pair:
                if name not in self.factors:
                    hint = did_you_mean(name, self.factors)
                    yield f"interactions.{index}", f"{name!r} is not a factor of the grid{hint}"
            if len(pair) != 2 or len(set(pair)) != 2:
                yield f"interactions.{index}", "an interaction is of two different factors: [one, other]"

    def _confounded(self, best: Fraction) -> str:
        """Message on the requested interactions that the best fraction confounds, with remedies."""
        names = list(self.factors)

        def named(effect: int) -> str:
            return " × ".join(names[i] for i in members_of(effect))

        confounded = [
            f"{named(effect)} is confounded with "
            + " and ".join(named(alias) for alias in best.aliases(effect) if alias.bit_count() <= 2)
            for effect in self.requested
            if not best.is_clear(effect)
        ]
        count = len(names)
        larger = [1 << bits for bits in range(best.size.bit_length(), count)]
        enough = next((more for more in larger if find(count, self.resolution, self.requested, more)), None)
        five = find(count, 5)
        ways = [f"`combinations: {enough}`"] * (enough is not None)
        ways += [
            f"`resolution: 5` ({five.size} combinations)"
            if five
            else f"`design: factorial` ({1 << count} combinations)"
        ]
        return (
            f"{best.size} combinations cannot tell all of them apart: {'; '.join(confounded)}; use {' or '.join(ways)}"
        )


CHOSEN_BY = tuple(map(on_validation, OF_SPLITS))
"""Metrics of the validation split, by which choices are made."""
METRICS = (*map(on_test, OF_SPLITS), *CHOSEN_BY, *(metric.name for metric in OF_TRAINING))
OF_SOURCE = tuple(f"{on(metric)}/" for metric in (TARGET_NLL, ANSWER_ACCURACY) for on in (on_test, on_validation))
"""Beginnings of metrics of one source of a mixture, or of one task of instruction data, for both splits."""
_OF_OBJECTIVE = tuple(
    name(metric) for metric in OF_SPLITS if not metric.across_objectives for name in (on_test, on_validation)
)
"""Metrics of the pretraining alone, as instruction data has one objective."""


def _metric(name: str) -> str:
    base_metric = name.removeprefix(FINETUNED)
    evaluation = base_metric.removeprefix(EVALUATED).partition("/")
    if (
        name in METRICS
        or (base_metric in METRICS and base_metric not in _OF_OBJECTIVE)
        or base_metric.startswith(OF_SOURCE)
    ):
        return name
    if base_metric.startswith(EVALUATED) and evaluation[0] in EVALUATIONS and evaluation[2]:
        return name
    more = [*METRICS, *(f"{FINETUNED}{metric}" for metric in METRICS if metric not in _OF_OBJECTIVE)]
    evaluated = ", ".join(f"{EVALUATED}{evaluation}/..." for evaluation in EVALUATIONS)
    hint = did_you_mean(name, more if name.startswith(FINETUNED) else METRICS)
    raise config_error(
        ("", f"{name!r} is not possible{hint}; of evaluations: {evaluated}, each also after {FINETUNED}")
    )


_ONE_OF = "|".join(re.escape(name) for name in METRICS)
_SOURCES = "|".join(f"{begin}.+" for begin in OF_SOURCE)
_PATTERN = f"^({FINETUNED})?({_ONE_OF}|{_SOURCES}|{EVALUATED}({'|'.join(EVALUATIONS)})/.+)$"


def is_metric(name: str) -> bool:
    """Whether a study can compare a metric of this name."""
    return re.fullmatch(_PATTERN, name) is not None


_SCHEMA: JsonDict = {"anyOf": [{"enum": [*METRICS]}, {"pattern": _PATTERN}]}
Metric = Annotated[str, AfterValidator(_metric), Field(json_schema_extra=_SCHEMA)]


By = Literal["none", "tokens", "loss_tokens", "parameters", "train_flops"]


Figure = Literal[
    "inference_flops",
    "train_flops",
    "training_seconds",
    "parameters",
    "non_embedding_parameters",
    "active_parameters",
    "kv_cache_bytes",
]


class Match(Section):
    """Quantity of the pretraining to match between an arm and its baseline."""

    by: By = "none"
    """tokens, loss_tokens and train_flops move max_steps, with warm-ups and decay scaled; parameters moves d_ff."""


class ScalingLaw(Section):
    """A power law of a loss for each group of arms, L = E + A x^-a."""

    x: X = "train_flops"
    """Size that the loss depends on: train_flops, parameters or tokens."""
    irreducible: bool = True
    """Fit E, the irreducible loss. That needs a bend in the curve, so runs over several decades. Without a bend E has a
    wide interval, and `false` is more informative."""
    by: Literal["arm", "family"] = "arm"
    """Arms that form a group: a named arm with its points of the grid, or all arms of one `model.family`."""


class ScalingGate(Section):
    """A gate for a change before a large run: the compute and time that it saves at each size.

    Each size of a group is measured against the power law of the baseline's sizes. A multiplier of 2 means that the
    baseline needs twice the compute, or time, for the same loss.
    """

    by: Literal["arm", "family"] = "arm"
    """Arms that form a group: a named arm with its points of the grid, or all arms of one `model.family`."""
    irreducible: bool = False
    """Fit E to the baseline's law. A projection over decades of compute depends on E, and few sizes hardly show it."""
    project: float | None = Field(None, gt=0)
    """Training FLOPs of the large run: the multiplier and the difference of losses there, with prediction intervals."""
    at_least: float = Field(1.0, gt=0)
    """The multiplier that a group has to reach, at `project`, else at its largest size. The group passes where the
    whole 95% interval reaches it, and fails where none of the interval does."""


Column = Literal["n", "mean", "difference", "p", "verdict", "baseline", "params", "FLOPs", "tok/s", "spikes"]
"""A column of the arms' table."""


class Compare(Section):
    """Settings of the comparison."""

    baseline: str | None = None
    """The arm that the others are compared with; the first when absent."""
    stratify_by: Items[str] = ()
    """Factors that stratify the comparison: each arm is compared with the baseline at the same level."""
    metric: Metric = on_test(TARGET_NLL)
    """Primary metric, at the end of training; of a mixture also `test/target_nll/<source>`. Metrics of the test split
    begin with `test/`. Each has one of the validation split, `val/target_nll`, which chooses further seeds and learning
    rates. Metrics of the finetuning begin with `finetune/`, those of evaluations with `eval/`:
    `finetune/eval/examples/nll`. An evaluation after both stages is shown before against after. Training losses are not
    compared, as they depend on the training data."""
    front: Figure | None = None
    """Cost of the Pareto front: the metric is shown against it, with the arms that no other beats in both.
    inference_flops: for reading an input and writing a target, both as long as the finetuning allows, or 1000 tokens
    each without one. training_seconds: measured seconds of all trainings, mean over the runs, which only compare if all
    ran on one machine with the same -j."""
    variance: Variance = "moderated"
    """Estimate of the variance of a difference. moderated: its own values over the seeds, with up to a third of a
    degree of freedom from the other differences; its intervals cover 93% or more in every design. paired: its own
    values alone. pooled: one variance for all arms, which assumes that they scatter alike and respond to a seed alike.
    mixed: a mixed model with a random effect of each family and seed. The last two are narrower, and cover as little as
    61% where an arm scatters more than the others; see docs/statistics.md."""
    correction: Correction = "none"
    """Correction for multiple comparisons. none: each interval holds for itself. holm: the chance of any false
    difference is 5%. fdr_bh: 5% of the differences below p = 0.05 are false. With both, intervals hold for all
    comparisons at once. dunnett: like holm, for arms that scatter alike, so it needs `variance: pooled`."""
    margin: float | None = Field(None, gt=0)
    """The largest difference that does not matter, in the metric's unit. With it, the verdict
    distinguishes arms that differ by less from arms that are undecided for lack of seeds."""
    scaling: ScalingLaw | None = None
    """Fit power laws of the metric, and report the ratio of compute for the baseline's loss."""
    labels: dict[str, str] = Field({})
    """Names that a paper prints, for arms, factors, levels and metrics: `{red: RedLLM, model.attention.qkv_norm: QKV
    norm, qkv_norm=none: no norm, val/target_nll: nats per token}`. Name a level `factor=level`, or by its own name
    where that is unique. Tables, sentences and figures print them; CSV and JSON keep the names that commands take."""
    columns: Items[Column] = ("n", "mean", "difference", "p", "verdict", "baseline", "params", "FLOPs")
    """Columns of the arms' table in LaTeX, in this order, after the arm or its factors; columns without values are left
    out. `mean` is the metric's."""

    gate: ScalingGate | None = None
    """Measure each size against the baseline's power law: multipliers of compute and of wall-clock time, their slope
    against compute, and a projection."""

    @model_validator(mode="after")
    def _has_a_better(self) -> Compare:
        if self.front is not None and direction(self.metric) is None:
            raise config_error(("front", f"{self.metric} is neither a loss nor a score, so no arm beats another in it"))
        if self.correction == "dunnett" and self.variance != "pooled":
            message = "dunnett assumes that all arms scatter alike; add `variance: pooled`, or use holm, which does not"
            raise config_error(("correction", message))
        if self.scaling is not None and direction(self.metric) != "lower":
            raise config_error(("scaling", f"{self.metric} is no loss, so no power law is fitted to it"))
        if self.gate is not None and direction(self.metric) != "lower":
            raise config_error(("gate", f"{self.metric} is no loss, so no power law is fitted to it"))
        return self


class MoreSeeds(Section):
    """Rounds of further seeds, for the arms whose difference is undecided."""

    max: int = Field(le=MOST_SEEDS)
    """Most seeds of an arm, those of `seeds` included."""
    step: int = Field(1, ge=1)
    """Seeds that a round adds."""


class Allowed(Section):
    """A difference that the audit would refuse."""

    key: str
    """The key that differs, or the beginning of several: `pretrain.training.optimizer`. Budgets: `budget.tokens`,
    `budget.train_flops`, ..., or `budget` for all. Keys that the metric is measured on need their full name:
    `pretrain.data.tokenizer`."""
    because: str = Field(min_length=1)
    """Reason why the comparison is fair all the same; shown in the plan and the report."""


def of_experiment(key: str, value: Any) -> str:
    """Message that a key of the experiment belongs under `base`; '' for other keys."""
    if key == "seed" or key.split(".")[0] not in Experiment.model_fields:
        return ""
    return f"what holds for every arm stands under `base`: write `base: {{{nested(key, value)}}}`"


class Study(Section):
    """An ablation: a base experiment, arms, factors, seeds."""

    study: Name
    """Name of the study, of its MLflow experiment and of its folder in the store."""
    question: str = Field(min_length=1)
    """Question that the study is to answer."""
    extends_study: str | None = None
    """Another study in the same folder, of which this file changes some keys. `base` is replaced whole, a factor by its
    new levels, the rest key by key."""
    extends: str | Items[str] | None = None
    """A preset, a file relative to this one, or a list of them, merged in order."""
    base: Tree = Field({})
    """Keys of every arm."""
    arms: dict[Name, Tree | None] = Field({})
    """Named arms: experiment keys, `extends` of its own, `baseline: ARM` to be compared with another arm than the
    baseline (a step-wise comparison has each arm beside the one before it), `grid: false` to stay out of the grid."""
    grid: Grid | None = None
    """Factors, crossed with the arms."""
    seeds: Seeds = (0,)
    """Every arm runs once with each."""
    more_seeds: MoreSeeds | None = None
    """After `seeds`, add seeds to the undecided arms and their baselines. An arm is undecided while its interval
    contains zero (with `compare.margin`: while it is shown neither to differ nor to be equivalent). Intervals are those
    of a sequential test after every round; with `compare.correction: holm` each arm has an equal share of the 5%."""
    match: Match = Match()
    """Quantity to match between arms and baselines."""
    compare: Compare = Compare()
    """Baseline and metric."""
    allow: Items[Allowed] = ()
    """Differences that the audit would refuse, each with its reason."""

    @classmethod
    def unknown_key(cls, key: str, value: Any) -> str:
        return of_experiment(key, value)

    @model_validator(mode="after")
    def _fits(self) -> Study:
        findings: list[tuple[str | tuple[str, ...], str]] = []
        if not self.seeds:
            findings.append(("seeds", "needs at least one seed, for example [0, 1, 2]"))
        if len(set(self.seeds)) < len(self.seeds):
            findings.append(("seeds", "a seed is there twice"))
        if self.more_seeds is not None:
            findings += self._round_problems(self.more_seeds)
        findings += self._size_problems()
        factors = self.grid.factors if self.grid else {}
        seeded: list[tuple[str, ...]] = [("base",)] if "seed" in self.base else []
        seeded += [("arms", name) for name, arm in self.arms.items() if "seed" in (arm or {})]
        seeded += [("grid", "factors")] if "seed" in factors else []
        findings += [((*path, "seed"), "seeds are the study's: write `seeds: [0, 1, 2]`") for path in seeded]
        for name in self.compare.stratify_by:
            if name not in factors:
                findings.append(
                    ("compare.stratify_by", f"{name!r} is not a factor of the grid{did_you_mean(name, factors)}")
                )
        within, design = self.compare.stratify_by, self.grid.design if self.grid else ""
        if within and design == "fractional_factorial":
            message = (
                "a fraction does not hold the baseline at every arm's own level; its effects tell the factors apart"
            )
            findings.append(("compare.stratify_by", message))
        if within and design == "paired" and (set(within) != set(factors) or len(self.arms) < 2):
            message = (
                "paired factors move together: with several named arms, `stratify_by` may name all of them, else none"
            )
            findings.append(("compare.stratify_by", message))
        if findings:
            raise config_error(*findings)
        return self

    def _size_problems(self) -> Iterator[tuple[str | tuple[str, ...], str]]:
        """Problem of more arms or runs than a study may have."""
        outside = sum((arm or {}).get("grid") is False for arm in self.arms.values())
        crossed = max(1, len(self.arms)) - outside
        arms = outside + crossed * (self.grid.cells if self.grid else 1)
        where = "grid.factors" if self.grid and self.grid.cells > crossed else "arms"
        if arms > MOST_ARMS:
            yield (
                where,
                f"{arms:,} arms, and a study has at most {MOST_ARMS:,}: take out levels, or write several studies",
            )
        elif (runs := arms * len(self.seeds)) > MOST_RUNS:
            yield (
                "seeds",
                f"{arms:,} arms x {len(self.seeds):,} seeds are {runs:,} runs, and a study has at most {MOST_RUNS:,}",
            )

    def _round_problems(self, more: MoreSeeds) -> Iterator[tuple[str | tuple[str, ...], str]]:
        """Problems of adding seeds in rounds."""
        if len(self.seeds) < 2:
            yield "more_seeds", "one seed has no interval to go on by; begin with `seeds: [0, 1, 2]`"
        if more.max <= len(self.seeds):
            yield "more_seeds.max", f"{more.max} at most, and there are {len(self.seeds)} to begin with"
        if self.compare.correction == "fdr_bh":
            message = (
                "the share of false differences is not bounded when arms stop at different interim analyses; "
                "use `correction: holm`, which bounds the chance of any"
            )
            yield "compare.correction", message
        if self.compare.correction == "dunnett":
            message = (
                "Dunnett's levels are for a single analysis, and seeds are added in rounds; use `correction: holm`, "
                "which gives each arm an equal share of the 5%"
            )
            yield "compare.correction", message

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """All seeds that may be used, in the order in which they are added."""
        further = self.more_seeds.max - len(self.seeds) if self.more_seeds else 0
        return (*self.seeds, *range(max(self.seeds) + 1, max(self.seeds) + 1 + further))
