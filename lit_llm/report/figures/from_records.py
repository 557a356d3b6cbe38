"""Figures from the records of evaluations, and the cost of a generated token from the configuration."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_llm.experiment.cost import GENERATE, PROMPT, cost_of
from lit_llm.models.cost import attended_keys
from lit_llm.models.resolve import resolve_model
from lit_llm.report.figures.inputs import Drawn, FigureData, group_equal
from lit_llm.report.figures.lines import Line, Panel, Places, line_figure
from lit_llm.report.figures.training_curves import read_rows, thinned
from lit_llm.studies.runs import StoredStage


def _evaluated(study: FigureData, name: str, after: str) -> dict[str, list[StoredStage]]:
    """{series: finished stages of an evaluation}; arms that share their stages share a series."""
    steps_by_arm = {
        arm: [
            step
            for run in study.runs_by_arm.get(arm, ())
            for step in run.steps
            if (step.node.evaluation, step.node.after) == (name, after) and step.stage.result() is not None
        ]
        for arm in study.named()
    }
    fingerprints = {arm: tuple(step.node.fingerprint for step in steps) for arm, steps in steps_by_arm.items() if steps}
    return {study.merged_series(arms): steps_by_arm[arms[0]] for arms in group_equal(fingerprints)}


Curves = Mapping[Path, Mapping[Any, Places]]
"""{folder of a stage: {key of a curve: points}}"""


def _over_seeds(
    study: FigureData, stages: Mapping[str, Sequence[StoredStage]], curves: Curves, key: Any
) -> dict[str, list[Line]]:
    """{arm: the mean curve of its stages}, where it has one."""
    lines = {
        arm: study.mean([curves[step.stage.folder].get(key, {}) for step in steps]) for arm, steps in stages.items()
    }
    return {arm: [line] for arm, line in lines.items() if line is not None}


def extrapolation(study: FigureData) -> Iterator[Drawn]:
    """Loss beyond the training window, by position and by total length."""
    window = study.ablation.arms[0].experiment.pretrain.data.sequence_length
    ylabel, end = "loss, nats per token", f"{study.band}, {study.seeds}{study.chosen}"
    for after in ("pretrain", "finetune"):
        stages = _evaluated(study, "extrapolation", after)
        every = [step for steps in stages.values() for step in steps]
        by_position = {step.stage.folder: _by_position(read_rows(step.stage.rows_file)) for step in every}
        panels = [
            Panel(
                f"after {prefix} token{'s' if prefix > 1 else ''}",
                "position of the target, tokens",
                ylabel,
                _over_seeds(study, stages, by_position, prefix),
                verticals=[window],
            )
            for prefix in sorted({prefix for curves in by_position.values() for prefix in curves})
        ]
        if panels:
            yield Drawn(
                f"extrapolation_by_position_{after}",
                "Loss of held-out tokens by their position, after a prefix of so many tokens; dotted: the training "
                f"window of {window} tokens; {end}.",
                line_figure("loss by position, beyond the training window", panels),
            )
        by_length = {step.stage.folder: _by_length(step) for step in every}
        panels = [
            Panel(
                f"prefix: {prefix}",
                "total length, training windows",
                ylabel,
                _over_seeds(study, stages, by_length, prefix),
                log="x",
                ticks=sorted({length for curves in by_length.values() for length in curves.get(prefix, {})}),
            )
            for prefix in dict.fromkeys(prefix for curves in by_length.values() for prefix in curves)
        ]
        if any(len(line.x) > 1 for panel in panels for lines in panel.lines.values() for line in lines):
            yield Drawn(
                f"extrapolation_by_length_{after}",
                f"Loss of the tokens in the last quarter of a window before a total length; {end}.",
                line_figure("loss by total length", panels),
            )


def _by_position(rows: Iterable[Mapping[str, Any]]) -> dict[int, Places]:
    """{prefix: {first position of a bucket: (its middle, nats per token of all sources)}}"""
    sums: dict[int, dict[tuple[int, int], list[float]]] = {}
    for row in rows:
        both = sums.setdefault(row["prefix"], {}).setdefault((row["position"], row["length"]), [0.0, 0.0])
        both[0], both[1] = both[0] + row["nats"], both[1] + row["tokens"]
    return {
        prefix: {first: ((first + end - 1) / 2, nats / tokens) for (first, end), (nats, tokens) in buckets.items()}
        for prefix, buckets in sums.items()
    }


_LENGTH = re.compile(r"extrapolation/nll/prefix_(.+)/length_(\d+)x")


def _by_length(step: StoredStage) -> dict[str, Places]:
    """{prefix: {windows: (windows, nats per token)}}"""
    curves: dict[str, dict[float, tuple[float, float]]] = {}
    for name, value in (step.stage.result() or {}).get("metrics", {}).items():
        if (match := _LENGTH.fullmatch(name)) and value is not None:
            curves.setdefault(match[1], {})[int(match[2])] = (float(match[2]), value)
    return dict(curves)


ATTENTION_CURVES = {
    ("local_probability", "position"): ("position in the decoder, from 1", "weight on the nearest keys"),
    ("first_key_probability", "position"): ("position in the decoder, from 1", "weight on the first key"),
    ("encoder_local_probability", "position"): ("position in the encoder, from 1", "weight on the nearest keys"),
    ("source_sensitivity", "step"): ("target token, from 1", "sensitivity to the source"),
}


def attention(study: FigureData) -> Iterator[Drawn]:
    """Attention on the nearest keys and on the first by position, and sensitivity of the targets to the source."""
    for after in ("pretrain", "finetune"):
        stages = _evaluated(study, "attention", after)
        every = [step for steps in stages.values() for step in steps]
        curves = {step.stage.folder: _attention_curves(read_rows(step.stage.rows_file)) for step in every}
        panels = [
            Panel("", xlabel, ylabel, lines, log="xy")
            for key, (xlabel, ylabel) in ATTENTION_CURVES.items()
            if (lines := _over_seeds(study, stages, curves, key))
        ]
        if panels:
            yield Drawn(
                f"attention_{after}",
                "Self-attention's weight on the nearest keys and on the first key by position, over all layers and "
                "heads, and the norm of the derivative of a target's log-probability by the source's embeddings; "
                f"{study.band}, {study.seeds}{study.chosen}.",
                line_figure("where attention goes, by position", panels),
            )


def _attention_curves(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], Places]:
    """{(measure, axis): {first place of a bucket: (its middle, value over all layers)}}"""
    curves: dict[tuple[str, str], dict[float, tuple[float, float]]] = {}
    for row in rows:
        if (key := (row["measure"], row["axis"])) in ATTENTION_CURVES and row["layer"] is None:
            first = row["first"] + (row["axis"] == "position")  # positions count from 0, steps from 1
            curves.setdefault(key, {})[first] = (first + (row["last"] - row["first"]) / 2, row["value"])
    return dict(curves)


def inference(study: FigureData) -> Iterator[Drawn]:
    """Cache bytes and attended keys by generated token; arms with equal costs share a line."""
    numbers = thinned(range(GENERATE + 1), 101)
    named = set(study.named())
    bytes_of, keys_of = {}, {}
    for arm in study.ablation.arms:
        model = resolve_model(arm.experiment.model)
        if arm.name in named and model.decoder:
            cache = cost_of(arm.experiment).cache
            bytes_of[arm.name] = tuple(float(cache.total(PROMPT, number)) for number in numbers)
            keys_of[arm.name] = tuple(attended_keys(model, PROMPT, number) for number in numbers)
    if not bytes_of:
        return
    shared = group_equal({name: (bytes_of[name], keys_of[name]) for name in bytes_of})
    if len(shared) == 1 < len(study.ablation.arms):
        return  # all cost the same by design
    panels = [
        Panel(
            "",
            "tokens generated",
            label,
            {study.merged_series(names): [Line(numbers, of[names[0]])] for names in shared},
        )
        for label, of in (("key-value cache, bytes", bytes_of), ("keys read by a token in a layer", keys_of))
    ]
    yield Drawn(
        "inference",
        f"Computed, for a prompt of {PROMPT} tokens: bytes of one sequence's key-value cache in the precision of the "
        "training, and the keys that a generated token reads in a layer of the decoder, all of its attentions "
        f"together, mean over the layers{study.chosen}.",
        line_figure("cost of a generated token", panels),
    )
