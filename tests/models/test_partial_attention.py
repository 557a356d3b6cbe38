"""PALM's partial attention: its formula, who sees the source in it, and that models without it are what they were."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lit_llm.components.attention.dot_product import DotProduct
from lit_llm.config.problems import InputError
from lit_llm.models import families
from lit_llm.objectives.collate import collate
from lit_llm.objectives.config import EOD, MasksConfig
from tests.tiny_models import PAPER_NORMS, build, ids, moved, other, resolved

PALM = "decoder.partial_attention=palm"
T, SOURCE = 9, 4


def palm(*overrides, seed=0):
    return build("decllm", PALM, *overrides, seed=seed)


@pytest.fixture(scope="module")
def model():
    return palm(*PAPER_NORMS["decllm"])


def after(place):
    return torch.arange(T) >= place


# --- the formula -----------------------------------------------------------------------------------------------------


def rotated(x_BHTK, theta):
    """RoPE on pairs (i, i + K/2) as a product of complex numbers."""
    half = x_BHTK.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones(1, dtype=torch.float64), torch.arange(x_BHTK.shape[2])[:, None] * frequencies)
    turned = torch.complex(x_BHTK[..., :half], x_BHTK[..., half:]) * turn
    return torch.cat([turned.real, turned.imag], dim=-1)


def attention(x, memory, w, name, config, seen):
    """softmax(Q Kᵀ / √K) V of every head, with the keys written out for each query head."""
    q, k, v = (
        (states @ w[f"{name}.{part}.weight"].T).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
        for part, states in (("q", x), ("k", memory), ("v", memory))
    )
    if config.rope != "none":
        q, k = rotated(q, config.rope_theta), rotated(k, config.rope_theta)
    k, v = (part.repeat_interleave(config.heads // config.kv_heads, dim=1) for part in (k, v))
    scores = q @ k.transpose(-1, -2) / config.head_dim**0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2) @ w[f"{name}.out.weight"].T


def norm(x, w, name):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.scale"]


def by_the_formula(model, tokens_BT, source):
    """Logits; plain torch from the weights alone."""
    w, length = model.state_dict(), tokens_BT.shape[1]
    x = w["embedding.weight"][tokens_BT]
    for number, layer in enumerate(model.config.decoder):
        at = f"decoder.layers.{number}"
        normed = norm(x, w, f"{at}.self_attention_norm")
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        x = x + attention(normed, normed, w, f"{at}.self_attention", layer.self_attention, causal)
        if layer.part("partial_attention") is not None:
            normed = norm(x, w, f"{at}.partial_attention_norm")
            p1 = (normed[:, :source] @ w[f"{at}.partial_attention.a1.weight"].T).clamp(min=0)
            p2 = p1 @ w[f"{at}.partial_attention.a2.weight"].T
            everything = torch.ones(length, source, dtype=torch.bool)
            x = x + attention(
                normed, p2 + p1, w, f"{at}.partial_attention", layer.part("partial_attention"), everything
            )
        normed = norm(x, w, f"{at}.feed_forward_norm")
        gate, up = (normed @ w[f"{at}.feed_forward.{part}.weight"].T for part in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ w[f"{at}.feed_forward.down.weight"].T
    return norm(x, w, "decoder.norm") @ w["embedding.weight"].T


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("source", [1, SOURCE, T])
@pytest.mark.parametrize(
    "overrides",
    [
        ["attention.rope=none"],
        ["attention.rope=none", "attention.kv_heads=2"],
        ["attention.rope=none", "decoder.partial_attention={kv_heads: 1, head_dim: 12}"],
        ["decoder.partial_attention.rope=none"],
        ["attention.kv_heads=2"],
        ["decoder.partial_attention={kv_heads: 1, head_dim: 12, rope_theta: 50.0}"],
        ["decoder.partial_attention=null", "decoder.layer_ranges.1.partial_attention={heads: 2}"],
    ],
    ids=" ".join,
)
def test_logits_are_those_of_the_formula(overrides, source, seed):
    """P = P2 + P1, P1 = relu(S A1), P2 = P1 A2; keys and values of P, queries of all tokens, no causal mask."""
    model, tokens = palm(*overrides, seed=seed), ids(2, T)
    with torch.no_grad():  # scales start as one: a forgotten one would not show
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    # Of rotations the model computes the angles in float32.
    expected, near = by_the_formula(model, tokens, source), 1e-11 if "attention.rope=none" in overrides else 2e-5
    assert expected.abs().max() > 1
    for length in (source, torch.full((2,), source)):
        assert_close(model(tokens, source_length=length), expected, rtol=0, atol=near)


# --- who sees whom ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("place", range(T))
def test_a_source_token_reaches_every_logit_and_a_target_only_its_own_and_later_ones(model, place, as_tensor):
    tokens, length = ids(2, T), torch.tensor([SOURCE, SOURCE]) if as_tensor else SOURCE
    changed = moved(model(tokens, source_length=length), model(other(tokens, place), source_length=length))
    assert_close(changed, after(0 if place < SOURCE else place))


def test_every_query_weighs_every_source_token_and_no_other_token():
    """Seen where they enter: the kernel gets keys of the source alone, and nothing hides one from a query."""
    model, calls = palm(), []
    for block in model.decoder.layers:
        assert isinstance(block.partial_attention.dot_product, DotProduct)
        block.partial_attention.dot_product.register_forward_pre_hook(lambda _, given: calls.append(given))
    model(ids(2, T), source_length=SOURCE)
    for q_BHTK, k_BHSK, v_BHSK, mask, _ in calls:
        assert (q_BHTK.shape[2], k_BHSK.shape[2], v_BHSK.shape[2]) == (T, SOURCE, SOURCE)
        assert mask.kernel == "masked"
        assert mask.visible is None
    assert len(calls) == 2


@pytest.mark.parametrize("prefix", ["causal", "bidirectional"])
def test_no_counted_target_is_seen_where_it_is_predicted(model, prefix):
    """Laid out as for training: the distribution of target n may not change with target n or a later one."""
    rows = ids(2, T).numpy()
    cuts = [2, 5]

    def logits(rows):
        sources = [row[:cut] for row, cut in zip(rows, cuts, strict=True)]
        targets = [row[cut:] for row, cut in zip(rows, cuts, strict=True)]
        batch = collate(sources, targets, "decoder", MasksConfig(prefix=prefix))
        return model(**batch.inputs), batch

    before, batch = logits(rows)
    for row, cut in enumerate(cuts):
        for place in range(cut, T):
            changed = rows.copy()
            changed[row, place] = 2 + (changed[row, place] - 2 + 7) % 59
            difference_T = (logits(changed)[0] - before).abs().amax(-1)[row]
            assert batch.weights[row, place] == 1
            assert (difference_T[: place + 1] == 0).all()
            assert place == T - 1 or (difference_T[place + 1 :] > 1e-9).all()


def test_rows_with_sources_of_their_own_equal_each_row_alone(model):
    tokens, lengths = ids(4, T), [1, 4, 7, T]
    together = model(tokens, source_length=torch.tensor(lengths))
    for row, length in enumerate(lengths):
        assert_close(together[row : row + 1], model(tokens[row : row + 1], source_length=length))


def test_lengths_on_a_device_that_is_not_waited_for_give_the_same(model, monkeypatch):
    """On a GPU nobody looks how long the longest source is: all tokens become keys, and a mask hides the others."""
    tokens, lengths = ids(3, T), torch.tensor([1, SOURCE, 6])
    documents = torch.tensor([[0] * 3 + [1] * 6, [0] * 9, [0] * 5 + [1] * 4])
    for masks in ({}, {"documents_BT": documents}):
        looked = model(tokens, source_length=lengths, **masks)
        with monkeypatch.context() as patch:
            patch.setattr(families, "_length_range", lambda lengths: None)
            assert_close(model(tokens, source_length=lengths, **masks), looked)


def test_a_token_whose_document_has_no_source_is_computed_as_without_partial_attention(model):
    """The window a b ■ c d e, cut behind ■: c d e are of another document than the source, the rest of its own."""
    plain = build("decllm", *PAPER_NORMS["decllm"])
    a, b, c, d, e = ids(1, 5)[0].tolist()
    batch = collate([np.array([a, b, EOD])], [np.array([c, d, e])], "decoder", MasksConfig(intra_document=True))
    assert batch.inputs["documents_BT"].tolist() == [[0, 0, 0, 0, 1, 1]]
    difference_T = (model(**batch.inputs) - plain(**batch.inputs)).abs().amax(-1)[0]
    assert (difference_T[:4] > 1e-3).all()
    assert (difference_T[4:] == 0).all()


# --- beside the models that have none --------------------------------------------------------------------------------


def test_what_two_models_share_starts_equal():
    plain = build("decllm").state_dict()
    with_it = {name: value for name, value in palm().state_dict().items() if "partial" not in name}
    assert with_it.keys() == plain.keys()
    assert all(torch.equal(value, plain[name]) for name, value in with_it.items())


def test_a_model_without_it_does_not_read_where_the_source_ends():
    plain, tokens = build("decllm"), ids(2, T)
    assert torch.equal(plain(tokens, source_length=SOURCE), plain(tokens))


def test_what_is_not_there_is_not_in_what_a_fingerprint_is_made_of():
    assert "partial_attention" not in str(resolved("decllm").model_dump(mode="json"))
    assert "partial_attention" in str(resolved("decllm", PALM).model_dump(mode="json"))


# --- addresses -------------------------------------------------------------------------------------------------------


def heads_of(*overrides):
    """Of each layer's partial attention; None where there is none."""
    layers = resolved("decllm", "decoder.layers=3", *overrides).decoder
    parts = [layer.part("partial_attention") for layer in layers]
    return [part and part.heads for part in parts]


def test_it_is_where_it_is_written_and_the_more_specific_address_wins():
    assert heads_of() == [None] * 3
    assert heads_of(PALM) == [4] * 3
    assert heads_of(PALM, "attention.heads=8") == [8] * 3
    assert heads_of("decoder.partial_attention.heads=2") == [2] * 3
    assert heads_of("decoder.layer_ranges.1-2.partial_attention=palm") == [None, 4, 4]
    both = ["decoder.layer_ranges.1.partial_attention.heads=1", "decoder.partial_attention.heads=2"]
    assert heads_of(*both) == [2, 1, 2]
    assert heads_of(PALM, "decoder.self_attention.heads=2") == [4] * 3, "an override of self-attention is not its own"


def test_ranges_that_overlap_may_both_say_that_there_is_one():
    ranges = ["decoder.layer_ranges.0-1.partial_attention=palm", "decoder.layer_ranges.1.partial_attention.heads=2"]
    assert heads_of(*ranges) == [4, 2, None]


def test_restarted_positions_are_continuous_ones():
    """Queries stand in the row that the keys stand in; PALM's position ids of their own are not part of this."""
    assert resolved("decllm", PALM, "attention.rope=restart") == resolved("decllm", PALM)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "override", "key", "message"),
    [
        ("redllm", "decoder.partial_attention=palm", "decoder.partial_attention", "cross-attention reads the source"),
        (
            "redllm",
            "decoder.layer_ranges.1.partial_attention={heads: 2}",
            "decoder.layer_ranges.1.partial_attention",
            "is for decoder-only models",
        ),
        ("redllm", "encoder.partial_attention=palm", "encoder.partial_attention", "unknown key"),
        ("decllm", "decoder.partial_attention.heads=5", "decoder.partial_attention", "5 heads do not divide"),
        ("decllm", "decoder.partial_attention=plam", "decoder.partial_attention.kind", "did you mean 'palm'?"),
        ("decllm", "decoder.partial_attention.haeds=2", "decoder.partial_attention.haeds", "did you mean 'heads'?"),
    ],
)
def test_what_cannot_be_built_is_refused_at_its_key(family, override, key, message):
    with pytest.raises(InputError) as error:
        resolved(family, override)
    (problem,) = error.value.problems
    assert problem.key == key
    assert message in problem.message


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (None, "needs to know where the source ends"),
        (0, "source_length 0 is too short; at least 1"),
        (torch.tensor([3, 0]), "source_length 0 is too short"),
        (T + 1, f"source_length {T + 1} is longer than the {T} tokens"),
        (torch.tensor([2, T + 1]), f"source_length {T + 1} is longer"),
    ],
)
def test_a_source_that_cannot_be_is_refused(model, length, message):
    with pytest.raises(ValueError, match=message):
        model(ids(2, T), source_length=length)
