"""What the audit has to know of a sweep: the keys that each arm is searched in, and the runs at their ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lit_llm.ablation.arms import SearchedKeys
from lit_llm.config.problems import InputError
from lit_llm.experiment.config import Experiment
from lit_llm.search.config import Sweep
from lit_llm.search.constraints import Constraint
from lit_llm.search.space import ArmSpace, Dimension, Point

_FREE = ("optimizer", "schedule", "clip_norm", "z_loss", "dropout", "stability")
"""Sections of `pretrain.training` that no budget depends on."""


def searched_keys(
    sweep: Sweep, spaces: Mapping[str, ArmSpace], constraints: Sequence[Constraint]
) -> dict[str, SearchedKeys]:
    """{arm: what is searched in it}."""
    known = [goal.known_before for goal in sweep.optimize]
    bounds = {name: constraint.text for constraint in constraints for name in constraint.names}
    return {
        name: SearchedKeys(_ranges(space), () if all(known) else tuple(_ends(space)), bounds=bounds, traded=any(known))
        for name, space in spaces.items()
    }


def _ranges(space: ArmSpace) -> dict[str, str]:
    """{key: its values}, those of several parameters in one line."""
    found: dict[str, list[str]] = {}
    for dimension in space.dimensions:
        values = dimension.parameter
        given = getattr(values, values.kind)
        said = ", ".join(map(str, dimension.probes if values.kind == "choice" else given))
        for path in dimension.paths:
            found.setdefault(path, []).append(f"{values.kind} [{said}]")
    return {path: " and ".join(sorted(said)) for path, said in found.items()}


def _ends(space: ArmSpace) -> Iterator[tuple[str, Experiment]]:
    """Runs at the ends of what may move a budget, and with all such ranges at their lowest and highest."""
    moving = [dimension for dimension in space.dimensions if not _is_free(dimension)]
    points: list[tuple[str, Point]] = []
    for dimension in moving:
        points += [(dimension.paths[0], space.with_value(dimension, value)[0]) for value in dimension.probes]
    whole = [dimension for dimension in moving if not dimension.parameter.when]
    if len(whole) > 1:
        names = " with ".join(dimension.paths[0] for dimension in whole)
        points += [(names, {dimension.name: dimension.probes[end] for dimension in whole}) for end in (0, -1)]
    for key, point in points:
        try:
            yield key, space.experiment(point)
        except InputError:  # what does not go together is no trial either
            continue


def _is_free(dimension: Dimension) -> bool:
    return all(path.startswith(tuple(f"pretrain.training.{section}" for section in _FREE)) for path in dimension.paths)
