"""The cells of a study: its named arms crossed with the levels of its factors, each with its name and its baseline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lit_llm.config.problems import InputError, Problem, did_you_mean, noted, some
from lit_llm.config.tree import Node, leaves, merge, merge_all, split_path, under
from lit_llm.experiment.load import (
    changes_nothing,
    idle_overrides,
    read_layers,
    read_overrides,
    validate_experiment,
    with_sources,
)
from lit_llm.experiment.schema import Experiment
from lit_llm.studies.design.factors import Level, combinations, read_factors, short_names
from lit_llm.studies.design.fractional_factorial import LETTERS
from lit_llm.studies.schema import Compare, Study

ARM_KEYS = ("extends", "grid", "baseline")
"""Keys of a named arm that are not the experiment's."""


@dataclass(eq=False)
class Cell:
    """A named arm at a combination of levels."""

    group: str
    levels: tuple[Level, ...]
    node: Node
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


def cells_of(study: Study, document: Node, folder: Path, overrides: Sequence[str]) -> list[Cell]:
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
    problems += [Problem("seeds are the study's, change them there", "seed", node.mark) for node in seeded]
    problems += _overridden(factors, after)
    base = document.find(["base"]) or Node({})
    cells = []
    for group, (node, in_grid) in groups.items():
        for levels in combinations(crossed if in_grid else None, factors):
            with noted(problems):
                above = [*(level.keys for level in levels), *after]
                # A level reaches a source as the base does: else it would switch how much is fresh as well.
                cells.append(Cell(group, levels, with_sources(merge_all([node, *above]), merge_all([base, *above]))))
    _name(cells, study, factors)
    problems += _build(cells, complete=crossed is study.grid)
    if not problems and not cells:
        problems.append(Problem("every combination is excluded", "grid.exclude", document.mark_of(["grid", "exclude"])))
    baselines = {cell.name: _baseline_of(cell, cells, baselines_by_arm, study.compare, factors) for cell in cells}
    alone = [name for name, baseline in baselines.items() if baseline is None]
    if not problems and alone:
        message = f"{some(alone)} would be compared with an arm that is excluded"
        problems.append(Problem(message, "grid.exclude", document.mark_of(["grid", "exclude"])))
    if problems:
        raise InputError(*problems, hint="`lit-llm schema > study.schema.json` gives your editor the allowed keys.")
    for cell in cells:
        cell.baseline = baselines[cell.name] or ""
    return cells


def _overridden(factors: Mapping[str, Sequence[Level]], overrides: Sequence[Node]) -> Iterator[Problem]:
    """Overrides that would set what a factor sets: its arms would no longer be what they are called."""
    owners = {
        path: name for name, levels in factors.items() for level in levels for path, _ in leaves(level.keys.plain())
    }
    for node in overrides:
        for key, _ in leaves(node.plain()):
            name = next((name for path, name in owners.items() if under(key, path) or under(path, key)), None)
            if name is not None:
                message = f"is set by the factor {name!r}; change its levels in the study, or choose arms by --only"
                yield Problem(message, key, node.mark_of(split_path(key)))


def _build(cells: Sequence[Cell], complete: bool) -> list[Problem]:
    """Give every cell its experiment. What is wrong is said once, with the arms where it is.

    complete: the cells have their factors; only then can it be said that an override changes nothing.
    """
    found: dict[Problem, list[Cell]] = {}
    for cell in cells:
        try:
            cell.built = validate_experiment(cell.node)
        except InputError as error:
            for problem in error.problems:
                found.setdefault(problem, []).append(cell)
    for name in dict.fromkeys(cell.group for cell in cells) if complete else ():
        group = [cell for cell in cells if cell.group == name]
        for problem in _idle(group):
            found.setdefault(problem, []).extend(group)
    in_grid, wrong = {cell.group for cell in cells if cell.declared}, dict[str, set[str]]()
    for problem, where in found.items():
        wrong.setdefault(problem.key, set()).update(cell.group for cell in where)
    return [
        _in_arms(problem, where, cells, elsewhere=bool(in_grid - wrong[problem.key]))
        for problem, where in found.items()
    ]


def _idle(group: Sequence[Cell]) -> list[Problem]:
    """Overrides that change nothing in any cell of a named arm. A factor's own levels may repeat what holds already."""
    built = [(cell, cell.built) for cell in group if cell.built is not None]
    if not built:
        return []
    return [
        problem
        for problem in idle_overrides(built[0][0].node, built[0][1])
        if not under(problem.key, *built[0][0].declared)
        and all(changes_nothing(cell.node, experiment, problem.key) for cell, experiment in built[1:])
    ]


def _in_arms(problem: Problem, where: Sequence[Cell], cells: Sequence[Cell], elsewhere: bool) -> Problem:
    """The problem with the arms that have it, unless all have, or all that a factor gives this key.

    elsewhere: there are arms of the grid in which this key is no problem.
    """
    of_factor = all(under(problem.key, *cell.declared) for cell in where)  # a wrong level is wrong wherever it is used
    factors = [path for path in where[0].declared if under(path, problem.key)]
    if problem.message.startswith("unknown key") and factors and elsewhere:
        # The key is there in other arms: not a slip of the pen, but a factor that these do not have.
        lacking = some(list(dict.fromkeys(cell.group for cell in where)))
        message = f"a factor that the arm {lacking} does not have; keep that arm out of the grid by `grid: false`"
        return Problem(message, factors[0], problem.mark)
    whole = {c.group for c in where if of_factor or all(other in where for other in cells if other.group == c.group)}
    names = list(dict.fromkeys(cell.group if cell.group in whole else cell.name for cell in where))
    if set(names) == {cell.group for cell in cells if cell.declared or not of_factor}:
        return problem
    return Problem(f"{problem.message} (in arm {some(names)})", problem.key, problem.mark)


def _named_baselines(study: Study, document: Node, problems: list[Problem]) -> dict[str, str]:
    """{named arm: the one that it is compared with}."""
    names = list(study.arms or {"baseline": None})
    first = study.compare.baseline or names[0]
    if first not in names:
        where = document.mark_of(["compare", "baseline"])
        problems.append(Problem(f"there is no arm {first!r}{did_you_mean(first, names)}", "compare.baseline", where))
    found = dict.fromkeys(names, first)
    for name, own in study.arms.items():
        if "against" in (own or {}):
            where = document.mark_of(["arms", name, "against"])
            problems.append(Problem(f"unknown key{did_you_mean('against', ARM_KEYS)}", f"arms.{name}.against", where))
        if "baseline" not in (own or {}):
            continue
        wanted, where = (own or {})["baseline"], document.mark_of(["arms", name, "baseline"])
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
            where = document.mark_of(["arms", name, "baseline"])
            message = f"is compared with itself in a circle: {' -> '.join([*seen, below])}"
            problems.append(Problem(message, f"arms.{name}.baseline", where))
            break
    return found


def _groups(study: Study, document: Node, folder: Path, problems: list[Problem]) -> dict[str, tuple[Node, bool]]:
    """{named arm: (its tree before the factors, whether the grid applies)}."""
    base = document.find(["base"]) or Node({})
    shared = None
    if not study.arms or any("extends" not in (arm or {}) for arm in study.arms.values()):
        with noted(problems):
            shared = read_layers(document.find(["extends"]), folder)
    groups = {}
    for name in study.arms or {"baseline": None}:
        own = document.find(["arms", name]) or Node({})
        items = own.value or {}
        below = shared
        if "extends" in items:
            below = None
            with noted(problems):
                below = read_layers(items["extends"], folder)
        in_grid = items.get("grid", Node(True)).value
        if not isinstance(in_grid, bool):
            problems.append(Problem("should be true or false", f"arms.{name}.grid", own.mark_of(["grid"])))
        keys = Node({key: value for key, value in items.items() if key not in (*ARM_KEYS, "against")}, own.mark)
        if below is not None:
            groups[name] = (merge(merge(below, base), keys), bool(in_grid))
    return groups


def _name(cells: list[Cell], study: Study, factors: dict[str, list[Level]]) -> None:
    """`red/output_norm=none`: the named arm and each factor that is not at its first level; in a fraction `red/ACE`."""
    short = short_names(list(factors))
    for cell in cells:
        cell.labels = {level.factor: level.label for level in cell.levels}
        first = {name: levels[0].label for name, levels in factors.items()}
        moved = [name for name, label in cell.labels.items() if label != first[name]]
        if moved and study.grid and study.grid.fraction:  # of so many factors, too long to be read otherwise
            parts = ["".join(letter for letter, name in zip(LETTERS, factors, strict=False) if name in moved)]
        else:
            parts = [f"{short[name]}={cell.labels[name]}" for name in moved]
        # A study without named arms calls its cells by what is switched.
        cell.name = "/".join([cell.group, *parts])


def _baseline_of(
    cell: Cell,
    cells: list[Cell],
    baselines_by_arm: Mapping[str, str],
    compare: Compare,
    factors: dict[str, list[Level]],
) -> str | None:
    """The baseline of an arm: at its own levels of the `stratify_by` factors, and the first level of all others."""
    group = baselines_by_arm.get(cell.group)
    wanted = {name: levels[0].label for name, levels in factors.items()}
    wanted |= {name: cell.labels[name] for name in compare.stratify_by if name in cell.labels}
    for other in cells:
        if other.group == group and (not other.labels or other.labels == wanted):
            return other.name
    return None
