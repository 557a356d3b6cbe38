"""Figures from metrics.jsonl: the losses and what was unstable, in the course of the training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from lit_llm.config.metrics import FINETUNED, GRAD_NORM, LOSS_SPIKES, MAX_ATTENTION_LOGIT, SPLITS, TRAIN_LOSS
from lit_llm.evaluation.config import primary_metric
from lit_llm.report import text
from lit_llm.report.figures.inputs import Drawn, Shown, alike
from lit_llm.report.figures.lines import Line, Panel, line_figure, proportion, single
from lit_llm.report.figures.training_curves import AXES, places
from lit_llm.runs.stage_graph import validation_metric
from lit_llm.studies.runs import Step


def learning(study: Shown) -> Iterator[Drawn]:
    """The validation and the training loss of each stage that trains."""
    own = validation_metric(study.metric).removeprefix(FINETUNED)
    measured = (
        own if own.startswith(SPLITS["validation"]) else primary_metric(study.ablation.arms[0].experiment.model.family)
    )
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
"""What a step takes, where it is the same for all arms."""


def _panels(study: Shown, kind: str, metric: str) -> list[Panel]:
    """A panel for each axis over which the courses look different, and for each level of the panels' factor.

    Where every step takes the same tokens and FLOPs in all arms, these axes show one curve: the first says how much.
    """
    found: dict[str, list[Panel]] = {}
    for over, label in AXES.items():
        panels = [
            Panel(title, label, study.labelled(metric), lines)
            for title, arms in study.panels.items()
            if (lines := _courses(study, kind, metric, over, arms))
        ]
        if any(len(line.x) > 1 for panel in panels for lines in panel.lines.values() for line in lines):
            found[over] = panels
    steps = found.get("steps", [])
    takes = {over: ratio for over in UNITS if over in found and (ratio := proportion(steps, found[over]))}
    if takes:
        said = ", ".join(UNITS[over].format(text.short(ratio)) for over, ratio in takes.items())
        found["steps"] = [replace(panel, xlabel=f"{panel.xlabel} (each {said})") for panel in steps]
    axes = [over for over in found if over not in takes and not (over == "seconds" and study.panel_factors)]
    return [panel for over in axes for panel in found[over]]


def _courses(study: Shown, kind: str, metric: str, over: str, arms: Sequence[str]) -> dict[str, list[Line]]:
    """The lines of each arm; of several that share their runs one."""
    stages = {
        # Without the pretrainings of its sources, whose courses are other arms'.
        name: [step for run in study.of_arm.get(name, ()) for step in run.steps if step.node.name == kind]
        for name in arms
    }
    shared = alike({name: tuple(step.node.fingerprint for step in steps) for name, steps in stages.items()})
    found = {study.together(names): _lines(study, stages[names[0]], metric, over) for names in shared}
    return {label: lines for label, lines in found.items() if lines}


def _lines(study: Shown, steps: Sequence[Step], metric: str, over: str) -> list[Line]:
    """The mean of the finished runs, then each of the others; a mean over runs that end in different places would jump
    where one of them ends."""
    states = [step.status()["state"] for step in steps]
    runs = [places(study.course(step), metric, over) for step in steps]
    mean = study.mean([run for run, state in zip(runs, states, strict=True) if state == "done"])
    others = [
        single(run, state == "diverged") for run, state in zip(runs, states, strict=True) if run and state != "done"
    ]
    return [mean or Line([], []), *others] if mean or others else []


SPIKES = LOSS_SPIKES.name
TRACES = {
    GRAD_NORM.name: "gradient norm before clipping",
    MAX_ATTENTION_LOGIT.name: "largest attention logit so far",
    SPIKES: "loss spikes so far",
}


def stability(study: Shown) -> Iterator[Drawn]:
    """What was unstable; a measure that is zero throughout, or was taken once, has no panel."""
    panels = [
        Panel(title, AXES["steps"], label, lines, log="" if metric == SPIKES else "y")
        for metric, label in TRACES.items()
        for title, arms in study.panels.items()
        if (lines := _courses(study, "pretrain", metric, "steps", arms)) and _moves(lines)
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
    """Whether any line has two points, and any point is not zero."""
    every = [line for group in lines.values() for line in group]
    return any(len(line.x) > 1 for line in every) and any(y for line in every for y in line.y)
