"""The check of `compare.labels`: every name in it is one of the study's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lit_llm.config.metrics import GRAD_NORM, TRAIN_LOSS
from lit_llm.config.problems import InputError, Problem, did_you_mean
from lit_llm.config.tree import ConfigNode
from lit_llm.studies.compared_metrics import METRICS, is_metric
from lit_llm.studies.design.factors import short_names

COURSES = (TRAIN_LOSS.name, GRAD_NORM.name)
"""Metrics that are drawn over a training, never compared."""


def check_labels(
    labels: Mapping[str, str], arms: Sequence[str], factors: Mapping[str, Sequence[str]], document: ConfigNode
) -> None:
    """Raise InputError for names that the study does not have, empty labels, and arms with the same label.

    arms: names of arms and of named arms; factors: {key: labels of its levels}.
    """
    names = [*arms, *_factor_names(factors)]
    metrics = [*METRICS, *COURSES]
    problems = []
    for name, label in labels.items():
        where = document.location_of(["compare", "labels", name])
        if not label.strip():
            problems.append(Problem("a label needs a letter at least", f"compare.labels.{name}", where))
        elif name not in names and name not in COURSES and not is_metric(name):
            near = did_you_mean(name, metrics if "/" in name and "=" not in name else names)
            message = f"{name!r} is no arm, factor, level or metric of this study{near}"
            problems.append(Problem(message, "compare.labels", where))
    for name, other in _same_labels(labels, arms):
        where = document.location_of(["compare", "labels", name])
        message = f"{name!r} and {other!r} would both be printed as {labels[name]!r}; give each arm a name of its own"
        problems.append(Problem(message, "compare.labels", where))
    if problems:
        raise InputError(*problems)


def _same_labels(labels: Mapping[str, str], arms: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of arms with the same printed name."""
    seen: dict[str, str] = {}
    for arm in arms:
        printed = labels.get(arm, arm)
        other = seen.setdefault(printed, arm)
        if other != arm:
            yield (arm, other) if arm in labels else (other, arm)


def _factor_names(factors: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Keys of factors, their short names, levels, and `factor=level` names."""
    for key, short in short_names(list(factors)).items():
        yield from (key, short, *factors[key])
        yield from (f"{name}={level}" for name in (key, short) for level in factors[key])
