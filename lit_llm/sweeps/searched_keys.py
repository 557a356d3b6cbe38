"""Input of the audit for a sweep: the keys that are searched in each arm, and the runs at the ends of their ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from lit_llm.config.problems import InputError
from lit_llm.experiment.schema import Experiment
from lit_llm.studies.load import SearchedKeys
from lit_llm.sweeps.schema import Sweep
from lit_llm.sweeps.space import ArmSpace, Dimension, Point

_FREE = (
    *("optimizer", "schedule", "clip_norm", "z_loss", "stability"),
    *("dropout", "attention_dropout", "feed_forward_dropout", "weight_averaging"),
)
"""Sections of `pretrain.training` on which no budget depends."""
_HALVINGS = 40
"""Most bisection steps to the last value of a range that the constraints permit."""


def searched_keys(
    sweep: Sweep, spaces: Mapping[str, ArmSpace], feasible: Callable[[Experiment], bool]
) -> dict[str, SearchedKeys]:
    """{arm: its searched keys}. feasible: whether an experiment satisfies the constraints of the sweep."""
    of_cost = [goal.is_cost_figure for goal in sweep.optimize]
    return {
        name: SearchedKeys(
            _ranges(space), () if all(of_cost) else tuple(_runs_at_ends(space, feasible)), traded=any(of_cost)
        )
        for name, space in spaces.items()
    }


def _ranges(space: ArmSpace) -> dict[str, str]:
    """{key: text of its values}; the values of several parameters are joined."""
    ranges: dict[str, list[str]] = {}
    for dimension in space.dimensions:
        values = dimension.parameter
        given = getattr(values, values.kind)
        texts = ", ".join(map(str, dimension.probes if values.kind == "choice" else given))
        for path in dimension.paths:
            ranges.setdefault(path, []).append(f"{values.kind} [{texts}]")
    return {path: " and ".join(sorted(texts)) for path, texts in ranges.items()}


def _runs_at_ends(space: ArmSpace, feasible: Callable[[Experiment], bool]) -> Iterator[tuple[str, Experiment]]:
    """Feasible runs at each end of every range that may change a budget, and at all lowest and all highest ends.

    Where the constraints exclude the end of a range, the run is at the last value before it that they permit.
    """
    moving = [dimension for dimension in space.dimensions if not _is_free(dimension)]
    points: list[tuple[str, Sequence[Dimension], Point]] = []
    for dimension in moving:
        for value in dimension.probes:
            points.append((dimension.paths[0], [dimension], space.with_value(dimension, value)[0]))
    whole = [dimension for dimension in moving if not dimension.parameter.when]
    if len(whole) > 1:
        names = " with ".join(dimension.paths[0] for dimension in whole)
        points += [(names, whole, {dimension.name: dimension.probes[end] for dimension in whole}) for end in (0, -1)]
    for key, dimensions, point in points:
        try:
            experiment = space.experiment(point)
            if not feasible(experiment):
                experiment = space.experiment(_nearest_feasible(space, dimensions, point, feasible))
        except InputError:  # an invalid combination, which no trial has
            continue
        if feasible(experiment):
            yield key, experiment


def _nearest_feasible(
    space: ArmSpace, dimensions: Sequence[Dimension], end: Point, feasible: Callable[[Experiment], bool]
) -> Point:
    """The point with each dimension in turn as near to an infeasible end as the constraints permit.

    Raises InputError where the arm's setting in the file is no point of the space."""

    def permitted(point: Point) -> bool:
        try:
            return feasible(space.experiment(point))
        except InputError:
            return False

    moved = {dimension.name for dimension in dimensions}
    point = {name: value for name, value in end.items() if name not in moved}  # values that conditions require
    for dimension in dimensions:
        low, high = space.default_point.get(dimension.name), end[dimension.name]
        if dimension.levels or low is None:
            continue  # a choice has no values between its levels
        if permitted({**point, dimension.name: high}):
            point[dimension.name] = high
            continue
        for _ in range(_HALVINGS):
            middle = dimension.between(low, high)
            if middle in (low, high):
                break
            low, high = (middle, high) if permitted({**point, dimension.name: middle}) else (low, middle)
        point[dimension.name] = low
    return point


def _is_free(dimension: Dimension) -> bool:
    return all(path.startswith(tuple(f"pretrain.training.{section}" for section in _FREE)) for path in dimension.paths)
