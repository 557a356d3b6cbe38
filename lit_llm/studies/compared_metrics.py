"""Names of the metrics that a study can compare its arms by."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic.config import JsonDict

from lit_llm.config.metrics import (
    ANSWER_ACCURACY,
    EVALUATED,
    FINETUNED,
    OF_SPLITS,
    OF_TRAINING,
    TARGET_NLL,
    on_test,
    on_validation,
)
from lit_llm.config.problems import did_you_mean
from lit_llm.config.section import config_error
from lit_llm.evaluation.config import EVALUATIONS

CHOSEN_BY = tuple(map(on_validation, OF_SPLITS))
"""Metrics of the validation split, by which choices are made."""
METRICS = (*map(on_test, OF_SPLITS), *CHOSEN_BY, *(metric.name for metric in OF_TRAINING))
OF_SOURCE = tuple(f"{on(metric)}/" for metric in (TARGET_NLL, ANSWER_ACCURACY) for on in (on_test, on_validation))
"""Beginnings of metrics of one source of a mixture, or of one task of instruction data, for both splits."""
_OF_OBJECTIVE = tuple(
    name(metric) for metric in OF_SPLITS if not metric.across_objectives for name in (on_test, on_validation)
)
"""Metrics of the pretraining alone, as instruction data has one objective."""


def _metric(name: str) -> str:
    base_metric = name.removeprefix(FINETUNED)
    evaluation = base_metric.removeprefix(EVALUATED).partition("/")
    if (
        name in METRICS
        or (base_metric in METRICS and base_metric not in _OF_OBJECTIVE)
        or base_metric.startswith(OF_SOURCE)
    ):
        return name
    if base_metric.startswith(EVALUATED) and evaluation[0] in EVALUATIONS and evaluation[2]:
        return name
    more = [*METRICS, *(f"{FINETUNED}{metric}" for metric in METRICS if metric not in _OF_OBJECTIVE)]
    evaluated = ", ".join(f"{EVALUATED}{evaluation}/..." for evaluation in EVALUATIONS)
    hint = did_you_mean(name, more if name.startswith(FINETUNED) else METRICS)
    raise config_error(
        ("", f"{name!r} is not possible{hint}; of evaluations: {evaluated}, each also after {FINETUNED}")
    )


_ONE_OF = "|".join(re.escape(name) for name in METRICS)
_SOURCES = "|".join(f"{begin}.+" for begin in OF_SOURCE)
_PATTERN = f"^({FINETUNED})?({_ONE_OF}|{_SOURCES}|{EVALUATED}({'|'.join(EVALUATIONS)})/.+)$"


def is_metric(name: str) -> bool:
    """True where a study can compare a metric of this name."""
    return re.fullmatch(_PATTERN, name) is not None


_SCHEMA: JsonDict = {"anyOf": [{"enum": [*METRICS]}, {"pattern": _PATTERN}]}
Metric = Annotated[str, AfterValidator(_metric), Field(json_schema_extra=_SCHEMA)]
