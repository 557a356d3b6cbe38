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
