"""Load a sweep file: its arms, the space of each, constraints and goals."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lit_llm.config.metrics import EVALUATED, FINETUNED, OBJECTIVE_LOSS, TARGET_NLL, on_validation
from lit_llm.config.problems import InputError, Problem, collect_errors, did_you_mean
from lit_llm.config.section import validate
from lit_llm.config.tree import ConfigNode, leaves, read_file, tree, under
from lit_llm.evaluation.config import PRIMARY_METRICS, primary_metric
from lit_llm.experiment.cost import COST_FIGURES, OF_DECODING, cost_of
from lit_llm.experiment.load import is_preset, read_overrides
from lit_llm.experiment.schema import Experiment
from lit_llm.objectives.config import continues
from lit_llm.runs.fingerprints import digest_of_data, reset_identities
from lit_llm.store.store import Store, read_json
from lit_llm.studies.audit.differing_keys import CONTINUATION, TARGETS_OF_PRIMARY
from lit_llm.studies.load import Ablation, build_ablation
from lit_llm.studies.schema import Study
from lit_llm.studies.stored import PLAIN_NAME, SWEEP, ablation_of, content_of, name_in, unreadable_error, with_overrides
from lit_llm.sweeps.constraints import Constraint, NotAConstraint, parse, unknown
from lit_llm.sweeps.schema import Sweep
from lit_llm.sweeps.searched_keys import searched_keys
from lit_llm.sweeps.space import (
    BRANCHES,
    ArmSpace,
    Dimension,
    Point,
    Value,
    dimensions_of,
    space_of,
    unknown_conditions,
    wrong_values,
)

HINT = "`lit-llm schema sweep > sweep.schema.json` gives your editor the allowed keys."
_MACHINE = "pretrain.training.execution"
_GROWING = "pretrain.training.batch_warmup"
_AVERAGE = "pretrain.training.weight_averaging"


@dataclass(frozen=True)
class Search:
    """A loaded sweep file."""

    sweep: Sweep
    ablation: Ablation
    """The arms at their default settings."""
    spaces: Mapping[str, ArmSpace]
    """{arm: its search space}."""
    constraints: tuple[Constraint, ...]
    firsts: Mapping[str, tuple[Point, ...]]
    """{arm: settings to try first}; the arm's default setting comes first."""

    @property
    def name(self) -> str:
        return self.sweep.sweep

    @property
    def goals(self) -> tuple[str, ...]:
        """Metrics and figures that are optimized, by name."""
        return tuple(goal.metric for goal in self.sweep.optimize)

    def named(self, values: Sequence[float] | None) -> dict[str, float]:
        """{goal: value} of a trial's values; empty for a trial without values."""
        return dict(zip(self.goals, values, strict=True)) if values else {}

    def experiment(self, arm: str, point: Point) -> Experiment:
        """The experiment at a point of an arm's space. Raises InputError for values that cannot be combined."""
        return self.spaces[arm].experiment(point)

    @property
    def trains(self) -> bool:
        """True where a trial has to be trained; not where all goals are figures of the cost."""
        return not all(goal.is_cost_figure for goal in self.sweep.optimize)

    def excess(self, experiment: Experiment) -> dict[str, float]:
        """{constraint: its excess}, 0 where it holds."""
        if not self.constraints:
            return {}
        values = figures(experiment)
        return {constraint.text: constraint.excess(values) for constraint in self.constraints}

    def as_json(self) -> dict[str, Any]:
        """Content of `plan --json` for a sweep beside its arms. Keys may be added, none is renamed."""
        space = {
            name: [dimension.name for dimension in space_of_arm.dimensions]
            for name, space_of_arm in self.spaces.items()
        }
        return {"sweep": self.sweep.model_dump(mode="json", exclude_none=True), "searched": space}

    def identity(self, arm: str) -> dict[str, Any]:
        """Plain data that is equal for searches whose trials of an arm may be mixed; without budget and confirmation
        study. It holds this arm alone, because MySQL takes no text over 64 KB."""
        content = self.sweep.model_dump(mode="json", exclude_defaults=True)
        for key in ("sweep", "question", "extends", "base", "arms", "trials", "winners", "allow"):
            content.pop(key, None)
        experiment = self.ablation.arm(arm).experiment
        plain = experiment.model_dump(mode="json", exclude={"seed"})
        del plain["pretrain"]["training"]["execution"], plain["finetune"], plain["evaluate"]
        data = {"data": digest_of_data(experiment)} if self.trains else {}
        return {**content, "arms": [each.name for each in self.ablation.arms], f"arms.{arm}": plain, **data}


def figures(experiment: Experiment) -> dict[str, Any]:
    """{name: value} that constraints may use: leaves of the configuration and figures of the cost.

    Figures of decoding are None for a model that does not decode.
    """
    cost = cost_of(experiment)
    costs = {name: of(cost) if cost.generates or name not in OF_DECODING else None for name, of in COST_FIGURES.items()}
    return {**dict(leaves(experiment.model_dump(mode="json"))), **costs}


def is_sweep(source: str, store: Store | None = None) -> bool:
    """True where `source` is a sweep file, or the name of a sweep in a store."""
    if is_preset(source) or os.path.isfile(source):
        return not is_preset(source) and "sweep" in read_file(Path(source)).value
    return store is not None and _stored_file(source, store) is not None


def open_sweep(source: str, overrides: Sequence[str], store: Store) -> Search:
    """Load a sweep from its file, or by its name or folder in a store. Raises InputError."""
    if is_preset(source) or os.path.isfile(source) or (file := _stored_file(source, store)) is None:
        return load_sweep(source, overrides)
    try:
        content = read_json(file) or {}
        document = tree(content["content"])
        sweep = validate(Sweep, document)
        study = validate(Study, _study_part(sweep.sweep, sweep.question, document))
        ablation = ablation_of(study, content)
    except (InputError, LookupError, TypeError, ValueError) as error:
        raise unreadable_error(file, error) from None
    return _build_search(sweep, document, _with_primary_metric(sweep, with_overrides(ablation, overrides)), overrides)


def content_of_search(search: Search) -> dict[str, Any]:
    """Content of sweep.json, which `open_sweep` reads."""
    return {"content": search.sweep.model_dump(mode="json", exclude_unset=True), **content_of(search.ablation)}


def _stored_file(source: str, store: Store) -> Path | None:
    """The sweep.json of a sweep in a store; None where the store has none of this name."""
    name = name_in(store, source)
    if not re.fullmatch(PLAIN_NAME, name):
        return None
    file = store.study(name) / SWEEP
    return file if file.is_file() else None


def load_sweep(source: str | Path, overrides: Sequence[str] = ()) -> Search:
    """Read a sweep.

    Args:
        source: Path of a sweep file.
        overrides: Keys with values that hold for every arm.

    Returns:
        The search: its arms, the space of each, constraints and goals.

    Raises:
        InputError: The file or an override is wrong. The message holds every problem, each with its file and line.
    """
    reset_identities()
    path = Path(source)
    document = read_file(path)
    if "sweep" not in document.value:
        raise InputError(
            Problem("is no sweep (it has no `sweep`); `lit-llm run` takes a study", location=document.location)
        )
    try:
        sweep = validate(Sweep, document)
    except InputError as error:
        arms_too = list(error.problems)
        keys_with_errors = {problem.key.partition(".")[0] for problem in error.problems}
        if {"extends", "base", "arms"} & document.value.keys() and not {
            "extends",
            "base",
            "arms",
            "allow",
        } & keys_with_errors:
            rest = ConfigNode({key: node for key, node in document.value.items() if key != "seeds"}, document.location)
            with collect_errors(arms_too):
                part = _study_part("sweep", "", rest)
                build_ablation(validate(Study, part), part, path, overrides)
        raise InputError(*arms_too, hint=HINT) from None
    problems: list[Problem] = []
    ablation = None
    with collect_errors(problems):
        part = _study_part(sweep.sweep, sweep.question, document)
        ablation = _with_primary_metric(sweep, build_ablation(validate(Study, part), part, path, overrides))
    return _build_search(sweep, document, ablation, overrides, problems)


def _build_search(
    sweep: Sweep,
    document: ConfigNode,
    ablation: Ablation | None,
    overrides: Sequence[str],
    of_arms: Sequence[Problem] = (),
) -> Search:
    """The search of a sweep. of_arms: problems of its arms. Raises InputError with every problem."""
    problems: list[Problem] = []
    dimensions = dimensions_of(sweep, document, problems)
    readable = not problems
    problems += _unsearchable_problems(sweep, dimensions, overrides)
    problems += _goal_problems(sweep, document)
    constraints = tuple(_constraints(sweep, document, problems))
    problems += of_arms
    if ablation is None or not (arms := ablation.arms) or not readable:
        raise InputError(*problems, hint=HINT)
    problems += [
        Problem(f"{arm.name}: a sweep searches the pretraining; leave `{name}` to a study", name)
        for arm in arms
        for name in ("adapt", "finetune", "evaluate")
        if getattr(arm.experiment, name) is not None
    ]
    problems += [
        Problem(f"{arm.name}: its batches grow, so equal steps are no equal tokens; use `by: steps`", "pruner.by")
        for arm in arms
        if arm.experiment.pretrain.training.batch_warmup and _counts_tokens(sweep)
    ]
    problems += [
        Problem(f"{arm.name}: the trials of a sweep share no trunk; leave it out", BRANCHES)
        for arm in arms
        if arm.experiment.pretrain.training.trunks
    ]
    problems += [
        Problem(_missing_metric_message(arm.name, goal.metric), "optimize")
        for arm in arms
        for goal in sweep.optimize
        if goal.metric.startswith(CONTINUATION + OF_DECODING) and not continues(arm.experiment.model.family)
    ]
    spaces = {arm.name: space_of(arm, dimensions) for arm in arms}
    problems += unknown_conditions(dimensions, list(spaces.values()))
    problems += wrong_values(list(spaces.values()))
    firsts, further = {}, list[Problem]()
    for space in spaces.values():
        with collect_errors(further):
            firsts[space.arm.name] = tuple(_first_points(sweep, document, space))
    blamed = {problem.key for problem in problems}
    problems += [problem for problem in further if problem.key not in blamed]
    ablation = replace(ablation, searches=searched_keys(sweep, spaces, partial(_holds, constraints)))
    search = Search(sweep, ablation, spaces, constraints, firsts)
    problems += _constraint_problems(search, document)
    if problems:
        raise InputError(*problems, hint=HINT)
    return search


def _missing_metric_message(arm: str, name: str) -> str:
    """Error message for a metric or figure of text continuation, which an encoder-only model lacks."""
    instead = "prefill_flops_per_token and memory_bytes are of all" if name in OF_DECODING else "use val/masked_nll"
    return f"an encoder_only model, as {arm} is, has no {name}; {instead}"


def _with_primary_metric(sweep: Sweep, ablation: Ablation) -> Ablation:
    """The arms with the first trained goal as their metric, or with their family's primary metric."""
    goals = [goal.metric for goal in sweep.optimize if not goal.is_cost_figure]
    metric = next(iter(goals), primary_metric(ablation.arms[0].experiment.model.family))
    compare = ablation.study.compare.model_copy(update={"metric": metric})
    return replace(ablation, study=ablation.study.model_copy(update={"compare": compare}))


def _study_part(name: str, question: str, document: ConfigNode) -> ConfigNode:
    """The tree of a study of the same arms, with source locations in the sweep file."""
    items = {key: document.value[key] for key in ("extends", "base", "arms", "allow", "seeds") if key in document.value}
    head = {"study": ConfigNode(name, document.location), "question": ConfigNode(question or "?", document.location)}
    head["compare"] = ConfigNode({"metric": ConfigNode(PRIMARY_METRICS[0])})  # of the split that a search goes by
    return ConfigNode(head | {"seeds": ConfigNode([ConfigNode(0)])} | items, document.location)


def _unsearchable_problems(
    sweep: Sweep, dimensions: Sequence[Dimension], overrides: Sequence[str]
) -> Iterator[Problem]:
    """Problems of searched keys that no search may change."""
    trained = [goal.metric for goal in sweep.optimize if not goal.is_cost_figure]
    ignored: list[Problem] = []
    moving = _moves_validations(sweep)
    after = [(key, node.location) for node in read_overrides(overrides, ignored) for key, _ in leaves(node.plain())]
    for dimension in dimensions:
        where = f"space.{dimension.name}"
        for path in dimension.paths:
            if under(path, *TARGETS_OF_PRIMARY) or any(under(part, path) for part in TARGETS_OF_PRIMARY):
                if trained:
                    message = f"{path} decides what {trained[0]} is measured on: trials would not be comparable"
                    yield Problem(message, where, dimension.location)
            elif under(path, _MACHINE):
                yield Problem(f"{path} is how the machine does it, and changes no result", where, dimension.location)
            elif path == "seed":
                yield Problem(
                    "a seed is no setting; `seeds: [0, 1, 2]` runs each trial with all", where, dimension.location
                )
            elif under(path, "pretrain.objective") and on_validation(OBJECTIVE_LOSS) in trained:
                message = (
                    f"{on_validation(OBJECTIVE_LOSS)} of another objective is another quantity; "
                    f"use {on_validation(TARGET_NLL)}"
                )
                yield Problem(message, where, dimension.location)
            elif any(under(path, key) or under(key, path) for key in moving):
                pruner = sweep.pruner
                message = f"{pruner.kind} ranks trials after equally many {pruner.by}, and those of another {path} are "
                message += "validated after others; take the pruner median"
                message += " or `by: steps`" if "max_steps" not in path and pruner.by == "tokens" else ""
                yield Problem(message, where, dimension.location)
            elif _counts_tokens(sweep) and (under(path, _GROWING) or under(_GROWING, path)):
                message = "with batches that grow, equal steps are no equal tokens; take the pruner `by: steps`"
                yield Problem(message, where, dimension.location)
            # Every exponential average begins after the first step, so its own settings may be ranked.
            begins = (under(path, _AVERAGE) or under(_AVERAGE, path)) and not path.endswith((".decay", ".warmup"))
            if begins and sweep.pruner.kind not in ("none", "wilcoxon"):
                message = f"{sweep.pruner.kind} ranks trials during the training, where some are validated with an "
                message += "average of the weights and some without; take the pruner none"
                yield Problem(message, where, dimension.location)
            for key, location in after:
                if under(key, path) or under(path, key):
                    yield Problem(f"is searched by the sweep; change `{where}` instead", key, location)


def _counts_tokens(sweep: Sweep) -> bool:
    """True for a pruner that compares trials after equally many tokens."""
    return sweep.pruner.kind != "none" and sweep.pruner.by == "tokens"


def _goal_problems(sweep: Sweep, document: ConfigNode) -> Iterator[Problem]:
    """Problems of goals that belong to stages which a sweep does not have."""
    for number, goal in enumerate(sweep.optimize):
        if goal.metric.startswith((FINETUNED, EVALUATED)):
            key = ["optimize", str(number), "metric"]
            message = f"{goal.metric} is of another stage; a sweep searches the pretraining"
            yield Problem(message, ".".join(key), document.location_of(key))


def _moves_validations(sweep: Sweep) -> tuple[str, ...]:
    """Keys that change when a trial is validated, for pruners that need equal validation points.

    Optuna fills a rung with the first report at or above it: a trial that reports late would be ranked by a lower loss.
    """
    if sweep.pruner.kind not in ("hyperband", "successive_halving"):
        return ()
    steps = "pretrain.training.max_steps"
    return (steps, "pretrain.data.batch_size") if sweep.pruner.by == "tokens" else (steps,)


def _constraints(sweep: Sweep, document: ConfigNode, problems: list[Problem]) -> Iterator[Constraint]:
    for number, text in enumerate(sweep.constraints):
        try:
            yield parse(text)
        except NotAConstraint as error:
            location = document.location_of(["constraints", str(number)])
            problems.append(Problem(str(error), "constraints", location))


def _holds(constraints: Sequence[Constraint], experiment: Experiment) -> bool:
    """True where an experiment satisfies the constraints; a constraint that cannot be computed is not satisfied."""
    if not constraints:
        return True
    values = figures(experiment)
    try:
        return all(constraint.excess(values) == 0 for constraint in constraints)
    except ValueError:
        return False


def _first_points(sweep: Sweep, document: ConfigNode, space: ArmSpace) -> Iterator[Point]:
    """The arm's default setting, then the file's settings to try first. Raises InputError."""
    yield space.default_point
    problems: list[Problem] = []
    for number, given in enumerate(sweep.first):
        where, location = f"first.{number}", document.location_of(["first", str(number)])
        for name, value in given.items():
            if name not in sweep.space:
                problems.append(Problem(f"{name!r} is not searched{did_you_mean(name, sweep.space)}", where, location))
            elif wrong := next((d.problem(value) for d in space.dimensions if d.name == name), None):
                problems.append(Problem(f"{name}: {wrong}", where, location))
        if problems:
            continue

        def suggest(
            dimension: Dimension, given: Mapping[str, Any] = given, where: str = where, location: Any = location
        ) -> Value:
            if dimension.name in given:
                return dimension.stored(given[dimension.name])
            if dimension.name in space.default_point:
                return space.default_point[dimension.name]
            message = f"needs a value of {dimension.name}, which the arm {space.arm.name} does not have by itself"
            problems.append(Problem(message, where, location))
            return dimension.probes[0]

        yield space.draw(suggest)
    if problems:
        raise InputError(*problems)


def _constraint_problems(search: Search, document: ConfigNode) -> Iterator[Problem]:
    """Problems of constraints on values that are no numbers, and of those that an arm's default setting breaks."""
    figures_by_arm = {arm.name: figures(arm.experiment) for arm in search.ablation.arms} if search.constraints else {}
    for constraint in search.constraints:
        location = document.location_of(["constraints", str(search.sweep.constraints.index(constraint.text))])
        for arm, values in figures_by_arm.items():
            numbers = {key: v for key, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
            wrong = [message for name in constraint.names if (message := unknown(name, numbers))]
            wrong += [
                _missing_metric_message(arm, name)
                for name in constraint.names
                if name in OF_DECODING and values[name] is None
            ]
            if wrong:
                yield Problem(f"{constraint.text}: {wrong[0]}", "constraints", location)
                break
            try:
                excess = constraint.excess(values)
            except ValueError as error:
                yield Problem(f"{constraint.text}: {error}", "constraints", location)
                break
            if excess > 0:
                values_text = ", ".join(f"{name} = {values[name]:g}" for name in constraint.names)
                message = f"{constraint.text} does not hold for the arm {arm}, whose default setting is always tried"
                yield Problem(f"{message}: {values_text}", "constraints", location)
