"""`model.attention` is everyone's default, the more specific address wins, and what cannot be built is refused."""

import pytest

from lit_llm.config.problems import InputError
from tests.tiny_models import build, config, resolved


def attentions(model):
    """Every attention by a short name: e encoder, s decoder's self, c cross; with its layer."""
    named = {f"e{n}": layer.self_attention for n, layer in enumerate(model.encoder)}
    for n, layer in enumerate(model.decoder):
        named[f"s{n}"] = layer.self_attention
        if layer.cross_attention:
            named[f"c{n}"] = layer.cross_attention
    return named


def with_output_norm(model):
    """{name: place} of every attention that normalises its output."""
    return {name: part.output_norm for name, part in attentions(model).items() if part.output_norm != "none"}


HEAD = {"output_norm": "head"}


@pytest.mark.parametrize(
    ("address", "reached"),
    [
        ("attention", "e0 e1 s0 c0 s1 c1"),
        ("encoder.attention", "e0 e1"),
        ("decoder.self_attention", "s0 s1"),
        ("decoder.cross_attention", "c0 c1"),
        ("encoder.layer_ranges.1.attention", "e1"),
        ("decoder.layer_ranges.0.self_attention", "s0"),
        ("decoder.layer_ranges.1.cross_attention", "c1"),
        ("decoder.layer_ranges.0-1.cross_attention", "c0 c1"),
    ],
)
def test_an_address_reaches_its_attentions_and_no_others(address, reached):
    model = resolved("redllm", f"{address}.output_norm=head")
    assert with_output_norm(model) == dict.fromkeys(reached.split(), "head")


@pytest.mark.parametrize("address", ["attention", "decoder.self_attention", "decoder.layer_ranges.0-1.self_attention"])
def test_decoder_only_has_the_addresses_of_a_decoder(address):
    assert with_output_norm(resolved("decllm", f"{address}.output_norm=head")) == {"s0": "head", "s1": "head"}


def test_the_more_specific_address_wins():
    """Layer range before stack before default, in whatever order they were written."""
    overrides = [
        "decoder.layer_ranges.1.cross_attention.output_norm=after_out",
        "decoder.cross_attention.output_norm=concat",
        "attention.output_norm=head",
    ]
    wanted = {"e0": "head", "e1": "head", "s0": "head", "s1": "head", "c0": "concat", "c1": "after_out"}
    assert with_output_norm(resolved("redllm", *overrides)) == wanted
    assert with_output_norm(resolved("redllm", *reversed(overrides))) == wanted


def test_a_specific_address_can_take_back_what_the_default_sets():
    model = resolved("redllm", "attention.qkv_norm=[q, k, v]", "encoder.attention.qkv_norm=[]")
    norms = {name: part.qkv_norm for name, part in attentions(model).items()}
    assert norms == {"e0": (), "e1": (), **dict.fromkeys(["s0", "c0", "s1", "c1"], ("q", "k", "v"))}


def test_an_override_changes_the_keys_that_it_names_and_no_others():
    model = resolved("redllm", "attention.output_norm=head", "decoder.cross_attention.rope=none")
    cross, own = model.decoder[0].cross_attention, model.decoder[0].self_attention
    changed = {key for key, value in own.model_dump().items() if cross.model_dump()[key] != value}
    assert changed == {"rope", "rope_theta"}


def test_overlapping_ranges_may_set_different_keys():
    model = resolved(
        "decllm",
        "decoder.layer_ranges.0-1.self_attention.output_norm=head",
        "decoder.layer_ranges.1.self_attention.kv_heads=2",
    )
    assert [(layer.self_attention.output_norm, layer.self_attention.kv_heads) for layer in model.decoder] == [
        ("head", 4),
        ("head", 2),
    ]


@pytest.mark.parametrize(
    ("address", "widths"),
    [
        ("feed_forward", [64, 64, 64, 64]),
        ("encoder.feed_forward", [64, 64, 48, 48]),
        ("decoder.feed_forward", [48, 48, 64, 64]),
        ("decoder.layer_ranges.1.feed_forward", [48, 48, 48, 64]),
    ],
)
def test_feed_forward_networks_are_addressed_alike(address, widths):
    assert [layer.feed_forward.d_ff for layer in resolved("redllm", f"{address}.d_ff=64").layers] == widths


def test_what_is_resolved_is_what_is_built():
    model = build("redllm", "decoder.layer_ranges.1.cross_attention.kv_heads=1", "encoder.feed_forward.d_ff=80")
    crosses = [layer.cross_attention.k.weight.shape[0] for layer in model.decoder.layers]
    assert crosses == [32, 8]
    assert [layer.feed_forward.up.weight.shape[0] for layer in [*model.encoder.layers, *model.decoder.layers]] == [
        *(80, 80),
        *(48, 48),
    ]


# --- what is the same function resolves to the same ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "left", "right"),
    [
        ("decllm", ["attention.kv_heads=4"], []),
        ("decllm", ["attention.head_dim=8"], []),
        ("decllm", ["attention.rope=restart"], []),
        ("decllm", ["attention.qkv_norm=[v, q]"], ["attention.qkv_norm=[q, v]"]),
        ("decllm", ["attention.norm_eps=1e-3"], []),
        ("decllm", ["attention.norm_function=layer_norm"], []),
        ("decllm", ["attention.qkv_norm_over=concat"], []),
        (
            "decllm",
            ["attention={kv_heads: 1, qkv_norm: [k], qkv_norm_over: concat}"],
            ["attention={kv_heads: 1, qkv_norm: [k]}"],
        ),
        ("decllm", ["attention.qkv_norm_scale=true", "attention.output_norm_scale=true"], []),
        ("decllm", ["attention.rope=none", "attention.rope_theta=500.0"], ["attention.rope=none"]),
        ("decllm", ["attention.output_norm=head"], ["decoder.self_attention.output_norm=head"]),
        (
            "redllm",
            ["attention.relative_bias=alibi", "attention.relative_buckets=6"],
            ["attention.relative_bias=alibi"],
        ),
        ("decllm", ["attention.rope_scaling=yarn", "attention.rope_original_length=64"], []),
        ("decllm", ["attention.rope=none", "attention.rope_fraction=0.3"], ["attention.rope=none"]),
        (
            "decllm",
            ["attention.rope=none", "attention.heads=32", "attention.gate=per_head"],
            ["attention.rope=none", "attention.heads=32", "attention.gate=per_element"],
        ),
        ("decllm", ["attention.output_norm=head"], ["decoder.layer_ranges.0-1.self_attention.output_norm=head"]),
        (
            "decllm",
            ["attention.heads=1", "attention.output_norm=concat"],
            ["attention.heads=1", "attention.output_norm=head"],
        ),
        ("redllm", ["attention.rope=restart"], ["decoder.cross_attention.rope=restart"]),
        ("redllm", ["encoder.attention.rope=restart", "decoder.self_attention.rope=restart"], []),
        ("redllm", ["encoder.layer_ranges.0.feed_forward.d_ff=48"], []),
        ("decllm", ["attention.value_residual_weight=0.3"], []),
        ("decllm", ["decoder.layers=1", "attention.value_residual=fixed"], ["decoder.layers=1"]),
        ("redllm", ["decoder.cross_attention.value_residual=fixed"], []),
        ("redllm", ["encoder.layer_ranges.0.attention.value_residual=learned"], []),
        (
            "decllm",
            ["attention.value_residual=fixed", "decoder.layer_ranges.0.self_attention.value_residual=none"],
            ["attention.value_residual=fixed"],
        ),
    ],
)
def test_equivalent_configs_resolve_to_equal_models(family, left, right):
    assert resolved(family, *left) == resolved(family, *right)


@pytest.mark.parametrize(
    ("family", "override"),
    [
        ("decllm", "attention.kv_heads=2"),
        ("decllm", "attention.rope_theta=500.0"),
        ("decllm", "attention.qkv_norm=[q]"),
        ("decllm", "attention.gate=per_head"),
        ("decllm", "attention.rope_fraction=0.5"),
        ("decllm", "attention.value_residual=fixed"),
        ("redllm", "attention={qkv_norm: [q], norm_function: layer_norm}"),
        ("redllm", "attention={qkv_norm: [q], qkv_norm_over: concat}"),
        ("decllm", "attention.qkv_bias=[q]"),
        ("decllm", "feed_forward.bias=true"),
        ("decllm", "attention.relative_bias=alibi"),
        ("decllm", "norm.scale=false"),
        ("decllm", "norm.eps=1e-3"),
        ("decllm", "norm.function=layer_norm"),
        ("decllm", "tie_embeddings=none"),
        ("decllm", "feed_forward.activation=geglu"),
        ("redllm", "decoder.cross_attention.rope=restart"),
        ("redllm", "tie_embeddings=inputs"),
        ("redllm", "encoder.layers=1"),
    ],
)
def test_different_functions_resolve_to_different_models(family, override):
    assert resolved(family, override) != resolved(family)
    assert resolved(family, override).model_dump() != resolved(family).model_dump(), "nor are they one fingerprint"


# --- what cannot be built --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "override", "key", "message"),
    [
        ("decllm", "attention.heads=5", "attention", "5 heads do not divide d_model 32"),
        ("decllm", "attention.head_dim=7", "attention", "head_dim 7 must be even (or rope: none)"),
        ("decllm", "attention.rope_fraction=0.4", "attention", "write rope_fraction: 0.5 for 4 entries"),
        ("decllm", "attention={rope_scaling: yarn, rope_factor: 2}", "attention", "yarn needs rope_original_length"),
        ("decllm", "attention.kv_heads=3", "attention", "kv_heads 3 does not divide heads 4"),
        ("decllm", "attention.kv_heads=8", "attention", "kv_heads 8 does not divide heads 4"),
        ("decllm", "decoder.self_attention.kv_heads=3", "decoder.self_attention", "kv_heads 3"),
        ("redllm", "decoder.cross_attention.heads=5", "decoder.cross_attention", "5 heads do not divide"),
        ("redllm", "encoder.attention.head_dim=9", "encoder.attention", "head_dim 9 must be even"),
        (
            "redllm",
            "decoder={cross_attention_mode: merged, self_attention: {relative_bias: alibi}}",
            "decoder.self_attention",
            "no distances between a target and its source",
        ),
        ("redllm", "decoder.layer_ranges.1.cross_attention.kv_heads=3", "decoder.layer_ranges.1.cross_attention", "3"),
        ("redllm", "decoder.layer_ranges.0-2.cross_attention.rope=none", "decoder.layer_ranges.0-2", "the layers 0-1"),
        ("redllm", "encoder.layer_ranges.2.feed_forward.d_ff=64", "encoder.layer_ranges.2", "the layers 0-1 only"),
        ("decllm", "decoder.layer_ranges.1-0.feed_forward.d_ff=64", "decoder.layer_ranges.1-0", "runs backwards"),
        ("decllm", "decoder.layer_ranges.last.feed_forward.d_ff=64", "decoder.layer_ranges.last", "not a range"),
        ("decllm", "attention.heads=0", "attention.heads", "greater than 0"),
        ("decllm", "attention.output_norm=heads", "attention.output_norm", "did you mean 'head'?"),
        ("decllm", "attention.qkv_norm=[q, o]", "attention.qkv_norm.1", "'o' is not possible"),
        ("decllm", "attention.output_nrom=head", "attention.output_nrom", "did you mean 'output_norm'?"),
        ("decllm", "norm.function=layernorm", "norm.function", "did you mean 'layer_norm'?"),
        ("decllm", "decoder.cross_attention.rope=none", "decoder.cross_attention", "unknown key"),
        ("decllm", "encoder.layers=2", "encoder", "unknown key"),
        ("decllm", "tie_embeddings=inputs", "tie_embeddings", "'inputs' is not possible"),
    ],
)
def test_what_cannot_be_built_is_refused_at_its_key(family, override, key, message):
    with pytest.raises(InputError) as error:
        config(family, override)
    (problem,) = error.value.problems
    assert problem.key == key
    assert message in problem.message
    assert problem.location.source == f"-o {override}", "and at the place that brought it in"


def test_every_problem_is_named_at_once():
    with pytest.raises(InputError) as error:
        config(
            "redllm",
            "encoder.attention.heads=5",
            "decoder.self_attention.kv_heads=3",
            "decoder.cross_attention.heads=3",
        )
    keys = {problem.key for problem in error.value.problems}
    assert keys == {"encoder.attention", "decoder.self_attention", "decoder.cross_attention"}


@pytest.mark.parametrize(
    ("default", "override"),
    [
        ("attention={rope_scaling: yarn, rope_factor: 2, rope_original_length: 8}", "self_attention.rope_theta=1.0"),
        ("attention.relative_bias=shared", "self_attention.relative_distance=4"),
        ("decoder.cross_attention_mode=merged", "self_attention.convolution=[input]"),
        ("attention.heads=4", "self_attention.heads=5"),
    ],
)
def test_an_override_that_its_defaults_make_impossible_is_refused_at_its_own_key(default, override):
    with pytest.raises(InputError) as error:
        config("redllm", default, f"decoder.layer_ranges.1.{override}")
    assert {problem.key for problem in error.value.problems} == {"decoder.layer_ranges.1.self_attention"}


def test_impossible_defaults_are_not_blamed_on_an_override_that_is_possible():
    with pytest.raises(InputError) as error:
        config("decllm", "attention.heads=5", "decoder.self_attention.rope_theta=100.0")
    assert {problem.key for problem in error.value.problems} == {"attention"}


def test_an_odd_head_dim_is_fine_without_rotation():
    assert resolved("decllm", "attention.head_dim=7", "attention.rope=none").decoder[0].self_attention.width == 28


def test_two_ranges_may_not_set_the_same_key_of_a_layer():
    """Neither is the more specific, so neither may win silently."""
    with pytest.raises(InputError) as error:
        config(
            "decllm",
            "decoder.layers=4",
            "decoder.layer_ranges.0-2.self_attention.kv_heads=2",
            "decoder.layer_ranges.2-3.self_attention.kv_heads=1",
        )
    (problem,) = error.value.problems
    assert problem.key == "decoder.layer_ranges"
    assert problem.message == "'0-2' and '2-3' both set self_attention.kv_heads of layer 2"
