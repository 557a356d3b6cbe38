"""Value residual (ResFormer, arXiv 2410.17897), against its formula written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lit_llm.config.problems import InputError
from lit_llm.models.build import build_model
from tests.tiny_models import build, config, ids, resolved

FIXED, LEARNED = "attention.value_residual=fixed", "attention.value_residual=learned"
MERGED_FIRST = [
    "decoder.layer_ranges.0.cross_attention_mode=merged",
    "decoder.layer_ranges.1.self_attention.value_residual=fixed",
]


def values_of(model, side: str, *inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(the values that a layer projects and normalises alone, those that its queries weigh) of every layer."""
    projected: list[Tensor] = []
    weighed: list[Tensor] = []
    for block in getattr(model, side).layers:
        attention = block.self_attention
        attention.register_forward_pre_hook(
            lambda module, given: projected.append(module.heads("v", given[0], None).detach())
        )
        attention.dot_product.register_forward_pre_hook(lambda _, given: weighed.append(given[2].detach()))
    with torch.no_grad():
        model(*inputs)
    return list(zip(projected, weighed, strict=True))


@pytest.mark.parametrize("norms", ["attention.qkv_norm=[]", "attention.qkv_norm=[v]"])
@pytest.mark.parametrize(("family", "side"), [("decllm", "decoder"), ("redllm", "encoder"), ("redllm", "decoder")])
def test_each_later_layer_mixes_the_first_layers_values_with_its_own(family: str, side: str, norms: str) -> None:
    """V'_n = λ₁ V_1 + λ₂ V_n, each V after its norm: with 0.3 given, and with two numbers of each layer learned."""
    inputs = (ids(2, 7), ids(2, 5))[: 2 if family == "redllm" else 1]
    shape = [f"{side}.layers=3", "attention.kv_heads=2", norms]
    fixed = build(family, *shape, FIXED, "attention.value_residual_weight=0.3")
    learned = build(family, *shape, LEARNED)
    for number, block in enumerate(getattr(learned, side).layers[1:]):
        block.self_attention.value_residual.weights.data = torch.tensor([0.2 + number, -0.7], dtype=torch.float64)
    for model, weights in ((fixed, [(0.3, 0.7)] * 2), (learned, [(0.2, -0.7), (1.2, -0.7)])):
        (first, kept), *later = values_of(model, side, *inputs)
        assert_close(kept, first)
        for (of_first, of_own), (own, mixed) in zip(weights, later, strict=True):
            assert_close(mixed, of_first * first + of_own * own)


def test_learned_weights_start_at_one_half_each() -> None:
    tokens = ids(2, 9)
    assert_close(build("decllm", LEARNED)(tokens), build("decllm", FIXED)(tokens))
    weights = build_model(config("decllm", LEARNED)).decoder.layers[1].self_attention.value_residual.weights
    assert weights.tolist() == [0.5, 0.5]


def test_a_range_of_layers_may_have_it_and_only_the_first_layer_gives_values() -> None:
    layers = resolved("decllm", "decoder.layers=4", "decoder.layer_ranges.2-3.self_attention.value_residual=fixed")
    assert [layer.self_attention.value_residual for layer in layers.decoder] == ["first", "none", "fixed", "fixed"]


def test_in_a_decoder_decoder_the_self_decoder_has_it() -> None:
    layers = resolved("yoco", FIXED).decoder
    assert [layer.self_attention.value_residual for layer in layers] == ["first", "fixed", "none", "none"]


def test_the_dump_of_a_model_without_it_does_not_name_it() -> None:
    """So that the fingerprints of other experiments do not depend on it."""
    assert "value" not in str(resolved("redllm").model_dump())


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("redllm", ["decoder.cross_attention_mode=merged", FIXED], "merged attention's values"),
        ("decllm", ["decoder.layer_ranges.1.self_attention.kv_heads=1", FIXED], "kv_heads and head_dim of layer 0"),
        ("decllm", ["decoder.layer_ranges.0.retention=gated", LEARNED], "has no self-attention"),
        ("redllm", MERGED_FIRST, "write cross_attention_mode: separate there"),
        ("double", MERGED_FIRST, "write cross_attention_mode: separate there"),
    ],
)
def test_it_is_refused_where_the_first_layer_has_no_such_values(
    family: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        config(family, *overrides)
