"""The schema of a study file."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from lit_llm.config.problems import did_you_mean
from lit_llm.config.section import Items, Section, impossible

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def _plain_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise impossible(("", f"{name!r} is not a plain name: letters, digits, '-', '_' and '.', no path"))
    return name


Name = Annotated[str, AfterValidator(_plain_name)]
"""A name that can be a folder's."""

Tree = dict[str, Any]
"""Keys of an experiment, checked when the arms are put together."""


class Grid(Section):
    """Factors and how their levels are combined."""

    design: Literal["factorial", "one_at_a_time"] = "one_at_a_time"
    """factorial: every combination; one_at_a_time: each level alone, the other factors at their first."""
    factors: dict[str, Items[Any] | Tree] = Field(min_length=1)
    """A key with its levels, `model.attention.output_norm: [head, none]`, or a label with named bundles of keys,
    `split: {3/3: {model.encoder.layers: 3, model.decoder.layers: 3}, 5/1: {...}}`. The first one is the baseline's."""
    exclude: Items[Tree] = ()
    """Combinations to leave out: `{model.attention.output_norm: none, pretrain.training.optimizer.lr: 1e-2}`."""

    @model_validator(mode="after")
    def _has_levels(self) -> Grid:
        findings: list[tuple[tuple[str, ...], str]] = []
        for name, levels in self.factors.items():
            key = ("factors", name)  # the name has dots of its own
            if not levels:
                findings.append((key, "has no levels; give at least two, the baseline's first"))
            elif len(levels) == 1:
                findings.append((key, "has one level, so nothing is switched; set it in `base` instead"))
            elif isinstance(levels, tuple) and any(a == b for i, a in enumerate(levels) for b in levels[:i]):
                findings.append((key, "has the same level twice"))
        if findings:
            raise impossible(*findings)
        return self


Metric = Literal[
    "val/target_nll",
    "val/perplexity",
    "val/bits_per_byte",
    "val/objective_loss",
    "stability/loss_spikes",
    "stability/max_grad_norm",
    "stability/max_attention_logit",
    "throughput/tokens_per_second",
]


By = Literal["none", "tokens", "loss_tokens", "parameters", "train_flops"]


class Match(Section):
    """What is made equal between an arm and its baseline, for the pretraining."""

    by: By = "none"
    """tokens, loss_tokens and train_flops move max_steps, with warm-up and decay scaled; parameters moves d_ff."""


class Compare(Section):
    """What is compared with what."""

    baseline: str | None = None
    """The arm that the others are compared with; the first when absent."""
    within: Items[str] = ()
    """Factors at whose every level the comparison is made anew: each arm meets the baseline of its own level."""
    metric: Metric = "val/target_nll"
    """What is compared, as it is at the end of training. Training losses are not: they depend on what is trained on."""


class Allowed(Section):
    """A difference that the audit would refuse."""

    key: str
    """The key that differs, or the beginning of several: `pretrain.data`."""
    because: str = Field(min_length=1)
    """Why the comparison is fair all the same; shown in the plan and the report."""


class Study(Section):
    """An ablation: a base experiment, arms, factors, seeds."""

    study: Name
    """Its name: of the MLflow experiment and of the folder in the store."""
    question: str = Field(min_length=1)
    """What it is to answer."""
    like: str | None = None
    """Another study in the same folder: this file then says only what is different. `base` is replaced whole, a factor
    by its new levels, the rest key by key."""
    extends: str | Items[str] | None = None
    """A preset, a file relative to this one, or a list of them, merged in order."""
    base: Tree = Field({})
    """Keys of every arm."""
    arms: dict[Name, Tree | None] = Field({})
    """Named arms: experiment keys, `extends` of its own, `against: ARM` to be compared with another arm than the
    baseline (a ladder compares each rung with the one below it), `grid: false` to stay out of the grid."""
    grid: Grid | None = None
    """Factors, crossed with the arms."""
    seeds: Items[Annotated[int, Field(ge=0)]] = Field((0,), json_schema_extra={"minItems": 1})
    """Every arm runs once with each."""
    match: Match = Match()
    """What is made equal."""
    compare: Compare = Compare()
    """Baseline and metric."""
    allow: Items[Allowed] = ()
    """Differences that the audit would refuse, each with its reason."""

    @model_validator(mode="after")
    def _fits(self) -> Study:
        findings: list[tuple[str | tuple[str, ...], str]] = []
        if not self.seeds:
            findings.append(("seeds", "needs at least one seed, for example [0, 1, 2]"))
        if len(set(self.seeds)) < len(self.seeds):
            findings.append(("seeds", "a seed is there twice"))
        factors = self.grid.factors if self.grid else {}
        seeded: list[tuple[str, ...]] = [("base",)] if "seed" in self.base else []
        seeded += [("arms", name) for name, arm in self.arms.items() if "seed" in (arm or {})]
        seeded += [("grid", "factors")] if "seed" in factors else []
        findings += [((*path, "seed"), "seeds are the study's: write `seeds: [0, 1, 2]`") for path in seeded]
        for name in self.compare.within:
            if name not in factors:
                findings.append(
                    ("compare.within", f"{name!r} is not a factor of the grid{did_you_mean(name, factors)}")
                )
        if findings:
            raise impossible(*findings)
        return self
