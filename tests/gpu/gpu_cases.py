"""Small models of every family and their batches, as presets with overrides; and a distance between tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lit_llm.components.loss.module import LossWeights, target_loss
from lit_llm.data.batches import WindowCollator
from lit_llm.experiment.load import load_experiment
from lit_llm.experiment.schema import Experiment
from lit_llm.models.build import build_model
from lit_llm.models.families import LanguageModel
from lit_llm.objectives.collate import Batch

CUDA = torch.device("cuda")
PREFIX_LM = "pretrain.objective={kind: prefix_lm, split: random}"
CASES: dict[str, tuple[str, list[str]]] = {
    "decllm": ("decllm-tiny", []),
    "decllm, open prefix": ("decllm-tiny", [PREFIX_LM, "pretrain.masks.prefix=bidirectional"]),
    "decllm, documents": ("decllm-tiny", ["pretrain.masks.intra_document=true"]),
    "decllm, window": ("decllm-tiny", ["model.attention.window=8"]),
    "decllm, grouped": ("decllm-tiny", ["model.attention.kv_heads=1"]),
    "decllm, learned bias": ("decllm-tiny", ["model.attention.rope=none", "model.attention.relative_bias=shared"]),
    "decllm, ALiBi": ("decllm-tiny", ["model.attention.rope=none", "model.attention.relative_bias=alibi"]),
    "decllm, softcap": ("decllm-tiny", ["model.attention.softcap=5.0"]),
    "decllm, LayerNorm": ("decllm-tiny", ["model.norm={function: layer_norm, placement: post}"]),
    "decllm, z-loss": ("decllm-tiny", ["pretrain.training.z_loss=1e-3"]),
    "partial attention": ("decllm-tiny", [PREFIX_LM, "model.decoder.partial_attention=palm"]),
    "redllm": ("redllm-tiny", []),
    "redllm, any split": ("redllm-tiny", [PREFIX_LM]),
    "redllm, documents": ("redllm-tiny", ["pretrain.masks.intra_document=true"]),
    "t5gemma": ("t5gemma-tiny", []),
    "t5gemma 2": ("t5gemma2-tiny", []),
    "ul2": ("ul2-tiny", []),
    "modernbert": ("modernbert-tiny", []),
    "yoco": ("yoco-tiny", []),
    "decllm, mixers": (
        "decllm-tiny",
        ['model.decoder.layer_ranges={"0": {gla: {}}, "1": {gated_deltanet: {chunk: 16}}, "2": {mamba2: {chunk: 16}}}'],
    ),
    "redllm, mixers": ("redllm-tiny", ["model.encoder.gated_deltanet={}", "model.decoder.mamba2={}"]),
    "yoco, retention": ("yoco-tiny", ["model.self_decoder.retention={chunk: 16}"]),
}


def small(case: str, *overrides: str) -> Experiment:
    preset, own = CASES[case]
    return load_experiment(preset, [*own, *overrides])


def model_of(experiment: Experiment, dtype: torch.dtype = torch.float32) -> LanguageModel:
    return build_model(experiment.model, seed=0).to(dtype)


def batch_of(experiment: Experiment, rows: int = 6, tokens: int = 96) -> Batch:
    """Random tokens of several documents, cut by the experiment's objective and laid out for its family."""
    pretrain = experiment.pretrain
    vocabulary = experiment.model.vocabulary - sum(pretrain.objective.extra_ids(tokens).values())
    windows = np.random.default_rng(0).integers(2, vocabulary, (rows, tokens))
    windows[:, [20, 61]] = 0
    return WindowCollator(pretrain.objective, experiment.model.family, pretrain.masks, vocabulary).batch(windows)


def loss_of(model: LanguageModel, batch: Batch, z_loss: float = 0.0) -> Tensor:
    """Nats per target token, with the z-loss."""
    hidden = model.hidden(**batch.inputs)
    losses = target_loss(hidden, model.unembedding, (batch.targets, batch.places), LossWeights(squares=z_loss))
    return losses.objective / sum(batch.counts)


def gradients(model: LanguageModel) -> dict[str, Tensor]:
    return {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}


def off(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖; infinite for what is not a number."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    distance = float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))
    return distance if distance == distance else float("inf")
