"""Steps of each parameter under mup and completep, as the optimisers take them."""

import pytest
import torch

from lit_llm.training.optimizers.build import build_optimizer, set_learning_rate
from lit_llm.training.optimizers.config import AdamW, Muon
from tests.tiny_models import build

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


def test_keys_and_values_of_a_wider_encoder_step_by_its_width():
    model = wide(1, 1, f"encoder.d_model={4 * BASE}")
    lrs = {
        id(p): group["lr_multiplier"] for group in build_optimizer(AdamW(), model).param_groups for p in group["params"]
    }
    attention = model.decoder.layers[0].cross_attention
    assert [lrs[id(getattr(attention, part).weight)] for part in ("q", "k", "v", "out")] == [1, 0.25, 0.25, 1]


@pytest.mark.parametrize("scaling", ["match_rms_adamw", "original"])
def test_muons_steps_have_a_spectral_norm_that_follows_the_root_of_outputs_over_inputs(scaling):
    """Condition 1 of arXiv 2310.17813: ‖ΔW‖₂ ∝ sqrt(outputs / inputs), whatever the width; here of one random gradient.

    Newton-Schulz makes singular values of 0.7 to 1.2, so the largest is known within a fifth. A decoder four times as
    wide as its encoder has other proportions in its cross-attention.
    """
    norms = {}
    for m, others in ((1, []), (4, []), (4, [f"encoder.d_model={BASE}"])):
        model = wide(m, 1, *others)
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
