"""The architectures of transformers that are points in our space of models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_llm.components.registry import COMPONENTS
from lit_llm.config.problems import InputError
from lit_llm.config.section import Section, validate
from lit_llm.config.tree import KIND, difference, tree
from lit_llm.huggingface import from_config, tensor_names, to_config
from lit_llm.huggingface.source_config import build_config, require_transformers
from lit_llm.huggingface.tensor_names import Names
from lit_llm.huggingface.to_config import SpecialTokens
from lit_llm.models.config import ModelConfig
from lit_llm.models.resolve import ResolvedModel, resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Architecture:
    """An architecture of transformers: three functions, and what is odd about its files."""

    model_type: str
    """Its name in a config.json."""
    model: str
    """transformers' class of the model."""
    section: Callable[[PreTrainedConfig], dict[str, Any]]
    """Our model section of a config object."""
    config: Callable[[ResolvedModel, SpecialTokens], dict[str, Any]]
    """The config.json that is nearest to a resolved model."""
    names: Callable[[ResolvedModel], Names]
    """Its tensors, and which of ours they are."""
    tied: tuple[str, ...]
    """Tensors that a file may hold although embeddings are tied: they equal our `embedding.weight`."""
    scales_from_one: bool = False
    """Its norms multiply by 1 + w, ours by the scale itself."""
    ignored_keys: tuple[str, ...] = ()
    """Keys of its config.json that change nothing here, or that its class writes into others."""
    ignored_tensors: tuple[str, ...] = ()
    """Beginnings of names of tensors that are no part of the network as we have it."""


BUFFERS = ("rotary_emb.inv_freq",)
"""Ends of names of tensors that older files hold beside the parameters: they follow from the config.json."""

_IMAGES = ("model.encoder.vision_tower.", "model.encoder.multi_modal_projector.")
EOI = "model.encoder.embed_tokens.eoi_embedding"
"""T5Gemma 2's input for the token that ends an image, instead of that token's row."""

ARCHITECTURES = {
    architecture.model_type: architecture
    for architecture in (
        Architecture(
            "llama", "LlamaForCausalLM", from_config.llama, to_config.llama, tensor_names.llama, ("lm_head.weight",),
        ),
        Architecture(
            "qwen3", "Qwen3ForCausalLM", from_config.qwen3, to_config.qwen3, tensor_names.qwen3, ("lm_head.weight",),
            ignored_keys=("use_sliding_window", "max_window_layers"),
        ),
        Architecture(
            "gemma2", "Gemma2ForCausalLM", from_config.gemma2, to_config.gemma2, tensor_names.gemma2,
            ("lm_head.weight",), scales_from_one=True,
        ),
        Architecture(
            "t5gemma", "T5GemmaForConditionalGeneration", from_config.t5gemma, to_config.t5gemma, tensor_names.t5gemma,
            ("lm_head.out_proj.weight",), scales_from_one=True, ignored_keys=("cross_attention_hidden_size",),
        ),
        Architecture(
            "t5gemma2", "T5Gemma2ForConditionalGeneration", from_config.t5gemma2, to_config.t5gemma2,
            tensor_names.t5gemma2, ("lm_head.out_proj.weight", "model.decoder.embed_tokens.weight"),
            scales_from_one=True,
            ignored_keys=(
                "cross_attention_hidden_size", "vision_config", "mm_tokens_per_image", "boi_token_index",
                "eoi_token_index", "image_token_index",
            ),
            ignored_tensors=(*_IMAGES, EOI, "model.decoder.embed_tokens.eoi_embedding"),
        ),
        Architecture(
            "modernbert", "ModernBertForMaskedLM", from_config.modernbert, to_config.modernbert,
            tensor_names.modernbert, ("decoder.weight",),
            ignored_keys=("layer_norm_eps", "position_embedding_type", "global_attn_every_n_layers"),
        ),
    )
}  # fmt: skip
"""{model_type: architecture}."""


class ModelFile(Section):
    """The part of a model.yaml that is checked here. The rest belongs to an experiment."""

    model: ModelConfig
    """The network."""


def checked(section: Mapping[str, Any]) -> ModelConfig:
    """The model that a section describes. Raises InputError."""
    return validate(ModelFile, tree({"model": section})).model


def read_values(architecture: Architecture, values: Mapping[str, Any]) -> ModelConfig:
    """The model that a config.json's values describe. Raises InputError with everything that we do not have."""
    return checked(architecture.section(build_config(architecture.model_type, values, architecture.ignored_keys)))


def nearest(model: ResolvedModel, tokens: SpecialTokens) -> tuple[Architecture, dict[str, Any], dict[str, str]]:
    """(architecture, its config.json, {key: what is different there}) of the one with the fewest differences."""
    absent = {"family": "decoder_decoder"} if model.shared_kv else {}
    for key, component in COMPONENTS.items():
        for side, layers in model.stacks:
            if any(layer.part(key) for layer in layers):
                absent[f"{side}.{key}"] = component.override.model_fields[KIND].default
    if absent:
        differences = {key: f"is {kind!r}, and nothing is like it there" for key, kind in absent.items()}
        return ARCHITECTURES["llama"], {}, differences
    require_transformers()
    families = {"decoder": ("llama", "qwen3", "gemma2"), "encoder_decoder": ("t5gemma", "t5gemma2")}
    candidates = []
    for name in families.get(model.family, ("modernbert",)):
        architecture = ARCHITECTURES[name]
        values = architecture.config(model, tokens)
        try:
            theirs = _by_layer(resolve_model(read_values(architecture, values)))
            pairs = difference(_by_layer(model), theirs).items()
            differences = {key: f"is {ours!r}, {other!r} there" for key, (ours, other) in pairs}
            distance = len(differences)
        except InputError as error:  # counts as a difference in each layer
            differences = {problem.key or "config.json": problem.message for problem in error.problems}
            distance = len(model.encoder) + len(model.decoder)
        candidates.append((distance, architecture, values, differences))
    _, architecture, values, differences = min(candidates, key=lambda candidate: candidate[0])
    return architecture, values, differences


def _by_layer(model: ResolvedModel) -> dict[str, Any]:
    plain = model.model_dump(mode="json")
    return plain | {side: {str(i): layer for i, layer in enumerate(plain[side])} for side in ("encoder", "decoder")}
