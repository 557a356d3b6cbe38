"""Decoder-decoder (YOCO, arXiv 2405.05254, eq. 1 to 6): one pair of keys and values, and who sees whom by it."""

import math

import pytest
import torch
from torch.testing import assert_close

from lit_llm import load_experiment
from lit_llm.config.problems import InputError
from lit_llm.generation import generate, prefill
from lit_llm.models.resolved import not_analysed
from lit_llm.objectives.collate import collate
from lit_llm.objectives.config import EOD, MasksConfig
from tests.tiny_models import PAPER_NORMS, build, config, ids, moved, other, resolved

T, PREFIX = 12, 5
RETENTION = "self_decoder.retention={chunk: 4}"


def after(place, length=T):
    return torch.arange(length) >= place


# --- the formula -----------------------------------------------------------------------------------------------------


def rms(x, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def rotated(x_THK):
    """Each pair (i, i + K/2) as a complex number, turned by position x theta^(-2i/K)."""
    tokens, _, k = x_THK.shape
    angles = torch.arange(tokens)[:, None] * 10000.0 ** (-torch.arange(0, k, 2).double() / k)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    turned = torch.complex(x_THK[..., : k // 2], x_THK[..., k // 2 :]) * turn
    return torch.cat([turned.real, turned.imag], dim=-1)


def attended(q_THK, k_THK, v_THK, seen_TT):
    """softmax(QK^T/sqrt(K))V head by head, H x K joined."""
    heads, outs = q_THK.shape[1], []
    for head in range(heads):
        of_keys = head * k_THK.shape[1] // heads
        scores = q_THK[:, head] @ k_THK[:, of_keys].T / math.sqrt(q_THK.shape[-1])
        outs.append(scores.masked_fill(~seen_TT, -torch.inf).softmax(-1) @ v_THK[:, of_keys])
    return torch.cat(outs, dim=-1)


def by_hand(model, tokens_T, window, prefix=0):
    """T x V logits of a decoder-decoder without learned scales, of two and two layers, by YOCO's equations."""
    weights = dict(model.named_parameters())

    def linear(name, x):
        return x @ weights[f"decoder.{name}.weight"].T

    def heads(x):
        return x.unflatten(-1, (-1, 8))

    def feed_forward(layer, x):
        y, name = rms(x), f"layers.{layer}.feed_forward"
        gate = linear(f"{name}.gate", y)
        return x + linear(f"{name}.down", gate * gate.sigmoid() * linear(f"{name}.up", y))

    i, j = torch.arange(len(tokens_T))[:, None], torch.arange(len(tokens_T))
    seen = (j <= i) | ((i < prefix) & (j < prefix))
    x = weights["embedding.weight"][tokens_T]
    for layer in (0, 1):
        y, name = rms(x), f"layers.{layer}.self_attention"
        q, k, v = (heads(linear(f"{name}.{part}", y)) for part in "qkv")
        x = x + linear(f"{name}.out", attended(rotated(q), rotated(k), v, seen & ((i - j).abs() < window)))
        x = feed_forward(layer, x)
    k, v = rotated(heads(linear("shared_kv.k", rms(x)))), heads(linear("shared_kv.v", rms(x)))
    for layer in (2, 3):
        name = f"layers.{layer}.self_attention"
        x = x + linear(f"{name}.out", attended(rotated(heads(linear(f"{name}.q", rms(x)))), k, v, seen))
        x = feed_forward(layer, x)
    return rms(x) @ weights["embedding.weight"].T


@pytest.mark.parametrize("window", [1, 3, 5])
@pytest.mark.parametrize("prefix", [None, PREFIX])
def test_the_logits_are_those_of_yocos_equations(window, prefix):
    model = build("yoco", "norm.scale=false", f"attention.window={window}", "attention.kv_heads=2",
                  "self_decoder.self_attention=null")  # fmt: skip
    tokens = ids(2, T)
    found = model(tokens, prefix_length=prefix)
    for row, row_tokens in zip(found, tokens, strict=True):
        assert_close(row, by_hand(model, row_tokens, window, prefix or 0), rtol=0, atol=1e-6)  # float32 angles


def test_everything_but_the_shared_pair_starts_from_a_decoder_only_models_values():
    """Four layers each: norms, W_q, W_o and feed-forward networks of the second half have their namesakes' values."""
    ours = dict(build("yoco", double=False).named_parameters())
    theirs = dict(build("decllm", "decoder.layers=4", double=False).named_parameters())
    shared = {f"decoder.shared_kv{part}" for part in (".k.weight", ".v.weight", "_norm.scale")}
    left_out = {f"decoder.layers.{n}.self_attention.{part}.weight" for n in (2, 3) for part in "kv"}
    assert ours.keys() - theirs.keys() == shared
    assert theirs.keys() - ours.keys() == left_out
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() & theirs.keys())


def test_a_pair_that_one_layer_alone_reads_is_that_layers_own():
    """The first layer of a cross-decoder reads the states that the pair is made of: alone, and behind layers without a
    window, it is a layer of a decoder-only model."""
    yoco = build("yoco", "self_decoder.self_attention.window=null", "cross_decoder.layers=1", "norm.scale=false")
    dec = build("decllm", "decoder.layers=3", "norm.scale=false")
    values = dict(dec.named_parameters())
    for name, parameter in yoco.named_parameters():
        if ".shared_kv." in name:
            name = name.replace(".shared_kv.", ".layers.2.self_attention.")
        values[name].data.copy_(parameter)
    tokens = ids(2, T)
    assert_close(yoco(tokens), dec(tokens), rtol=0, atol=1e-12)


# --- who sees whom ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [[], [RETENTION], ["self_decoder.layer_ranges.1.retention=gated"]])
@pytest.mark.parametrize("place", range(T))
def test_a_token_changes_its_own_and_later_logits_and_no_earlier_one(overrides, place):
    model, tokens = build("yoco", *PAPER_NORMS["yoco"], *overrides), ids(2, T)
    assert_close(moved(model(tokens), model(other(tokens, place))), after(place))


@pytest.mark.parametrize("place", range(T))
def test_the_self_decoder_sees_its_windows_and_no_further(place):
    """Two layers with a window of 3 reach 2 x 2 tokens back; the pair of keys and values is made of that."""
    model, tokens, seen = build("yoco", "self_decoder.self_attention.window=3"), ids(2, T), []
    model.decoder.shared_kv.register_forward_hook(lambda _, __, made: seen.append(made[0].transpose(1, 2).flatten(2)))
    model(tokens), model(other(tokens, place))
    at = torch.arange(T)
    assert_close(moved(*seen), (at >= place) & (at <= place + 4))


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("place", range(T))
def test_a_prefix_opens_windows_and_cross_decoder(place, as_tensor):
    model, tokens = build("yoco", "self_decoder.self_attention.window=2"), ids(2, T)
    prefix = torch.tensor([PREFIX, PREFIX]) if as_tensor else PREFIX
    changed = moved(model(tokens, prefix_length=prefix), model(other(tokens, place), prefix_length=prefix))
    assert_close(changed, after(0 if place < PREFIX else place))


@pytest.mark.parametrize("overrides", [[], [RETENTION]])
def test_documents_that_are_kept_separate_are_read_as_if_alone(overrides):
    """RoPE sees distances only, so a document's logits do not depend on where in its row it stands."""
    model = build("yoco", *overrides)
    window = ids(1, T)[0].numpy()
    window[[3, 7]] = EOD
    batch = collate([window[:0]], [window], "decoder_decoder", MasksConfig(intra_document=True))
    whole = model(**batch.inputs)
    for first, last in ((0, 5), (5, 9), (9, T)):  # <s> and 4 tokens; 4 more; the rest
        alone = model(batch.inputs["tokens_BT"][:, first:last])
        assert_close(whole[:, first:last], alone, rtol=0, atol=1e-6)  # angles are float32


# --- early exit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [[5, 5, 5], [9, 0, 4, 1]], ids=["even", "uneven"])
@pytest.mark.parametrize("overrides", [[], [RETENTION], ["cross_decoder.layers=3", "attention.kv_heads=2"]])
def test_stopping_a_prompt_in_the_middle_changes_no_logit(prompts, overrides):
    """The cross-decoder runs for the last token of each prompt alone; the whole pass runs it for all."""
    model = build("yoco", *PAPER_NORMS["yoco"], *overrides)
    texts = [ids(1, length)[0].tolist() for length in prompts]
    found = prefill(model, texts).logits_BV
    whole = torch.stack([model(torch.tensor([[1, *text]]))[0, -1] for text in texts])
    assert_close(found, whole, rtol=0, atol=1e-12)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "kv_heads: 2",
        "rope: none",
        "rope_theta: 500.0",
        "rope_factor: 2.0",
        "rope_fraction: 0.5",
        "{heads: 2, head_dim: 16}",
        "qkv_norm: [k]",
        "qkv_bias: [v]",
    ],
)
def test_layers_that_would_need_other_keys_are_refused(override):
    value = override if override.startswith("{") else f"{{{override}}}"
    with pytest.raises(InputError, match=r"cross_decoder.cross_attention.*one pair.*layer 1 differs from layer 0"):
        config("yoco", f"cross_decoder.layer_ranges.1.cross_attention={value}")


@pytest.mark.parametrize("override", ["heads: 8, kv_heads: 4, head_dim: 8", "qkv_norm: [q]", "output_norm: head"])
def test_layers_may_differ_in_what_is_their_own(override):
    config("yoco", f"cross_decoder.layer_ranges.1.cross_attention={{{override}}}")


def test_a_window_of_the_default_is_the_self_decoders():
    """As in cross-attention to a source, which sees all of it."""
    windows = [layer.self_attention.window for layer in resolved("yoco", "attention.window=7").decoder]
    assert windows == [5, 5, None, None]  # the more specific address wins in the first two


def test_shared_keys_have_no_relative_bias():
    with pytest.raises(InputError, match="shared keys have no relative bias"):
        config("yoco", "attention.relative_bias=per_layer")
    config("yoco", "attention.relative_bias=per_layer", "cross_decoder.cross_attention.relative_bias=none")


def test_retention_refuses_an_open_prefix_wherever_one_can_be_asked_for():
    opened = ["pretrain.objective=prefix_lm", "pretrain.masks.prefix=bidirectional"]
    load_experiment("yoco-tiny", opened)
    with pytest.raises(InputError, match=r"pretrain.masks.prefix: bidirectional: retention is causal"):
        load_experiment("yoco-tiny", [*opened, "model.self_decoder.retention=gated"])
    with pytest.raises(ValueError, match="retention is causal"):
        generate(build("yoco", RETENTION), [[5, 6]], max_new_tokens=1, prefix="bidirectional")
    generate(build("yoco"), [[5, 6]], max_new_tokens=1, prefix="bidirectional")


@pytest.mark.parametrize(
    ("family", "overrides", "reason"),
    [
        ("yoco", [], "no keys and values of their own"),
        ("decllm", ["decoder.retention=gated"], "does not see retention"),
    ],
)
def test_the_analysis_of_attention_says_why_it_does_not_look(family, overrides, reason):
    assert reason in not_analysed(resolved(family, *overrides))


def test_an_experiment_that_would_look_at_its_attention_is_refused():
    with pytest.raises(InputError, match=r"evaluate.attention: .*no keys and values of their own"):
        load_experiment("yoco-tiny", ["pretrain.objective=prefix_lm", "evaluate.attention={}"])


def test_an_idle_key_of_either_stack_is_an_error():
    for key in ("self_decoder.self_attention.heads=4", "cross_decoder.cross_attention.window=3"):
        with pytest.raises(InputError, match="changes nothing"):
            load_experiment("yoco-tiny", [f"model.{key}"])


def test_retention_takes_its_heads_from_the_default_attention_and_the_place_of_self_attention():
    first, second = resolved("decllm", "decoder.layer_ranges.1.retention.value_dim=5", "attention.heads=2").decoder
    retention = second.part("retention")
    assert first.part("retention") is None
    assert second.self_attention is None
    assert (retention.heads, retention.head_dim, retention.value_dim) == (2, 16, 5)
