"""From a study file to its arms: every point of the study, each with the experiment it stands for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lit_llm.ablation.config import Compare, Grid, Study
from lit_llm.config.problems import InputError, Problem, did_you_mean
from lit_llm.config.section import validate
from lit_llm.config.tree import Node, at, merge, read_file, read_override, tree
from lit_llm.experiment.config import Experiment
from lit_llm.experiment.load import PRESETS, idle_overrides, merge_all, read_layers, validate_experiment


@dataclass(frozen=True)
class Arm:
    """One point of a study without its seed."""

    name: str
    group: str
    """The named arm that it was crossed from."""
    levels: Mapping[str, str]
    """The label of each factor's level; empty where the grid does not apply."""
    baseline: str
    """Name of the arm it is compared with; its own for a baseline."""
    experiment: Experiment
    declared: frozenset[str] = frozenset()
    """Keys that its factors set."""

    def seeded(self, seed: int) -> Experiment:
        return self.experiment.model_copy(update={"seed": seed})

    @cached_property
    def flat(self) -> dict[str, Any]:
        return self.experiment.model_dump(mode="json", exclude={"seed"})


@dataclass(frozen=True)
class Ablation:
    """A study file, understood."""

    study: Study
    arms: tuple[Arm, ...]
    source: str
    """The file it was read from, or the preset."""
    overrides: tuple[str, ...] = ()

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


def load_study(source: str | Path, overrides: Sequence[str] = ()) -> Ablation:
    """Read a study; a preset or an experiment file is a study of one arm.

    Raises InputError with every problem that was found, each at its file and line.
    """
    path = Path(source)
    if (PRESETS / f"{source}.yaml").is_file() or not path.is_file():
        return _single(str(source), read_layers(Node([Node(str(source))]), Path.cwd()), overrides)
    document = read_file(path)
    if "study" not in document.value:
        if "pretrain" in document.value or "model" in document.value or "extends" in document.value:
            return _single(str(source), read_layers(Node([Node(str(path.absolute()))]), Path.cwd()), overrides)
        raise InputError(Problem("is neither a study (no `study`) nor an experiment (no `model`)", mark=document.mark))
    study = validate(Study, document)
    return Ablation(study, tuple(_arms(study, document, path.parent, overrides)), str(source), tuple(overrides))


def _single(name: str, node: Node, overrides: Sequence[str]) -> Ablation:
    experiment = validate_experiment(merge_all([node, *map(read_override, overrides)]), changes_checked=True)
    short = Path(name).stem
    study = Study(study=short, question=f"What does {short} cost, and where does it end?", seeds=(experiment.seed,))
    return Ablation(study, (Arm(short, short, {}, short, experiment),), name, tuple(overrides))


@dataclass(frozen=True)
class Level:
    """One level of a factor."""

    factor: str
    label: str
    keys: Node
    """The experiment keys that it sets, as a tree."""
    paths: tuple[str, ...]


@dataclass
class _Cell:
    group: str
    levels: tuple[Level, ...]
    node: Node
    name: str = ""
    labels: dict[str, str] = field(default_factory=dict)


def _arms(study: Study, document: Node, folder: Path, overrides: Sequence[str]) -> Iterator[Arm]:
    problems: list[Problem] = []
    factors = _factors(study.grid, document, problems)
    groups = _groups(study, document, folder, problems)
    after = [read_override(option) for option in overrides]
    if problems:
        raise InputError(*problems)

    cells: list[_Cell] = []
    checked: dict[str, Experiment | None] = {}
    for group, (node, in_grid) in groups.items():
        try:
            # Before the factors: a factor's first level often repeats what holds already, an arm's own key should not.
            experiment = validate_experiment(merge_all([node, *after]))
            problems += idle_overrides(node, experiment)
            checked[group] = experiment
        except InputError as error:
            problems += error.problems
            checked[group] = None
        grid = study.grid if in_grid else None
        for levels in _combinations(grid, factors):
            cells.append(_Cell(group, levels, merge_all([node, *(level.keys for level in levels), *after])))
    if not cells:
        problems.append(Problem("every combination is excluded", "grid.exclude", document.mark_of(["grid", "exclude"])))
    _name(cells, study, factors)

    baseline_group = study.compare.baseline or next(iter(groups))
    if baseline_group not in groups:
        hint = did_you_mean(baseline_group, groups)
        problems.append(
            Problem(f"there is no arm {baseline_group!r}{hint}", "compare.baseline", document.mark_of(["compare", "baseline"]))
        )
    arms = []
    for cell in cells:
        if checked[cell.group] is None:
            continue
        try:
            experiment = validate_experiment(cell.node)
        except InputError as error:
            problems += [_in_arm(problem, cell) for problem in error.problems]
            continue
        baseline = _baseline_of(cell, cells, baseline_group, study.compare, factors)
        if baseline is None and baseline_group in groups:
            problems.append(
                Problem(f"{cell.name!r} has no baseline to be compared with: it is excluded", "grid.exclude", document.mark_of(["grid"]))
            )
        declared = frozenset(path for level in cell.levels for path in level.paths)
        arms.append(Arm(cell.name, cell.group, cell.labels, baseline or "", experiment, declared))
    if problems:
        raise InputError(*problems, hint="`lit-llm schema > study.schema.json` gives your editor the allowed keys.")
    yield from arms


def _in_arm(problem: Problem, cell: _Cell) -> Problem:
    return Problem(f"{problem.message} (in arm {cell.name})", problem.key, problem.mark)


def _groups(study: Study, document: Node, folder: Path, problems: list[Problem]) -> dict[str, tuple[Node, bool]]:
    """{named arm: (its tree before the factors, whether the grid applies)}."""
    base = document.find(["base"]) or Node({})
    try:
        shared = read_layers(document.find(["extends"]), folder)
    except InputError as error:
        problems += error.problems
        shared = Node({})
    groups = {}
    for name in study.arms or {"baseline": None}:
        own = document.find(["arms", name]) or Node({})
        items = own.value or {}
        try:
            below = read_layers(items["extends"], folder) if "extends" in items else shared
        except InputError as error:
            problems += error.problems
            continue
        in_grid = items.get("grid", Node(True)).value
        if not isinstance(in_grid, bool):
            problems.append(Problem("should be true or false", f"arms.{name}.grid", own.mark_of(["grid"])))
        keys = Node({key: value for key, value in items.items() if key not in ("extends", "grid")}, own.mark)
        groups[name] = (merge(merge(below, base), keys), bool(in_grid))
    return groups


def _factors(grid: Grid | None, document: Node, problems: list[Problem]) -> dict[str, list[Level]]:
    """The levels of each factor, with the marks of the file. Notes keys that two factors both set."""
    factors: dict[str, list[Level]] = {}
    setters: dict[str, str] = {}
    for name in grid.factors if grid else ():
        node = document.find(["grid", "factors", name])
        assert node is not None
        mark = node.mark
        if isinstance(node.value, list):
            levels = [
                Level(name, label_of(item.plain()), at(name, tree(item, item.mark or mark)), (name,)) for item in node.value
            ]
        else:
            levels = []
            for label, bundle in node.value.items():
                if not isinstance(bundle.value, dict) or not bundle.value:
                    problems.append(Problem("a named level is a mapping of keys to values", f"grid.factors.{name}.{label}", bundle.mark))
                    continue
                keys = merge_all(at(path, value) for path, value in bundle.value.items())
                levels.append(Level(name, label, keys, tuple(bundle.value)))
        for path in dict.fromkeys(path for level in levels for path in level.paths):
            other = setters.setdefault(path, name)
            nested = [p for p, owner in setters.items() if owner != name and (p.startswith(f"{path}.") or path.startswith(f"{p}."))]
            if other != name or nested:
                clash = other if other != name else setters[nested[0]]
                problems.append(Problem(f"the factors {clash!r} and {name!r} both set {path}", f"grid.factors.{name}", mark))
        factors[name] = levels
    for index, exclusion in enumerate(grid.exclude if grid else ()):
        where = document.mark_of(["grid", "exclude", str(index)])
        for name, value in exclusion.items():
            if name not in factors:
                problems.append(Problem(f"unknown factor{did_you_mean(name, factors)}", f"grid.exclude.{name}", where))
            elif label_of(value) not in [level.label for level in factors[name]]:
                problems.append(Problem(f"{label_of(value)!r} is not a level of it", f"grid.exclude.{name}", where))
    return factors


def label_of(value: Any) -> str:
    """A level as people read it in an arm's name."""
    if isinstance(value, list | tuple):
        return "+".join(map(label_of, value)) or "none"
    if isinstance(value, Mapping):
        return ",".join(f"{key}={label_of(item)}" for key, item in value.items())
    if isinstance(value, bool | None):
        return str(value).lower() if value is not None else "null"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _combinations(grid: Grid | None, factors: dict[str, list[Level]]) -> Iterator[tuple[Level, ...]]:
    if grid is None:
        yield ()
        return
    columns = list(factors.values())
    if grid.design == "factorial":
        combined = list(itertools.product(*columns))
    else:
        first = tuple(levels[0] for levels in columns)
        combined = [first]
        for index, levels in enumerate(columns):
            combined += [(*first[:index], level, *first[index + 1 :]) for level in levels[1:]]
    for levels in combined:
        chosen = {level.factor: level.label for level in levels}
        if not any(all(chosen[name] == label_of(value) for name, value in rule.items()) for rule in grid.exclude):
            yield levels


def _name(cells: list[_Cell], study: Study, factors: dict[str, list[Level]]) -> None:
    """`red/output_norm=none`: the named arm, and each factor that is not at its first level."""
    short = _short_names(list(factors))
    for cell in cells:
        cell.labels = {level.factor: level.label for level in cell.levels}
        first = {name: levels[0].label for name, levels in factors.items()}
        parts = [f"{short[name]}={label}" for name, label in cell.labels.items() if label != first[name]]
        # A study without named arms calls its cells by what is switched.
        cell.name = "/".join([cell.group, *parts])


def _short_names(factors: list[str]) -> dict[str, str]:
    """The shortest endings of the keys that tell the factors apart."""
    out = {}
    for factor in factors:
        parts = factor.split(".")
        for size in range(1, len(parts) + 1):
            ending = ".".join(parts[-size:])
            if sum(other == ending or other.endswith(f".{ending}") for other in factors) == 1:
                break
        out[factor] = ending
    return out


def _baseline_of(
    cell: _Cell, cells: list[_Cell], group: str, compare: Compare, factors: dict[str, list[Level]]
) -> str | None:
    """The baseline arm at this cell's own levels of the `within` factors, at the first level of all others."""
    wanted = {name: levels[0].label for name, levels in factors.items()}
    wanted |= {name: cell.labels[name] for name in compare.within if name in cell.labels}
    for other in cells:
        if other.group == group and (not other.labels or other.labels == wanted):
            return other.name
    return None
