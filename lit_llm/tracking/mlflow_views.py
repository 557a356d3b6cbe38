"""Tags of an experiment that configure MLflow's UI, as the UI of MLflow 3.17 itself writes them.

They set a kind (without it the UI opens on traces of a chat application), a description, and a saved view: columns and
order of the table, runs grouped by arm, and the first charts. A UI that does not know a tag shows its defaults.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

NOTE = "mlflow.note.content"
"""Markdown, of an experiment or of a run."""
ARM_COLUMN, SEED_COLUMN, ORDER = "arm", "seed", "lit_llm.order"
"""Tags that the view uses. A superseded child loses them, so that the view omits it."""
KEY = "arms"
VIEW = f"mlflow.sharedViewState.{KEY}"
CHARACTERS = 5000
"""Most characters of an experiment's tag in MLflow."""

COLOUR = "mlflow.runColor"
"""Tag with the colour of a run in all charts. The colour of a group is in the browser's memory, which no server can
set. Therefore charts show runs, and only the table has groups."""

Chart = tuple[Literal["LINE", "SCATTER"], str]
"""(kind of chart, metric): a curve over steps, or the last values over FLOPs. Their axes fit the data, unlike those of
MLflow's bar charts, which begin at zero."""
COST = "flops"
"""Metric on the x axis of scatter charts."""


def column(kind: Literal["tags", "metrics", "params"], name: str) -> str:
    return f"{kind}.`{name}`"


def experiment_tags(
    description: str, columns: Iterable[str], charts: Iterable[Chart], grouped: bool = True
) -> dict[str, str]:
    """Tags of an experiment. columns: those after arm and seed; grouped: by arm, with means over seeds."""
    groups = {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": ARM_COLUMN}]}
    arm, seed, name = column("tags", ARM_COLUMN), column("tags", SEED_COLUMN), "attributes.`Run Name`"
    chosen = [arm, seed, *columns]
    section = {"uuid": "study", "name": "study", "display": True, "columns": 2, "cardHeight": 300}
    cards = [
        {
            "uuid": f"{kind}-{metric}",
            "type": kind,
            "displayName": metric if kind == "LINE" else f"{metric} by {COST}",
            "metricSectionId": "study",
        }
        | {"runsCountToCompare": 100, "deleted": False, "isGenerated": False}
        | (_course(metric) if kind == "LINE" else _last(metric))
        for kind, metric in charts
    ]
    state = {
        "searchFilter": f"tags.{ARM_COLUMN} LIKE '%'",  # the children alone: grouping takes no parents
        "orderByKey": column("tags", ORDER),
        "orderByAsc": True,
        "groupBy": groups if grouped else None,
        "selectedColumns": chosen,
        "columnOrder": [name, *chosen, "duration", "runDateAndNestInfo"],
        "columnWidths": {name: 230, **dict.fromkeys(chosen, 115), arm: 90, seed: 60},
        "runsHiddenMode": "SHOW_ALL",  # else charts have the first ten
        "useGroupedValuesInCharts": False,
        "compareRunSections": [section],
        "compareRunCharts": cards,
        "isAccordionReordered": True,  # else the UI sorts its own sections before ours
    }
    view = {"name": "Arms" if grouped else "Trials", "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)}
    tags = {
        "mlflow.experimentKind": "custom_model_development",
        NOTE: cut(description, CHARACTERS),
        VIEW: json.dumps(view),
    }
    return {key: text for key, text in tags.items() if text and len(text) <= CHARACTERS}


def _course(metric: str) -> dict[str, Any]:
    """A line chart without the UI's smoothing."""
    return {"metricKey": metric, "displayPoints": False, "lineSmoothness": 0, "useGlobalLineSmoothing": False}


def _last(metric: str) -> dict[str, Any]:
    return {"xaxis": {"key": COST, "type": "METRIC"}, "yaxis": {"key": metric, "type": "METRIC"}}


def page(experiment: str, tags: Mapping[str, str] | Iterable[str], charts: bool = False) -> str:
    """Path of an experiment with these tags in the UI: its table, or its charts."""
    wanted = {"workflowType": "machine_learning"}
    if VIEW in tags:
        wanted["viewStateShareKey"] = KEY
    if charts:
        wanted["compareRunsMode"] = "CHART"
    return f"/#/experiments/{experiment}/runs?" + "&".join(f"{key}={value}" for key, value in wanted.items())


def cut(markdown: str, characters: int) -> str:
    """The first whole lines of a text that fit."""
    if len(markdown) <= characters:
        return markdown
    return markdown[: characters - 4].rpartition("\n")[0] + "\n..."
