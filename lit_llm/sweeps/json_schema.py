"""The JSON Schema of a sweep file, for editors."""

from __future__ import annotations

from typing import Any

from lit_llm.studies.json_schema import with_keys
from lit_llm.sweeps.schema import Sweep


def sweep_schema() -> dict[str, Any]:
    """Schema of a sweep file; `base` and the arms hold the keys of an experiment."""
    return with_keys(Sweep.model_json_schema(), {})
