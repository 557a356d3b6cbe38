"""Further metrics of held-out text on several devices: those of one process over the same targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassPrecision

from lit_llm import LitExperiment
from lit_llm.evaluation.likelihood import logits_of
from lit_llm.experiment.load import load_experiment
from lit_llm.runs.lightning_modules import HeldOut
from lit_llm.training.config import ExecutionConfig
from lit_llm.training.devices import DeviceGroup
from tests.training.rank_processes import on_ranks
from tests.training.test_step import SMALL, uneven_batch

pytestmark = [pytest.mark.xdist_group("ranks"), pytest.mark.slow]


def accuracies() -> MetricCollection:
    """Two metrics of one group, whose members share their states on ranks that updated them."""
    kinds = {"accuracy": MulticlassAccuracy, "precision": MulticlassPrecision}
    return MetricCollection({name: kind(1024, average="micro", top_k=20) for name, kind in kinds.items()})


def lists() -> MetricCollection:
    """A metric that keeps all predictions."""
    return MetricCollection({"auroc": MulticlassAUROC(1024, thresholds=None)})


def measured(group: DeviceGroup, metrics: Callable[[], MetricCollection]) -> dict[str, float]:
    """Values of one validation batch, which rank 0 alone counts."""
    torch.set_num_threads(1)
    lit = LitExperiment(load_experiment("decllm-tiny", SMALL), metrics=metrics())
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    execution = ExecutionConfig(devices=group.ranks, strategy="ddp")
    held_out: Any = [HeldOut(lambda model: {"target_nll": 1.0}, lambda: [uneven_batch("decoder")])]
    loader: Any = torch.utils.data.DataLoader(held_out, batch_size=None)
    with group.connected("cpu"):
        options = {**lit.trainer_options, **quiet, **group.trainer_options(execution, "ddp")}
        trainer = L.Trainer(accelerator="cpu", enable_model_summary=False, **options)
        trainer.validate(lit, loader, verbose=False)
    return {name: value.item() for name, value in trainer.callback_metrics.items() if name != "target_nll"}


def test_a_rank_without_a_held_out_batch_has_the_metrics_of_the_other() -> None:
    """Judge: the same metrics over the batch, in this process."""
    judge = accuracies()
    model, batch = LitExperiment(load_experiment("decllm-tiny", SMALL)).model.eval(), uneven_batch("decoder")
    with torch.no_grad():
        for logits_NV, ids_N in logits_of(model, batch):
            judge.update(logits_NV, ids_N)
    expected = {f"val/{name}": value.item() for name, value in judge.compute().items()}
    assert 0 < expected["val/accuracy"] < 1
    assert on_ranks(2, measured, accuracies) == [pytest.approx(expected)] * 2


def test_lists_need_a_batch_for_each_rank() -> None:
    """torchmetrics gathers an empty list as one of another shape, which ends in an error of gloo."""
    (found,) = on_ranks(1, measured, lists)
    assert 0 < found["val/auroc"] <= 1
    with pytest.raises(RuntimeError, match=r"auroc: it keeps a list, to which each of 2 devices must add"):
        on_ranks(2, measured, lists)
