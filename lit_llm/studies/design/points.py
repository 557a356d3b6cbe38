"""The cells of a study: its named arms crossed with the levels of its factors, each with its name and its baseline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lit_llm.config.problems import RENAMED, InputError, Problem, collect_errors, did_you_mean, some, unknown_key
from lit_llm.config.tree import ConfigNode, leaves, merge, merge_all, split_path, under
from lit_llm.experiment.load import (
    changes_nothing,
    read_layers,
    read_overrides,
    redundant_overrides,
    validate_experiment,
    with_sources,
)
from lit_llm.experiment.schema import Experiment
from lit_llm.studies.design.factors import Level, combinations, read_factors, short_names
from lit_llm.studies.fractional_factorial import LETTERS
from lit_llm.studies.schema import Compare, Study

ARM_KEYS = ("extends", "grid", "baseline")
"""Keys of a named arm that are not the experiment's."""
OLD_ARM_KEYS = {old for old, new in RENAMED.items() if new in ARM_KEYS}
"""What they were called earlier."""


@dataclass(eq=False)
class DesignPoint:
    """A named arm at a combination of levels."""

    group: str
    levels: tuple[Level, ...]
    node: ConfigNode
    """The tree of its experiment."""
    name: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    """Of the levels, by factor."""
    baseline: str = ""
    built: Experiment | None = None
    """None until it was found to be one."""

    @property
    def experiment(self) -> Experiment:
        assert self.built is not None
        return self.built

    @property
    def declared(self) -> frozenset[str]:
        return frozenset(path for level in self.levels for path in level.paths)


def cells_of(study: Study, document: ConfigNode, folder: Path, overrides: Sequence[str]) -> list[DesignPoint]:
    """Every cell, built, with its name and its baseline. Raises InputError with every problem of theirs.

    document: the tree that `study` was validated from; folder: of its file.
    """
    problems: list[Problem] = []
    factors, crossed = read_factors(study.grid, document, problems), study.grid
    if problems:  # what is wrong with the arms can be said all the same
        factors, crossed = {}, None
    groups = _groups(study, document, folder, problems)
    baselines_by_arm = _named_baselines(study, document, problems)
    after = read_overrides(overrides, problems)
    seeded = [node for node in after if node.find(["seed"])]
    problems += [Problem("seeds are the study's, change them there", "seed", node.location) for node in seeded]
    problems += _overridden(factors, after)
    base = document.find(["base"]) or ConfigNode({})
    points = []
    for group, (node, in_grid) in groups.items():
        for levels in combinations(crossed if in_grid else None, factors):
            with collect_errors(problems):
                above = [*(level.keys for level in levels), *after]
                # A level reaches a source as the base does: else it would switch how much is fresh as well.
                points.append(
                    DesignPoint(group, levels, with_sources(merge_all([node, *above]), merge_all([base, *above])))
                )
    _name(points, study, factors)
    problems += _build(points, complete=crossed is study.grid)
    if not problems and not points:
        problems.append(
            Problem("every combination is excluded", "grid.exclude", document.location_of(["grid", "exclude"]))
        )
    baselines = {point.name: _baseline_of(point, points, baselines_by_arm, study.compare, factors) for point in points}
    alone = [name for name, baseline in baselines.items() if baseline is None]
    if not problems and alone:
        message = f"{some(alone)} would be compared with an arm that is excluded"
        problems.append(Problem(message, "grid.exclude", document.location_of(["grid", "exclude"])))
    if problems:
        raise InputError(*problems, hint="`lit-llm schema > study.schema.json` gives your editor the allowed keys.")
    for point in points:
        point.baseline = baselines[point.name] or ""
    return points


def _overridden(factors: Mapping[str, Sequence[Level]], overrides: Sequence[ConfigNode]) -> Iterator[Problem]:
    """Overrides that would set what a factor sets: its arms would no longer be what they are called."""
    owners = {
        path: name for name, levels in factors.items() for level in levels for path, _ in leaves(level.keys.plain())
    }
    for node in overrides:
        for key, _ in leaves(node.plain()):
            name = next((name for path, name in owners.items() if under(key, path) or under(path, key)), None)
            if name is not None:
                message = f"is set by the factor {name!r}; change its levels in the study, or choose arms by --only"
                yield Problem(message, key, node.location_of(split_path(key)))


def _build(points: Sequence[DesignPoint], complete: bool) -> list[Problem]:
    """Give every cell its experiment. What is wrong is said once, with the arms where it is.

    complete: the cells have their factors; only then can it be said that an override changes nothing.
    """
    found: dict[Problem, list[DesignPoint]] = {}
    for point in points:
        try:
            point.built = validate_experiment(point.node)
        except InputError as error:
            for problem in error.problems:
                found.setdefault(problem, []).append(point)
    for name in dict.fromkeys(point.group for point in points) if complete else ():
        group = [point for point in points if point.group == name]
        for problem in _idle(group):
            found.setdefault(problem, []).extend(group)
    in_grid, wrong = {point.group for point in points if point.declared}, dict[str, set[str]]()
    for problem, where in found.items():
        wrong.setdefault(problem.key, set()).update(point.group for point in where)
    return [
        _in_arms(problem, where, points, elsewhere=bool(in_grid - wrong[problem.key]))
        for problem, where in found.items()
    ]


def _idle(group: Sequence[DesignPoint]) -> list[Problem]:
    """Overrides that change nothing in any cell of a named arm. A factor's own levels may repeat what holds already."""
    built = [(point, point.built) for point in group if point.built is not None]
    if not built:
        return []
    return [
        problem
        for problem in redundant_overrides(built[0][0].node, built[0][1])
        if not under(problem.key, *built[0][0].declared)
        and all(changes_nothing(point.node, experiment, problem.key) for point, experiment in built[1:])
    ]


def _in_arms(problem: Problem, where: Sequence[DesignPoint], points: Sequence[DesignPoint], elsewhere: bool) -> Problem:
    """The problem with the arms that have it, unless all have, or all that a factor gives this key.

    elsewhere: there are arms of the grid in which this key is no problem.
    """
    of_factor = all(
        under(problem.key, *point.declared) for point in where
    )  # a wrong level is wrong wherever it is used
    factors = [path for path in where[0].declared if under(path, problem.key)]
    if problem.message.startswith("unknown key") and factors and elsewhere:
        # The key is there in other arms: not a slip of the pen, but a factor that these do not have.
        lacking = some(list(dict.fromkeys(point.group for point in where)))
        message = f"a factor that the arm {lacking} does not have; keep that arm out of the grid by `grid: false`"
        return Problem(message, factors[0], problem.location)
    whole = {c.group for c in where if of_factor or all(other in where for other in points if other.group == c.group)}
    names = list(dict.fromkeys(point.group if point.group in whole else point.name for point in where))
    if set(names) == {point.group for point in points if point.declared or not of_factor}:
        return problem
    return Problem(f"{problem.message} (in arm {some(names)})", problem.key, problem.location)


def _named_baselines(study: Study, document: ConfigNode, problems: list[Problem]) -> dict[str, str]:
    """{named arm: the one that it is compared with}."""
    names = list(study.arms or {"baseline": None})
    first = study.compare.baseline or names[0]
    if first not in names:
        where = document.location_of(["compare", "baseline"])
        problems.append(Problem(f"there is no arm {first!r}{did_you_mean(first, names)}", "compare.baseline", where))
    found = dict.fromkeys(names, first)
    for name, own in study.arms.items():
        for key in OLD_ARM_KEYS & (own or {}).keys():
            where = document.location_of(["arms", name, key])
            problems.append(Problem(unknown_key(key, ARM_KEYS), f"arms.{name}.{key}", where))
        if "baseline" not in (own or {}):
            continue
        wanted, where = (own or {})["baseline"], document.location_of(["arms", name, "baseline"])
        if wanted in names:
            found[name] = wanted
        else:
            hint = did_you_mean(str(wanted), names)
            problems.append(Problem(f"there is no arm {wanted!r}{hint}", f"arms.{name}.baseline", where))
    for name in found:
        seen = [name]
        while (below := found.get(seen[-1], seen[-1])) != seen[-1] and below not in seen:
            seen.append(below)
        if below in seen[:-1]:
            where = document.location_of(["arms", name, "baseline"])
            message = f"is compared with itself in a circle: {' -> '.join([*seen, below])}"
            problems.append(Problem(message, f"arms.{name}.baseline", where))
            break
    return found


def _groups(
    study: Study, document: ConfigNode, folder: Path, problems: list[Problem]
) -> dict[str, tuple[ConfigNode, bool]]:
    """{named arm: (its tree before the factors, whether the grid applies)}."""
    base = document.find(["base"]) or ConfigNode({})
    shared = None
    if not study.arms or any("extends" not in (arm or {}) for arm in study.arms.values()):
        with collect_errors(problems):
            shared = read_layers(document.find(["extends"]), folder)
    groups = {}
    for name in study.arms or {"baseline": None}:
        own = document.find(["arms", name]) or ConfigNode({})
        items = own.value or {}
        below = shared
        if "extends" in items:
            below = None
            with collect_errors(problems):
                below = read_layers(items["extends"], folder)
        in_grid = items.get("grid", ConfigNode(True)).value
        if not isinstance(in_grid, bool):
            problems.append(Problem("should be true or false", f"arms.{name}.grid", own.location_of(["grid"])))
        of_experiment = {key: value for key, value in items.items() if key not in {*ARM_KEYS, *OLD_ARM_KEYS}}
        keys = ConfigNode(of_experiment, own.location)
        if below is not None:
            groups[name] = (merge(merge(below, base), keys), bool(in_grid))
    return groups


def _name(points: list[DesignPoint], study: Study, factors: dict[str, list[Level]]) -> None:
    """`red/output_norm=none`: the named arm and each factor that is not at its first level; in a fraction `red/ACE`."""
    short = short_names(list(factors))
    for point in points:
        point.labels = {level.factor: level.label for level in point.levels}
        first = {name: levels[0].label for name, levels in factors.items()}
        moved = [name for name, label in point.labels.items() if label != first[name]]
        if moved and study.grid and study.grid.fraction:  # of so many factors, too long to be read otherwise
            parts = ["".join(letter for letter, name in zip(LETTERS, factors, strict=False) if name in moved)]
        else:
            parts = [f"{short[name]}={point.labels[name]}" for name in moved]
        # A study without named arms calls its points by what is switched.
        point.name = "/".join([point.group, *parts])


def _baseline_of(
    point: DesignPoint,
    points: list[DesignPoint],
    baselines_by_arm: Mapping[str, str],
    compare: Compare,
    factors: dict[str, list[Level]],
) -> str | None:
    """The baseline of an arm: at its own levels of the `stratify_by` factors, and the first level of all others."""
    group = baselines_by_arm.get(point.group)
    wanted = {name: levels[0].label for name, levels in factors.items()}
    wanted |= {name: point.labels[name] for name in compare.stratify_by if name in point.labels}
    for other in points:
        if other.group == group and (not other.labels or other.labels == wanted):
            return other.name
    return None
