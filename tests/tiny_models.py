"""Small models of both families by overrides, as a user would write them."""

from __future__ import annotations

import torch

from lit_llm.config.section import validate
from lit_llm.config.tree import merge, read_override, tree
from lit_llm.models.build import build_model
from lit_llm.models.config import DecoderDecoderModel, DecoderModel, DoubleDecoderModel, EncoderDecoderModel
from lit_llm.models.resolve import resolve_model

VOCABULARY = 61
_SHARED = {"d_model": 32, "vocabulary": VOCABULARY, "attention": {"heads": 4}, "feed_forward": {"d_ff": 48}}
FAMILIES = {
    "decllm": (DecoderModel, {**_SHARED, "decoder": {"layers": 2}}),
    "yoco": (
        DecoderDecoderModel,
        {
            **_SHARED,
            "self_decoder": {"layers": 2, "self_attention": {"window": 5}},
            "cross_decoder": {"layers": 2},
        },
    ),
    "redllm": (EncoderDecoderModel, {**_SHARED, "encoder": {"layers": 2}, "decoder": {"layers": 2}}),
    "double": (DoubleDecoderModel, {**_SHARED, "block": 5, "encoder": {"layers": 2}, "decoder": {"layers": 2}}),
}
PAPER_NORMS = {
    "decllm": ["norm.scale=false", "attention.qkv_norm=[q, k, v]"],
    "yoco": ["norm.scale=false", "attention.qkv_norm=[q, k, v]"],
    "redllm": ["norm.scale=false", "attention.qkv_norm=[q, k, v]", "attention.output_norm=head"],
    "double": ["norm.scale=false", "attention.qkv_norm=[q, k, v]", "attention.output_norm=head"],
}


def config(family, *overrides):
    """The model section; without overrides a Llama: no norms but those of the residual stream."""
    section, base = FAMILIES[family]
    node = tree(base)
    for override in overrides:
        node = merge(node, read_override(override))
    return validate(section, node)


def resolved(family, *overrides):
    return resolve_model(config(family, *overrides))


def build(family, *overrides, seed=0, double=True):
    """An initialised model, in float64 so that equal functions differ by rounding of 1e-15 only."""
    model = build_model(config(family, *overrides), seed=seed)
    return (model.double() if double else model).eval()


def ids(rows, length):
    return torch.randint(2, VOCABULARY, (rows, length))


def other(tokens, *places):
    """The same ids but for those at `places` of every row."""
    changed = tokens.clone()
    for place in places:
        changed[:, place] = 2 + (changed[:, place] - 2 + 7) % (VOCABULARY - 2)
    return changed


def moved(left_BTV, right_BTV):
    """T: whether the distribution at a position changed, in any row."""
    return (left_BTV - right_BTV).abs().amax(dim=(0, 2)) > 1e-9
