"""Figures from metrics.jsonl: the losses and what was unstable, in the course of the training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lit_llm.ablation.runs import Step
from lit_llm.evaluation.config import yardstick_of
from lit_llm.experiment.chain import FINETUNED, validation_metric
from lit_llm.report.figures.courses import AXES, places
from lit_llm.report.figures.lines import Line, Panel, line_figure, single
from lit_llm.report.figures.shown import Drawn, Shown, labelled, merged


def learning(study: Shown) -> Iterator[Drawn]:
    """The validation and the training loss of each stage that trains."""
    own = validation_metric(study.metric).removeprefix(FINETUNED)
    measured = own if own.startswith("val/") else yardstick_of(study.ablation.arms[0].experiment.model.family)
    for kind, training in (("pretrain", "pretraining"), ("finetune", "finetuning")):
        for metric in (measured, "train/loss"):
            panels = [
                Panel("", label, labelled(metric), lines)
                for over, label in AXES.items()
                if (lines := _courses(study, kind, metric, over))
            ]
            if panels:
                what = "validation" if metric == measured else "training"
                yield Drawn(
                    f"{what}_{kind}",
                    f"{metric} in the course of the {training}; {study.band}, {study.seeds}; thin lines: runs that are "
                    f"not finished; ×: where a run diverged{study.chosen}.",
                    line_figure(f"{metric} during {training}", panels),
                )


def _courses(study: Shown, kind: str, metric: str, over: str) -> dict[str, list[Line]]:
    """The lines of each arm; of several that share their runs one."""
    stages = {
        # Without the pretrainings of its sources, whose courses are other arms'.
        name: [step for run in study.of_arm.get(name, ()) for step in run.steps if step.link.name == kind]
        for name in study.named()
    }
    shared = merged({name: tuple(step.link.fingerprint for step in steps) for name, steps in stages.items()})
    found = {label: _lines(study, stages[first], metric, over) for label, first in shared.items()}
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


TRACES = {
    "stability/grad_norm": "gradient norm before clipping",
    "stability/max_attention_logit": "largest attention logit so far",
    "stability/loss_spikes": "loss spikes so far",
}


def stability(study: Shown) -> Iterator[Drawn]:
    curves = {metric: _courses(study, "pretrain", metric, "steps") for metric in TRACES}
    spikes = "stability/loss_spikes"
    calm = not any(y for lines in curves[spikes].values() for line in lines for y in line.y)
    panels = [
        Panel("", AXES["steps"], label, curves[metric], log="" if metric == spikes else "y")
        for metric, label in TRACES.items()
        if curves[metric] and not (calm and metric == spikes)
    ]
    if panels:
        yield Drawn(
            "stability",
            f"What was unstable in the course of the pretraining{': no loss spiked' * calm}; {study.band}, "
            f"{study.seeds}; thin lines: runs that are not finished; ×: where a run diverged{study.chosen}.",
            line_figure("stability during pretraining", panels),
        )
