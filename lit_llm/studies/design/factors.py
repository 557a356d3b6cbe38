"""Factors and levels of a grid: read from a study, with their places in its file, and combined by its design."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lit_llm.config.problems import Problem, did_you_mean
from lit_llm.config.tree import ConfigNode, at, merge_all, tree
from lit_llm.studies.grid import Grid


@dataclass(frozen=True)
class Level:
    """One level of a factor."""

    factor: str
    label: str
    keys: ConfigNode
    """Keys of the experiment that the level sets, as a tree."""
    paths: tuple[str, ...]
    """The same keys, dotted."""


def read_factors(grid: Grid | None, document: ConfigNode, problems: list[Problem]) -> dict[str, list[Level]]:
    """{factor: levels}, with their places in the file. Adds to `problems` what is wrong, as a key of two factors."""
    factors: dict[str, list[Level]] = {}
    setters: dict[str, str] = {}
    for name in grid.factors if grid else ():
        node = document.find(["grid", "factors", name])
        assert node is not None
        location = node.location
        levels = levels_of(name, node, f"grid.factors.{name}", problems)
        distinct = levels  # paired factors may repeat a level
        if isinstance(node.value, list):
            values = [item.plain() for item in node.value]
            distinct = [level for index, level in enumerate(levels) if values[index] not in values[:index]]
        labels = [level.label for level in distinct]
        for label in dict.fromkeys(label for label in labels if labels.count(label) > 1):
            problems.append(Problem(f"two levels are called {label!r}; name them", f"grid.factors.{name}", location))
        for path in dict.fromkeys(path for level in levels for path in level.paths):
            other = setters.setdefault(path, name)
            nested = [
                p
                for p, setter in setters.items()
                if setter != name and (p.startswith(f"{path}.") or path.startswith(f"{p}."))
            ]
            if other != name or nested:
                clash = other if other != name else setters[nested[0]]
                problems.append(
                    Problem(f"the factors {clash!r} and {name!r} both set {path}", f"grid.factors.{name}", location)
                )
        factors[name] = levels
    for index, exclusion in enumerate(grid.exclude if grid else ()):
        where = document.location_of(["grid", "exclude", str(index)])
        for name, value in exclusion.items():
            if name not in factors:
                problems.append(Problem(f"unknown factor{did_you_mean(name, factors)}", f"grid.exclude.{name}", where))
            elif label_of(value) not in [level.label for level in factors[name]]:
                hint = did_you_mean(label_of(value), [level.label for level in factors[name]])
                problems.append(
                    Problem(f"{label_of(value)!r} is not a level of it{hint}", f"grid.exclude.{name}", where)
                )
    return factors


def levels_of(name: str, node: ConfigNode, where: str, problems: list[Problem], key: str | None = None) -> list[Level]:
    """The levels of one factor, from a list of values of one key or from named bundles of keys.

    key: the key that a list of values is for; the factor's name where None.
    where: the key of `node` in the file, for problems.
    """
    if isinstance(node.value, list):
        return [
            Level(
                name,
                label_of(item.plain()),
                at(key or name, tree(item, item.location or node.location)),
                (key or name,),
            )
            for item in node.value
        ]
    levels = []
    for label, bundle in node.value.items():
        if not isinstance(bundle.value, dict) or not bundle.value:
            problems.append(
                Problem("a named level is a mapping of keys to values", f"{where}.{label}", bundle.location)
            )
            continue
        keys = merge_all(at(path, value) for path, value in bundle.value.items())
        levels.append(Level(name, label, keys, tuple(bundle.value)))
    return levels


def combinations(grid: Grid | None, factors: dict[str, list[Level]]) -> Iterator[tuple[Level, ...]]:
    """The combinations of levels that the grid's design runs, the baseline's first, without excluded ones."""
    if grid is None:
        yield ()
        return
    columns = list(factors.values())
    if grid.design == "factorial":
        combined = list(itertools.product(*columns))
    elif grid.design == "paired":
        combined = list(zip(*columns, strict=True))
    elif fraction := grid.fraction:
        combined = [
            tuple(levels[number] for levels, number in zip(columns, numbers, strict=True))
            for numbers in fraction.combinations
        ]
    else:
        first = tuple(levels[0] for levels in columns)
        combined = [first]
        for index, levels in enumerate(columns):
            combined += [(*first[:index], level, *first[index + 1 :]) for level in levels[1:]]
    for combination in combined:
        labels = {level.factor: level.label for level in combination}
        if not any(all(labels[name] == label_of(value) for name, value in rule.items()) for rule in grid.exclude):
            yield combination


def label_of(value: Any) -> str:
    """The label of a level in an arm's name: `0.001`, `q+k`, `none`."""
    if isinstance(value, list | tuple):
        return "+".join(map(label_of, value)) or "none"
    if isinstance(value, Mapping):
        return ",".join(f"{key}={label_of(item)}" for key, item in value.items())
    if isinstance(value, bool | None):
        return str(value).lower() if value is not None else "null"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else str(value)
    return str(value)


class Printed(str):
    """Printed name of a factor that is no key, and so has no shorter ending."""


def short_names(factors: list[str]) -> dict[str, str]:
    """{factor: the shortest ending of its key that no other factor has}."""
    out = {}
    for factor in factors:
        parts = [factor] if isinstance(factor, Printed) else factor.split(".")
        for size in range(1, len(parts) + 1):
            ending = ".".join(parts[-size:])
            if sum(other == ending or other.endswith(f".{ending}") for other in factors) == 1:
                break
        out[factor] = ending
    return out
