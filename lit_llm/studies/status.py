"""State of each run of a study, and the last steps that a running stage has logged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lit_llm.runs.stage_graph import StageNode
from lit_llm.runs.trainer_parts import in_force
from lit_llm.store.store import FINAL, Stage, metric_lines
from lit_llm.studies.runs import Run


def left_out(runs: Sequence[Run]) -> list[str]:
    """Sentences on the runs that are left out for a damaged file, with the file and the next step."""
    statuses = [(run, run.status()) for run in runs]
    return [f"{run.name} is left out: {status['error']}" for run, status in statuses if status.get("damaged")]


def status_rows(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """The objects that `status --json` prints, one for each stage of each run. Keys may be added, none is renamed."""
    trainer = in_force()  # once, as there may be thousands of runs
    for run in runs:
        for step in run.steps:
            node, stage = step.node, step.stage
            status = stage.status()
            result = status if status["state"] in FINAL else None
            last = (0, {}) if status.get("metrics") and "steps" in status else last_metrics(stage)
            yield {
                "arm": run.arm.name,
                "seed": run.seed,
                "stage": node.name if node.source else node.kind,
                "after": node.after if node.kind == "evaluate" else None,
                "evaluation": node.evaluation or None,
                "state": status["state"],
                "host": status.get("host") if status["state"] == "running" else None,
                "fingerprint": node.fingerprint,
                "run_id": f"{run.arm.name}/{run.seed}/{run.last.fingerprint}",
                "metrics": status.get("metrics") or last[1],
                "error": status.get("error"),
                "retries": len(stage.retries()),
                "notes": status.get("notes", []),
                "step": status.get("steps", last[0]),
                "max_steps": max_steps(run, node),
                "stale": run.stale_at(step, result, trainer),
                "log": str(stage.log_file) if stage.log_file.exists() else None,
            }


def max_steps(run: Run, node: StageNode) -> int:
    """Steps of a stage; for an evaluation, those of the stage before it."""
    return int((node.source or run.experiment).section(node.after).training.max_steps)


def last_metrics(stage: Stage) -> tuple[int, dict[str, float]]:
    """(last step, last value of each metric) at the end of metrics.jsonl."""
    return merged(last_lines(stage))


def merged(lines: Sequence[Mapping[str, Any]]) -> tuple[int, dict[str, float]]:
    """(last step, last value of each metric) of lines of metrics.jsonl."""
    metrics: dict[str, float] = {}
    for line in lines:
        metrics |= line["metrics"]
    return (int(lines[-1]["step"]) if lines else 0), metrics


def last_lines(stage: Stage) -> list[dict[str, Any]]:
    """The complete lines in the last 8 KiB of metrics.jsonl."""
    try:
        with stage.metrics_file.open("rb") as file:
            begin = max(0, file.seek(0, 2) - 8192)
            file.seek(begin)
            lines = file.read().split(b"\n")[1 if begin else 0 : -1]  # neither half a first line nor half a last one
    except OSError:
        return []
    return metric_lines(lines)
