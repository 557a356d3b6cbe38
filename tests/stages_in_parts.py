"""A stage of an experiment that trains in a blink, run in parts, and what it measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_llm.data.prepare import prepare
from lit_llm.experiment.load import load_experiment
from lit_llm.experiment.schema import Experiment
from lit_llm.runs.stage_config import save_stage_config
from lit_llm.runs.stage_graph import stage_graph
from lit_llm.store.store import Stage, Store, read_metrics

TIMED = ("throughput/",)


def tiny_experiment(corpus: Path, preset: str, *overrides: str) -> Experiment:
    return load_experiment(
        preset,
        [
            "model.d_model=16", "model.vocabulary=258", "model.attention.heads=2", "model.feed_forward.d_ff=32",
            f'pretrain.data.corpus={{kind: text, files: ["{corpus}/*.txt"]}}', "pretrain.data.tokenizer=bytes",
            "pretrain.data.sequence_length=32", "pretrain.data.batch_size=4", "pretrain.training.max_steps=14",
            "pretrain.training.schedule.warmup_steps=2", "pretrain.training.execution.log_every=3",
            "pretrain.training.stability.spike_window=4", "pretrain.validation.times=3",
            "pretrain.validation.sequences=8", *overrides,
        ],
    )  # fmt: skip


def prepared_stage(store: Store, corpus: Path, preset: str, *overrides: str) -> Stage:
    experiment = tiny_experiment(corpus, preset, *overrides)
    prepare(experiment.pretrain.data, store.data)
    return save_stage_config(store.open(), stage_graph(experiment)[0], experiment)


def stops_after(*steps: int) -> Callable[[], bool]:
    """`should_stop` that says yes at its calls with these numbers (one call opens the stage, one ends each step)."""
    calls = iter(range(10**6))
    return lambda: next(calls) in steps


def numbers(stage: Stage) -> list[tuple[int, dict[str, Any]]]:
    """All metrics but those that measure time."""
    lines = read_metrics(stage.metrics_file)
    return [(line["step"], {k: v for k, v in line["metrics"].items() if not k.startswith(TIMED)}) for line in lines]
