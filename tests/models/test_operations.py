"""What is off costs nothing: the operations of one more layer are those of its formula, and no other."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lit_llm.experiment.load import load_experiment
from lit_llm.models.build import build_model

VIEWS = {"view", "_unsafe_view", "transpose", "t", "unsqueeze", "slice", "expand", "split", "detach", "promote_types"}
"""And the question for a dtype; none of them computes."""
PLAIN = ["model.attention.qkv_norm=[]", "model.norm.scale=false"]
ROTATION = Counter(mul=4, sub=1, add=1, cat=1)
"""(a cos - b sin, b cos + a sin) of the two halves a and b."""
NORM = Counter(linalg_vector_norm=1, pow_=1, div_=1, add_=1, rsqrt_=1, mul=1)
"""x / sqrt(mean(x²) + eps)."""
ATTENTION = Counter(mm=4, scaled_dot_product_attention=1, add=1) + ROTATION + ROTATION
NETWORK = Counter(mm=3, silu=1, mul=1, add=1)
SELF_AND_NETWORK = ATTENTION + NETWORK + NORM + NORM
CROSS = ATTENTION + NORM


class Operations(TorchDispatchMode):
    """Counts torch's operations, without views, which launch nothing."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            self.counts["scaled_dot_product_attention" if "scaled_dot_product" in name else name] += 1
        return function(*args, **(kwargs or {}))


def operations(preset, overrides, layers):
    """Operations of a forward pass over one batch."""
    experiment = load_experiment(preset, [*PLAIN, f"model.decoder.layers={layers}", *overrides])
    model = build_model(experiment.model).train()
    tokens = torch.zeros((2, 12), dtype=torch.long)
    with torch.no_grad(), Operations() as counted:
        model(*[tokens] * (2 if model.config.encoder else 1))
    return counted.counts


def of_a_layer(preset, overrides=()):
    found = operations(preset, overrides, 3)
    found.subtract(operations(preset, overrides, 2))
    return +found


@pytest.mark.parametrize(
    ("preset", "formula"),
    [("decllm-tiny", SELF_AND_NETWORK), ("redllm-tiny", SELF_AND_NETWORK + CROSS)],
)
def test_a_plain_layer_has_the_operations_of_its_formula(preset, formula):
    off = ["model.attention.output_norm=none"]
    assert of_a_layer(preset, off) == formula


@pytest.mark.parametrize(
    ("override", "more"),
    [
        ("model.attention.qkv_norm=[q, k, v]", NORM + NORM + NORM),
        ("model.attention.output_norm=head", NORM),
        ("model.attention.gate=per_head", Counter(mm=1, sigmoid=1, mul=1)),
        ("model.attention.gate=per_element", Counter(mm=1, sigmoid=1, mul=1)),
        ("model.attention.value_residual=fixed", Counter(mul=2, add=1)),
        ("model.attention.rope_fraction=0.5", Counter(cat=2)),
        ("model.norm.placement=parallel", Counter()),
        ("model.norm.placement=sandwich", NORM + NORM),
        ("model.attention.kv_heads=1", Counter()),
        ("model.attention.relative_bias=alibi", Counter()),  # made once with its mask, before the layers
        ("model.attention.relative_bias=shared", Counter()),
    ],
)
def test_a_component_that_is_on_adds_its_own_operations(override, more):
    assert of_a_layer("decllm-tiny", [override]) == SELF_AND_NETWORK + more
