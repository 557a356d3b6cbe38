"""What an adapted model has of its source: T5Gemma's recipe (arXiv 2504.06225, section 2), and what then must compute
the same."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from lit_llm.components.forward_context import ForwardContext
from lit_llm.components.masks import AttentionMask
from lit_llm.config.section import validate
from lit_llm.config.tree import tree
from lit_llm.models.adapt import adaptation_of, adapted, altered, layers_taken, problem_of
from lit_llm.models.build import build_model
from lit_llm.models.config import EncoderOnlyModel
from lit_llm.models.parameters import parameter_shapes
from lit_llm.models.resolve import resolve_model
from tests.tiny_models import VOCABULARY, build, ids, resolved

SCALED = ["attention.qkv_norm=[q, v]", "attention.qkv_norm_scale=true"]
OUTPUT = ["attention.output_norm=concat", "attention.output_norm_scale=true"]
BIASED = ["attention.rope=none", "attention.relative_bias=shared", "attention.relative_buckets=8"]
HALVED = [("heads", 4, 2), ("kv_heads", 4, 2), ("head_dim", 8, 16)]
DENSE = ["output.head=dense", "output.bias=true", "embedding.norm=true"]


def encoder_only():
    shared = {"d_model": 32, "vocabulary": VOCABULARY, "attention": {"heads": 4}, "feed_forward": {"d_ff": 48}}
    return resolve_model(
        validate(EncoderOnlyModel, tree({**shared, "family": "encoder_only", "encoder": {"layers": 2}}))
    )


def both(source):
    return {"encoder": source, "decoder": source}


def take(target, source):
    """A target with weights of another seed, which has taken over what a source has to give; in float64."""
    made = build_model(target, seed=1).double().eval()
    drawn = {name: value.clone() for name, value in made.state_dict().items()}
    adaptation = adaptation_of(target, both(source.config))
    made.load_state_dict(adapted(adaptation, both(source.state_dict())), strict=False)
    return made, adaptation, drawn


@pytest.mark.parametrize("family", ["decllm", "redllm"])
@pytest.mark.parametrize(
    "overrides",
    [
        [], SCALED, OUTPUT, BIASED, DENSE,
        ["tie_embeddings=none"], ["norm.placement=sandwich"], ["norm.placement=post"], ["norm.skip_first=true"],
        ["norm.scale=false"], ["feed_forward.activation=gelu"], ["attention.kv_heads=2"],
        ["attention.rope=none", "attention.relative_bias=per_layer", "attention.relative_buckets=8"],
    ],
    ids=str,
)  # fmt: skip
def test_names_and_shapes_are_those_of_the_built_model(family, overrides):
    model = resolved(family, *overrides)
    built = build_model(model, device="meta").named_parameters()
    assert parameter_shapes(model) == {name: tuple(parameter.shape) for name, parameter in built}


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("decllm", ["decoder.partial_attention=palm"]),
        ("decllm", ["decoder.layer_ranges.1.retention=gated"]),
        (
            "redllm",
            [
                "encoder.gated_deltanet=gated",
                "decoder.layer_ranges.1.mamba2={groups: 2}",
                "decoder.layer_ranges.0.gla={}",
            ],
        ),
        ("redllm", ["tie_embeddings=decoder", "encoder.d_model=16", "encoder.attention.heads=2"]),
        ("redllm", ["tie_embeddings=inputs", "decoder.cross_attention_mode=merged"]),
        ("redllm", ["tie_embeddings=none", "decoder.layer_ranges.1.cross_attention_mode=none", *DENSE]),
    ],
)
def test_so_they_are_where_the_stacks_differ(family, overrides):
    model = resolved(family, *overrides)
    built = build_model(model, device="meta").named_parameters()
    assert parameter_shapes(model) == {name: tuple(parameter.shape) for name, parameter in built}


@pytest.mark.parametrize(
    ("red", "dec"), [([], []), (SCALED, SCALED), (OUTPUT, OUTPUT), (["norm.placement=sandwich"],) * 2], ids=str
)
def test_an_encoder_whose_mask_is_closed_again_is_the_decoder(red, dec):
    source = build("decllm", *dec)
    made, _, _ = take(resolved("redllm", *red), source)
    tokens = ids(2, 7)
    positions = {"self": torch.arange(7)}
    x_BSD = made.embed(tokens, positions)
    closed = made.encoder(x_BSD, ForwardContext(x_BSD, AttentionMask(causal=True), positions))
    assert_close(closed, source.hidden(tokens), rtol=0, atol=1e-12)
    assert (made.encode(tokens) - closed).abs().max() > 0.01  # and open it is not


def test_a_decoder_that_hears_nothing_of_its_source_is_the_decoder():
    source = build("decllm")
    made, _, _ = take(resolved("redllm"), source)
    for layer in made.decoder.layers:
        layer.cross_attention.out.weight.data.zero_()
    target = ids(2, 7)
    assert_close(made(ids(2, 5), target), source(target), rtol=0, atol=1e-12)


def test_every_tensor_is_bit_equal_to_the_one_it_comes_from():
    source = build("decllm", "tie_embeddings=none", *SCALED)
    made, adaptation, _ = take(resolved("redllm", "tie_embeddings=none", *SCALED), source)
    state, given = made.state_dict(), source.state_dict()
    assert adaptation.newly_initialised == adaptation.left == ()
    assert torch.equal(state["encoder_embedding.weight"], given["embedding.weight"])
    assert torch.equal(state["output.weight"], given["output.weight"])
    for index in range(2):
        for part in ("q.weight", "k.weight", "v.weight", "out.weight", "qkv_scale.q"):
            own = given[f"decoder.layers.{index}.self_attention.{part}"]
            for place in ("encoder.{}.self_attention", "decoder.{}.self_attention", "decoder.{}.cross_attention"):
                name = f"{place.format(f'layers.{index}')}.{part}"
                assert torch.equal(state[name], own), name
        norm = given[f"decoder.layers.{index}.self_attention_norm.scale"]
        assert torch.equal(state[f"decoder.layers.{index}.cross_attention_norm.scale"], norm)
        up = given[f"decoder.layers.{index}.feed_forward.up.weight"]
        assert torch.equal(state[f"encoder.layers.{index}.feed_forward.up.weight"], up)


def test_a_tied_source_gives_its_one_matrix_to_every_table():
    source = build("decllm")
    made, _, _ = take(resolved("redllm", "tie_embeddings=none"), source)
    for table in (made.embedding, made.encoder_embedding, made.output):
        assert torch.equal(table.weight, source.embedding.weight)


def test_merged_attention_has_nothing_fresh():
    """T5Gemma 2 (arXiv 2512.14856): the decoder reads the source by its self-attention's own matrices."""
    assert (
        adaptation_of(
            resolved("redllm", "decoder.cross_attention_mode=merged"), both(resolved("decllm"))
        ).newly_initialised
        == ()
    )


def test_of_two_sizes_the_cross_attention_is_drawn_and_all_else_taken():
    """T5Gemma 9B-2B: keys and values of another width than queries."""
    wide, narrow = resolved("decllm"), resolved("decllm", "d_model=16", "attention.heads=2", "feed_forward.d_ff=24")
    small = ["encoder.d_model=16", "encoder.attention.heads=2", "encoder.feed_forward.d_ff=24"]
    target = resolved("redllm", "tie_embeddings=decoder", *small)
    found = adaptation_of(target, {"encoder": narrow, "decoder": wide})
    crossed = {name for name in parameter_shapes(target) if "cross_attention" in name}
    assert set(found.newly_initialised) == crossed
    assert {side for side, _ in found.taken.values()} == {"encoder", "decoder"}
    assert altered(target, {"encoder": narrow, "decoder": wide}) == ()
    assert found.taken["encoder_embedding.weight"] == ("encoder", "embedding.weight")


def test_what_is_fresh_stays_as_it_was_drawn():
    source = build("decllm")
    made, adaptation, drawn = take(
        resolved("redllm", "attention.output_norm=head", "attention.output_norm_scale=true"), source
    )
    assert all(name.endswith("attention.output_scale") for name in adaptation.newly_initialised)
    assert len(adaptation.newly_initialised) == 6  # of two encoder layers, and twice of two decoder layers
    state = made.state_dict()
    assert all(torch.equal(state[name], drawn[name]) for name in adaptation.newly_initialised)
    assert not torch.equal(state["embedding.weight"], drawn["embedding.weight"])


def test_a_gated_network_of_one_without_a_gate_is_drawn_whole():
    """Two of three matrices are another function: down(gelu(up x)) is not down(swish(gate x) * up x)."""
    found = adaptation_of(resolved("redllm"), both(resolved("decllm", "feed_forward.activation=gelu")))
    networks = {name for name in parameter_shapes(resolved("redllm")) if "feed_forward" in name}
    assert set(found.newly_initialised) == networks  # their norms, too
    assert "decoder.layers.0.feed_forward.up.weight" in found.left


def test_a_source_that_is_used_as_before_has_nothing_to_tell():
    for family in ("decllm", "redllm"):
        assert altered(resolved(family), both(resolved("decllm"))) == ()


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (["attention.output_norm=head"], [("attention.output_norm", "none", "head")]),
        (["decoder.self_attention.window=3"], [("decoder.self_attention.window", None, 3)]),
        (["decoder.cross_attention.rope_theta=500"], [("decoder.cross_attention.rope_theta", 10000, 500)]),
        (["attention.heads=2"], [(f"attention.{key}", *pair) for key, *pair in HALVED]),
        (["feed_forward.activation=geglu"], [("feed_forward.activation", "swiglu", "geglu")]),
        (["norm.function=layer_norm"], [("norm.function", "rms_norm", "layer_norm")]),
        (["norm.eps=0.01"], [("norm.eps", 1e-6, 0.01)]),
        (["attention.rope=none"], [("attention.rope", "continuous", "none")]),
        (["feed_forward.activation=gelu"], [("feed_forward.activation", "swiglu", "gelu")]),  # its gate is left behind
    ],
    ids=str,
)  # fmt: skip
def test_tensors_of_one_shape_that_are_used_otherwise_are_told(own, expected):
    source = resolved("decllm", "attention.output_norm=none", "attention.heads=4")
    target = resolved("redllm", "attention.output_norm=none", "attention.heads=4", *own)
    assert adaptation_of(target, both(source)).newly_initialised == ()  # the tensors do not tell
    assert list(altered(target, both(source))) == expected


@pytest.mark.parametrize("norm", ["norm.placement=pre", "norm.placement=post", "norm.scale=false"])
def test_names_and_shapes_of_a_decoder_decoder_are_those_of_the_built_one(norm):
    model = resolved("yoco", norm, "attention.qkv_norm=[q, k]", "attention.qkv_norm_scale=true", "attention.kv_heads=2")
    built = build_model(model, device="meta").named_parameters()
    assert parameter_shapes(model) == {name: tuple(parameter.shape) for name, parameter in built}


def test_a_causal_decoder_and_one_with_an_open_prefix_are_one_model():
    """Non-causal adaptation and its opposite (arXiv 2204.05832) change masks and objective, no weight."""
    source = build("decllm")
    made, adaptation, _ = take(source.config, source)
    assert adaptation.newly_initialised == adaptation.left == ()
    tokens = ids(2, 7)
    assert torch.equal(made(tokens, prefix_length=3), source(tokens, prefix_length=3))


def test_an_encoder_only_model_has_the_decoders_layers():
    found = adaptation_of(encoder_only(), both(resolved("decllm")))
    assert found.newly_initialised == ()
    assert found.taken["encoder.layers.1.feed_forward.up.weight"][1] == "decoder.layers.1.feed_forward.up.weight"


def test_a_causal_bias_says_nothing_of_what_is_ahead():
    found = adaptation_of(resolved("redllm", *BIASED), both(resolved("decllm", *BIASED)))
    assert found.newly_initialised == ("encoder.relative_bias.weight",)


@pytest.mark.parametrize(
    ("layers", "of", "expected"),
    [(4, 4, [0, 1, 2, 3]), (2, 4, [0, 3]), (3, 5, [0, 2, 4]), (3, 7, [0, 3, 6]), (1, 4, [0])],
)
def test_a_shallower_stack_takes_layers_evenly_from_the_first_to_the_last(layers, of, expected):
    assert layers_taken(layers, of) == expected


def test_the_layers_that_are_not_taken_are_named():
    found = adaptation_of(resolved("redllm"), both(resolved("decllm", "decoder.layers=4")))
    assert {name.split(".")[2] for name in found.left} == {"1", "2"}
    assert found.taken["encoder.layers.1.self_attention.q.weight"][1] == "decoder.layers.3.self_attention.q.weight"


@pytest.mark.parametrize(
    ("target", "source", "message"),
    [
        (resolved("redllm", "encoder.layers=3"), resolved("decllm"), "has 2 layers for the 3 of the encoder"),
        (resolved("decllm", "decoder.layers=3"), resolved("decllm"), "has 2 layers for the 3 of the decoder"),
        (resolved("redllm"), resolved("decllm", "vocabulary=99"), "its embedding has 99 rows, this model's 61"),
        (resolved("decllm"), resolved("redllm"), "is of family encoder_decoder, which cannot be made into one of"),
        (resolved("redllm"), encoder_only(), "is of family encoder_only"),
        (
            resolved("redllm"),
            resolved("decllm", "d_model=16", "attention.heads=2", "feed_forward.d_ff=24"),
            "gives nothing to the encoder's layers",
        ),
    ],
)
def test_what_cannot_be_adapted_is_refused_with_the_reason(target, source, message):
    side, found = problem_of(target, both(source))
    assert message in found
    with pytest.raises(ValueError, match=f"the {side}'s source"):
        adaptation_of(target, both(source))
