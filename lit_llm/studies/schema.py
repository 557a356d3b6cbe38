"""The schema of a study file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from lit_llm.config.metrics import TARGET_NLL, direction, on_test
from lit_llm.config.problems import did_you_mean
from lit_llm.config.section import Items, Section, config_error, nested
from lit_llm.experiment.schema import Experiment
from lit_llm.statistics.multiple_comparisons import Correction
from lit_llm.statistics.paired import Variance
from lit_llm.statistics.scaling.runs import X
from lit_llm.studies.compared_metrics import Metric
from lit_llm.studies.grid import MOST_ARMS, Grid, Tree

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
LONGEST_NAME = 100
MOST_SEEDS, MOST_RUNS = 1_000, 20_000
"""Limits that stop mistakes early, as those of a grid."""


def _plain_name(name: str) -> str:
    if len(name) > LONGEST_NAME:
        raise config_error(("", f"a name has at most {LONGEST_NAME} letters, and this one has {len(name)}"))
    if not _NAME.fullmatch(name):
        raise config_error(("", f"{name!r} is not a plain name: letters, digits, '-', '_' and '.', no path"))
    return name


Name = Annotated[str, AfterValidator(_plain_name)]
"""A name that can be a folder's, of at most 100 characters."""

Seeds = Annotated[Items[Annotated[int, Field(ge=0)]], Field(max_length=MOST_SEEDS, json_schema_extra={"minItems": 1})]


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
