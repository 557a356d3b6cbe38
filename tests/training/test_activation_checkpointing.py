"""Activation checkpointing: every layer is computed twice, and no bit of the gradient changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lit_llm.experiment.load import load_experiment
from lit_llm.models.build import build_model
from lit_llm.models.stacks import Block
from lit_llm.objectives.collate import Batch, collate
from lit_llm.objectives.config import MasksConfig
from lit_llm.training.config import TrainingConfig
from lit_llm.training.module import LitModel
from tests.training.test_step import SMALL, fitted, stepped, uneven_batch


def prefixed(lengths: list[int]) -> Batch:
    """Examples with an open prefix: one number where all are equal, else one for each row."""
    ids = np.random.default_rng(0)
    sources = [ids.integers(2, 1024, size=length) for length in lengths]
    return collate(
        sources, [ids.integers(2, 1024, size=9) for _ in lengths], "decoder", MasksConfig(prefix="bidirectional")
    )


BATCHES = {
    "decllm": ("decllm", lambda: uneven_batch("decoder")),
    "redllm": ("redllm", lambda: uneven_batch("encoder_decoder")),
    "yoco": ("yoco", lambda: uneven_batch("decoder_decoder", True)),
    "double": ("doubledecoder", lambda: uneven_batch("double_decoder")),
    "experts": ("decllm", lambda: uneven_batch("decoder")),
    "value residual": ("decllm", lambda: uneven_batch("decoder")),
    "one prefix": ("decllm", lambda: prefixed([6, 6, 6, 6])),
    "prefixes": ("decllm", lambda: prefixed([3, 5, 8, 2])),
}
OVERRIDES = {
    "experts": ["model.decoder.experts={count: 4, balance_weight: 1.0}"],
    "value residual": ["model.attention.value_residual=learned"],
}
"""{case: keys of its model}."""


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("case", BATCHES)
def test_the_gradient_is_the_same_bit_for_bit(case: str, dropout: float) -> None:
    """Masks are made once and found again by the second computation; dropout drops the same entries in it."""
    torch.set_num_threads(1)
    family, batch = BATCHES[case]
    options = {"dropout": dropout, "attention_dropout": dropout, "feed_forward_dropout": dropout, "z_loss": 1e-4}
    keys, recomputing = OVERRIDES.get(case, []), {"activation_checkpointing": True, "micro_batch_size": 8}
    _, plain = stepped(family, batch(), *keys, **options)
    _, found = stepped(family, batch(), *keys, **options, execution=recomputing)
    assert plain.keys() == found.keys()
    for name, gradient in plain.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("family", ["decllm", "redllm"])
def test_so_it_is_under_autocast(family: str) -> None:
    torch.set_num_threads(1)
    batch = uneven_batch("decoder" if family == "decllm" else "encoder_decoder")
    gradients = []
    for on in (False, True):
        model = build_model(load_experiment(f"{family}-tiny", SMALL).model)
        LitModel(model, TrainingConfig.model_validate(
            {"max_steps": 1, "dropout": 0.3, "execution": {"activation_checkpointing": on}}
        ))  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16), torch.random.fork_rng([]):
            torch.manual_seed(0)
            model.hidden(**batch.inputs).float().square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


@pytest.mark.parametrize("family", ["decllm", "redllm"])
@pytest.mark.parametrize("on", [False, True])
def test_each_layer_is_computed_again_in_the_backward_pass_and_only_there(family: str, on: bool) -> None:
    calls: list[nn.Module] = []
    model = build_model(load_experiment(f"{family}-tiny", SMALL).model)
    layers = [module for module in model.modules() if isinstance(module, Block)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, _: calls.append(layer))
    config = TrainingConfig.model_validate({"max_steps": 1, "execution": {"activation_checkpointing": on}})
    batch = uneven_batch("decoder" if family == "decllm" else "encoder_decoder")
    fitted(LitModel(model, config), batch)
    assert calls == (layers_in_order(layers, family) + layers_in_order(layers, family)[::-1] * on)
    calls.clear()
    with torch.no_grad():
        model.hidden(**batch.inputs)
    assert len(calls) == len(layers)


def layers_in_order(layers: list[Block], family: str) -> list[Block]:
    """As the forward pass meets them: an encoder's before the decoder's, which are named first."""
    half = len(layers) // 2
    return layers if family == "decllm" else layers[half:] + layers[:half]
