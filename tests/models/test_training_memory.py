"""Bytes for training by arithmetic, against the storages that autograd really keeps."""

import pytest
import torch
from tiny_models import build, ids, resolved

from lit_llm.components.loss import config as loss_config
from lit_llm.components.loss.module import target_loss
from lit_llm.models.cost import Shape, count_parameters
from lit_llm.training.config import TrainingConfig
from lit_llm.training.memory import activation_bytes, loss_bytes, state_bytes, training_bytes

BOUND = 0.03
"""What the formula leaves out (one number for a token or head, rotations, masks) is at most this share here, where
heads are narrow; it shrinks with head_dim and d_model."""

WIDE = ["d_model=96", "attention.heads=3", "feed_forward.d_ff=256", "norm.scale=false"]
ALL = ["attention.qkv_norm=[q, k, v]"]
CASES = {
    "llama": ("decllm", []),
    "decllm": ("decllm", ALL),
    "redllm": ("redllm", [*ALL, "attention.output_norm=head"]),
    "no norms": ("redllm", []),
    "concat": ("redllm", [*ALL, "attention.output_norm=concat"]),
    "after out": ("redllm", [*ALL, "attention.output_norm=after_out"]),
    "grouped": ("decllm", [*ALL, "attention.kv_heads=1"]),
    "gelu, layer norm": ("redllm", ["feed_forward.activation=gelu", "norm.function=layer_norm"]),
    "wide heads": ("decllm", ["attention.qkv_norm=[q, k]", "attention.head_dim=64"]),
    "untied": ("redllm", [*ALL, "tie_embeddings=none"]),
    "deep decoder": ("redllm", [*ALL, "encoder.layers=1", "decoder.layers=4"]),
}
SHAPES = {"decllm": [(0, 96, 96), (0, 160, 40)], "redllm": [(64, 64, 64), (128, 32, 20), (24, 120, 120)]}


def training(precision="fp32"):
    return TrainingConfig(max_steps=1, precision=precision)


def kept_bytes(model, source, target, outputs, precision="fp32"):
    """Bytes of all storages that a forward pass and its loss keep, but the parameters themselves."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    targets, weights = ids(1, target), (torch.arange(target) >= target - outputs).float()[None]
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        hidden = model.hidden(ids(1, source), targets) if source else model.hidden(targets)
        loss = target_loss(hidden, model.unembedding_VD, targets, weights)
    assert loss[0].requires_grad
    return sum(storage.nbytes() for address, storage in storages.items() if address not in parameters)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_activations_are_what_autograd_keeps(case, precision):
    family, overrides = CASES[case]
    model = build(family, *WIDE, *overrides, double=False)
    one = training(precision)
    for source, target, outputs in SHAPES[family]:
        counted = activation_bytes(model.config, one, Shape(source, target, outputs))
        counted += loss_bytes(model.config, outputs) / 2  # the other half is the gradient, which comes later
        if precision == "bf16":  # autocast's copies of the matrices are kept too
            counted += state_bytes(model.config, one) - state_bytes(model.config, training("fp32"))
        assert counted == pytest.approx(kept_bytes(model, source, target, outputs, precision), rel=BOUND)


@pytest.mark.parametrize("family", ["decllm", "redllm"])
@pytest.mark.parametrize("prefix", [None, 48])
def test_with_learned_scales_and_masks_the_figure_is_still_within_a_fifth(family, prefix):
    """On a CPU, RMSNorm keeps one more copy where it has a scale (CUDA's kernel does not), a prefix its mask."""
    model = build(family, *WIDE, "norm.scale=true", double=False)
    source, hidden = (0, model.hidden) if family == "decllm" else (64, None)
    if prefix and hidden:
        model.hidden = lambda tokens: hidden(tokens, prefix_length=prefix)
    counted = activation_bytes(model.config, training(), Shape(source, 96, 96)) + loss_bytes(model.config, 96) / 2
    assert counted == pytest.approx(kept_bytes(model, source, 96, 96), rel=0.2)


def test_state_is_four_float32_numbers_per_parameter_under_adamw():
    """Parameter, gradient, two moments: 16 bytes."""
    model = resolved("redllm")
    assert state_bytes(model, training()) == 16 * count_parameters(model).total


def test_under_bf16_autocast_keeps_a_copy_of_every_matrix_that_is_multiplied_with():
    model = resolved("redllm", "norm.scale=false", "tie_embeddings=none")
    copies = state_bytes(model, training("bf16")) - state_bytes(model, training("fp32"))
    looked_up = 2 * model.vocabulary * model.d_model
    assert copies == 2 * (count_parameters(model).total - looked_up)


def test_activations_grow_with_the_sequences_and_the_state_does_not():
    model, shape = resolved("redllm"), Shape(64, 64, 64)
    one, two, three = (training_bytes(model, training(), shape, n) for n in (1, 2, 3))
    each = activation_bytes(model, training(), shape) + loss_bytes(model, 64)
    assert two - one == three - two == each
    assert one == state_bytes(model, training()) + each


def test_logits_beyond_a_chunk_take_no_more_memory(monkeypatch):
    model = resolved("decllm")
    monkeypatch.setattr(loss_config, "CHUNK_ENTRIES", 10 * model.vocabulary)
    assert loss_bytes(model, 10) == 2 * 10 * model.vocabulary * 4
    assert loss_bytes(model, 1000) == loss_bytes(model, 10)
