"""The runs of a study, and what the store knows of each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lit_llm.ablation.arms import Ablation, Arm
from lit_llm.ablation.layouts import layouts
from lit_llm.analysis.comparison import Comparison, RunResult, compare
from lit_llm.config.tree import leaves
from lit_llm.experiment.config import Experiment
from lit_llm.experiment.identity import pretrain_fingerprint, provenance, same_origin
from lit_llm.experiment.run import experiment_yaml
from lit_llm.tracking.store import Stage, Store


@dataclass(frozen=True)
class Run:
    """An arm with a seed."""

    arm: Arm
    seed: int
    stage: Stage

    @property
    def name(self) -> str:
        return f"{self.arm.name}/seed {self.seed}"

    @property
    def experiment(self) -> Experiment:
        return self.arm.seeded(self.seed)

    @property
    def steps(self) -> int:
        return int(self.arm.experiment.pretrain.training.max_steps)

    @cached_property
    def params(self) -> dict[str, Any]:
        """The flattened configuration, and the levels of the factors."""
        levels = {f"arm.{name}": label for name, label in self.arm.levels.items()}
        return {**dict(leaves(self.experiment.model_dump(mode="json"))), **levels}

    @cached_property
    def config_yaml(self) -> str:
        return experiment_yaml(self.experiment)

    def stale(self) -> bool:
        """Whether its result is of another origin (code, device, threads, ...) than it would be now."""
        result = self.stage.result()
        return result is not None and not same_origin(result["provenance"], provenance(self.experiment))


def runs_of(ablation: Ablation, store: Store) -> list[Run]:
    """Every run, arm by arm."""
    return [
        Run(arm, seed, store.stage(pretrain_fingerprint(arm.seeded(seed))))
        for arm in ablation.arms
        for seed in ablation.study.seeds
    ]


def status_rows(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """What `status --json` prints for each run. Keys may be added, none is renamed."""
    for run in runs:
        status = run.stage.status()
        last = last_metrics(run.stage)
        yield {
            "arm": run.arm.name,
            "seed": run.seed,
            "stage": "pretrain",
            "state": status["state"],
            "fingerprint": run.stage.fingerprint,
            "run_id": f"{run.arm.name}/{run.seed}/{run.stage.fingerprint}",
            "metrics": status.get("metrics") or last[1],
            "error": status.get("error"),
            "step": status.get("steps", last[0]),
            "max_steps": run.steps,
            "stale": run.stale(),
            "log": str(run.stage.log_file) if run.stage.log_file.exists() else None,
        }


def last_metrics(stage: Stage) -> tuple[int, dict[str, float]]:
    """(step, metrics) by the file's end: the last step, and of each metric the last value that stands there."""
    try:
        with stage.metrics_file.open("rb") as file:
            begin = max(0, file.seek(0, 2) - 8192)
            file.seek(begin)
            lines = file.read().split(b"\n")[1 if begin else 0 : -1]  # neither half a first line nor half a last one
        found = [json.loads(line) for line in lines]
    except (FileNotFoundError, ValueError):
        return 0, {}
    metrics: dict[str, float] = {}
    for line in found:
        metrics |= line["metrics"]
    return (int(found[-1]["step"]) if found else 0), metrics


def comparison_of(ablation: Ablation, runs: Sequence[Run]) -> Comparison:
    """The comparison of whatever is finished."""
    results = [
        RunResult(run.arm.name, run.arm.baseline, run.seed, run.stage.status()["state"], run.stage.result() or {})
        for run in runs
    ]
    return compare(results, ablation.study.compare.metric, layouts(ablation))
