"""The comparison of a study's arms: of its finished runs, with power laws, gate and Pareto front."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from lit_llm.config.metrics import FINETUNED
from lit_llm.experiment.cost import GENERATE, PROMPT, cost_of
from lit_llm.experiment.schema import Experiment
from lit_llm.experiment.training_sections import Trained
from lit_llm.statistics.comparison import Comparison, Design, compare
from lit_llm.statistics.estimates import joined
from lit_llm.statistics.interims import InterimAnalyses
from lit_llm.statistics.pareto import pareto_front
from lit_llm.statistics.run_results import RunResult, of_newest_provenance
from lit_llm.store.store import Store
from lit_llm.studies.analysis_plan import log_comparison, registration_of
from lit_llm.studies.estimable_effects import factor_layouts, layouts, lr_factors
from lit_llm.studies.interim_analyses import procedure_of
from lit_llm.studies.load import Ablation, Arm
from lit_llm.studies.runs import Run, interims_in, register_analysis
from lit_llm.studies.scaling import Measured, ended_runs, gate_of, scaling_of
from lit_llm.studies.schema import Figure


def comparison_of(ablation: Ablation, runs: Sequence[Run]) -> Comparison:
    """The comparison of the finished runs."""
    settings = ablation.study.compare
    results = [run.result() for run in runs]
    interims = interims_in(runs[0].last.store, ablation) if runs else None
    compared = compare(results, settings.metric, _design(ablation, interims), procedure_of(ablation))
    if settings.scaling is not None or settings.gate is not None:
        compared = _scaled(compared, ablation, runs, results)
    figure = settings.front
    if figure is None:
        return compared
    if figure == "training_seconds":
        costs = mean_training_seconds(results)
    else:
        costs = {arm: figures[figure] for arm, figures in costs_of(ablation.arms).items()}
    means = {row.arm: row.mean for row in compared.rows if row.arm in costs}
    unmeasured = [row.arm for row in compared.rows if row.mean is not None and row.arm not in costs]
    notes = [f"without measured seconds of training, so not on the front: {joined(unmeasured)}"] * bool(unmeasured)
    front = pareto_front(figure, compared.metric, costs, means)
    return replace(compared, front=front, notes=(*compared.notes, *notes))


def note_comparison(store: Store, ablation: Ablation, runs: Sequence[Run], comparison: Comparison) -> list[str]:
    """Log changes of the analysis and the comparison, for a study that has run in this store."""
    if registration_of(store.study(ablation.study.study)) is None:
        return []
    return [*register_analysis(store, ablation, runs), *log_comparison(store, ablation, comparison)]


def mean_training_seconds(results: Iterable[RunResult]) -> dict[str, float]:
    """{arm: mean seconds of training of its runs that measured them}."""
    seconds = dict[str, list[float]]()
    for run in results:
        if measured := run.result.get("training_seconds"):
            seconds.setdefault(run.arm, []).append(measured)
    return {arm: statistics.fmean(values) for arm, values in seconds.items()}


def _design(ablation: Ablation, interims: InterimAnalyses | None) -> Design:
    return Design(layouts(ablation), factor_layouts(ablation), lr_factors(ablation), interims)


def _scaled(compared: Comparison, ablation: Ablation, runs: Sequence[Run], results: Sequence[RunResult]) -> Comparison:
    """The comparison with power laws and gate, fitted to the runs of the rows whose schedules have ended."""
    settings = ablation.study.compare
    stage: Trained = "finetune" if settings.metric.startswith(FINETUNED) else "pretrain"
    # The rows' provenance: that of the ended runs alone may be an older one.
    compared_runs = {id(result) for result in of_newest_provenance(results, [])}
    pairs = [pair for pair in zip(runs, results, strict=True) if id(pair[1]) in compared_runs]
    measured = [
        Measured(result, run.arm.experiment.section(stage).training, step.stage.result() or {})
        for run, result in pairs
        if result.metric(settings.metric) is not None
        for step in run.steps
        if step.node.kind == stage and not step.node.source
    ]
    ended, refused = ended_runs(measured)
    kept = [*ended, *(result for _, result in pairs if result.state_of(settings.metric) == "diverged")]
    laws = scaling_of(ablation, kept, settings.scaling) if settings.scaling else None
    gated = gate_of(ablation, kept, settings.gate) if settings.gate else None
    return replace(
        compared,
        scaling=laws and replace(laws, notes=(*refused, *laws.notes)),
        gate=gated and replace(gated, notes=(*refused, *gated.notes)),
    )


def costs_of(arms: Iterable[Arm]) -> dict[str, dict[Figure, float]]:
    """{arm: computed costs that a Pareto front can show}; arms that differ only in the optimiser share them."""
    costs, computed = dict[str, dict[Figure, float]](), dict[str, dict[Figure, float]]()
    free: Any = {"seed": True, "evaluate": True, "pretrain": {"training": {"optimizer": True}}}
    for arm in arms:
        key = arm.experiment.model_dump_json(exclude=free)
        if key not in computed:
            computed[key] = _costs(arm.experiment)
        costs[arm.name] = computed[key]
    return costs


def _costs(experiment: Experiment) -> dict[Figure, float]:
    """Costs of an experiment, with the prompt and answer lengths of its finetuning where it has one."""
    tuned = experiment.finetune
    prompt, answer = (tuned.data.input_length, tuned.data.target_length) if tuned else (PROMPT, GENERATE)
    cost = cost_of(experiment, prompt, answer)
    return {
        "inference_flops": prompt * cost.prefill_flops_per_token + answer * cost.decode_flops_per_token,
        "train_flops": cost.train_flops + cost.finetune_flops,
        "parameters": float(cost.parameters),
        "non_embedding_parameters": float(cost.non_embedding_parameters),
        "active_parameters": float(cost.active_parameters),
        "kv_cache_bytes": float(cost.cache.total(prompt, answer)),
    }
