"""One optimiser step: token-correct, however it is cut."""

from __future__ import annotations

import math
import warnings
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lit_llm.experiment.load import load_experiment
from lit_llm.models.build import build_model
from lit_llm.objectives.collate import Batch, collate
from lit_llm.objectives.config import EOD, MasksConfig
from lit_llm.training import module
from lit_llm.training.config import StabilityConfig, TrainingConfig
from lit_llm.training.module import Diverged, LitModel, StepReport
from lit_llm.training.optimizers.build import build_optimizer
from lit_llm.training.optimizers.config import Adafactor, AdamW, FactoredAdafactor, Muon, Optimizer
from lit_llm.training.stability import Stability, largest_attention_logit

SMALL = ["model.d_model=16", "model.vocabulary=1024", "model.attention.heads=2", "model.feed_forward.d_ff=32"]


def uneven_batch(family: str, intra_document: bool = False) -> Batch:
    """Eight examples whose targets have 1, 4, 7, ... tokens; some hold more than one document."""
    ids = np.random.default_rng(0)
    sources = [ids.integers(2, 1024, size=5 + n) for n in range(8)]
    targets = [ids.integers(2, 1024, size=1 + 3 * n) for n in range(8)]
    for n in (0, 3, 6):
        sources[n][2], targets[n][-1 - n] = EOD, EOD
    return collate(sources, targets, family, MasksConfig(intra_document=intra_document))


def stepped(family: str, batch: Batch, *overrides: str, **training: object) -> tuple[LitModel, dict[str, torch.Tensor]]:
    """The module after one step of the Trainer, and the gradients that the step was made of."""
    config = TrainingConfig.model_validate({"max_steps": 1, "clip_norm": None, **training})
    model, gradients = build_model(load_experiment(f"{family}-tiny", [*SMALL, *overrides]).model), {}

    class Catching(LitModel):
        def configure_gradient_clipping(self, *args: Any, **options: Any) -> None:
            super().configure_gradient_clipping(*args, **options)
            gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    fitted(lit := Catching(model, config), batch)
    return lit, gradients


def fitted(lit: LitModel, batch: Batch, *callbacks: L.Callback) -> None:
    """One step of Lightning's Trainer on this batch."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(max_steps=1, accelerator="cpu", callbacks=list(callbacks), **quiet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(lit, torch.utils.data.DataLoader([batch], batch_size=None))


@pytest.mark.parametrize("family", ["decllm", "redllm"])
@pytest.mark.parametrize("micro_batch", [1, 3, 5])
@pytest.mark.parametrize("intra_document", [False, True])
def test_the_gradient_ignores_how_the_step_is_cut(family: str, micro_batch: int, intra_document: bool) -> None:
    """Sum over targets / count of targets: 8 sequences at once, or 3 + 3 + 2 with uneven targets, the same gradient."""
    batch = uneven_batch("decoder" if family == "decllm" else "encoder_decoder", intra_document)
    assert ("documents_BT" in batch.inputs) == intra_document
    whole_step, whole = stepped(family, batch, z_loss=1e-4)
    cut_step, cut = stepped(family, batch, z_loss=1e-4, execution={"micro_batch_size": micro_batch})
    assert whole.keys() == cut.keys() == dict(whole_step.model.named_parameters()).keys()
    for name, gradient in whole.items():
        assert_close(cut[name], gradient, rtol=1e-4, atol=1e-7)
    assert cut_step.report is not None
    assert whole_step.report is not None
    assert cut_step.report.loss == pytest.approx(whole_step.report.loss, rel=1e-6)


def test_the_reported_loss_is_the_mean_over_targets_and_the_gradient_its_derivative() -> None:
    """Judge: torch's own cross-entropy over the counted positions, differentiated by autograd."""
    batch = uneven_batch("decoder")
    lit, gradients = stepped("decllm", batch)
    model = build_model(load_experiment("decllm-tiny", SMALL).model)
    logits = model(batch.inputs["tokens_BT"])
    counted = batch.weights.bool()
    loss = torch.nn.functional.cross_entropy(logits[counted], batch.targets[counted])
    loss.backward()
    assert lit.report is not None
    assert lit.report.loss == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_z_loss_adds_the_mean_squared_normaliser() -> None:
    batch = uneven_batch("decoder")
    _, gradients = stepped("decllm", batch, z_loss=0.5)
    model = build_model(load_experiment("decllm-tiny", SMALL).model)
    logits = model(batch.inputs["tokens_BT"])[batch.weights.bool()]
    targets = batch.targets[batch.weights.bool()]
    (torch.nn.functional.cross_entropy(logits, targets) + 0.5 * torch.logsumexp(logits, -1).square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_clipping_bounds_the_step_and_reports_the_norm_before_it() -> None:
    batch = uneven_batch("decoder")
    free, whole = stepped("decllm", batch)
    clipped, small = stepped("decllm", batch, clip_norm=0.01)
    norm = math.sqrt(sum(float(g.square().sum()) for g in whole.values()))
    assert free.report is not None
    assert clipped.report is not None
    assert free.report.grad_norm == pytest.approx(norm, rel=1e-5)
    assert clipped.report.grad_norm == pytest.approx(norm, rel=1e-5)
    assert math.sqrt(sum(float(g.square().sum()) for g in small.values())) == pytest.approx(0.01, rel=1e-4)


def test_a_gradient_that_is_not_clipped_is_only_measured() -> None:
    """Judge: the norm of torch's `clip_grad_norm_`, to the bit; in-place operations raise a tensor's version."""
    versions: list[list[int]] = []

    class Watching(LitModel):
        def configure_gradient_clipping(self, *args: Any, **options: Any) -> None:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            versions.append([g._version for g in gradients])
            super().configure_gradient_clipping(*args, **options)
            versions.append([g._version for g in gradients])
            self.judge = torch.nn.utils.clip_grad_norm_(self.model.parameters(), math.inf).item()

    model = build_model(load_experiment("decllm-tiny", SMALL).model)
    lit = Watching(model, TrainingConfig.model_validate({"max_steps": 1, "clip_norm": None}))
    fitted(lit, uneven_batch("decoder"))
    before, after = versions
    assert before == after
    assert lit.report is not None
    assert lit.report.grad_norm == lit.judge


def test_a_micro_batch_that_fails_leaves_the_gradients_of_a_sharded_model_synchronised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run may catch the error and go on in smaller micro-batches."""
    lit = LitModel(build_model(load_experiment("decllm-tiny", SMALL).model), TrainingConfig(max_steps=1))
    switched: list[bool] = []
    monkeypatch.setattr(lit.model, "set_requires_gradient_sync", switched.append, raising=False)
    monkeypatch.setattr(module, "is_sharded", lambda model: True)
    monkeypatch.setattr(lit, "_trainer", SimpleNamespace(strategy=SimpleNamespace(model=None)))
    with suppress(MemoryError), lit._unsynchronised():
        assert switched == [False]
        raise MemoryError
    assert switched == [False, True]


DECAYING = AdamW(lr=0.1, weight_decay=0.5)


@pytest.mark.parametrize(
    "config",
    [
        DECAYING,
        AdamW(kind="adamw_8bit", lr=0.1, weight_decay=0.5),
        Adafactor(lr=0.1, weight_decay=0.5),
        FactoredAdafactor(lr=0.1, weight_decay=0.5),
        Muon(lr=0.1, weight_decay=0.5, adamw=DECAYING),
    ],
    ids=lambda config: config.kind,
)
def test_matrices_decay_and_scales_do_not(config: Optimizer) -> None:
    """Decoupled decay with a zero gradient: p <- p (1 - lr decay)."""
    model = build_model(load_experiment("decllm-tiny", [*SMALL, "model.norm.scale=true"]).model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(config, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if parameter.dim() >= 2 else 1.0
        assert_close(parameter.detach(), before[name] * factor)


def watched(losses: list[float], **config: float) -> Stability:
    stability = Stability(StabilityConfig.model_validate({"spike_window": 5, "diverged_patience": 3, **config}))
    for loss in losses:
        stability.watch(StepReport(loss, 1.0, 1e-3, 10))
    return stability


def test_a_spike_is_counted_and_ordinary_noise_is_not() -> None:
    noise = [3.0, 3.1, 2.9, 3.05, 2.95, 3.1, 2.9, 3.0]
    assert watched(noise).spikes == 0
    assert watched([*noise, 9.0, 3.0]).spikes == 1


def test_a_loss_that_stays_lost_is_divergence_and_one_that_returns_is_not() -> None:
    assert watched([3.0, 9.0, 9.0, 3.0, 9.0, 9.0]).lost is None
    assert "2.0 nats above its first value" in str(watched([3.0, 9.0, 9.0, 9.0]).lost)


def test_a_loss_that_is_not_finite_is_divergence_at_once() -> None:
    class Poisoned(LitModel):
        def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
            with torch.no_grad():
                self.model.embedding.weight.fill_(math.nan)
            return super().training_step(batch, batch_idx)

    model = build_model(load_experiment("decllm-tiny", SMALL).model)
    lit = Poisoned(model, TrainingConfig(max_steps=1))
    with pytest.raises(Diverged, match="loss is not finite in step 1"):
        fitted(lit, uneven_batch("decoder"))


@pytest.mark.parametrize("family", ["decllm", "redllm"])
def test_the_largest_attention_logit_is_bounded_by_the_norm_on_q_and_k(family: str) -> None:
    """Unit-RMS queries and keys of K entries: |q·k|/√K <= √K; without the norm, large weights go far beyond."""
    batch = uneven_batch("decoder" if family == "decllm" else "encoder_decoder")
    for norms, bounded in (("[q, k, v]", True), ("[]", False)):
        model = build_model(load_experiment(f"{family}-tiny", [*SMALL, f"model.attention.qkv_norm={norms}"]).model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("q.weight", "k.weight")):
                    parameter.mul_(100)
        logit = largest_attention_logit(model, batch)
        assert (logit <= math.sqrt(8) * (1 + 1e-5)) == bounded
