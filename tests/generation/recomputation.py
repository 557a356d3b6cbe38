"""Small models of the families, and generation without a cache: a whole forward pass for every token."""

from __future__ import annotations

import torch

from lit_llm.config.section import validate
from lit_llm.config.tree import merge, read_override, tree
from lit_llm.models.build import build_model
from lit_llm.models.config import DecoderDecoderModel, DecoderModel, DoubleDecoderModel, EncoderDecoderModel

VOCABULARY = 61
BOS, EOD = 1, 0
_SHARED = {
    "d_model": 32,
    "vocabulary": VOCABULARY,
    "attention": {"heads": 4},
    "feed_forward": {"d_ff": 48},
}
_DECODER = {"decoder": {"layers": 2}}
_HALVES = {"self_decoder": {"layers": 2}, "cross_decoder": {"layers": 2}}
_MIXERS = {
    "0": {"gla": {"chunk": 3}},
    "1": {"gated_deltanet": {"chunk": 3}},
    "2": {"mamba2": {"head_dim": 6, "chunk": 3}},
}
CONVOLUTIONS = ["attention.convolution=[input, qkv]", "feed_forward.convolution=[input, hidden]"]
_FAMILIES = {
    "decllm": (DecoderModel, _DECODER),
    "yoco": (DecoderDecoderModel, _HALVES | {"self_decoder": {"layers": 2, "self_attention": {"window": 4}}}),
    "retention": (DecoderDecoderModel, _HALVES | {"self_decoder": {"layers": 2, "retention": {"chunk": 3}}}),
    "mixers": (DecoderModel, {"decoder": {"layers": 4, "layer_ranges": _MIXERS}}),
    "palm": (DecoderModel, {"decoder": {"layers": 2, "partial_attention": "palm"}}),
    "redllm": (EncoderDecoderModel, _DECODER | {"encoder": {"layers": 2}}),
    "double": (DoubleDecoderModel, _DECODER | {"encoder": {"layers": 2}, "block": 4}),
}
PROMPTS = [[5, 9, 13, 2, 7, 30, 8], [], [4, 17, 60], [3, 3, 8, 21, 40, 41, 12, 6, 55, 2, 19, 33], [16, 2, 4]]
"""Of five lengths less one, and an empty one among them."""


def build(family, *overrides, dtype=torch.float64):
    """An initialised model whose every parameter was moved: no scale is one, no two tokens are alike.

    In float64, so that equal functions differ by rounding of 1e-15 only and no argmax hangs on it.
    """
    section, own = _FAMILIES[family]
    node = tree(_SHARED | own)
    for override in overrides:
        node = merge(node, read_override(override))
    model = build_model(validate(section, node))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        for name, steps in model.named_buffers():
            if name.endswith("bias_steps"):  # a router's, in multiples of its bias's rate
                steps.add_(torch.randint_like(steps, -200, 200))
    return model.to(dtype).eval()


@torch.no_grad()
def next_logits(model, prompt, answer, prefix="causal"):
    """V: of the token behind `answer`, by one forward pass over everything, this prompt alone."""
    if model.config.source_apart:
        return model(torch.tensor([prompt or [EOD]]), torch.tensor([[BOS, *answer]]))[0, -1]
    source = 1 + len(prompt)
    open_prefix = source if prefix == "bidirectional" else None
    return model(torch.tensor([[BOS, *prompt, *answer]]), prefix_length=open_prefix, source_length=source)[0, -1]


def recomputed(model, prompt, new, prefix="causal"):
    """(tokens, logits): the most probable token, `new` times."""
    tokens, logits = [], []
    for _ in range(new):
        logits.append(next_logits(model, prompt, tokens, prefix))
        tokens.append(int(logits[-1].argmax()))
    return tokens, torch.stack(logits)
