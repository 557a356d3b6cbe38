"""The schema of a sweep file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from lit_llm.config.metrics import SPLITS, TARGET_NLL, on_validation
from lit_llm.config.problems import did_you_mean
from lit_llm.config.section import Items, OneOf, Section, config_error
from lit_llm.experiment.cost import COST_FIGURES
from lit_llm.runs.stage_graph import validation_metric
from lit_llm.studies.compared_metrics import CHOSEN_BY, METRICS, OF_SOURCE
from lit_llm.studies.grid import MOST_FACTORS, MOST_RULES, Tree
from lit_llm.studies.schema import MOST_SEEDS, Allowed, Name, Seeds, of_experiment

# A key of the file is called `int`, as people read it.
Integer = int
Bounds = Annotated[Items[float], Field(min_length=2, max_length=2)]
WholeBounds = Annotated[Items[Integer], Field(min_length=2, max_length=2)]

MOST_VALUES, MOST_TRIALS = 1_000, 100_000
"""Most values of a choice, and most trials of an arm."""

KINDS = ("uniform", "log_uniform", "int", "log_int", "choice")
"""Kinds of parameters."""


class Parameter(Section):
    """One searched key of the experiment, with its values as uniform, log_uniform, int, log_int or choice."""

    uniform: Bounds | None = None
    """[lowest, highest], every number between them equally likely."""
    log_uniform: Bounds | None = None
    """[lowest, highest], every order of magnitude equally likely: learning rates."""
    int: WholeBounds | None = None
    """[lowest, highest], whole numbers, both ends included."""
    log_int: WholeBounds | None = None
    """[lowest, highest], whole numbers, every order of magnitude equally likely."""
    choice: Items[Any] | Tree | None = None
    """Values of any kind, or named bundles of keys: `{3/3: {model.encoder.layers: 3, model.decoder.layers: 3}}`."""
    step: float | None = Field(None, gt=0)
    """Distance between two values, of uniform and int."""
    when: Tree = Field({})
    """Searched only where other parameters, or keys of the arm, have these values: `{model.attention.heads: 4}`; a list
    stands for any of its values."""
    key: str | None = None
    """The key that it sets, where the name is not the key itself: two parameters may set one key, each under a `when`
    of its own."""

    @property
    def kind(self) -> str:
        """The parameter's kind, one of KINDS."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    @model_validator(mode="after")
    def _is_one(self) -> Parameter:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            problem = f"{' and '.join(given)} at once" if given else "no values"
            raise config_error(("", f"has {problem}; give one of {', '.join(KINDS)}"))
        kind = given[0]
        values = getattr(self, kind)
        if kind == "choice":
            if len(values) > MOST_VALUES:
                raise config_error((kind, f"takes at most {MOST_VALUES} values, has {len(values)}"))
            if len(values) < 2:
                raise config_error((kind, "needs two values at least; set a single one in `base` instead"))
            if self.key is not None and not isinstance(values, tuple):
                raise config_error(("key", "named bundles name their keys themselves"))
        elif values[0] >= values[1]:
            raise config_error((kind, f"the lowest, {values[0]!r}, is not below the highest, {values[1]!r}"))
        elif kind.startswith("log_") and values[0] <= 0:
            raise config_error((kind, f"a logarithmic range begins above 0, not at {values[0]!r}"))
        if self.step is not None and kind not in ("uniform", "int"):
            raise config_error(("step", f"belongs to uniform and int, and this one is {kind}"))
        if self.step is not None and kind == "int" and not self.step.is_integer():
            raise config_error(("step", f"of whole numbers is one, not {self.step!r}"))
        return self


def _check_metric(name: str) -> str:
    if (sibling := validation_metric(name)) != name:
        message = f"{name!r} is on the test split, which is kept for the study of the winners; use {sibling!r}"
        raise config_error(("", message))
    allowed = [
        *CHOSEN_BY,
        *(metric for metric in METRICS if not metric.startswith(tuple(SPLITS.values()))),
        *COST_FIGURES,
    ]
    if name not in allowed and not name.startswith(OF_SOURCE):
        raise config_error(("", f"{name!r} is not possible{did_you_mean(name, allowed)}"))
    return name


class Objective(Section):
    """One goal of the search: a metric or figure that is minimized or maximized."""

    metric: Annotated[str, AfterValidator(_check_metric)] = on_validation(TARGET_NLL)
    """A metric at the end of training, or a figure of the cost that needs no training: parameters, train_flops,
    decode_flops_per_token, kv_cache_bytes, memory_bytes, ..."""
    direction: Literal["minimize", "maximize"] = "minimize"
    """Direction of improvement. It is not derived from the metric, and nothing compares the two: maximize a metric that
    is better when higher."""

    @property
    def is_cost_figure(self) -> bool:
        """True where the goal is a figure of the cost, which needs no training."""
        return self.metric in COST_FIGURES


class Pruner(Section):
    """Rule by which bad trials are stopped early."""

    kind: Literal["none", "median", "hyperband", "successive_halving", "wilcoxon"] = "none"
    """none; median: after a third of the training, worse than half of the finished trials at that point; hyperband,
    successive_halving: not among the best third at a rung (arXiv 1603.06560, 1810.05934); wilcoxon: over the seeds,
    worse than the best trial by a signed-rank test. All but wilcoxon judge the validations of a trial's first seed."""
    by: Literal["steps", "tokens"] = "steps"
    """Trials are compared after equally many steps, or tokens. The two differ where batch_size is searched: by tokens,
    trials are then validated at unequal points, which hyperband and successive_halving refuse, since they rank all
    trials at each rung. They also refuse a search of max_steps."""


class Winners(Section):
    """The confirmation study that follows: each arm at its default and its best setting, over fresh seeds."""

    seeds: Annotated[Items[Annotated[int, Field(ge=0)]], Field(max_length=MOST_SEEDS)] | None = None
    """Seeds that the search has not used; the three after its seeds when absent. An empty list runs no such study."""


class Sweep(Section):
    """A search for hyper-parameters: the same budget for each arm."""

    sweep: Name
    """Name of the sweep, of its MLflow experiment and of its folder in the store."""
    question: str = "What is each arm's best setting?"
    """Question that the sweep is to answer."""
    extends: str | Items[str] | None = None
    """A preset, a file relative to this one, or a list of them, merged in order."""
    base: Tree = Field({})
    """Keys of every arm."""
    arms: dict[Name, Tree | None] = Field({})
    """Named arms, as in a study. Each is searched separately."""
    space: dict[str, Parameter] = Field(min_length=1, max_length=MOST_FACTORS)
    """Searched keys with their values: `pretrain.training.optimizer.lr: {log_uniform: [1e-4, 3e-2]}`."""
    constraints: Annotated[Items[str], Field(max_length=MOST_RULES)] = ()
    """Conditions on keys and on figures of the cost that every trial has to fulfil: `parameters <= 2e7`."""
    first: Annotated[Items[Tree], Field(max_length=MOST_RULES)] = ()
    """Settings to try first: `{pretrain.training.optimizer.lr: 1e-3}`, the rest as in the arm. The arm's default
    setting is always tried before them."""
    optimize: Annotated[Items[Objective], Field(min_length=1)] = (Objective(),)
    """One goal, or several: the search then returns their Pareto front, and nothing is pruned."""
    trials: int = Field(gt=0, le=MOST_TRIALS)
    """Number of trials of each arm."""
    sampler: Literal["tpe", "gp", "cma_es", "nsga2", "nsga3", "random", "qmc"] = "tpe"
    """Method that draws the trials. tpe takes any space; gp models few, costly trials; cma_es takes numbers alone and
    one goal; nsga2 and nsga3 are for several goals; random and qmc (a Sobol sequence) do not learn from trials."""
    pruner: Annotated[Pruner, OneOf(default=Pruner)] = Pruner()
    """Rule by which a trial is stopped early."""
    seeds: Seeds = (0,)
    """Seeds of each trial, whose value is the mean over them; the first one also seeds the sampler."""
    winners: Winners = Winners()
    """The confirmation study of the best settings."""
    allow: Items[Allowed] = ()
    """Differences between arms that the audit would refuse, each with its reason."""

    @classmethod
    def unknown_key(cls, key: str, value: Any) -> str:
        return of_experiment(key, value)

    @model_validator(mode="after")
    def _fits(self) -> Sweep:
        findings: list[tuple[str | tuple[str, ...], str]] = []
        if not self.seeds:
            findings.append(("seeds", "needs at least one seed, for example [0]"))
        for name, seeds in (("seeds", self.seeds), ("winners.seeds", self.winners.seeds or ())):
            if len(set(seeds)) < len(seeds):
                findings.append((name, "a seed is there twice"))
        repeated = set(self.winners.seeds or ()) & set(self.seeds)
        if repeated:
            findings.append(("winners.seeds", f"the search has seen {min(repeated)} already; fresh seeds are needed"))
        names = [goal.metric for goal in self.optimize]
        findings += [("optimize", f"{name} is there twice") for name in dict.fromkeys(names) if names.count(name) > 1]
        if len(self.optimize) > 1:
            if self.sampler == "cma_es":
                findings.append(
                    ("sampler", "cma_es has one goal; for several take tpe, nsga2, nsga3, gp, random or qmc")
                )
            if self.pruner.kind != "none":
                findings.append(("pruner", "with several goals nothing can be pruned; leave it out"))
        elif self.pruner.kind != "none":
            if not self.optimize[0].metric.startswith(SPLITS["validation"]):
                findings.append(("pruner", f"{names[0]} is not validated during training; only val/ metrics are"))
            if self.pruner.kind == "wilcoxon" and len(self.seeds) < 5:
                message = (
                    f"wilcoxon tells nothing from fewer than 4 seeds, and there are {len(self.seeds)}; give 5 or more"
                )
                findings.append(("pruner", message))
        for name, parameter in self.space.items():
            if parameter.kind == "choice" and self.sampler == "cma_es":
                findings.append((("space", name), "cma_es takes numbers alone; use tpe for a choice"))
            if parameter.when and self.sampler in ("cma_es", "gp", "qmc"):
                message = f"{self.sampler} takes no conditions: it would draw this key at random; use tpe"
                findings.append((("space", name, "when"), message))
        if findings:
            raise config_error(*findings)
        return self
