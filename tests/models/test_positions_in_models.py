"""Which positions the attentions of whole models are given (arXiv 2510.26622, figure 1), and that they matter."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from tests.tiny_models import build, ids

S, T = 6, 4
LENGTHS = torch.tensor([3, 6])


def rotations_given(model, attention, *inputs):
    """(query rotation, key rotation) that one attention module is called with."""
    seen = []
    handle = attention.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    model(*inputs)
    handle.remove()
    (given,) = seen
    return given.q_rotation, given.k_rotation if given.source_BSD is None else given.source_rotation


def assert_positions(rotation, positions):
    """The first frequency is theta^0 = 1, so its angle is the position itself."""
    cos, sin = (part[..., 0].squeeze() for part in rotation)
    wanted = torch.as_tensor(positions, dtype=torch.float64)
    assert_close(cos, wanted.cos(), rtol=0, atol=1e-6)
    assert_close(sin, wanted.sin(), rtol=0, atol=1e-6)


def test_decoder_only_positions_count_from_zero():
    model = build("decllm")
    query, key = rotations_given(model, model.decoder.layers[1].self_attention, ids(2, T))
    assert_positions(query, range(T))
    assert_positions(key, range(T))


def test_continuous_the_target_goes_on_where_the_source_ended():
    """Figure 1: the encoder's tokens are 0..k-1, <s> is k."""
    model = build("redllm", "attention.rope=continuous")
    cross = model.decoder.layers[1].cross_attention
    query, key = rotations_given(model, cross, ids(2, S), ids(2, T))
    assert_positions(query, range(S, S + T))
    assert_positions(key, range(S))


def test_continuous_counts_from_each_rows_own_source():
    model = build("redllm", "attention.rope=continuous")
    query, key = rotations_given(model, model.decoder.layers[0].cross_attention, ids(2, S), ids(2, T), LENGTHS)
    assert_positions(query, [range(3, 3 + T), range(6, 6 + T)])
    assert_positions(key, range(S))


def test_restart_counts_the_target_from_zero():
    model = build("redllm", "decoder.cross_attention.rope=restart")
    query, key = rotations_given(model, model.decoder.layers[0].cross_attention, ids(2, S), ids(2, T), LENGTHS)
    assert_positions(query, range(T))
    assert_positions(key, range(S))


def test_none_rotates_neither_side_of_the_cross_attention_and_leaves_self_attention_alone():
    model = build("redllm", "decoder.cross_attention.rope=none")
    layer = model.decoder.layers[0]
    assert rotations_given(model, layer.cross_attention, ids(2, S), ids(2, T)) == (None, None)
    assert_positions(rotations_given(model, layer.self_attention, ids(2, S), ids(2, T))[0], range(T))


def test_self_attention_of_encoder_and_decoder_counts_from_zero():
    model = build("redllm")
    for stack, length in ((model.encoder, S), (model.decoder, T)):
        query, key = rotations_given(model, stack.layers[0].self_attention, ids(2, S), ids(2, T), LENGTHS)
        assert_positions(query, range(length))
        assert_positions(key, range(length))


def test_the_three_schemes_are_three_functions_of_the_same_weights():
    source, target = ids(2, S), ids(2, T)
    models = [build("redllm", f"decoder.cross_attention.rope={rope}") for rope in ("continuous", "restart", "none")]
    for left, right in itertools.combinations(models, 2):
        assert_close(left.state_dict(), right.state_dict(), rtol=0, atol=0)
        assert (left(source, target) - right(source, target)).abs().max() > 1e-3


def test_rope_restart_and_continuous_are_one_in_self_attention():
    tokens = ids(2, T)
    assert_close(build("decllm", "attention.rope=restart")(tokens), build("decllm")(tokens), rtol=0, atol=0)


def test_a_layer_may_have_its_own_theta():
    model = build("decllm", "decoder.layer_ranges.1.self_attention.rope_theta=100.0")
    rotations = [rotations_given(model, layer.self_attention, ids(1, T))[0] for layer in model.decoder.layers]
    exponents = torch.arange(0, 8, 2) / 8
    for (cos, _), theta in zip(rotations, (10000.0, 100.0), strict=True):
        assert_close(cos[3].flatten(), (3 * theta**-exponents).cos().double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["decllm", "redllm"])
def test_without_any_position_a_source_or_an_open_prefix_is_a_set(family):
    """rope: none everywhere leaves masks as the only thing that tells places apart; with RoPE the order shows."""
    tokens, target, order = ids(2, S), ids(2, T), torch.tensor([3, 0, 2, 1, 4, 5])

    def behind(model, tokens):
        return model(tokens, target) if family == "redllm" else model(tokens, prefix_length=4)[:, 4:]

    unordered, ordered = build(family, "attention.rope=none"), build(family)
    assert_close(behind(unordered, tokens[:, order]), behind(unordered, tokens))
    assert (behind(ordered, tokens[:, order]) - behind(ordered, tokens)).abs().max() > 1e-3
