"""The architectures of transformers that are points in our space of models, and DecLLM and RedLLM, which bring their
code along."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_llm.components.attention.resolved import ResolvedAttention
from lit_llm.components.registry import COMPONENTS
from lit_llm.config.problems import InputError
from lit_llm.config.section import Section, validate
from lit_llm.config.tree import KIND, difference, tree
from lit_llm.huggingface import from_config, tensor_names, to_config
from lit_llm.huggingface.source_config import build_config, require_transformers
from lit_llm.huggingface.tensor_names import Names
from lit_llm.huggingface.to_config import SpecialTokens
from lit_llm.models.config import ModelConfig
from lit_llm.models.layer import Layer
from lit_llm.models.resolve import resolve_model
from lit_llm.models.resolved import ResolvedModel
from lit_llm.models.scaling import output_multiplier

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
    unlisted_keys: tuple[str, ...] = ()
    """Keys of its config.json that its model reads although its class does not list them."""
    tied_by_file: tuple[str, ...] = ()
    """`tie_embeddings` of a file (without, with) an output matrix of its own, where the file decides and not the
    config.json."""
    unscaled: bool = False
    """Its scores have no factor. An export multiplies ours into W_q, where that is exact: see `without_scales`."""
    ignored_tensors: tuple[str, ...] = ()
    """Beginnings of names of tensors that are no part of the network as we have it."""

    @property
    def code(self) -> str | None:
        """File of this package that an export takes along; None for a class that transformers has."""
        return to_config.CODE if self.model_type in ("decllm", "redllm") else None


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
            "qwen2", "Qwen2ForCausalLM", from_config.qwen2, to_config.qwen2, tensor_names.qwen2, ("lm_head.weight",),
            ignored_keys=("use_sliding_window", "max_window_layers"), unlisted_keys=("head_dim",),
        ),
        Architecture(
            "mistral", "MistralForCausalLM", from_config.mistral, to_config.mistral, tensor_names.llama,
            ("lm_head.weight",),
        ),
        Architecture(
            "olmo2", "Olmo2ForCausalLM", from_config.olmo2, to_config.olmo2, tensor_names.olmo2, ("lm_head.weight",),
            unlisted_keys=("head_dim",),
        ),
        Architecture(
            "gemma3_text", "Gemma3ForCausalLM", from_config.gemma3, to_config.gemma3, tensor_names.gemma3,
            ("lm_head.weight",), scales_from_one=True,
            ignored_keys=("_sliding_window_pattern", "sliding_window_pattern"),
        ),
        *(
            Architecture(
                name, f"{model}ForConditionalGeneration", from_config.t5, to_config.t5, tensor_names.t5,
                ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
                tied_by_file=("all", "inputs"), unscaled=True,
                ignored_keys=("feed_forward_proj", "initializer_factor", "n_positions"),
                ignored_tensors=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.",),
            )
            for name, model in (("t5", "T5"), ("mt5", "MT5"))
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
        Architecture(
            "decllm", "DecLLMForCausalLM", from_config.decllm, to_config.decllm, tensor_names.decllm,
            ("lm_head.weight",), ignored_keys=("auto_map",),
        ),
        Architecture(
            "redllm", "RedLLMForConditionalGeneration", from_config.redllm, to_config.redllm, tensor_names.redllm,
            ("lm_head.weight", "encoder.embed_tokens.weight"), ignored_keys=("auto_map",),
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
    config = build_config(architecture.model_type, values, architecture.ignored_keys, architecture.unlisted_keys)
    return checked(architecture.section(config))


def with_ties_of(model: ResolvedModel, architecture: Architecture, config: ModelConfig) -> ResolvedModel:
    """The model of a config.json, with the `tie_embeddings` of `model` where the file of weights decides on it."""
    described = resolve_model(config)
    if {model.tie_embeddings, described.tie_embeddings} <= {*architecture.tied_by_file}:
        return described.model_copy(update={"tie_embeddings": model.tie_embeddings})
    return described


def without_scales(model: ResolvedModel) -> tuple[ResolvedModel, dict[str, float]]:
    """(the same function with scores that have no factor, {name of a W_q: its factor}).

    Factors that are powers of two alone: a product with them is exact. Other attentions stay as they are.
    """
    factors: dict[str, float] = {}
    sides: dict[str, Any] = {}
    for side, layers in model.stacks:
        sides[side] = []
        for index, layer in enumerate(layers):
            parts = dict(layer.parts)
            for name, part in parts.items():
                if isinstance(part, ResolvedAttention):
                    factor = part.head_dim**-0.5 if part.scale is None else part.scale
                    if math.frexp(factor)[0] == 0.5:
                        factors[f"{side}.layers.{index}.{name}.q.weight"] = factor
                        parts[name] = part.model_copy(update={"scale": 1.0})
            sides[side].append(Layer(parts=tuple(parts.items())))
    return model.model_copy(update={side: tuple(layers) for side, layers in sides.items()}), factors


def nearest(model: ResolvedModel, tokens: SpecialTokens) -> tuple[Architecture, dict[str, Any], dict[str, str]]:
    """(architecture, its config.json, {key: what is different there}) of the one with the fewest differences."""
    absent = {"family": model.family} if model.family in ("decoder_decoder", "double_decoder") else {}
    for key, component in COMPONENTS.items():
        for side, layers in model.stacks:
            if any(layer.part(key) for layer in layers):
                absent[f"{side}.{key}"] = component.override.model_fields[KIND].default
    if absent:
        differences = {key: f"is {kind!r}, and nothing is like it there" for key, kind in absent.items()}
        return ARCHITECTURES["llama"], {}, differences
    require_transformers()
    families = {
        "decoder": ("llama", "mistral", "qwen2", "qwen3", "olmo2", "gemma2", "gemma3_text", "decllm"),
        "encoder_decoder": ("t5gemma", "t5gemma2", "t5", "redllm"),
    }
    candidates = []
    for name in families.get(model.family, ("modernbert",)):
        architecture = ARCHITECTURES[name]
        values = architecture.config(model, tokens)
        try:
            theirs = with_ties_of(model, architecture, read_values(architecture, values))
            ours = without_scales(model)[0] if architecture.unscaled else model
            pairs = difference(_by_layer(ours), _by_layer(theirs)).items()
            differences = {key: f"is {here!r}, {there!r} there" for key, (here, there) in pairs}
            distance = len(differences)
        except InputError as error:  # counts as a difference in each layer
            differences = {problem.key or "config.json": problem.message for problem in error.problems}
            distance = len(model.encoder) + len(model.decoder)
        candidates.append((distance, architecture, values, differences))
    _, architecture, values, differences = min(candidates, key=lambda candidate: candidate[0])
    return architecture, values, differences


def _by_layer(model: ResolvedModel) -> dict[str, Any]:
    # Weights that are there do not depend on the initial ones; the factor of T5's tied logits does.
    unused = {"initialisation"} if output_multiplier(model) == 1 else set()
    plain = model.model_dump(mode="json", exclude=unused)
    return plain | {side: {str(i): layer for i, layer in enumerate(plain[side])} for side in ("encoder", "decoder")}
