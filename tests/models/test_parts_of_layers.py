"""A part of a layer computes what its own configuration says, whatever else the model has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lit_llm.components.masks import KernelMask
from lit_llm.models.stacks import Block
from tests.tiny_models import build, ids

NORMS = "attention.qkv_norm=[q, k, v]"
CHANGES = [
    ("redllm", ["attention.output_norm=head"]),
    ("redllm", ["attention.output_norm=after_out", NORMS]),
    ("redllm", ["decoder.cross_attention.rope=restart"]),
    ("redllm", ["decoder.cross_attention.kv_heads=1"]),
    ("redllm", ["encoder.attention.window=3"]),
    ("redllm", ["decoder.self_attention.softcap=5.0"]),
    ("redllm", ["encoder.attention.value_residual=learned"]),
    ("redllm", ["tie_embeddings=none"]),
    ("redllm", ["norm.function=layer_norm"]),
    ("redllm", ["norm.placement=sandwich"]),
    ("redllm", ["feed_forward.activation=gelu"]),
    ("decllm", ["decoder.layer_ranges.0.retention=gated"]),
    ("decllm", ["decoder.layer_ranges.0.gated_deltanet=gated"]),
    ("redllm", ["encoder.layer_ranges.0.mamba2=ssd"]),
    ("redllm", ["decoder.layer_ranges.0.gla=gated"]),
    ("decllm", ["decoder.partial_attention=palm"]),
    ("decllm", ["attention.relative_bias=per_layer"]),
    ("yoco", ["cross_decoder.cross_attention.qkv_norm=[q]"]),
    ("yoco", ["self_decoder.layer_ranges.0.self_attention.window=2"]),
]


def calls_of(model) -> dict[tuple[str, int, str], tuple[Any, Tensor]]:
    """{(side, layer, part): (its arguments, its output)} of one forward pass."""
    torch.manual_seed(0)
    found: dict[tuple[str, int, str], tuple[Any, Tensor]] = {}
    for side, layers in model.config.stacks:
        for index in range(len(layers)):
            block: Block = getattr(model, side).layers[index]
            for name in block.parts:
                key = side, index, name
                block.part(name).register_forward_hook(
                    lambda _, given, output, key=key: found.update({key: (given, output)})
                )
    tokens = ids(2, 9)
    model(tokens, ids(2, 7)) if model.config.family == "encoder_decoder" else model(tokens, source_length=4)
    return found


def beside_activations(item: Any) -> list[Tensor]:
    """Positions and masks that a part is given, as tensors: all that depends on no layer before it."""
    if isinstance(item, KernelMask):
        return [tensor for tensor in (item.visible, item.added, item.fully_masked) if tensor is not None]
    if isinstance(item, tuple):
        return [tensor for inner in item for tensor in beside_activations(inner)]
    return [item] if isinstance(item, Tensor) and not item.requires_grad else []


def compare(family: str, changes: list[str]) -> int:
    """How many parts have one configuration in both models. Raises AssertionError where one of them differs."""
    plain, changed = build(family), build(family, *changes)
    expected, given, compared = calls_of(plain), calls_of(changed), 0
    for side, layers in plain.config.stacks:
        others = dict(changed.config.stacks)[side]
        for index, (layer, other) in enumerate(zip(layers, others, strict=True)):
            for name, part in layer.parts:
                if other.part(name) != part:
                    continue
                compared += 1
                old, new = (getattr(model, side).layers[index].part(name) for model in (plain, changed))
                assert type(old) is type(new)
                assert_close(dict(old.named_parameters()), dict(new.named_parameters()), rtol=0, atol=0)
                arguments, output = expected[side, index, name]
                assert_close(new(*arguments), output, rtol=0, atol=0)
                ours, theirs = (beside_activations(each[side, index, name][0][1:]) for each in (given, expected))
                assert_close(ours, theirs, rtol=0, atol=0)
    return compared


@pytest.mark.parametrize(("family", "changes"), CHANGES, ids=str)
def test_what_has_one_configuration_in_two_models_is_one_function_with_one_start(family, changes):
    assert compare(family, changes) > 0


def test_a_part_that_does_more_than_its_configuration_says_is_seen(monkeypatch: pytest.MonkeyPatch):
    original = Block.__init__

    def init(self: Block, *arguments: Any) -> None:
        original(self, *arguments)
        if self.part("self_attention").config.output_norm == "head":
            self.feed_forward.activation = torch.nn.functional.gelu

    monkeypatch.setattr(Block, "__init__", init)
    with pytest.raises(AssertionError, match="not close|not equal"):
        compare("redllm", ["attention.output_norm=head"])
