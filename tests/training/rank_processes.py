"""Small trainings in one process, or in several that communicate by gloo, for tests of training on several devices."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed

from lit_llm.components.loss.module import target_nats
from lit_llm.data.batches import Batches
from lit_llm.experiment.load import load_experiment
from lit_llm.models.build import build_model
from lit_llm.models.families import DecoderOnly, LanguageModel
from lit_llm.objectives.collate import Batch, Family, collate
from lit_llm.objectives.config import EOD, MasksConfig
from lit_llm.store.store import read_metrics
from lit_llm.training.config import DistillConfig, TrainingConfig
from lit_llm.training.devices import DeviceGroup
from lit_llm.training.fit import fit
from lit_llm.training.module import WarmStart
from lit_llm.training.throughput import StepCost

SMALL = ["model.d_model=16", "model.vocabulary=320", "pretrain.data.tokenizer=bytes",
    "model.attention.heads=2", "model.feed_forward.d_ff=24",
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Case:
    """One training: a preset made small, and settings of its training."""

    name: str
    preset: str = "decllm-tiny"
    model: tuple[str, ...] = ()
    training: dict[str, Any] = field(default_factory=dict)
    rows: int = 6
    warmup_steps: int = 0
    """First steps that train half of the parameters alone."""
    distill: bool = False
    within: float = 1e-5
    """Largest difference of a loss from that of one process, relative to it."""
    strategies: tuple[str, ...] = ("ddp", "fsdp")

    def config(self, **execution: Any) -> TrainingConfig:
        base = {"max_steps": 6, "optimizer": {"lr": 0.01}, "stability": {"logit_every": 3}, **self.training}
        execution = {"log_every": 1, "checkpoint_every": 100, **base.pop("execution", {}), **execution}
        return TrainingConfig.model_validate({**base, "execution": execution})


class UnevenBatches(Batches):
    """Batches of examples whose targets have 1, 3, 5, ... tokens; some hold more than one document."""

    def __init__(self, family: Family, rows: int, masks: MasksConfig) -> None:
        super().__init__(seed=0)
        self.family, self.rows, self.masks = family, rows, masks

    def whole(self, k: int) -> Batch:
        ids = np.random.default_rng(k)
        if self.family == "encoder_only":
            windows = [ids.integers(2, 256, size=12) for _ in range(self.rows)]
            counted = [np.arange(12) <= n for n in range(self.rows)]
            return collate(windows, windows, self.family, self.masks, counted)
        sources = [ids.integers(2, 256, size=4 + n % 3) for n in range(self.rows)]
        targets = [ids.integers(2, 256, size=1 + 2 * n) for n in range(self.rows)]
        sources[0][1] = targets[-1][0] = EOD
        return collate(sources, targets, self.family, self.masks)


def train(case: Case, folder: Path, group: DeviceGroup = DeviceGroup(), stop_after: int = 0, **execution: Any) -> Any:
    """Losses, gradient norms and validations by step, and the trained weights; (state, steps) of a stopped training.

    stop_after: step after which rank 0 asks to stop; the other ranks never do.
    """
    torch.set_num_threads(1)
    experiment = load_experiment(case.preset, [*SMALL, *case.model])
    family, masks = experiment.model.family, experiment.pretrain.masks
    model = build_model(experiment.model, seed=1)
    teacher = None
    if case.distill:
        teacher = build_model(load_experiment("decllm-tiny", SMALL).model, seed=2).eval().requires_grad_(False)
        assert isinstance(teacher, DecoderOnly)
    names = [name for name, _ in model.named_parameters()]
    warm_start = WarmStart(frozenset(names[::2]), case.warmup_steps, teacher, DistillConfig() if case.distill else None)
    held_out = UnevenBatches(family, 3, masks).whole(1000)

    def evaluate(model: LanguageModel) -> dict[str, float]:
        targets = held_out.targets, held_out.places
        return {
            "val/target_nll": float(target_nats(model.hidden(**held_out.inputs), model.unembedding, targets).mean())
        }

    calls = iter(range(1, 1000))
    metrics = folder / "metrics.jsonl"
    result = fit(
        model,
        case.config(**execution),
        UnevenBatches(family, case.rows, masks),
        step_cost=StepCost(1, 1.0),
        evaluate=evaluate,
        evaluate_times=2,
        metrics_file=metrics,
        checkpoints=folder,
        should_stop=lambda: group.rank == 0 and next(calls) == stop_after,
        warm_start=warm_start,
        log=lambda _: None,
        group=group,
    )
    if result.state != "done":
        return result.state, result.steps
    if group.rank > 0:
        return None
    lines = [line["metrics"] for line in read_metrics(metrics)]
    return {
        "train": [line["train/loss"] for line in lines],
        "norm": [line["stability/grad_norm"] for line in lines],
        "logit": lines[-1]["stability/max_attention_logit"],
        "validation": [line["val/target_nll"] for line in lines if "val/target_nll" in line],
        "teacher": [line.get("train/teacher_divergence", 0.0) for line in lines],
        "loss_tokens": result.loss_tokens,
        "busiest": [line["stability/busiest_expert"] for line in lines if "stability/busiest_expert" in line],
        "weights": {name: weight.numpy().copy() for name, weight in result.weights.items()},
    }


def on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any, seconds: float = 400) -> list[Any]:
    """The results of function(group, *arguments) in `ranks` processes, by rank. Raises RuntimeError for a failure."""
    with started(ranks, function, *arguments) as processes:
        results: list[Any] = [None] * ranks
        for rank, (process, pipe) in enumerate(processes):
            if not pipe.poll(seconds):
                raise RuntimeError(f"rank {rank} hangs")
            returned, results[rank] = pipe.recv()
            if not returned:
                raise RuntimeError(f"rank {rank}: {results[rank]}")
            process.join()
    return results


@contextmanager
def started(ranks: int, function: Callable[..., Any], *arguments: Any) -> Iterator[Sequence[tuple[Any, Any]]]:
    """Context with (process, pipe to its result) of each rank; kills what is left of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imports once
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = []
    try:
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_run, args=(rank, ranks, store.port, theirs, function, arguments))
            process.start()
            theirs.close()
            processes.append((process, ours))
        yield processes
    finally:
        for process, _ in processes:
            process.kill()


def _run(rank: int, ranks: int, port: int, pipe: Any, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    store = torch.distributed.TCPStore("127.0.0.1", port)
    try:
        pipe.send((True, function(DeviceGroup(rank, ranks, rank, store), *arguments)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


@dataclass(frozen=True)
class Run:
    """A case trained on ranks, in a folder of its own or in one with a checkpoint."""

    case: Case
    strategy: str
    folder: Path | None = None
    stop_after: int = 0


def train_all(group: DeviceGroup, runs: Sequence[Run]) -> list[Any]:
    """The results of trainings, one after the other, on connected ranks."""
    results = []
    with group.connected("cpu"):
        for run in runs:
            with tempfile.TemporaryDirectory() as new:
                folder = run.folder or Path(group.from_first(new))
                devices = {"devices": group.ranks, "strategy": run.strategy}
                results.append(train(run.case, folder, group, run.stop_after, **devices))
                torch.distributed.barrier()  # before the folder goes
    return results
