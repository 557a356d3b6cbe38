"""Design points of a study: named arms crossed with the levels of factors, each with a name and a baseline."""

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
"""Earlier names of these keys."""


@dataclass(eq=False)
class DesignPoint:
    """A named arm at a combination of levels."""

    group: str
    levels: tuple[Level, ...]
    node: ConfigNode
    """Keys of the experiment, as a tree."""
    name: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    """{factor: label of the level}."""
    baseline: str = ""
    """Name of the design point that this one is compared with."""
    built: Experiment | None = None
    """The validated experiment, None before validation or where it failed."""

    @property
    def experiment(self) -> Experiment:
        """The validated experiment."""
        assert self.built is not None
        return self.built

    @property
    def intervened_keys(self) -> frozenset[str]:
        """Keys of the experiment that the levels set."""
        return frozenset(path for level in self.levels for path in level.paths)


def design_points(study: Study, document: ConfigNode, folder: Path, overrides: Sequence[str]) -> list[DesignPoint]:
    """Every design point with its experiment, name and baseline. Raises InputError with all problems of all points.

    document: the tree that `study` was validated from; folder: where the study's file lies, for `extends`.
    """
    problems: list[Problem] = []
    factors, crossed = read_factors(study.grid, document, problems), study.grid
    if problems:  # the arms are checked without the grid
        factors, crossed = {}, None
    groups = _groups(study, document, folder, problems)
    baselines_by_arm = _named_baselines(study, document, problems)
    override_nodes = read_overrides(overrides, problems)
    seeded = [node for node in override_nodes if node.find(["seed"])]
    problems += [Problem("seeds are the study's, change them there", "seed", node.location) for node in seeded]
    problems += _overridden_factors(factors, override_nodes)
    base = document.find(["base"]) or ConfigNode({})
    points = []
    for group, (node, in_grid) in groups.items():
        for levels in combinations(crossed if in_grid else None, factors):
            with collect_errors(problems):
                changes = [*(level.keys for level in levels), *override_nodes]
                # A source model gets the level as well, as it gets the base: else the level would also change how many
                # parameters are newly initialised.
                keys = with_sources(merge_all([node, *changes]), merge_all([base, *changes]))
                points.append(DesignPoint(group, levels, keys))
    _name(points, study, factors)
    problems += _build(points, complete=crossed is study.grid)
    if not problems and not points:
        problems.append(
            Problem("every combination is excluded", "grid.exclude", document.location_of(["grid", "exclude"]))
        )
    baselines = {point.name: _baseline_of(point, points, baselines_by_arm, study.compare, factors) for point in points}
    without_baseline = [name for name, baseline in baselines.items() if baseline is None]
    if not problems and without_baseline:
        message = f"{some(without_baseline)} would be compared with an arm that is excluded"
        problems.append(Problem(message, "grid.exclude", document.location_of(["grid", "exclude"])))
    if problems:
        raise InputError(*problems, hint="`lit-llm schema > study.schema.json` gives your editor the allowed keys.")
    for point in points:
        point.baseline = baselines[point.name] or ""
    return points


def _overridden_factors(factors: Mapping[str, Sequence[Level]], overrides: Sequence[ConfigNode]) -> Iterator[Problem]:
    """A problem for each override of a key that a factor sets: the arms' names would no longer say their levels."""
    factor_by_path = {
        path: name for name, levels in factors.items() for level in levels for path, _ in leaves(level.keys.plain())
    }
    for node in overrides:
        for key, _ in leaves(node.plain()):
            name = next((name for path, name in factor_by_path.items() if under(key, path) or under(path, key)), None)
            if name is not None:
                message = f"is set by the factor {name!r}; change its levels in the study, or choose arms by --only"
                yield Problem(message, key, node.location_of(split_path(key)))


def _build(points: Sequence[DesignPoint], complete: bool) -> list[Problem]:
    """Validate the experiment of every point, and return each problem once, with the arms that have it.

    complete: the points have their factors; only then are overrides that change nothing reported.
    """
    points_by_problem: dict[Problem, list[DesignPoint]] = {}
    for point in points:
        try:
            point.built = validate_experiment(point.node)
        except InputError as error:
            for problem in error.problems:
                points_by_problem.setdefault(problem, []).append(point)
    for name in dict.fromkeys(point.group for point in points) if complete else ():
        group = [point for point in points if point.group == name]
        for problem in _redundant_overrides(group):
            points_by_problem.setdefault(problem, []).extend(group)
    arms_in_grid, arms_by_key = {point.group for point in points if point.intervened_keys}, dict[str, set[str]]()
    for problem, affected in points_by_problem.items():
        arms_by_key.setdefault(problem.key, set()).update(point.group for point in affected)
    return [
        _with_arms(problem, affected, points, elsewhere=bool(arms_in_grid - arms_by_key[problem.key]))
        for problem, affected in points_by_problem.items()
    ]


def _redundant_overrides(group: Sequence[DesignPoint]) -> list[Problem]:
    """Overrides that change nothing in any point of a named arm. The levels of a factor may repeat a default."""
    built = [(point, point.built) for point in group if point.built is not None]
    if not built:
        return []
    return [
        problem
        for problem in redundant_overrides(built[0][0].node, built[0][1])
        if not under(problem.key, *built[0][0].intervened_keys)
        and all(changes_nothing(point.node, experiment, problem.key) for point, experiment in built[1:])
    ]


def _with_arms(
    problem: Problem, affected: Sequence[DesignPoint], points: Sequence[DesignPoint], elsewhere: bool
) -> Problem:
    """The problem with the arms that have it, unless all have it, or all to which a factor gives this key.

    elsewhere: in other arms of the grid this key is no problem.
    """
    # A wrong level of a factor is wrong wherever it is used.
    from_factor = all(under(problem.key, *point.intervened_keys) for point in affected)
    factors = [path for path in affected[0].intervened_keys if under(path, problem.key)]
    if problem.message.startswith("unknown key") and factors and elsewhere:
        # Other arms have the key, so it is no slip of the pen, but a factor that these arms lack.
        lacking = some(list(dict.fromkeys(point.group for point in affected)))
        message = f"a factor that the arm {lacking} does not have; keep that arm out of the grid by `grid: false`"
        return Problem(message, factors[0], problem.location)
    spared = {point.group for point in points if point not in affected}
    names = [point.name if point.group in spared and not from_factor else point.group for point in affected]
    if set(names) == {point.group for point in points if point.intervened_keys or not from_factor}:
        return problem
    return Problem(f"{problem.message} (in arm {some(list(dict.fromkeys(names)))})", problem.key, problem.location)


def _named_baselines(study: Study, document: ConfigNode, problems: list[Problem]) -> dict[str, str]:
    """{named arm: the named arm that it is compared with}."""
    names = list(study.arms or {"baseline": None})
    first = study.compare.baseline or names[0]
    if first not in names:
        where = document.location_of(["compare", "baseline"])
        problems.append(Problem(f"there is no arm {first!r}{did_you_mean(first, names)}", "compare.baseline", where))
    baselines = dict.fromkeys(names, first)
    for name, arm in study.arms.items():
        for key in OLD_ARM_KEYS & (arm or {}).keys():
            where = document.location_of(["arms", name, key])
            problems.append(Problem(unknown_key(key, ARM_KEYS), f"arms.{name}.{key}", where))
        if "baseline" not in (arm or {}):
            continue
        baseline, where = (arm or {})["baseline"], document.location_of(["arms", name, "baseline"])
        if baseline in names:
            baselines[name] = baseline
        else:
            hint = did_you_mean(str(baseline), names)
            problems.append(Problem(f"there is no arm {baseline!r}{hint}", f"arms.{name}.baseline", where))
    for name in baselines:
        visited = [name]
        while (following := baselines.get(visited[-1], visited[-1])) != visited[-1] and following not in visited:
            visited.append(following)
        if following in visited[:-1]:
            where = document.location_of(["arms", name, "baseline"])
            message = f"is compared with itself in a circle: {' -> '.join([*visited, following])}"
            problems.append(Problem(message, f"arms.{name}.baseline", where))
            break
    return baselines


def _groups(
    study: Study, document: ConfigNode, folder: Path, problems: list[Problem]
) -> dict[str, tuple[ConfigNode, bool]]:
    """{named arm: (tree of the experiment before the factors, whether the grid applies)}."""
    base = document.find(["base"]) or ConfigNode({})
    shared = None
    if not study.arms or any("extends" not in (arm or {}) for arm in study.arms.values()):
        with collect_errors(problems):
            shared = read_layers(document.find(["extends"]), folder)
    groups = {}
    for name in study.arms or {"baseline": None}:
        arm = document.find(["arms", name]) or ConfigNode({})
        items = arm.value or {}
        extended = shared
        if "extends" in items:
            extended = None
            with collect_errors(problems):
                extended = read_layers(items["extends"], folder)
        in_grid = items.get("grid", ConfigNode(True)).value
        if not isinstance(in_grid, bool):
            problems.append(Problem("should be true or false", f"arms.{name}.grid", arm.location_of(["grid"])))
        of_experiment = {key: value for key, value in items.items() if key not in {*ARM_KEYS, *OLD_ARM_KEYS}}
        keys = ConfigNode(of_experiment, arm.location)
        if extended is not None:
            groups[name] = (merge(merge(extended, base), keys), bool(in_grid))
    return groups


def _name(points: list[DesignPoint], study: Study, factors: dict[str, list[Level]]) -> None:
    """Name every point by the named arm and the factors that are not at their first level.

    The name is `red/window=64`, or the letters of the factors, `red/ACE`, in a fraction, which has many factors.
    """
    short = short_names(list(factors))
    first = {name: levels[0].label for name, levels in factors.items()}
    for point in points:
        point.labels = {level.factor: level.label for level in point.levels}
        moved = [name for name, label in point.labels.items() if label != first[name]]
        if moved and study.grid and study.grid.fraction:
            parts = ["".join(letter for letter, name in zip(LETTERS, factors, strict=False) if name in moved)]
        else:
            parts = [f"{short[name]}={point.labels[name]}" for name in moved]
        point.name = "/".join([point.group, *parts])


def _baseline_of(
    point: DesignPoint,
    points: list[DesignPoint],
    baselines_by_arm: Mapping[str, str],
    compare: Compare,
    factors: dict[str, list[Level]],
) -> str | None:
    """Name of the baseline of a point, None if it is excluded.

    The baseline has the point's levels of the `stratify_by` factors and the first level of all others.
    """
    group = baselines_by_arm.get(point.group)
    wanted = {name: levels[0].label for name, levels in factors.items()}
    wanted |= {name: point.labels[name] for name in compare.stratify_by if name in point.labels}
    for other in points:
        if other.group == group and (not other.labels or other.labels == wanted):
            return other.name
    return None
