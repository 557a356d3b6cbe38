"""Search space of one arm: its parameters with their conditions, and the experiment of each point."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from typing import Any

from lit_llm.config.problems import InputError, Problem, SourceLocation, did_you_mean, some
from lit_llm.config.tree import KIND, ConfigNode, at, leaves, merge_all, tree, under
from lit_llm.experiment.load import changed
from lit_llm.experiment.schema import Experiment
from lit_llm.studies.design.factors import Level, label_of, levels_of
from lit_llm.studies.load import Arm
from lit_llm.sweeps.schema import Parameter, Sweep

BRANCHES = "pretrain.training.schedule.branch_at"
"""The key by which experiments share a trunk, which trials of a sweep do not."""

Value = float | int | str
"""Value of a parameter at a point: a number, or the label of a choice."""
Point = dict[str, Value]
"""{parameter: value} of all parameters whose conditions hold."""


_MOST_PARTS = 64
"""Most combinations of conditions that are checked."""


@dataclass(frozen=True, eq=False)
class Dimension:
    """One parameter of the search space."""

    name: str
    parameter: Parameter
    levels: tuple[Level, ...] = ()
    """Levels of a choice; empty for a range."""
    location: SourceLocation | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """The keys that it may set."""
        if self.levels:
            return tuple(dict.fromkeys(path for level in self.levels for path in level.paths))
        return (self.parameter.key or self.name,)

    def keys(self, value: Value) -> ConfigNode:
        """The keys that a value sets, as a tree."""
        if self.levels:
            return next(level.keys for level in self.levels if level.label == value)
        return at(self.paths[0], tree(self._on_grid(value), self.location))

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest of a number; the highest is the last that a step reaches."""
        low, high = getattr(self.parameter, self.parameter.kind)
        if self.parameter.step is None:
            return low, high
        start, step = (Decimal(str(number)) for number in (low, self.parameter.step))
        return low, float(start + (Decimal(str(high)) - start) // step * step)

    def _on_grid(self, value: Any) -> Any:
        """A number rounded to its step: 0.3 for 0.30000000000000004, the rounded sum of steps of 0.1."""
        if self.parameter.step is None or self.integer_valued:
            return value
        low, step = self.bounds[0], self.parameter.step
        return float(Decimal(str(low)) + round((value - low) / step) * Decimal(str(step)))

    def fulfilling(self, name: str, wanted: Any) -> list[Value]:
        """Values under which a condition on `name` (the dimension's name, or a key that it sets) holds."""
        options = wanted if isinstance(wanted, list | tuple) else [wanted]
        if not self.levels:
            return [self.stored(option) for option in options if self.problem(option) is None]
        labels: list[Value] = []
        for level in self.levels:
            values: dict[str, Any] = {}
            _set_values(values, level.keys)
            labelled = name == self.name and level.label in {label_of(option) for option in (wanted, *options)}
            if labelled or (name in values and _matches(values[name], wanted)):
                labels.append(level.label)
        return labels

    @property
    def integer_valued(self) -> bool:
        return self.parameter.kind in ("int", "log_int")

    @property
    def probes(self) -> tuple[Value, ...]:
        """Values that represent all: every value of a choice, the ends of a range."""
        if self.levels:
            return tuple(level.label for level in self.levels)
        return tuple(int(end) if self.integer_valued else end for end in self.bounds)

    def values(self, most: int) -> list[Value] | None:
        """All values; None where there are more than `most`."""
        if self.levels:
            return list(self.probes)
        low, high = self.bounds
        step = self.parameter.step or (1 if self.integer_valued else None)
        count = math.inf if step is None else round((high - low) / step) + 1
        if count > most or step is None:
            return None
        return [
            int(low + step * n) if self.integer_valued else self._on_grid(low + step * n) for n in range(int(count))
        ]

    def between(self, low: Any, high: Any) -> Value:
        """The value of a range halfway between two of its values; one of the two where none lies between them."""
        step = self.parameter.step or (1 if self.integer_valued else None)
        if step is None:
            return float((low + high) / 2)
        value = low + int((high - low) / step / 2) * step
        return int(value) if self.integer_valued else float(self._on_grid(value))

    def problem(self, value: Any) -> str | None:
        """Error message for an invalid value from a file; None for a valid one."""
        if self.levels:
            labels = [level.label for level in self.levels]
            label = label_of(value)
            return None if label in labels else f"{label!r} is none of its values{did_you_mean(label, labels)}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"{value!r} is no number"
        low, high = self.bounds
        if not low <= value <= high:
            return f"{value!r} lies outside of {low!r} to {high!r}"
        step = self.parameter.step or (1 if self.integer_valued else None)
        if step and not math.isclose((value - low) / step, round((value - low) / step), abs_tol=1e-9):
            return f"{value!r} lies between two steps of {step:g} from {low!r}"
        return None

    def stored(self, value: Any) -> Value:
        """The form that a value from a file has in a point."""
        if self.levels:
            return label_of(value)
        return int(value) if self.integer_valued else float(self._on_grid(value))


@dataclass(frozen=True)
class ArmSpace:
    """Search space of one arm."""

    arm: Arm
    dimensions: tuple[Dimension, ...]
    """Dimensions whose conditions can hold in this arm, each after the dimensions in its condition."""

    def draw(self, suggest: Callable[[Dimension], Value]) -> Point:
        """A point with the value of `suggest` for each parameter whose conditions hold, in order of `dimensions`."""
        point: Point = {}
        values = dict(self._arm_values)
        for dimension in self.dimensions:
            if _holds(dimension.parameter.when, point, values):
                point[dimension.name] = chosen = suggest(dimension)
                _set_values(values, dimension.keys(chosen))
        return point

    def keys(self, point: Point) -> ConfigNode:
        """Tree of the keys that a point sets. A `kind` comes first, since it replaces its section."""
        nodes = [self.dimension(name).keys(value) for name, value in point.items()]
        paths = [(path, value) for node in nodes for path, value in _leaf_nodes(node)]
        return merge_all(at(path, node) for path, node in sorted(paths, key=lambda item: not _is_kind(item[0])))

    def experiment(self, point: Point) -> Experiment:
        """The experiment at a point. Raises InputError for values that cannot be combined."""
        return changed(self.arm.experiment, self.keys(point))

    def dimension(self, name: str) -> Dimension:
        return next(dimension for dimension in self.dimensions if dimension.name == name)

    @cached_property
    def default_point(self) -> Point:
        """The arm's setting in the file as a point. Raises InputError where the space does not contain it."""
        problems: list[Problem] = []

        def suggest(dimension: Dimension) -> Value:
            value = self._default_value(dimension)
            if isinstance(value, Problem):
                problems.append(value)
                return dimension.probes[0]
            return value

        point = self.draw(suggest)
        if problems:
            raise InputError(*problems)
        return point

    def _default_value(self, dimension: Dimension) -> Value | Problem:
        where = f"space.{dimension.name}"
        if dimension.levels:
            for level in dimension.levels:
                try:
                    if changed(self.arm.experiment, level.keys) == self.arm.experiment:
                        return level.label
                except InputError:
                    continue
            message = f"the default setting of the arm {self.arm.name} is none of these; it is always tried, so add it"
            return Problem(message, where, dimension.location)
        value = self._arm_value(dimension.paths[0])
        if problem := dimension.problem(value):
            wrong = problem if value is not None else "it is not set"
            always = f"in the arm {self.arm.name}, whose default setting is always tried"
            message = f"{always}, {wrong}; widen it or set `base`"
            return Problem(message, where, dimension.location)
        return dimension.stored(value)

    def _arm_value(self, path: str) -> Any:
        """The arm's value at a path; None where it has none. A dump leaves out some defaults, which sections have."""
        if path in self._arm_values:
            return self._arm_values[path]
        value: Any = self.arm.experiment
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else getattr(value, key, None)
        return value

    @cached_property
    def _arm_values(self) -> Mapping[str, Any]:
        return dict(leaves(self.arm.flat))

    def every_point(self, most: int) -> list[Point] | None:
        """All points of a finite space; None where there are more than `most`, or infinitely many."""
        points: list[list[Value]] = [[]]
        complete: list[Point] = []
        while points:
            begun = points.pop()
            fixed, branches = iter(begun), [list[Value]()]

            def suggest(dimension: Dimension, fixed: Iterator[Value] = fixed, branches: list[Any] = branches) -> Value:
                for value in fixed:
                    return value
                values = dimension.values(most)
                if values is None:
                    raise OverflowError
                branches[0] = branches[0] or values
                return values[0]

            try:
                point = self.draw(suggest)
            except OverflowError:
                return None
            if branches[0]:
                points += [[*begun, value] for value in reversed(branches[0])]
            else:
                complete.append(point)
            if len(complete) + len(points) > most:
                return None
        return complete

    def with_value(self, dimension: Dimension, value: Value) -> list[Point]:
        """Partial points with this value, one for each combination of other values that fulfils its conditions.

        All other parameters keep the arm's values.
        """
        points: list[Point] = [{dimension.name: value}]
        waiting = [dimension]
        while waiting:
            for name, wanted in waiting.pop().parameter.when.items():
                for other in self.dimensions:
                    decides = name == other.name or any(under(name, path) for path in other.paths)
                    if decides and other.name not in points[0] and (options := other.fulfilling(name, wanted)):
                        points = [{**point, other.name: option} for point in points for option in options][:_MOST_PARTS]
                        waiting.append(other)
        return points


def dimensions_of(sweep: Sweep, document: ConfigNode, problems: list[Problem]) -> list[Dimension]:
    """The parameters with their source locations, each after the parameters in its conditions."""
    dimensions = []
    for name, parameter in sweep.space.items():
        node = document.find(["space", name])
        assert node is not None
        levels: list[Level] = []
        if parameter.kind == "choice":
            choice = node.find(["choice"])
            assert choice is not None
            where = f"space.{name}.choice"
            levels = levels_of(name, choice, where, problems, parameter.key)
            labels = [level.label for level in levels]
            for label in dict.fromkeys(label for label in labels if labels.count(label) > 1):
                problems.append(Problem(f"two values are called {label!r}; name them", where, choice.location))
        dimensions.append(Dimension(name, parameter, tuple(levels), node.location))
    problems += _key_conflicts(dimensions)
    graph = {one.name: _deciding_parameters(one.parameter.when, dimensions) for one in dimensions}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        circle = error.args[1]
        location = next(dimension.location for dimension in dimensions if dimension.name == circle[0])
        problems.append(Problem(f"conditions in a circle: {' -> '.join(circle)}", f"space.{circle[0]}.when", location))
        return dimensions
    return sorted(dimensions, key=lambda dimension: order.index(dimension.name))


def space_of(arm: Arm, dimensions: Sequence[Dimension]) -> ArmSpace:
    """The space of an arm, with the parameters that can be searched in it."""
    values = dict(leaves(arm.flat))
    kept: list[Dimension] = []

    def possible(name: str, wanted: Any) -> bool:
        if name in values and _matches(values[name], wanted):
            return True
        return any(
            other.fulfilling(name, wanted) for other in kept if other.name in _deciding_parameters([name], dimensions)
        )

    for dimension in dimensions:
        if all(possible(name, wanted) for name, wanted in dimension.parameter.when.items()):
            kept.append(dimension)
    return ArmSpace(arm, tuple(kept))


def unknown_conditions(dimensions: Sequence[Dimension], spaces: Sequence[ArmSpace]) -> Iterator[Problem]:
    """Problems of conditions on names that are neither searched nor a key, and of conditions that never hold."""
    searched = {one for space in spaces for one in space.dimensions}
    keys = {key for space in spaces for key, _ in leaves(space.arm.flat)}
    names = {dimension.name for dimension in dimensions}
    for dimension in dimensions:
        for name in dimension.parameter.when:
            if name not in keys | names and not any(name in other.paths for other in dimensions):
                hint = did_you_mean(name, sorted(names | keys)) if len(name) > 3 else ""
                message = f"{name!r} is neither searched nor a key of an arm{hint}"
                yield Problem(message, f"space.{dimension.name}.when", dimension.location)
                break
        else:
            if dimension not in searched:
                message = "no arm and no searched value fulfils this condition"
                yield Problem(message, f"space.{dimension.name}.when", dimension.location)


def wrong_values(spaces: Sequence[ArmSpace]) -> Iterator[Problem]:
    """Problems of values that an arm can never have: keys that do not exist, or values that the schema refuses."""
    for dimension in dict.fromkeys(dimension for space in spaces for dimension in space.dimensions):
        having = [space for space in spaces if dimension in space.dimensions]
        wrong_by_arm = {space.arm.name: _impossible_values(space, dimension) for space in having}
        absent = [
            name for name, wrong in wrong_by_arm.items() if any(p.message.startswith("unknown key") for _, p in wrong)
        ]
        if absent and len(absent) < len(spaces):
            message = f"a key that the arm {some(absent)} does not have; add a `when` that holds in the others alone"
            yield Problem(message, f"space.{dimension.name}", dimension.location)
            continue
        for value, problem in dict.fromkeys(pair for wrong in wrong_by_arm.values() for pair in wrong):
            prefix = "" if problem.message.startswith("unknown key") else f"{value!r} is not possible: "
            yield Problem(f"{prefix}{problem.key}: {problem.message}", f"space.{dimension.name}", dimension.location)


def _impossible_values(space: ArmSpace, dimension: Dimension) -> list[tuple[Value, Problem]]:
    """Values of a choice, or ends of a range, that fit no checked setting of the other parameters, with the problem."""
    wrong: list[tuple[Value, Problem]] = []
    for value in dimension.probes:
        points = space.with_value(dimension, value)
        problems = _point_problems(space, points[0])
        others = [
            (other.name, one) for other in space.dimensions if other.name not in points[0] for one in other.probes
        ]
        candidates = ({**point, name: one} for point in points for name, one in [(dimension.name, value), *others])
        if problems and all(_point_problems(space, point) for point in candidates):
            wrong += [(value, problem) for problem in problems]
    return wrong


def _point_problems(space: ArmSpace, point: Point) -> list[Problem]:
    """Problems of a point's experiment; empty for a valid one."""
    try:
        experiment = space.experiment(point)
    except InputError as error:
        return error.problems
    if experiment.pretrain.training.trunks and not space.arm.experiment.pretrain.training.trunks:
        return [Problem("the trials of a sweep share no trunk; leave it out", BRANCHES)]
    return []


def _key_conflicts(dimensions: Sequence[Dimension]) -> Iterator[Problem]:
    """Problems of parameters that could set the same key at one point."""
    for index, dimension in enumerate(dimensions):
        for other in dimensions[:index]:
            shared = [p for p in dimension.paths for q in other.paths if under(p, q) or under(q, p)]
            if shared and not _exclude_each_other(dimension.parameter.when, other.parameter.when):
                message = f"{other.name!r} sets {shared[0]} too; give each a `when` of its own, with values apart"
                yield Problem(message, f"space.{dimension.name}", dimension.location)


def _exclude_each_other(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """True where two conditions exclude each other."""

    def options(wanted: Any) -> set[str]:
        return {_canonical_json(item) for item in (wanted if isinstance(wanted, list | tuple) else [wanted])}

    return any(not options(left[name]) & options(right[name]) for name in left.keys() & right.keys())


def _deciding_parameters(names: Iterable[str], dimensions: Sequence[Dimension]) -> set[str]:
    """Names of the parameters that decide conditions on these names."""
    return {
        other.name
        for other in dimensions
        if any(name == other.name or any(under(name, path) for path in other.paths) for name in names)
    }


def _holds(when: Mapping[str, Any], point: Point, values: Mapping[str, Any]) -> bool:
    return all(_matches(values[name] if name in values else point.get(name), wanted) for name, wanted in when.items())


def _matches(value: Any, wanted: Any) -> bool:
    """True where a value equals the wanted one, or one of a list of wanted values."""
    options = wanted if isinstance(wanted, list | tuple) else ()
    return _canonical_json(value) in {_canonical_json(wanted), *map(_canonical_json, options)}


def _canonical_json(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True)


def _set_values(values: dict[str, Any], keys: ConfigNode) -> None:
    """Set the keys of a tree in `values`; `optimizer: muon` is short for `optimizer: {kind: muon}`."""
    for path, value in leaves(keys.plain()):
        values[path] = value
        if isinstance(value, str) and f"{path}.{KIND}" in values:
            values[f"{path}.{KIND}"] = value


def _leaf_nodes(node: ConfigNode, prefix: str = "") -> Iterator[tuple[str, ConfigNode]]:
    if isinstance(node.value, dict) and node.value:
        for key, item in node.value.items():
            yield from _leaf_nodes(item, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, node


def _is_kind(path: str) -> bool:
    return path.rpartition(".")[2] == KIND
