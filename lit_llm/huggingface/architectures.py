"""The architectures of transformers that are points in our space of models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lit_llm.components.registry import COMPONENTS
from lit_llm.config.problems import Problem
from lit_llm.config.section import Section, validate
from lit_llm.config.tree import KIND, difference, tree
from lit_llm.huggingface import from_config, tensor_names, to_config
from lit_llm.huggingface.source_config import Asked
from lit_llm.huggingface.tensor_names import Names
from lit_llm.huggingface.to_config import Ids
from lit_llm.models.config import ModelConfig
from lit_llm.models.resolve import ResolvedModel, resolve_model


@dataclass(frozen=True)
class Architecture:
    """One of them: three functions, and what is odd about its files."""

    model_type: str
    """Its name in a config.json."""
    model: str
    """transformers' class."""
    section: Callable[[Asked], dict[str, Any]]
    """A config.json as our model section."""
    config: Callable[[ResolvedModel, Ids], dict[str, Any]]
    """A resolved model as a config.json, the nearest."""
    names: Callable[[ResolvedModel], Names]
    """Its tensors, and which of ours they are."""
    defaults: Mapping[str, Any]
    """Of its class, for keys that a config.json leaves out."""
    tied: tuple[str, ...]
    """Its tensors that may be stored besides where embeddings are tied: equal to our `embedding.weight`."""
    scales_from_one: bool = False
    """Its norms multiply by 1 + w, ours by the scale itself."""
    known: str = ""
    """Keys of the config.json that change nothing here."""
    left_out: tuple[str, ...] = ()
    """Beginnings of names of tensors that are no part of the network as we have it."""


BUFFERS = ("rotary_emb.inv_freq",)
"""Ends of names of tensors that older files hold beside the parameters: they follow from the config.json."""

_IMAGES = ("model.encoder.vision_tower.", "model.encoder.multi_modal_projector.")
EOI = "model.encoder.embed_tokens.eoi_embedding"
"""T5Gemma 2's input for the token that ends an image, instead of that token's row."""

ARCHITECTURES = {
    each.model_type: each
    for each in (
        Architecture(
            "llama", "LlamaForCausalLM", from_config.llama, to_config.llama, tensor_names.llama, from_config.LLAMA,
            ("lm_head.weight",),
        ),
        Architecture(
            "qwen3", "Qwen3ForCausalLM", from_config.qwen3, to_config.qwen3, tensor_names.qwen3, from_config.QWEN3,
            ("lm_head.weight",),
        ),
        Architecture(
            "gemma2", "Gemma2ForCausalLM", from_config.gemma2, to_config.gemma2, tensor_names.gemma2,
            from_config.GEMMA2, ("lm_head.weight",), scales_from_one=True,
        ),
        Architecture(
            "t5gemma", "T5GemmaForConditionalGeneration", from_config.t5gemma, to_config.t5gemma, tensor_names.t5gemma,
            from_config.TWO_STACKS, ("lm_head.out_proj.weight",), scales_from_one=True, known="vocab_size",
        ),
        Architecture(
            "t5gemma2", "T5Gemma2ForConditionalGeneration", from_config.t5gemma2, to_config.t5gemma2,
            tensor_names.t5gemma2, from_config.TWO_STACKS,
            ("lm_head.out_proj.weight", "model.decoder.embed_tokens.weight"), scales_from_one=True,
            known="vocab_size eoi_token_index image_token_index",
            left_out=(*_IMAGES, EOI, "model.decoder.embed_tokens.eoi_embedding"),
        ),
        Architecture(
            "modernbert", "ModernBertForMaskedLM", from_config.modernbert, to_config.modernbert,
            tensor_names.modernbert, from_config.MODERNBERT, ("decoder.weight",), known="layer_norm_eps",
        ),
    )
}  # fmt: skip
"""By their `model_type`."""


class ModelFile(Section):
    """What of a model.yaml is ours to check: the rest belongs to an experiment."""

    model: ModelConfig
    """The network."""


def checked(section: Mapping[str, Any]) -> ModelConfig:
    """The model that a section describes. Raises InputError."""
    return validate(ModelFile, tree({"model": section})).model


def nearest(model: ResolvedModel, ids: Ids) -> tuple[Architecture, dict[str, Any], dict[str, str]]:
    """(architecture, its config.json, what is different there by key) of the one with the least difference."""
    # None of them has one of these, whatever else they have.
    unlike = {"family": "decoder_decoder"} if model.shared_kv else {}
    for key, component in COMPONENTS.items():
        for side, layers in model.stacks:
            if any(layer.part(key) for layer in layers):
                unlike[f"{side}.{key}"] = component.override.model_fields[KIND].default
    if unlike:
        return (
            ARCHITECTURES["llama"],
            {},
            {key: f"is {kind!r}, and nothing is like it there" for key, kind in unlike.items()},
        )
    found = []
    families = {"decoder": ("llama", "qwen3", "gemma2"), "encoder_decoder": ("t5gemma", "t5gemma2")}
    for name in families.get(model.family, ("modernbert",)):
        each, problems = ARCHITECTURES[name], list[Problem]()
        config = each.config(model, ids)
        there = resolve_model(checked(each.section(Asked(config, each.defaults, problems))))
        apart = difference(_by_layer(model), _by_layer(there)).items()
        differs = {key: f"is {ours!r}, {theirs!r} there" for key, (ours, theirs) in apart}
        found.append((each, config, differs | {problem.key: problem.message for problem in problems}))
    return min(found, key=lambda one: len(one[2]))


def _by_layer(model: ResolvedModel) -> dict[str, Any]:
    plain = model.model_dump(mode="json")
    return plain | {side: {str(i): layer for i, layer in enumerate(plain[side])} for side in ("encoder", "decoder")}
