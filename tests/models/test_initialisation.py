"""Paired randomness: a parameter's first value depends on the seed, its name and its shape, and on nothing else."""

import itertools

import pytest
import torch

from lit_llm.models.build import build_model
from tests.tiny_models import build, config, resolved

# With head_dim given, the number of heads and a switch change some shapes and leave the others alone.
VARIANTS = {
    "decllm": ("decllm", []),
    "redllm": ("redllm", []),
    "decllm, deeper": ("decllm", ["decoder.layers=5"]),
    "redllm, deeper encoder": ("redllm", ["encoder.layers=4", "decoder.layers=3"]),
    "normed": ("redllm", ["attention.qkv_norm=[q, k, v]", "attention.output_norm=head"]),
    "scaled": ("decllm", ["attention.qkv_norm=[q, k]", "attention.qkv_norm_scale=true", "norm.function=layer_norm"]),
    "scale-free": ("decllm", ["norm.scale=false"]),
    "grouped": ("decllm", ["attention.kv_heads=2"]),
    "gelu": ("redllm", ["feed_forward.activation=gelu"]),
    "untied": ("redllm", ["tie_embeddings=none"]),
    "ranged": ("redllm", ["decoder.layer_ranges.0.cross_attention.rope=none"]),
}


@pytest.mark.parametrize(("left", "right"), list(itertools.combinations(VARIANTS, 2)))
def test_what_two_models_share_with_equal_shape_starts_bit_equal(left, right):
    (left_family, left_overrides), (right_family, right_overrides) = VARIANTS[left], VARIANTS[right]
    ours = dict(build(left_family, *left_overrides, double=False).named_parameters())
    theirs = dict(build(right_family, *right_overrides, double=False).named_parameters())
    shared = {name for name in ours.keys() & theirs.keys() if ours[name].shape == theirs[name].shape}
    assert {
        "embedding.weight",
        "decoder.layers.1.self_attention.q.weight",
        "decoder.layers.0.feed_forward.up.weight",
    } <= shared
    different = [name for name in shared if not torch.equal(ours[name], theirs[name])]
    assert different == []


def test_the_other_parameters_of_a_grouped_model_are_untouched():
    """kv_heads changes the shape of W_k and W_v alone."""
    full, grouped = build("decllm").state_dict(), build("decllm", "attention.kv_heads=2").state_dict()
    changed = {name for name in full if full[name].shape != grouped[name].shape}
    assert changed == {f"decoder.layers.{n}.self_attention.{part}.weight" for n in (0, 1) for part in "kv"}


def test_every_matrix_has_values_of_its_own():
    matrices = [p for p in build("redllm", "tie_embeddings=none").parameters() if p.dim() == 2]
    assert len(matrices) == 3 + 2 * (4 + 3) + 2 * (8 + 3)
    for left, right in itertools.combinations(matrices, 2):
        assert left.shape != right.shape or not torch.equal(left, right)


def test_every_matrix_differs_between_seeds_and_no_scale_does():
    one, two = (dict(build("redllm", seed=seed).named_parameters()) for seed in (0, 1))
    for name in one:
        assert torch.equal(one[name], two[name]) == (one[name].dim() == 1), name


def test_the_same_seed_gives_the_same_model_whatever_was_drawn_or_built_before():
    first = build_model(config("redllm"), seed=3)
    torch.manual_seed(1234)
    torch.randn(17)
    build_model(config("decllm"), seed=3)
    again = build_model(config("redllm"), seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    build_model(config("redllm"))
    assert torch.equal(torch.randn(3), expected)


def test_a_config_and_its_resolution_build_the_same_model():
    ours, theirs = build_model(config("redllm")), build_model(resolved("redllm"))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_matrices_are_normal_with_one_over_fan_in_and_embeddings_with_one_over_d_model():
    """Of n draws the mean is within 5 σ/√n of 0, the deviation within 5 σ/√2n of σ; by chance not, once in 10⁶."""
    model = build("redllm", "d_model=64", "feed_forward.d_ff=256", "attention.head_dim=24", "tie_embeddings=none")
    for name, matrix in model.named_parameters():
        if matrix.dim() < 2:
            assert (matrix == 1).all(), name
            continue
        fan_in = 64 if "embedding" in name else matrix.shape[1]  # F.linear: output x input
        sigma, n = fan_in**-0.5, matrix.numel()
        assert abs(matrix.mean()) < 5 * sigma / n**0.5, name
        assert abs(matrix.std() - sigma) < 5 * sigma / (2 * n) ** 0.5, name
    widths = {"q": 64, "out": 4 * 24, "down": 256}
    layer = model.decoder.layers[0]
    assert layer.self_attention.q.weight.shape[1] == widths["q"]
    assert layer.self_attention.out.weight.shape[1] == widths["out"]
    assert layer.feed_forward.down.weight.shape[1] == widths["down"]


def test_on_the_meta_device_a_model_takes_no_memory():
    model = build_model(config("decllm"), device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
