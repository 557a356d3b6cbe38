"""A config.json as transformers' own class reads it, and what of it lit-llm cannot represent.

The classes fill in defaults and `layer_types`, read the keys of older files and write ropes as `rope_parameters`. They
are called by themselves: `from_pretrained` and code of the folder are not.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lit_llm.config.problems import InputError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LOCAL, GLOBAL = "sliding_attention", "full_attention"
"""transformers' names of layers with a window and without."""
ACTIVATIONS = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "gelu_new": "geglu_tanh",
    "relu": "reglu",
    "sigmoid": "glu",
}
"""transformers' name of the gate's activation: our name of the feed-forward network."""
UNGATED = {"relu": "relu", "gelu_new": "gelu_tanh", "gelu": "gelu", "silu": "swish"}
"""The same for networks without a gate."""
HARMLESS = {
    # What the file is, and how it is loaded and trained.
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache",
    "cache_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
    "_experts_implementation_internal", "initializer_range", "initializer_cutoff_factor",
    "ignore_keys_at_rope_validation", "attention_dropout", "dropout_rate", "embedding_dropout", "mlp_dropout",
    "classifier_dropout", "classifier_dropout_rate", "gradient_checkpointing", "reference_compile",
    "deterministic_flash_attn", "chunk_size_feed_forward", "pretraining_tp",
    # Longest text of the training: RoPE has no table that ends.
    "max_position_embeddings", "original_max_position_embeddings",
    # Ids of tokens, and what is done with outputs.
    "pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id",
    "decoder_start_token_id", "is_decoder", "is_encoder_decoder", "_output_attentions", "output_hidden_states",
    "return_dict", "id2label", "label2id", "problem_type", "classifier_pooling", "sparse_prediction",
    "sparse_pred_ignore_index", "repad_logits_with_grad", "tokenizer_class", "task_specific_params", "output_past",
}  # fmt: skip
"""Keys that do not change what a network computes of a text."""
SWITCHES = {"tie_word_embeddings", "decoder_bias", "attention_output_norm", "is_gated_act", "scale_decoder_outputs"}
NUMBERS = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "rms_norm_eps", "norm_eps", "sliding_window", "local_attention", "query_pre_attn_scalar",
    "attn_logit_softcapping", "final_logit_softcapping", "rope_theta", "factor", "num_encoder_layers",
    "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads", "layer_norm_epsilon",
    "relative_attention_num_buckets", "relative_attention_max_distance",
}  # fmt: skip
OPTIONAL_NUMBERS = {"sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}
CHOICES = {
    "hidden_act": tuple(ACTIVATIONS),
    "hidden_activation": tuple(ACTIVATIONS),
    "dense_act_fn": tuple(UNGATED),
    "rope_type": ("default", "linear", "llama3", "yarn"),
}
"""Keys that `from_config.py` reads. Numbers are above 0, or null where optional; choices are those of lit-llm."""
ROPE = {
    "factor": 1.0, "partial_rotary_factor": 1.0,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,  # llama3: turns up to which a frequency is divided, or kept from
    "beta_slow": 1.0, "beta_fast": 32.0, "attention_factor": None, "mscale": None, "mscale_all_dim": None,  # yarn
    "truncate": True,
}  # fmt: skip
"""Keys of a rope beside its base and kind, with the only value that lit-llm has of each; the factor is free."""
OLDER_NAMES = {"hidden_act": "hidden_activation"}
"""Keys of older files beside today's: transformers ignores them, and they have to agree."""


def build_config(
    model_type: str, values: Mapping[str, Any], ignored: Collection[str], unlisted: Collection[str] = ()
) -> PreTrainedConfig:
    """transformers' config object of a config.json, with the attributes of its class alone.

    Args:
        model_type: Name of the architecture.
        values: Content of the config.json.
        ignored: Keys of this architecture that change nothing, beside `HARMLESS`.
        unlisted: Keys that its model reads although its class does not list them.

    Raises:
        InputError: The class refuses the values, or lit-llm cannot represent them. The message names every key.
    """
    require_transformers()
    ignored, problems = HARMLESS.union(ignored), list[Problem]()
    config = _build(_config_class(model_type), copy.deepcopy(dict(values)), (ignored, unlisted), "", problems)
    problems += [*_unsupported_keys(vars(config), vars(type(config)()), ignored, ""), *_unsupported_together(config)]
    if problems:
        raise InputError(*problems)
    return config


def _config_class(model_type: str) -> type[PreTrainedConfig]:
    from transformers import CONFIG_MAPPING

    from lit_llm.huggingface import modeling_lit_llm

    ours = {each.model_type: each for each in (modeling_lit_llm.DecLLMConfig, modeling_lit_llm.RedLLMConfig)}
    return ours.get(model_type) or CONFIG_MAPPING[model_type]


def require_transformers() -> None:
    """Raise InputError where transformers is not installed."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise InputError("import and export need the `transformers` library: pip install 'lit-llm[hf]'") from None


def stacks_of(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    """{path: config} of the stacks of layers: the config itself, or the encoder's and the decoder's."""
    if not hasattr(config, "decoder"):
        return {"": config}
    text = getattr(config.encoder, "text_config", None)
    encoder = {"encoder.": config.encoder} if text is None else {"encoder.text_config.": text}
    return {**encoder, "decoder.": config.decoder}


def _build(
    config_class: type[PreTrainedConfig],
    values: dict[str, Any],
    tolerated: tuple[Collection[str], Collection[str]],
    path: str,
    problems: list[Problem],
) -> PreTrainedConfig:
    """The config object, the objects inside it first: errors of their classes do not say where they stand."""
    ignored, unlisted = tolerated
    if overrides := values.pop("per_layer_config", None):  # the class writes them into attributes of other names
        problems.append(_unknown(overrides, f"{path}per_layer_config"))
    for key, inner_class in config_class.sub_configs.items():
        inner = values.get(key)
        if isinstance(inner, dict) and hasattr(inner_class, "sub_configs"):  # not AutoConfig, of T5Gemma 2's vision
            values[key] = _build(inner_class, inner, tolerated, f"{path}{key}.", problems)
    try:
        config, default = config_class(**values), config_class()
    except Exception as error:  # its checks raise errors of many kinds
        reason = " ".join(str(error.__cause__ or error).split())
        field = re.match(r"Field '(\w+)'", reason)
        place = f"{path}{field[1]}" if field else path.rstrip(".")
        message = f"is refused by transformers' {config_class.__name__}: {reason}"
        raise InputError(*problems, Problem(message, place)) from None
    # The object keeps keys that its class does not know, as attributes.
    for key in [key for key in vars(config) if key not in vars(default) and key not in unlisted]:
        value, today = vars(config).pop(key), vars(config).get(OLDER_NAMES.get(key, ""))
        if key not in ignored and value and value != today:
            problems.append(_unknown(value, f"{path}{key}"))
    return config


def _unknown(value: Any, place: str) -> Problem:
    advice = "if the network is the same without it, take it out of the file"
    return Problem(f"{value!r} is not known here; {advice}", place)


def _unsupported_keys(
    values: Mapping[str, Any], defaults: Mapping[str, Any], ignored: Collection[str], path: str
) -> Iterator[Problem]:
    """Keys that are neither ignored, nor of a name that `from_config.py` can read, nor at the default of the class."""
    for key, value in values.items():
        place, default = f"{path}{key}", defaults.get(key)
        if key in ignored:
            continue
        if hasattr(default, "sub_configs"):
            yield from _unsupported_keys(vars(value), vars(default), ignored, f"{place}.")
        elif isinstance(default, dict):
            yield from _unsupported_in_rope(value, default, ignored, place)
        elif key in NUMBERS:
            absent = value is None and key in OPTIONAL_NUMBERS
            if not absent and (type(value) not in (int, float) or not value > 0):  # NaN is not above 0 either
                yield Problem(f"{value!r} should be a number above 0", place)
        elif key in CHOICES:
            if value not in CHOICES[key]:
                yield Problem(f"{value!r} is not supported; only {', '.join(CHOICES[key])}", place)
        elif key == "layer_types":
            if not set(value) <= {LOCAL, GLOBAL}:
                yield Problem(f"should name each of the layers {LOCAL} or {GLOBAL}", place)
        elif key not in SWITCHES and value != default and (value or default):
            if key in defaults:
                yield Problem(f"{value!r} is not supported; only {default!r}", place)
            else:
                yield _unknown(value, place)


def _unsupported_in_rope(
    rope: Any, default: Mapping[str, Any], ignored: Collection[str], path: str
) -> Iterator[Problem]:
    """Keys of a rope, or of the ropes by kind of layer, that do not mean what they say in this architecture."""
    if not isinstance(rope, Mapping):
        yield Problem(f"{rope!r} should be a mapping", path)
        return
    if "rope_type" in default:  # one rope for all layers; `type` is an older name of its kind
        default = {**ROPE, "type": rope.get("rope_type"), **default}
    for key, value in rope.items():
        if key not in default and key not in ignored:
            yield _unknown(value, f"{path}.{key}")
    yield from _unsupported_keys({key: rope[key] for key in rope if key in default}, default, ignored, f"{path}.")


def _unsupported_together(config: PreTrainedConfig) -> Iterator[Problem]:
    """Values that do not go together in a network of ours."""
    stacks = stacks_of(config)
    for path, stack in stacks.items():
        if LOCAL in getattr(stack, "layer_types", ()) and stack.sliding_window is None:
            yield Problem("is missing, and there are layers with a window", f"{path}sliding_window")
        if not hasattr(stack, "head_dim") and stack.hidden_size % max(stack.num_attention_heads, 1):
            message = f"{stack.num_attention_heads} heads do not divide hidden_size {stack.hidden_size}"
            yield Problem(message, f"{path}num_attention_heads")
        if stack.model_type.startswith(("t5gemma2", "gemma3")) and stack.attn_logit_softcapping is not None:
            # transformers reads it and applies none.
            yield Problem("is not supported in Gemma 3 and T5Gemma 2; only null", f"{path}attn_logit_softcapping")
        if getattr(stack, "scale_decoder_outputs", False):
            message = "true, or absent, scales the decoder's outputs, as the first T5 does; only false, as in T5 v1.1"
            yield Problem(message, f"{path}tie_word_embeddings")
    if len(stacks) == 2:
        (path, encoder), (_, decoder) = stacks.items()
        for key in ("vocab_size", "rms_norm_eps"):
            first, second = getattr(encoder, key), getattr(decoder, key)
            if first != second:
                yield Problem(f"{first} is not the decoder's {second}; only one for both", f"{path}{key}")
