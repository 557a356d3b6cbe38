"""Initial values, factors and refusals of parametrizations, against the formulas of the papers.

mup: table 8 of arXiv 2203.03466. completep: table 1 of arXiv 2505.01618 with alpha 1. m: width over the base model's.
"""

import pytest
import torch
from torch.testing import assert_close

from lit_llm.config.problems import InputError
from lit_llm.experiment.load import load_experiment
from lit_llm.models.build import build_model
from lit_llm.models.resolve import resolve_model
from tests.tiny_models import build, config, ids, resolved

BASE = 32
MUP = f"parametrization={{kind: mup, base_width: {BASE}, base_head_dim: 8}}"
COMPLETEP = f"parametrization={{kind: completep, base_width: {BASE}, base_depth: 2, base_head_dim: 8}}"
UNTIED = "tie_embeddings=none"


def wide(m, *others):
    """Overrides for m times the width of the base model, with as many entries in each head."""
    return [f"d_model={BASE * m}", f"attention.heads={4 * m}", f"feed_forward.d_ff={48 * m}", *others]


def deviation(family, name, *overrides):
    return float(dict(build(family, *overrides).named_parameters())[name].detach().std())


@pytest.mark.parametrize("family", ["decllm", "redllm", "yoco"])
@pytest.mark.parametrize("rules", [MUP, COMPLETEP.replace("base_depth: 2", "base_depth: 4")])
def test_a_model_of_the_base_size_is_the_standard_one(family, rules):
    deep = [f"{stack}.layers={n}" for stack, n in STACKS[family].items()]
    assert resolved(family, *deep, rules) == resolved(family, *deep)


STACKS = {
    "decllm": {"decoder": 4},
    "redllm": {"encoder": 4, "decoder": 4},
    "yoco": {"self_decoder": 2, "cross_decoder": 2},
}


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("rules", [MUP, COMPLETEP])
def test_initial_deviations_are_constant_for_the_vocabulary_and_fall_with_the_root_of_the_inputs_inside(m, rules):
    overrides = wide(m, rules, UNTIED, "attention.relative_bias=shared", "attention.gate=per_element")
    wanted = dict.fromkeys(("embedding", "encoder_embedding", "output"), BASE**-0.5)
    inside = ("self_attention.q", "self_attention.gate", "cross_attention.k", "cross_attention.out", "feed_forward.up")
    wanted |= {f"decoder.layers.1.{name}": (BASE * m) ** -0.5 for name in inside}
    wanted |= {"encoder.layers.0.feed_forward.down": (48 * m) ** -0.5, "encoder.relative_bias": BASE**-0.5}
    parameters = dict(build("redllm", *overrides).named_parameters())
    for name, std in wanted.items():
        values = parameters[f"{name}.weight"].detach()
        assert float(values.std()) == pytest.approx(std, rel=4 / values.numel() ** 0.5), name


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (
            ["decoder.experts={count: 64}"],
            {"experts.router": lambda m: BASE**-0.5 / m, "experts.expert.7.up": lambda m: (BASE * m) ** -0.5}
            | {"experts.expert.7.down": lambda m: (48 * m) ** -0.5},
        ),
        (
            ["decoder.gla={gate_rank: 9}"],
            {"gla.directions.0.down": lambda m: BASE**-0.5 / m, "gla.directions.0.up": lambda m: 1 / 3},
        ),
        (
            ["attention.convolution=[input]", "feed_forward.convolution=[hidden]", "output.future_tokens=1"],
            {"self_attention.convolution.input": lambda m: 12**-0.5, "self_attention.q": lambda m: (BASE * m) ** -0.5}
            | {"feed_forward.convolution.up": lambda m: 12**-0.5},
        ),
    ],
    ids=["experts", "gla", "convolutions"],
)
def test_a_matrix_whose_outputs_stay_begins_over_m_and_one_whose_inputs_stay_does_not_change(m, overrides, wanted):
    parameters = dict(build("decllm", *wide(m, MUP), *overrides).named_parameters())
    for name, deviation_of in wanted.items():
        for layer in ["layers.1", "future.0"][: 1 + ("output.future_tokens=1" in overrides)]:
            values = parameters[f"decoder.{layer}.{name}.weight"].detach()
            assert float(values.std()) == pytest.approx(deviation_of(m), rel=4 / values.numel() ** 0.5), (layer, name)


def test_fixed_deviations_fall_with_the_root_of_m_inside():
    fixed = "initialisation=fixed_std"
    for m, std in ((1, 0.02), (4, 0.01)):
        name = "decoder.layers.0.feed_forward.up.weight"
        assert deviation("decllm", name, *wide(m, MUP, fixed)) == pytest.approx(std, rel=0.05)
        assert deviation("decllm", "embedding.weight", *wide(m, MUP, fixed)) == pytest.approx(0.02, rel=0.1)


def test_the_inputs_of_cross_attentions_keys_and_values_are_the_encoders():
    """An encoder twice as wide as the base, in the standard proportions: 1 / sqrt(2 base)."""
    overrides = [
        MUP,
        f"encoder.d_model={2 * BASE}",
        "tie_embeddings=decoder",
        "initialisation={kind: fixed_std, std: 1.0}",
    ]
    for part, std in (("q", 1.0), ("k", 0.5**0.5), ("v", 0.5**0.5), ("out", 1.0)):
        name = f"decoder.layers.0.cross_attention.{part}.weight"
        assert deviation("redllm", name, *overrides) == pytest.approx(std, rel=0.1)


@pytest.mark.parametrize(
    "overrides", [[], [UNTIED, "output.bias=true", "output.softcap=3.0"], ["embedding.scaled=true"]]
)
@pytest.mark.parametrize("family", ["decllm", "redllm", "yoco"])
def test_a_wide_model_is_the_standard_one_with_a_smaller_output_matrix(family, overrides):
    """Over m, in place of the logits; scaled embeddings keep the base model's factor, sqrt(base) for sqrt(m base)."""
    ours = build(family, *wide(2, MUP), *overrides)
    state = {name: value.clone() for name, value in ours.state_dict().items()}
    state["output.weight"] = state.get("output.weight", state["embedding.weight"]) / 2
    tables = ["embedding.weight"]
    if family == "redllm":
        tables.append("encoder_embedding.weight")
        state.setdefault(tables[1], state[tables[0]])
    for name in tables:
        state[name] = state[name] * (0.5**0.5 if "embedding.scaled=true" in overrides else 1.0)
    theirs = build(family, *wide(2), *overrides, UNTIED)
    theirs.load_state_dict(state)
    tokens = [ids(2, 7)] * (2 if family == "redllm" else 1)
    assert_close(ours(*tokens), theirs(*tokens))


@pytest.mark.parametrize(("head_dim", "written", "scale"), [(8, None, None), (32, None, 8**0.5 / 32), (32, 1.0, 0.25)])
def test_attention_scores_fall_with_head_dim_from_those_of_the_base_model(head_dim, written, scale):
    overrides = [f"attention.head_dim={head_dim}", f"attention.scale={written or 'null'}"]
    for family, side in (("decllm", "decoder"), ("redllm", "encoder")):
        model = resolved(family, *overrides, MUP)
        assert getattr(model, side)[0].self_attention.scale == (scale and pytest.approx(scale))
    palm = resolved("decllm", *overrides, MUP, "decoder.partial_attention=palm")
    assert palm.decoder[0].part("partial_attention").scale == (scale and pytest.approx(scale))


FACTORS = {
    "completep": (["decoder.layers=6", COMPLETEP], 1 / 3),
    "completep, parallel": (["decoder.layers=6", COMPLETEP, "norm.placement=parallel"], 1 / 3),
    "completep, sandwich": (["decoder.layers=1", COMPLETEP, "norm.placement=sandwich"], 2.0),
    "layer scale": (["residual={kind: layer_scale, initial: 0.3}"], 0.3),
    "rezero": (["residual=rezero", "norm.placement=output"], 0.0),
    "deepnorm": (["residual=deepnorm", "norm.placement=post"], 1.0),
}


@pytest.mark.parametrize("case", FACTORS)
def test_a_branch_is_multiplied_before_it_is_added_to_the_stream(case):
    overrides, factor = FACTORS[case]
    stream = (2 * 2) ** 0.25 if case == "deepnorm" else 1.0
    assert_stream_is(build("decllm", *overrides), "decoder", (ids(2, 5),), stream, factor)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_each_stack_is_multiplied_by_the_factors_of_its_own_depth(side):
    """Judge of DeepNorm: figure 2 of arXiv 2203.00555, with N = 4 and M = 1."""
    inputs, unequal = (ids(2, 4), ids(2, 5)), ["encoder.layers=4", "decoder.layers=1"]
    divisor = {"encoder": 4 / 2, "decoder": 1 / 2}[side]
    assert_stream_is(build("redllm", *unequal, COMPLETEP), side, inputs, 1.0, 1 / divisor)
    alpha = {"encoder": 0.81 * (4**4 * 1) ** (1 / 16), "decoder": (3 * 1) ** 0.25}[side]
    model = build("redllm", *unequal, "residual=deepnorm", "norm.placement=post")
    assert_stream_is(model, side, inputs, alpha, 1.0)


def assert_stream_is(model, side, inputs, stream, factor):
    """Compare a layer's output with stream * x + factor * branch for each of its branches, normalised with DeepNorm."""
    added, streams = [], []
    block = getattr(model, side).layers[0]
    for part in block.parts:
        last = getattr(block, part) if block.norm_of_added(part) is None else block.norm_of_added(part)
        last.register_forward_hook(lambda module, inputs, output: added.append(output))
    block.register_forward_hook(lambda module, inputs, output: streams.extend((inputs[0], output)))
    with torch.no_grad():
        model(*inputs)
    x, out = streams
    for branch in added:
        x = stream * x + factor * branch
        if model.config.residual.kind == "deepnorm":
            x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert_close(out, x)


def test_a_model_with_rezero_begins_as_its_embedding():
    model = build("decllm", "residual=rezero")
    tokens = ids(2, 5)
    assert_close(model.hidden(tokens), model.decoder.norm(model.embedding(tokens)))


def test_deepnorm_has_the_constants_of_the_paper():
    """Figure 2 of arXiv 2203.00555, for an encoder of N layers and a decoder of M."""
    from lit_llm.components.residual.config import deepnorm

    n, m = 18, 6
    assert deepnorm(n) == pytest.approx(((2 * n) ** 0.25, (8 * n) ** -0.25))
    assert deepnorm(n, decoder=m) == pytest.approx((0.81 * n**0.25 * m ** (1 / 16), 0.87 * n**-0.25 * m ** (-1 / 16)))
    assert deepnorm(m, encoder=n) == pytest.approx(((3 * m) ** 0.25, (12 * m) ** -0.25))


def test_deepnorm_shrinks_the_values_the_outputs_and_the_feed_forward_network_alone():
    plain = dict(build("redllm", "norm.placement=post").named_parameters())
    ours = dict(build("redllm", "norm.placement=post", "residual=deepnorm").named_parameters())
    for side, beta in (("encoder", 0.87 * 2 ** (-5 / 16)), ("decoder", 24**-0.25)):
        for part, factor in (("q", 1.0), ("k", 1.0), ("v", beta), ("out", beta)):
            name = f"{side}.layers.1.self_attention.{part}.weight"
            assert_close(ours[name], factor * plain[name], rtol=1e-5, atol=1e-6)
        for part in ("gate", "up", "down"):
            name = f"{side}.layers.1.feed_forward.{part}.weight"
            assert_close(ours[name], beta * plain[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("rules", "key"), [("residual=deepnorm", "deepnorm"), ("initialisation=depth_scaled", "depth")]
)
def test_an_expert_starts_as_the_feed_forward_network_in_whose_place_it_stands(rules, key):
    norm = ["norm.placement=post", rules]
    dense = dict(build("decllm", *norm).named_parameters())
    experts = "decoder.experts={count: 3, top_k: 2, shared_d_ff: 48}"
    mixed = dict(build("decllm", *norm, experts, "feed_forward.d_ff=48").named_parameters())
    for part in ("up", "down"):
        wanted = float(dense[f"decoder.layers.0.feed_forward.{part}.weight"].std())
        for name in ("expert.0", "shared"):
            found = float(mixed[f"decoder.layers.0.experts.{name}.{part}.weight"].std())
            fan_in = (48 / dense[f"decoder.layers.0.feed_forward.{part}.weight"].shape[-1]) ** 0.5
            grown = fan_in if part == "down" and key == "deepnorm" else 1.0
            assert found * grown == pytest.approx(wanted, rel=0.1)


def test_depth_scaled_divides_the_last_matrix_of_each_branch_by_the_root_of_the_branches():
    """GPT-2: two branches in each of the layers; the decoder of an encoder-decoder has three."""
    overrides = ["initialisation={kind: depth_scaled, std: 0.1}", "encoder.layers=8", "decoder.layers=3"]
    parameters = dict(build("redllm", *overrides).named_parameters())
    for name, std in (
        ("encoder.layers.7.self_attention.out", 0.1 / 4),
        ("encoder.layers.0.feed_forward.down", 0.1 / 4),
        ("decoder.layers.2.cross_attention.out", 0.1 / 3),
        ("decoder.layers.2.cross_attention.v", 0.1),
        ("embedding", 0.1),
    ):
        assert float(parameters[f"{name}.weight"].detach().std()) == pytest.approx(std, rel=0.08), name


@pytest.mark.slow
def test_t5_starts_as_in_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, tie_word_embeddings=True
        )
    )
    peer = dict(theirs.named_parameters())
    t5 = ["initialisation=t5", "attention.relative_bias=shared", "attention.rope=none", "attention.scale=1.0"]
    ours = dict(
        build(
            "redllm",
            *t5,
            "attention.head_dim=8",
            "feed_forward.activation=relu",
        ).named_parameters()
    )
    block = "decoder.block.0.layer"
    for name, other in (
        ("embedding", "shared"),
        ("decoder.layers.0.self_attention.q", f"{block}.0.SelfAttention.q"),
        ("decoder.layers.0.self_attention.k", f"{block}.0.SelfAttention.k"),
        ("decoder.layers.0.cross_attention.v", f"{block}.1.EncDecAttention.v"),
        ("decoder.layers.0.cross_attention.out", f"{block}.1.EncDecAttention.o"),
        ("decoder.layers.0.feed_forward.up", f"{block}.2.DenseReluDense.wi"),
        ("decoder.layers.0.feed_forward.down", f"{block}.2.DenseReluDense.wo"),
        ("decoder.relative_bias", f"{block}.0.SelfAttention.relative_attention_bias"),
    ):
        left, right = ours[f"{name}.weight"], peer[f"{other}.weight"]
        assert float(left.std()) == pytest.approx(float(right.std()), rel=5 / left.numel() ** 0.5), name


def test_an_untied_output_of_t5_starts_like_its_embeddings():
    """`T5PreTrainedModel._init_weights` of transformers, whose configuration ties them."""
    weight = build("decllm", "initialisation=t5", "tie_embeddings=none").output.weight
    assert float(weight.detach().std()) == pytest.approx(1.0, rel=0.05)


def test_t5_divides_tied_logits_by_the_root_of_d_model_and_w_q_only_where_scores_are_not():
    model = build("decllm", "initialisation=t5")
    hidden = torch.randn(2, 3, 32, dtype=torch.float64)
    assert_close(model.logits(hidden), hidden @ model.embedding.weight.T / 32**0.5)
    assert float(model.decoder.layers[0].self_attention.q.weight.std()) == pytest.approx(32**-0.5, rel=0.1)


REFUSED = {
    "no base": (["parametrization=mup"], "base_width"),
    "no depth": ([f"parametrization={{kind: completep, base_width: {BASE}}}"], "base_depth"),
    "a base without rules": ([f"parametrization.base_width={BASE}"], "base_width"),
    "t5": ([MUP, "initialisation=t5"], "initialisation"),
    "a norm in the stream": ([COMPLETEP, "norm.placement=post"], "parametrization"),
    "queries that heads share": ([MUP, "decoder.mamba2={head_dim: 4, groups: 2}"], "parametrization"),
    "two factors": ([COMPLETEP, "residual=rezero"], "residual"),
    "deepnorm without its norm": (["residual=deepnorm"], "residual"),
    "deepnorm with shared layers": (["residual=deepnorm", "norm.placement=post", "tie_layers=true"], "residual"),
    "deepnorm with a third part": (
        ["residual=deepnorm", "norm.placement=post", "decoder.partial_attention=palm"],
        "residual",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_at_its_key(case):
    overrides, key = REFUSED[case]
    with pytest.raises(InputError) as error:
        config("redllm" if "tie_layers=true" in overrides else "decllm", *overrides)
    assert [problem.key for problem in error.value.problems] == [
        f"parametrization.{key}" if key.startswith("base") else key
    ]


def test_an_optimiser_without_a_rule_is_refused():
    rules = ["model.parametrization={kind: mup, base_width: 32}", "pretrain.training.optimizer=adafactor"]
    with pytest.raises(InputError, match="adafactor has no rule in mup"):
        load_experiment("decllm-tiny", rules)
    load_experiment("decllm-tiny", [rules[0], "pretrain.training.optimizer=muon"])


def test_defaults_are_left_out_of_a_resolved_model():
    """So that fingerprints of models without these keys are what they were."""
    plain = load_experiment("redllm-tiny")
    assert not {"residual", "initialisation", "parametrization"} & resolve_model(plain.model).model_dump().keys()
    names = dict(build_model(plain.model).named_parameters())
    assert not [name for name in names if "branch" in name]
