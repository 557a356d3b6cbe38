"""Rotary positions against transformers' Llama, and what makes them relative."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lit_llm.components.forward_context import ForwardContext
from lit_llm.components.masks import AttentionMask
from lit_llm.components.rope import Frequencies, rotate, rotation_at


def rotation_of(positions, head_dim, theta=10000.0, dtype=torch.float32):
    return rotation_at(torch.as_tensor(positions), Frequencies(theta, head_dim), dtype)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [8, 64])
def test_rotations_are_those_of_llama(theta, head_dim):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    rope = {"rope_type": "default", "rope_theta": theta}
    peer = LlamaRotaryEmbedding(
        LlamaConfig(hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, rope_parameters=rope)
    )
    q, k, positions = torch.randn(1, 300, 2, head_dim), torch.randn(1, 300, 2, head_dim), torch.arange(300)
    wanted_q, wanted_k = apply_rotary_pos_emb(q, k, *peer(q, positions[None]), unsqueeze_dim=2)
    mine = rotation_of(positions, head_dim, theta)
    # Angles reach 300 rad, where float32 is 3e-5 apart.
    assert_close(rotate(q, mine), wanted_q, rtol=0, atol=2e-4)
    assert_close(rotate(k, mine), wanted_k, rtol=0, atol=2e-4)


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize(("factor", "original"), [(4.0, 64), (8.0, 8192), (40.0, 4096)])
@pytest.mark.parametrize(("scaling", "more"), [("linear", {}), ("llama3", LLAMA3), ("yarn", {})])
def test_scaled_frequencies_are_those_of_transformers(scaling, more, factor, original, fraction):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theta, head_dim = 500.0, 64
    rope = {"rope_type": scaling, "rope_theta": theta, "factor": factor, "partial_rotary_factor": fraction, **more}
    if scaling != "linear":
        rope["original_max_position_embeddings"] = original
    shape = {"hidden_size": 2 * head_dim, "num_attention_heads": 2, "head_dim": head_dim}
    config = LlamaConfig(**shape, max_position_embeddings=int(factor * original), rope_parameters=rope)
    wanted, magnitude = ROPE_INIT_FUNCTIONS[scaling](config, torch.device("cpu"))
    ours = Frequencies(theta, int(head_dim * fraction), factor, scaling, original)
    assert_close(ours.radians(torch.device("cpu")), wanted)
    cos, sin = rotation_at(torch.arange(3), ours, torch.float32)
    assert_close((cos.square() + sin.square()).sqrt(), torch.full_like(cos, magnitude))


def test_a_rotation_of_a_part_leaves_the_other_entries():
    """Judge: Qwen3-Next's function, which rotates the first entries too."""
    from transformers.models.qwen3_next.modeling_qwen3_next import apply_rotary_pos_emb

    x, (cos, sin) = torch.randn(2, 5, 3, 16), rotation_of(range(5), 8)
    whole = (torch.cat([each[:, 0], each[:, 0]], -1)[None] for each in (cos, sin))
    wanted, _ = apply_rotary_pos_emb(x, x, *whole, unsqueeze_dim=2)
    assert_close(rotate(x, (cos, sin)), wanted)


def test_a_score_depends_on_the_distance_alone():
    """<R_m q, R_n k> = <R_(m+c) q, R_(n+c) k>: the property that gives RoPE its name (arXiv 2104.09864, eq. 11)."""
    q, k = torch.randn(16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)

    def score(m, n):
        return (
            rotate(q[None, None], rotation_of([m], 16)).flatten()
            @ rotate(k[None, None], rotation_of([n], 16)).flatten()
        )

    assert_close(score(12, 7), score(112, 107), rtol=1e-4, atol=1e-4)
    assert abs(score(12, 7) - score(13, 7)) > 1e-2


def test_rows_may_have_positions_of_their_own():
    x = torch.randn(2, 4, 3, 8)
    both = rotate(x, rotation_of([[0, 1, 2, 3], [5, 6, 7, 8]], 8))
    assert_close(both[:1], rotate(x[:1], rotation_of([0, 1, 2, 3], 8)))
    assert_close(both[1:], rotate(x[1:], rotation_of([5, 6, 7, 8], 8)))


def test_parameter_free_rms_norm_commutes_with_rope():
    """A rotation keeps the norm; so whether LN(Q) comes before or after RoPE (facts.md 1.2, unknown) is irrelevant."""
    x, rotation = torch.randn(2, 5, 3, 16, dtype=torch.float64), rotation_of(range(5), 16, dtype=torch.float64)
    assert_close(rotate(F.rms_norm(x, (16,)), rotation), F.rms_norm(rotate(x, rotation), (16,)))


def test_a_learned_scale_does_not_commute_with_rope():
    x, rotation = torch.randn(2, 5, 3, 16), rotation_of(range(5), 16)
    scale = torch.linspace(0.5, 2, 16)
    difference = rotate(F.rms_norm(x, (16,), scale), rotation) - F.rms_norm(rotate(x, rotation), (16,), scale)
    assert difference.abs().max() > 0.1


def test_in_bfloat16_neighbours_beyond_256_stay_apart():
    """bfloat16 has 8 bits of precision: 256 and 257 are one number there, so the angles must be made in float32."""
    assert torch.tensor(256.0).bfloat16() == torch.tensor(257.0).bfloat16()
    cos, sin = rotation_of([256, 257], 8, dtype=torch.bfloat16)
    assert cos.dtype == torch.bfloat16
    assert_close(cos[:, 0, 0].float(), torch.tensor([256.0, 257.0]).cos(), rtol=0, atol=2**-8)
    assert_close(sin[:, 0, 0].float(), torch.tensor([256.0, 257.0]).sin(), rtol=0, atol=2**-8)


def test_a_rotation_is_made_once_for_each_kind():
    context = ForwardContext(torch.zeros(1, 4, 8), AttentionMask(), {"self": torch.arange(4)})
    assert context.rotation("self", Frequencies(1e4, 8)) is context.rotation("self", Frequencies(1e4, 8))
    one, other = (context.rotation("self", Frequencies(theta, 8)) for theta in (1e4, 1e5))
    assert not torch.equal(one[0], other[0])
    assert context.rotation("self", Frequencies(1e4, 16))[0].shape == (4, 1, 8)
