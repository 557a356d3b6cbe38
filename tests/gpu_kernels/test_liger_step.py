"""A training step by Liger's kernels, run by Triton's interpreter, beside the step by ours."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lit_llm.experiment.load import load_experiment
from lit_llm.models.build import build_model
from lit_llm.objectives.collate import Batch, collate
from lit_llm.objectives.config import MasksConfig
from lit_llm.runs.run_one_stage import run_one
from lit_llm.store.store import Store
from lit_llm.training.config import TrainingConfig
from lit_llm.training.module import LitModel
from tests.stages_in_parts import prepared_stage
from tests.training.test_step import SMALL, fitted

TINY = [*SMALL, "pretrain.data.tokenizer=bytes", "model.vocabulary=258", "model.decoder.layers=1"]
"""The interpreter takes a millisecond for each row of a norm."""
CASES: dict[str, tuple[str, list[str], dict]] = {
    "decllm": ("decllm", [], {"micro_batch_size": 2}),
    "decllm, scales, geglu": (
        "decllm",
        ["model.norm.scale=true", "model.feed_forward.activation=geglu_tanh", "model.output.softcap=5.0"],
        {},
    ),
    "redllm": ("redllm", ["model.encoder.layers=1"], {"activation_checkpointing": True}),
}


def uneven_batch(family: str) -> Batch:
    """Three examples whose targets have 1, 3 and 5 tokens."""
    ids = np.random.default_rng(0)
    sources, targets = ([ids.integers(2, 258, size) for size in sizes] for sizes in ((3, 4, 2), (1, 3, 5)))
    return collate(sources, targets, family, MasksConfig())


def stepped(case: str, kernels: str) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of one step of the Trainer, and its gradients."""
    family, overrides, execution = CASES[case]
    config = {"max_steps": 1, "clip_norm": None, "z_loss": 1e-2, "execution": {**execution, "kernels": kernels}}
    model = build_model(load_experiment(f"{family}-tiny", [*TINY, *overrides]).model)
    lit, gradients = LitModel(model, TrainingConfig.model_validate(config)), {}

    class Catch(L.Callback):
        def on_before_optimizer_step(self, *_: object) -> None:
            gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    fitted(lit, uneven_batch("decoder" if family == "decllm" else "encoder_decoder"), Catch())
    assert lit.report is not None
    return lit.report.loss, gradients


@pytest.mark.parametrize("case", CASES)
def test_a_step_has_the_loss_and_gradient_of_ours(case: str) -> None:
    (loss, found), (right, wanted) = stepped(case, "liger"), stepped(case, "auto")
    assert loss == pytest.approx(right, rel=1e-5)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)
    assert any(not torch.equal(found[name], wanted[name]) for name in wanted), "equal bits: nothing was replaced"


def test_a_run_trains_and_has_its_kernels_in_its_provenance(tmp_path: Path, corpus: Path) -> None:
    """Beside the same run by ours."""
    nll = {}
    for kernels in ("liger", "auto"):
        steps = ["pretrain.training.max_steps=2", "pretrain.training.schedule.warmup_steps=1", "model.decoder.layers=1"]
        steps += ["pretrain.data.sequence_length=8", "pretrain.data.batch_size=2"]
        steps += ["pretrain.training.execution.accelerator=cpu", f"pretrain.training.execution.kernels={kernels}"]
        stage = prepared_stage(Store(tmp_path / kernels), corpus, "decllm-tiny", *steps)
        assert run_one(stage.folder.parents[1], stage.fingerprint) == "done", stage.status()
        result = stage.result() or {}
        assert result["provenance"]["kernels"] == kernels
        nll[kernels] = result["metrics"]["val/target_nll"]
    assert nll["liger"] == pytest.approx(nll["auto"], rel=1e-4)
