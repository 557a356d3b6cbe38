"""What MLflow's database in a store holds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from mlflow.tracking import MlflowClient


def mirrored(store: Path) -> Counter[str]:
    """{the last stage of a run: how many runs in MLflow say that they are it}."""
    client = MlflowClient(f"sqlite:///{store}/mlflow.db")
    found = [run for each in client.search_experiments() for run in client.search_runs([each.experiment_id])]
    return Counter(run.data.tags["lit_llm.fingerprint"] for run in found if "lit_llm.fingerprint" in run.data.tags)
