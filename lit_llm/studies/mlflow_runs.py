"""MLflow records of a study and its runs: parameters, tags, descriptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_llm.config.hashing import fingerprint
from lit_llm.config.markup import code_span, markdown_text
from lit_llm.config.metrics import EVALUATED, FINETUNED, GRAD_NORM, TRAIN_LOSS
from lit_llm.runs.provenance import provenance_digest
from lit_llm.runs.stage_graph import validation_metric
from lit_llm.store.store import Store
from lit_llm.studies.plan import Plan
from lit_llm.studies.runs import Run
from lit_llm.tracking.mlflow_sync import RunRecord
from lit_llm.tracking.mlflow_views import COLOUR, Chart, column, experiment_tags

MOST_FACTORS = 6
"""Factors that are columns in MLflow."""


def record(run: Run, place: int = 0, colour: str = "") -> RunRecord:
    """The MLflow record of a run; `place` and `colour` are those of its arm in the study."""
    status = run.status()
    origins = [(step.stage.result() or {}).get("provenance") or run.provenance_of(step) for step in run.steps]
    digests = sorted({provenance_digest(origin) for origin in origins})
    done = [step.stage.result() for step in run.trained]
    latest: dict[str, Any] = next((result["provenance"] for result in reversed(done) if result), {})
    return RunRecord(
        arm=run.arm.name,
        seed=run.seed,
        place=place,
        # The last trained stage: an evaluation that is added later joins the existing run.
        fingerprint=run.trained[-1].node.fingerprint,
        state=status["state"],
        params=run.params,
        config_yaml=run.config_yaml,
        metrics=[(step.node.prefix, step.stage.metrics_file) for step in run.steps],  # a trunk's steps count once
        error=status.get("error"),
        tags={f"lit_llm.{key}": str(value) for key, value in latest.items() if key not in ("code", "weights")}
        | ({COLOUR: colour} if colour else {}),
        code=digests[0] if len(digests) == 1 else fingerprint(digests),
    )


def description(planned: Plan, store: Store) -> str:
    """The question, the arms and the command, in Markdown."""
    ablation = planned.ablation
    lines = [f"**{markdown_text(ablation.study.question)}**", ""]
    for arm in planned.arms:
        differs = markdown_text("; ".join(f"{key}: {old} → {new}" for key, (old, new) in arm.differs.items()))
        lines.append(f"- {code_span(arm.arm.name)}: {arm.cost.parameters:,} parameters{differs and f'; {differs}'}")
    return "\n".join([*lines, "", *_reproduce(planned, store)])


def description_with_tables(planned: Plan, folder: Path, store: Store) -> str:
    """The question with the tables in a finished study's folder, in Markdown; else the description."""
    tables = folder / "comparison.md"
    if not tables.exists():
        return description(planned, store)
    where = "Figures, all tables and `report.html` are among the artifacts of the study's own run."
    # The UI shows only the first line at first: the question, rather than the name.
    text = tables.read_text(encoding="utf-8").removeprefix(f"# {planned.ablation.study.study}\n").strip()
    return "\n".join([text, "", where, "", *_reproduce(planned, store)])


def _reproduce(planned: Plan, store: Store) -> list[str]:
    return ["```", planned.ablation.command("run", store), "```"]


def tags_of(planned: Plan, store: Store) -> dict[str, str]:
    """Tags that select the UI's columns and charts: metric before and after finetuning, factors, cost."""
    metric = planned.ablation.study.compare.metric
    tuned = any(arm.arm.experiment.finetune is not None for arm in planned.arms)
    before = metric.removeprefix(FINETUNED)
    metrics = [before, f"{FINETUNED}{before}"] if tuned else [metric]
    factors = list(dict.fromkeys(name for arm in planned.arms for name in arm.arm.levels))
    columns = [column("metrics", name) for name in metrics]
    columns += [column("params", f"arm.{name}") for name in factors[:MOST_FACTORS]]
    columns += [column("metrics", name) for name in (TRAIN_LOSS.name, "flops", "tokens_seen")]
    # An evaluation is measured once, so it has no curve.
    courses = [validation_metric(name) for name in metrics if EVALUATED not in name]
    courses += [TRAIN_LOSS.name, *[f"{FINETUNED}{TRAIN_LOSS.name}"] * tuned, GRAD_NORM.name]
    charts: list[Chart] = [*(("LINE", name) for name in courses), *(("SCATTER", name) for name in metrics)]
    return experiment_tags(description(planned, store), [*columns, column("tags", "lit_llm.state")], charts)
