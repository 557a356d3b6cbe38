"""State and result of each run of a study, and the numbers that a comparison takes from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_llm.evaluation.unit_losses import Units
from lit_llm.runs.provenance import COMPARABLE
from lit_llm.statistics.baselines import Noise
from lit_llm.statistics.document_noise import Influences, influence
from lit_llm.statistics.procedure import Procedure
from lit_llm.statistics.scaling.runs import ScalingRun


@dataclass(frozen=True)
class RunResult:
    """State and result of one arm with one seed."""

    arm: str
    baseline: str
    seed: int
    state: str
    result: Mapping[str, Any] = field(default_factory=dict)
    """result.json of the last training, with the metrics, the `initial` and the `origins` of all stages; empty while
    there is none."""
    states: Mapping[str, str] = field(default_factory=dict)
    """{prefix of the stage's metrics: its state}; where it is empty, `state` holds for all stages."""
    read_units: Callable[[str], Units | None] = field(default=lambda _: None, repr=False, compare=False)
    """Reads the units of a metric from the store."""

    def units(self, metric: str) -> Units | None:
        """{document, example or question: (sum of its losses, its weight)}, read anew with each call.

        The sum of the losses over the sum of the weights is the metric, or the logarithm of a perplexity. None where
        the run has no value or no records.
        """
        return None if self.metric(metric) is None else self.read_units(metric)

    def state_of(self, metric: str) -> str:
        """State of the stage that measures a metric: the failure of a later stage does not change it.

        A run whose training ended with a value that is not finite has diverged, whenever that was noticed.
        """
        state = self._stage_state(metric)
        return "diverged" if state == "done" and self.is_not_finite(metric) else state

    def is_not_finite(self, metric: str) -> bool:
        """True where the metric was measured and is not finite: null in a result."""
        measured = self.result.get("metrics", {})
        return metric in measured and (measured[metric] is None or not math.isfinite(measured[metric]))

    def _stage_state(self, metric: str) -> str:
        scopes = [scope for scope in self.states if metric.startswith(scope)]
        state = self.states[max(scopes, key=len)] if scopes else self.state
        # A stage never begins where an earlier one has failed or diverged.
        return self.state if state == "pending" else state

    def metric(self, name: str) -> float | None:
        value = self.result.get("metrics", {}).get(name) if self.state_of(name) == "done" else None
        return None if value is None else float(value)

    @property
    def origin(self) -> tuple[Any, ...]:
        """Part of the provenance in which compared runs have to agree."""
        return tuple({tuple(origin.get(key) for key in COMPARABLE): None for origin in self._origins})

    @property
    def outside_code(self) -> dict[str, str]:
        """{package: digest of its code} of the components from other packages."""
        return {package: code for origin in self._origins for package, code in (origin.get("components") or {}).items()}

    @property
    def devices(self) -> str:
        """Devices and strategy of its trainings, in words."""
        several = [origin for origin in self._origins if origin.get("devices", 1) > 1]
        return " and ".join(sorted({f"{o['devices']} devices ({o['strategy']})" for o in several})) or "one device"

    @property
    def _origins(self) -> list[dict[str, Any]]:
        return self.result.get("origins") or [self.result.get("provenance", {})]


def of_newest_provenance(runs: Sequence[RunResult], notes: list[str]) -> list[RunResult]:
    """The finished runs of the newest provenance, and of the newest code of each package that has components.

    Functions with an argument `kept` read these runs. notes: gets a sentence on the runs that are left out.
    """
    finished = [run for run in runs if run.result]
    in_order = sorted(finished, key=lambda run: run.result.get("finished", 0))
    outside = {package: digest for run in in_order for package, digest in run.outside_code.items()}
    newest = max(finished, key=lambda run: run.result.get("finished", 0)).origin if finished else ()
    kept = [run for run in finished if run.origin == newest and run.outside_code.items() <= outside.items()]
    if left_out := len(finished) - len(kept):
        notes.append(
            f"{left_out} result(s) of other code, device, threads or callbacks are left out; `lit-llm run STUDY "
            "--rerun stale` repeats them"
        )
    return kept


def values_by_arm(kept: Sequence[RunResult], arms: Sequence[str], metric: str) -> dict[str, dict[int, float]]:
    """{arm: {seed: value}} of the runs that have a value."""
    values: dict[str, dict[int, float]] = {arm: {} for arm in arms}
    for run in kept:
        if run.arm in values and (value := run.metric(metric)) is not None:
            values[run.arm][run.seed] = value
    return values


def noise_of_kept(kept: Sequence[RunResult], metric: str, procedure: Procedure = Procedure()) -> Noise:
    """Noise of a metric: the procedure's variance, and each document's influence."""
    return Noise(procedure.variance, _influences(kept, metric), procedure.families)


def _influences(kept: Sequence[RunResult], metric: str) -> Influences:
    """Influence of each document on the metric of each run that has recorded it."""
    exponential = "perplexity" in metric.split("/")
    return {
        (run.arm, run.seed): by_document
        for run in kept
        if run.metric(metric) is not None
        and (units := run.units(metric)) is not None
        and (by_document := influence(units, exponential)) is not None
    }


def missing_reason(run: RunResult, metric: str) -> str:
    """Reason why a run has no value in the comparison."""
    if run.state_of(metric) != "done":
        return run.state_of(metric)
    return "of other code or another device" if run.metric(metric) is not None else f"no {metric}"


def scaling_runs(
    kept: Sequence[RunResult], metric: str, groups: Mapping[str, str], models: Mapping[str, str]
) -> list[ScalingRun]:
    """Runs that have the metric. groups: {arm: its group}; models: {arm: its named arm}."""
    return [
        ScalingRun(
            groups[run.arm],
            run.result["flops"],
            run.result["parameters"],
            run.result["tokens"],
            loss,
            run.arm,
            run.seed,
            run.result.get("training_seconds"),
            models[run.arm],
        )
        for run in kept
        if (loss := run.metric(metric)) is not None
    ]


def lost_sizes(kept: Sequence[RunResult], metric: str, groups: Mapping[str, str]) -> dict[str, list[str]]:
    """{group: its arms of which a run diverged}. groups: {arm: its group}."""
    lost: dict[str, list[str]] = {}
    for arm in dict.fromkeys(run.arm for run in kept if run.state_of(metric) == "diverged"):
        lost.setdefault(groups[arm], []).append(arm)
    return lost
