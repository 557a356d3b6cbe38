"""Results without training: every run of a study with values that a test chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lit_llm.runs.stage_graph import validation_metric
from lit_llm.store.store import Store
from lit_llm.studies.load import Ablation
from lit_llm.studies.runs import Run

NLL = "test/target_nll"


def finish(
    ablation: Ablation,
    store: Store,
    values: Mapping[str, Sequence[float]],
    metric: str = NLL,
    validation: Mapping[str, Sequence[float]] | None = None,
    flops: float = 1e9,
) -> None:
    """Give the first runs of each arm a result, in the order of all its seeds. values: {arm: one for each seed}.

    validation: what the metric is on the validation split; the same as on the test split when None.
    """
    for arm in ablation.arms:
        pairs = zip(values[arm.name], (validation or values)[arm.name], strict=True)
        for seed, (value, validated) in zip(ablation.study.all_seeds, pairs, strict=False):
            stage = Run.of(arm, seed, store).last
            stage.folder.mkdir(parents=True, exist_ok=True)
            metrics = {metric: value, validation_metric(metric): validated}
            result = {"state": "done", "metrics": metrics, "parameters": 1000, "tokens": 5000, "flops": flops}
            stage.finish(result | {"steps": 12, "finished": 1.0, "seconds": {}, "provenance": {}})
