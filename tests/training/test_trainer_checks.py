"""Trainers and checkpoints that are refused, and the hooks that callbacks of a cut batch get."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from lit_llm.config.problems import InputError
from lit_llm.experiment.load import load_experiment
from lit_llm.models.build import build_model
from lit_llm.training.config import TrainingConfig
from lit_llm.training.module import LitModel
from tests.training.test_step import SMALL, uneven_batch

pytestmark = pytest.mark.filterwarnings("ignore")


def small_model(steps: int = 1, **execution: Any) -> LitModel:
    model = build_model(load_experiment("decllm-tiny", SMALL).model)
    return LitModel(model, TrainingConfig.model_validate({"max_steps": steps, "execution": execution}))


def fit(lit: LitModel, callback: L.Callback | None = None, ckpt_path: Path | None = None, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        accelerator="cpu", callbacks=callback, max_steps=lit.training_config.max_steps, enable_model_summary=False,
        **quiet, **options,
    )  # fmt: skip
    trainer.fit(lit, torch.utils.data.DataLoader([uneven_batch("decoder")] * 2, batch_size=None), ckpt_path=ckpt_path)
    return trainer


def test_a_checkpoint_whose_steps_lightning_would_not_count_is_refused(tmp_path: Path) -> None:
    """Under manual optimisation Lightning counted steps elsewhere, and would now train all of them once more."""
    path = tmp_path / "last.ckpt"
    fit(small_model()).save_checkpoint(path)
    assert fit(small_model(2), ckpt_path=path).global_step == 2
    checkpoint = torch.load(path)
    loops = checkpoint["loops"]["fit_loop"]
    counts = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    loops["epoch_loop.manual_optimization.optim_step_progress"], zero = counts, {"ready": 0, "completed": 0}
    loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"] = {"total": zero, "current": zero}
    torch.save(checkpoint, path)
    with pytest.raises(InputError, match="counts 1 steps, but 0 of them under automatic optimisation.*its weights"):
        fit(small_model(2), ckpt_path=path)


def test_a_gradient_scaler_is_refused_before_the_first_step() -> None:
    """A plugin, since on a CPU Lightning takes bfloat16 for `precision="16-mixed"`."""
    with pytest.raises(InputError, match="has a gradient scaler.*use bf16, `bf16-mixed`"):
        fit(small_model(), plugins=[MixedPrecision("16-mixed", "cpu")])


class Counting(L.Callback):
    """Counts hooks, and keeps the losses of backward passes and of the step."""

    def __init__(self) -> None:
        self.counts = {"on_after_backward": 0, "on_before_optimizer_step": 0}
        self.losses: list[float] = []
        self.loss_of_step = 0.0

    def on_before_backward(self, trainer: L.Trainer, lit: L.LightningModule, loss: torch.Tensor) -> None:
        self.losses.append(loss.item())

    def on_after_backward(self, *_: Any) -> None:
        self.counts["on_after_backward"] += 1

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.counts["on_before_optimizer_step"] += 1

    def on_train_batch_end(self, trainer: L.Trainer, lit: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.loss_of_step = outputs["loss"].item()


def test_callbacks_get_each_micro_batchs_backward_pass_and_the_last_ones_loss() -> None:
    """Judge: torch's cross-entropy over the targets of the last row, of those of the whole batch."""
    counting, lit, batch = Counting(), small_model(micro_batch_size=1), uneven_batch("decoder")
    with torch.no_grad():
        logits = lit.model(batch.inputs["tokens_BT"])
    counted = batch.weights.bool()
    parts = [
        torch.nn.functional.cross_entropy(logits[n][counted[n]], batch.targets[n][counted[n]], reduction="sum").item()
        for n in range(len(batch))
    ]
    fit(lit, counting)
    assert counting.counts == {"on_after_backward": 8, "on_before_optimizer_step": 1}
    assert counting.losses == pytest.approx([part / batch.total for part in parts], rel=1e-5)
    assert counting.loss_of_step == counting.losses[-1]
    assert lit.report is not None
    assert sum(counting.losses) == pytest.approx(lit.report.loss, rel=1e-5)
