"""Addresses of studies and runs in MLflow's UI."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from lit_llm.tracking.mlflow_database import connected
from lit_llm.tracking.mlflow_views import page

UI = "http://127.0.0.1:5000"
"""Default address of `lit-llm ui`."""


def run_addresses(database: Path, study: str) -> dict[tuple[str, str], str]:
    """{(arm, seed): address in the UI} of a study's runs in a store's own database; empty where there is none.

    Of several runs of one arm and seed, the newest counts.
    """
    query = (
        "SELECT arm.value, seed.value, runs.experiment_id, runs.run_uuid FROM runs "
        "JOIN experiments USING (experiment_id) "
        "JOIN tags arm ON arm.run_uuid = runs.run_uuid AND arm.key = 'lit_llm.arm' "
        "JOIN tags seed ON seed.run_uuid = runs.run_uuid AND seed.key = 'lit_llm.seed' "
        "WHERE experiments.name = ? AND runs.lifecycle_stage = 'active' ORDER BY runs.start_time"
    )
    rows = _query_rows(database, query, study)
    return {(arm, seed): f"{UI}/#/experiments/{experiment}/runs/{run}" for arm, seed, experiment, run in rows}


def study_page(database: Path, study: str) -> str:
    """Path of a study in the UI of a store's own database, without the server's address; '' where it is missing."""
    query = (
        "SELECT experiments.experiment_id, experiment_tags.key FROM experiments "
        "LEFT JOIN experiment_tags USING (experiment_id) "
        "WHERE experiments.name = ? AND experiments.lifecycle_stage = 'active'"
    )
    rows = _query_rows(database, query, study)
    return page(str(rows[0][0]), {key for _, key in rows}) if rows else ""


def _query_rows(database: Path, query: str, study: str) -> list[tuple[str, ...]]:
    """Rows of a query on sqlite, without MLflow, whose import takes seconds; empty without a database."""
    try:
        with connected(database.resolve(), read_only=True) as connection:
            return connection.execute(query, (study,)).fetchall()
    except sqlite3.Error:
        return []


def latest_study(studies: Path) -> str:
    """The study or sweep whose folder was written to last; '' where there is none."""
    folders = [folder for folder in studies.iterdir() if folder.is_dir()] if studies.is_dir() else []
    return max(folders, key=lambda folder: folder.stat().st_mtime).name if folders else ""
