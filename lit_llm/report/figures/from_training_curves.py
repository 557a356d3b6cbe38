"""Figures from metrics.jsonl: losses and stability during training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from lit_llm.config.metrics import (
    BUSIEST_EXPERT,
    EXPERT_ENTROPY,
    FINETUNED,
    GRAD_NORM,
    LOSS_SPIKES,
    MAX_ATTENTION_LOGIT,
    SPLITS,
    TRAIN_LOSS,
)
from lit_llm.evaluation.config import primary_metric
from lit_llm.report import text
from lit_llm.report.figures.inputs import Drawn, FigureData, group_equal
from lit_llm.report.figures.lines import Line, Panel, line_figure, proportion, single
from lit_llm.report.figures.training_curves import AXES, places
from lit_llm.runs.stage_graph import validation_metric
from lit_llm.studies.runs import StoredStage


def learning(study: FigureData) -> Iterator[Drawn]:
    """The validation and the training loss of each stage that trains."""
    measured = validation_metric(study.metric).removeprefix(FINETUNED)
    if not measured.startswith(SPLITS["validation"]):
        measured = primary_metric(study.ablation.arms[0].experiment.model.family)
    for kind, training in (("pretrain", "pretraining"), ("finetune", "finetuning")):
        for metric in (measured, TRAIN_LOSS.name):
            panels = _panels(study, kind, metric)
            if panels:
                what = "validation" if metric == measured else "training"
                yield Drawn(
                    f"{what}_{kind}",
                    f"{metric} in the course of the {training}; {study.band}, {study.seeds}; thin lines: runs that are "
                    f"not finished; ×: where a run diverged{study.chosen}.",
                    line_figure(f"{metric} during {training}", panels, shared=bool(study.panel_factors)),
                )


UNITS = {"tokens": "{} tokens", "flops": "{} FLOPs"}
"""Formats of the tokens or FLOPs of a step, where they are the same for all arms."""


def _panels(study: FigureData, kind: str, metric: str) -> list[Panel]:
    """A panel for each axis over which the curves differ, and for each level of the panels' factor.

    Where every step takes the same tokens and FLOPs in all arms, the axis of steps names them in place of more panels.
    """
    by_axis: dict[str, list[Panel]] = {}
    for over, label in AXES.items():
        panels = [
            Panel(title, label, study.labelled(metric), lines)
            for title, arms in study.panels.items()
            if (lines := _curves(study, kind, metric, over, arms))
        ]
        if any(len(line.x) > 1 for panel in panels for lines in panel.lines.values() for line in lines):
            by_axis[over] = panels
    steps = by_axis.get("steps", [])
    takes = {over: ratio for over in UNITS if over in by_axis and (ratio := proportion(steps, by_axis[over]))}
    if takes:
        amounts = ", ".join(UNITS[over].format(text.short(ratio)) for over, ratio in takes.items())
        by_axis["steps"] = [replace(panel, xlabel=f"{panel.xlabel} (each {amounts})") for panel in steps]
    axes = [over for over in by_axis if over not in takes and not (over == "seconds" and study.panel_factors)]
    return [panel for over in axes for panel in by_axis[over]]


def _curves(study: FigureData, kind: str, metric: str, over: str, arms: Sequence[str]) -> dict[str, list[Line]]:
    """{series: lines}; arms that share their runs share a series."""
    stages = {
        # Without the pretrainings of its source models, whose curves belong to other arms.
        name: [
            step
            for run in study.runs_by_arm.get(name, ())
            for step in run.logged
            if step.node.kind != "evaluate" and step.node.after == kind and not step.node.place
        ]
        for name in arms
    }
    shared = group_equal({name: tuple(step.node.fingerprint for step in steps) for name, steps in stages.items()})
    curves = {study.panel_series(names): _lines(study, stages[names[0]], metric, over) for names in shared}
    return {label: lines for label, lines in curves.items() if lines}


def _lines(study: FigureData, steps: Sequence[StoredStage], metric: str, over: str) -> list[Line]:
    """The mean of the finished runs, then each other run: a mean over runs of different lengths would jump."""
    states = [_state(step) for step in steps]
    runs = [places(study.curve(step), metric, over) for step in steps]
    mean = study.mean([run for run, state in zip(runs, states, strict=True) if state == "done"])
    others = [
        single(run, state == "diverged") for run, state in zip(runs, states, strict=True) if run and state != "done"
    ]
    return [mean or Line([], []), *others] if mean or others else []


def _state(step: StoredStage) -> str:
    """State of the run whose curve ends with this stage, as a trunk is only its first part."""
    state: str = step.status()["state"]
    return "pending" if step.node.kind == "trunk" and state == "done" else state


SPIKES = LOSS_SPIKES.name
TRACES = {
    GRAD_NORM.name: "gradient norm before clipping",
    MAX_ATTENTION_LOGIT.name: "largest attention logit so far",
    BUSIEST_EXPERT.name: "share of the busiest expert",
    EXPERT_ENTROPY.name: "entropy of the experts' shares",
    SPIKES: "loss spikes so far",
}


def stability(study: FigureData) -> Iterator[Drawn]:
    """Measures of stability during pretraining; one that is always zero, or was taken once, has no panel."""
    panels = [
        Panel(title, AXES["steps"], label, lines, log="" if metric == SPIKES else "y")
        for metric, label in TRACES.items()
        for title, arms in study.panels.items()
        if (lines := _curves(study, "pretrain", metric, "steps", arms)) and _moves(lines)
    ]
    if panels:
        calm = not any(panel.ylabel == TRACES[SPIKES] for panel in panels)
        yield Drawn(
            "stability",
            f"What was unstable in the course of the pretraining{': no loss spiked' * calm}; {study.band}, "
            f"{study.seeds}; thin lines: runs that are not finished; ×: where a run diverged{study.chosen}.",
            line_figure("stability during pretraining", panels),
        )


def _moves(lines: Mapping[str, Sequence[Line]]) -> bool:
    """True where any line has two points, and any value is not zero."""
    every = [line for group in lines.values() for line in group]
    return any(len(line.x) > 1 for line in every) and any(y for line in every for y in line.y)
