"""JSON Schemas for editors."""

from __future__ import annotations

from typing import Any

from lit_llm.experiment.schema import EXTENDS, Experiment
from lit_llm.studies.schema import Study

_GRID = {"description": "false: this arm stays out of the grid.", "type": "boolean"}
_BASELINE = {"description": "The arm that this one is compared with; its own name for a baseline.", "type": "string"}


def experiment_schema() -> dict[str, Any]:
    """JSON Schema of an experiment file. All keys are optional, as `extends` may supply them."""
    schema: dict[str, Any] = _all_optional(Experiment.model_json_schema())
    schema["properties"]["extends"] = EXTENDS
    return schema


def study_schema() -> dict[str, Any]:
    """JSON Schema of a study file, in which `base` and the arms hold the keys of an experiment."""
    study = with_keys(Study.model_json_schema(), {"grid": _GRID, "baseline": _BASELINE})
    # The study named by `extends_study` supplies what is absent.
    study["anyOf"] = [{"required": [key]} for key in ("question", "extends_study")]
    study["required"] = ["study"]
    return study


def with_keys(schema: dict[str, Any], of_arm: dict[str, Any]) -> dict[str, Any]:
    """Add the keys of an experiment to the `base` and `arms` of a file's schema, and `of_arm` to the arms."""
    experiment = _all_optional(Experiment.model_json_schema())
    definitions = schema.get("$defs", {}) | experiment.pop("$defs")
    arm = experiment | {"properties": experiment["properties"] | {"extends": EXTENDS, **of_arm}}
    schema["$defs"] = definitions | {"Keys": experiment, "ArmKeys": arm}
    described = schema["properties"]
    described["base"] = {"description": described["base"]["description"], "$ref": "#/$defs/Keys"}
    described["arms"]["additionalProperties"] = {"anyOf": [{"$ref": "#/$defs/ArmKeys"}, {"type": "null"}]}
    return schema


def _all_optional(schema: Any) -> Any:
    """The schema without `required`: a layer of a configuration holds only its changes."""
    if isinstance(schema, dict):
        return {key: _all_optional(value) for key, value in schema.items() if key != "required"}
    return [_all_optional(item) for item in schema] if isinstance(schema, list) else schema
