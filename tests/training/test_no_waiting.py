"""A step reads nothing back from the device but its report: on the meta device every such read raises."""

import numpy as np
import pytest
import torch

from lit_llm.data.batches import WindowCollator
from lit_llm.experiment.load import load_experiment
from lit_llm.models.build import build_model
from lit_llm.training.config import TrainingConfig
from lit_llm.training.module import LitModel
from lit_llm.training.optimizers.build import build_optimizer
from lit_llm.training.optimizers.config import Adafactor, FactoredAdafactor, Muon

CASES = {
    "decllm": ("decllm-tiny", []),
    "a bidirectional prefix": ("decllm-tiny", ["pretrain.masks.prefix=bidirectional", "pretrain.objective=prefix_lm"]),
    "redllm": ("redllm-tiny", []),
    "merged attention": ("redllm-tiny", ["model.decoder.cross_attention_mode=merged"]),
    "documents": ("redllm-tiny", ["pretrain.masks.intra_document=true"]),
    "a window": ("decllm-tiny", ["model.attention.window=8"]),
    "ul2": ("ul2-tiny", []),
    "yoco": ("yoco-tiny", []),
    "a double decoder": ("doubledecoder-tiny", ["pretrain.masks.intra_document=true"]),
    "modernbert": ("modernbert-tiny", []),
}


@pytest.mark.parametrize("case", CASES)
def test_forward_loss_backward_and_clipping_read_nothing_back(case):
    preset, overrides = CASES[case]
    experiment = load_experiment(preset, overrides)
    pretrain, vocabulary = experiment.pretrain, 256
    windows = np.random.default_rng(0).integers(2, vocabulary, (4, 128))
    windows[:, [20, 61]] = 0  # ends of documents
    batch = WindowCollator(pretrain.objective, experiment.model.family, pretrain.masks, vocabulary).batch(windows)
    config = TrainingConfig.model_validate({"max_steps": 1, "z_loss": 1e-4})
    lit = LitModel(build_model(experiment.model).to("meta"), config)
    pieces = list(batch.to(torch.device("meta")).micro_batches(3))
    assert [len(piece) for piece in pieces] == [3, 1]
    for piece in pieces:
        lit._losses(lit.model.hidden(**piece.inputs), piece).objective.backward()
    parameters = [p for p in lit.parameters() if p.grad is not None]
    assert len(parameters) > 10
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    with pytest.raises((RuntimeError, NotImplementedError)):
        parameters[0].sum().item()


@pytest.mark.parametrize("config", [Adafactor(weight_decay=0.1), FactoredAdafactor(weight_decay=0.1), Muon()])
def test_the_step_of_an_optimiser_reads_nothing_back(config):
    """AdamW is torch's, whose fused kernel has no form on the meta device."""
    model = build_model(load_experiment("decllm-tiny", ["model.norm.scale=true"]).model).to("meta")
    optimizer = build_optimizer(config, model)
    optimizer = getattr(optimizer, "parts", (optimizer,))[0]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(2):
        optimizer.step()
    assert len(optimizer.state) == sum(len(group["params"]) for group in optimizer.param_groups) > 10
