"""Steps of each parameter under mup and completep, as the optimisers take them."""

import pytest
import torch

from lit_llm.config.problems import InputError
from lit_llm.experiment.load import load_experiment
from lit_llm.models.parameter_groups import parameter_groups
from lit_llm.models.parameters import parameter_shapes
from lit_llm.training.optimizers.build import build_optimizer, set_learning_rate
from lit_llm.training.optimizers.config import Adafactor, AdamW, FactoredAdafactor, Muon
from tests.tiny_models import build, resolved

BASE = 32
OVERRIDES = [
    "norm.scale=true",
    "attention.qkv_bias=[q]",
    "tie_embeddings=none",
    "attention.relative_bias=shared",
    "output.head=dense",
]


def wide(m, depth, *others):
    rules = f"parametrization={{kind: completep, base_width: {BASE}, base_depth: 2, base_head_dim: 8}}"
    sizes = [
        f"d_model={BASE * m}",
        f"attention.heads={4 * m}",
        f"feed_forward.d_ff={48 * m}",
        f"decoder.layers={2 * depth}",
    ]
    return build("redllm", rules, *sizes, *OVERRIDES, *others, double=False)


def test_adamw_steps_by_the_table_of_completep():
    """{parameter: (lr, weight decay, eps)} over the base model's, at m = 4 and l = 3 (the encoder's l is 1)."""
    m, depth = 4, 3
    config = AdamW(lr=0.1, weight_decay=0.5, eps=1e-6)
    model = wide(m, depth)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    optimizer = build_optimizer(config, model)
    assert set_learning_rate(optimizer.param_groups, 0.5) == 0.05
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found[names[id(parameter)]] = group["lr"] / 0.05, group["weight_decay"] / 0.5, group["eps"] / 1e-6
    assert len(found) == len(names)
    vocabulary, outside, hidden, scale = (1, 1, 1 / m), (1, 0, 1 / m), (1 / m, m, 1 / m), (1, 0, 1 / (m * depth))
    inside = (1 / m, m, 1 / (m * depth))
    for name, wanted in {
        "embedding.weight": vocabulary,
        "encoder_embedding.weight": vocabulary,
        "output.weight": vocabulary,
        "decoder.relative_bias.weight": vocabulary,
        "decoder.norm.scale": outside,
        "head.dense.weight": hidden,
        "encoder.layers.1.self_attention.v.weight": hidden,
        "decoder.layers.1.self_attention_norm.scale": scale,
        "decoder.layers.1.self_attention.q.bias": scale,
        "decoder.layers.5.cross_attention.k.weight": inside,
        "decoder.layers.5.feed_forward.down.weight": inside,
    }.items():
        assert found[name] == pytest.approx(wanted), name


@pytest.mark.parametrize(
    ("part", "overrides", "wanted"),
    [
        (
            "experts",
            ["decoder.experts={count: 3, shared_d_ff: 48}"],
            {"router.weight": "readout", "expert.2.up.weight": "both", "expert.0.down.weight": "both"}
            | {"shared.up.weight": "both"},
        ),
        (
            "mamba2",
            ["decoder.mamba2={head_dim: 4, groups: 16}"],
            {"q.weight": "both", "v.weight": "both", "decay.weight": "both"}
            | {"directions.0.convolution.weight": "channels", "directions.0.steps.a_log": "vector"},
        ),
        (
            "gla",
            ["decoder.gla=gated"],
            {"q.weight": "both", "directions.0.down.weight": "readout", "directions.0.up.weight": "input"}
            | {"directions.0.up.bias": "vector"},
        ),
        (
            "gated_deltanet",
            ["decoder.gated_deltanet=gated"],
            {"k.weight": "both", "beta.weight": "both", "directions.0.convolution.weight": "channels"}
            | {"directions.0.steps.dt_bias": "vector", "head_scale": "vector"},
        ),
        (
            "feed_forward",
            ["feed_forward.convolution=[hidden]"],
            {"convolution.up.weight": "channels", "up.weight": "both"},
        ),
        ("self_attention", ["attention.convolution=[qkv]"], {"convolution.q.weight": "channels", "v.weight": "both"}),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_adamw_steps_of_a_matrix_follow_the_sides_of_it_that_grow(part, overrides, wanted):
    """m = 4, l = 3. Learning rate over the inputs that grow, epsilon over the outputs that grow and over the depth."""
    m, depth = 4, 3
    rules = {
        "both": (1 / m, m, 1 / (m * depth)),
        "readout": (1 / m, m, 1 / depth),
        "input": (1, 1, 1 / (m * depth)),
        "channels": (1, 1, 1 / (m * depth)),
        "vector": (1, 0, 1 / (m * depth)),
    }
    completep = f"parametrization={{kind: completep, base_width: {BASE}, base_depth: 2, base_head_dim: 8}}"
    sizes = [f"d_model={BASE * m}", f"attention.heads={4 * m}", f"feed_forward.d_ff={48 * m}", "decoder.layers=6"]
    model = build("decllm", completep, *sizes, "output.future_tokens=1", *overrides, double=False)
    found = {}
    for group in build_optimizer(AdamW(lr=0.1, weight_decay=0.5, eps=1e-6), model).param_groups:
        for parameter in group["params"]:
            found[id(parameter)] = group["lr_multiplier"], group["weight_decay"] / 0.5, group["eps"] / 1e-6
    of_name = {name: found[id(parameter)] for name, parameter in model.named_parameters()}
    for name, kind in wanted.items():
        for layer in ("layers.5", "future.0"):
            assert of_name[f"decoder.{layer}.{part}.{name}"] == pytest.approx(rules[kind]), (layer, name)


def test_keys_and_values_of_a_wider_encoder_step_by_its_width():
    model = wide(1, 1, f"encoder.d_model={4 * BASE}")
    groups = build_optimizer(AdamW(eps=1e-6), model).param_groups
    found = {id(p): (group["lr_multiplier"], group["eps"] / 1e-6) for group in groups for p in group["params"]}
    attention = model.decoder.layers[0].cross_attention
    lrs, epsilons = zip(*(found[id(getattr(attention, part).weight)] for part in ("q", "k", "v", "out")), strict=True)
    assert (lrs, epsilons) == ((1, 0.25, 0.25, 1), (1, 1, 1, 1))  # gradients are those of the decoder's heads


@pytest.mark.parametrize("scaling", ["match_rms_adamw", "original"])
def test_muons_steps_have_a_spectral_norm_that_follows_the_root_of_outputs_over_inputs(scaling):
    """Condition 1 of arXiv 2310.17813: ‖ΔW‖₂ ∝ sqrt(outputs / inputs), whatever the width; here of one random gradient.

    Newton-Schulz makes singular values of 0.7 to 1.2, so the largest is known within a fifth. A decoder four times as
    wide as its encoder has other proportions in its cross-attention.
    """
    norms = {}
    for m, others in ((1, []), (4, []), (4, [f"encoder.d_model={BASE}"])):
        model = wide(m, 1, "encoder.experts={count: 16}", *others)
        optimizer = build_optimizer(Muon(lr=0.1, scaling=scaling), model)
        set_learning_rate(optimizer.param_groups, 1.0)
        matrices = {
            f"{part}.{name}": getattr(getattr(model.decoder.layers[0], part), name).weight
            for part, name in (
                ("self_attention", "q"),
                ("cross_attention", "v"),
                ("feed_forward", "up"),
                ("feed_forward", "down"),
            )
        }
        matrices["router"] = model.encoder.layers[0].experts.router.weight
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        before = {name: matrix.detach().clone() for name, matrix in matrices.items()}
        optimizer.step()
        for name, matrix in matrices.items():
            step = torch.linalg.matrix_norm(matrix.detach() - before[name], 2)
            norms.setdefault(name, []).append(float(step) / (matrix.shape[0] / matrix.shape[1]) ** 0.5)
    for name, (base, *others) in norms.items():
        assert others == pytest.approx([base] * 2, rel=0.2), name


def test_without_a_parametrization_there_are_two_groups_and_no_multiplier():
    model = build("decllm", "norm.scale=true", double=False)
    groups = build_optimizer(AdamW(weight_decay=0.1), model).param_groups
    assert [(group["weight_decay"], group["lr_multiplier"], group["eps"]) for group in groups] == [
        (0.1, 1, 1e-8),
        (0.0, 1, 1e-8),
    ]


# --- groups of parameters --------------------------------------------------------------------------------------------

GROUPED = [
    "norm.scale=true", "attention.qkv_norm=[q]", "attention.qkv_norm_scale=true", "attention.relative_bias=shared",
    "residual=layer_scale", "tie_embeddings=none", "output.bias=true", "decoder.experts={count: 3}",
]  # fmt: skip


def test_every_parameter_is_in_the_group_of_its_section():
    groups = parameter_groups(resolved("redllm", *GROUPED))
    assert groups.keys() == parameter_shapes(resolved("redllm", *GROUPED)).keys()
    for name, wanted in {
        "embedding.weight": ("embeddings",),
        "encoder_embedding.weight": ("embeddings",),
        "output.weight": ("output",),
        "output_bias": ("output",),
        "decoder.norm.scale": ("norms",),
        "encoder.layers.1.feed_forward_norm.scale": ("norms",),
        "encoder.layers.0.self_attention_branch.scale": ("residual",),
        "encoder.layers.0.self_attention.qkv_scale.q": ("attention", "self_attention"),
        "encoder.relative_bias.weight": ("attention", "self_attention"),
        "decoder.layers.0.cross_attention.out.weight": ("attention", "cross_attention"),
        "encoder.layers.0.feed_forward.up.weight": ("feed_forward",),
        "decoder.layers.0.experts.router.weight": ("feed_forward", "experts"),
    }.items():
        assert groups[name] == wanted, name
    assert parameter_groups(resolved("yoco"))["decoder.shared_kv.k.weight"] == ("attention",)


@pytest.mark.parametrize(
    "kind",
    [AdamW, Adafactor, FactoredAdafactor, Muon, lambda **keys: AdamW(kind="adamw_8bit", **keys)],
    ids=["adamw", "adafactor", "factored", "muon", "8_bit"],
)
def test_a_first_step_is_multiplied_by_the_factor_of_the_most_specific_group(kind):
    """Judge: the step without groups, to which a first step without decay is proportional."""
    steps = []
    factors = {"embeddings": 0.5, "attention": 0.25, "cross_attention": 2.0, "norms": 0.0}
    for keys in ({}, {"lr_groups": factors}):
        model = build("redllm", "norm.scale=true", double=False)
        optimizer = build_optimizer(kind(lr=1e-3, **keys), model)
        set_learning_rate(optimizer.param_groups, 1.0)
        torch.manual_seed(0)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        steps.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
    for name, plain in steps[0].items():
        places = {"cross_attention.": 2.0, "self_attention.": 0.25, "embedding.weight": 0.5, "norm.scale": 0.0}
        factor = next((factor for place, factor in places.items() if place in name), 1.0)
        assert plain.any(), name
        torch.testing.assert_close(steps[1][name], factor * plain, rtol=1e-3, atol=1e-6, msg=name)


def test_groups_multiply_the_rates_and_decays_of_the_parametrization():
    keys = {"lr_groups": {"feed_forward": 3.0}, "weight_decay_groups": {"embeddings": 0.0, "feed_forward": 0.5}}
    model = wide(4, 1)
    found = []
    for more in ({}, keys):
        groups = build_optimizer(AdamW(weight_decay=0.1, **more), model).param_groups
        found.append(
            {id(p): (group["lr_multiplier"], group["weight_decay"]) for group in groups for p in group["params"]}
        )
    plain, grouped = found
    up, table, query = (
        model.decoder.layers[0].feed_forward.up.weight,
        model.embedding.weight,
        model.decoder.layers[0].self_attention.q.weight,
    )
    assert grouped[id(up)] == pytest.approx((3 * plain[id(up)][0], 0.5 * plain[id(up)][1]))
    assert grouped[id(table)] == (plain[id(table)][0], 0.0)
    assert plain[id(table)][1] == 0.1
    assert grouped[id(query)] == plain[id(query)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optimizer.lr_groups={norms: 2, cross_attention: 1, bogus: 0}",
            r"optimizer\.lr_groups\.norms: matches no parameter; this model has the groups attention, embeddings, "
            r"feed_forward, self_attention\n.*lr_groups\.cross_attention: .*\n.*lr_groups\.bogus: matches",
        ),
        ("optimizer.weight_decay_groups={output: 0}", r"weight_decay_groups\.output: matches no parameter"),
        (
            "optimizer.weight_decay_groups={norms: 0}\nmodel.norm.scale=true",
            r"weight_decay_groups\.norms: has scales .* with matrices are attention, embeddings, feed_",
        ),
        ("optimizer={kind: muon, adamw: {lr_groups: {embeddings: 1}}}", r"adamw\.lr_groups: .*`optimizer\.lr_groups`"),
        ("optimizer.lr_groups={embeddings: -1}", r"lr_groups\.embeddings: should be greater than or equal to 0"),
    ],
)
def test_groups_that_a_model_does_not_have_are_refused_with_a_list_of_its_groups(override, message):
    with pytest.raises(InputError, match=message):
        load_experiment("decllm-tiny", f"pretrain.training.{override}".splitlines())
