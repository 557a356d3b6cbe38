"""Small models of transformers, random in every parameter, and the same runs of both sides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from lit_llm.huggingface import import_checkpoint, open_checkpoint
from lit_llm.models.build import build_model

VOCABULARY = 61
BOS = 2
_SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "rms_norm_eps": 1e-3,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": BOS,
}  # fmt: skip
_ROPE = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3["original_max_position_embeddings"] = 16
_ROPES = {"full_attention": _ROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 70.0}}
_GEMMA = {**_SHAPE, "query_pre_attn_scalar": 20, "sliding_window": 3, "rope_parameters": _ROPE}
_GEMMA |= {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
_GEMMA3 = {**_GEMMA, "attn_logit_softcapping": None, "rope_parameters": _ROPES}
_GEMMA3["layer_types"] = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
_T5 = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2,
    "num_heads": 4, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 9,
    "layer_norm_epsilon": 1e-3, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    "decoder_start_token_id": BOS, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_BERT = {key: value for key, value in _SHAPE.items() if key not in ("head_dim", "num_key_value_heads", "rms_norm_eps")}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_VISION |= {"image_size": 28, "patch_size": 14}

DECODERS = ("llama", "qwen3", "gemma2", "mistral", "qwen2", "olmo2", "gemma3_text")
BOTH, ENCODERS = ("t5gemma", "t5gemma2", "t5", "mt5"), ("modernbert",)
ALL = (*DECODERS, *BOTH, *ENCODERS)


def _two(own, **changes):
    """An encoder-decoder of Gemma 3: a text part inside an encoder with eyes."""
    encoder = {"text_config": {**own, "sliding_window": 6}, "vision_config": _VISION, "mm_tokens_per_image": 4}
    return {"encoder": encoder, "decoder": {**own, **changes}}


CONFIGS = {
    "llama": (transformers.LlamaConfig, {**_SHAPE, "rope_parameters": _ROPE}),
    "qwen3": (
        transformers.Qwen3Config,
        {**_SHAPE, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2, "rope_parameters": _ROPE},
    ),
    "gemma2": (transformers.Gemma2Config, _GEMMA),
    # Three heads of a width that is no share of the 32 entries: what Llama's class refuses to build.
    "mistral": (
        transformers.MistralConfig,
        {**_SHAPE, "num_attention_heads": 6, "num_key_value_heads": 3, "sliding_window": 5, "rope_parameters": _LLAMA3},
    ),
    "qwen2": (
        transformers.Qwen2Config,
        {**_SHAPE, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2, "rope_parameters": _ROPE},
    ),
    "olmo2": (transformers.Olmo2Config, {**_SHAPE, "rope_parameters": _LLAMA3}),
    "gemma3_text": (transformers.Gemma3TextConfig, _GEMMA3),
    "t5": (transformers.T5Config, _T5),
    "mt5": (transformers.MT5Config, {**_T5, "feed_forward_proj": "gated-silu"}),
    "t5gemma": (
        transformers.T5GemmaConfig,
        {
            "encoder": {**_GEMMA, "hidden_size": 24, "num_hidden_layers": 3, "intermediate_size": 40},
            "decoder": {**_GEMMA, "num_key_value_heads": 1, "sliding_window": 4},
            "vocab_size": VOCABULARY,
        },
    ),
    "t5gemma2": (
        transformers.T5Gemma2Config,
        _two(_GEMMA3, num_hidden_layers=3, layer_types=_GEMMA3["layer_types"][1:]),
    ),
    "modernbert": (
        transformers.ModernBertConfig,
        {**_BERT, "norm_eps": 1e-3, "local_attention": 6, "rope_parameters": _ROPES, "cls_token_id": 2,
         "sep_token_id": 1},
    ),
}  # fmt: skip
MODELS: dict[str, Any] = {
    "llama": transformers.LlamaForCausalLM,
    "qwen3": transformers.Qwen3ForCausalLM,
    "gemma2": transformers.Gemma2ForCausalLM,
    "mistral": transformers.MistralForCausalLM,
    "qwen2": transformers.Qwen2ForCausalLM,
    "olmo2": transformers.Olmo2ForCausalLM,
    "gemma3_text": transformers.Gemma3ForCausalLM,
    "t5": transformers.T5ForConditionalGeneration,
    "mt5": transformers.MT5ForConditionalGeneration,
    "t5gemma": transformers.T5GemmaForConditionalGeneration,
    "t5gemma2": transformers.T5Gemma2ForConditionalGeneration,
    "modernbert": transformers.ModernBertForMaskedLM,
}


def values_of(name):
    """What the peer's configuration is made of, to be changed: its classes, too, write into what they are given."""
    return _copied(CONFIGS[name][1])


def peer(name, **changes):
    """transformers' model with every parameter drawn anew, so that none is at a value that would not show."""
    config = CONFIGS[name][0](**{**values_of(name), **changes}, attn_implementation="eager")
    model = MODELS[name](config).eval()
    generator = torch.Generator().manual_seed(7)
    for key, parameter in model.named_parameters():
        if parameter.dim() < 2:
            middle = 0.0 if "gemma" in name or parameter.shape[0] == VOCABULARY else 1.0
            parameter.data.uniform_(middle - 0.5, middle + 0.5, generator=generator)
        else:
            parameter.data.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5, generator=generator)
            if key.endswith("Attention.q.weight"):  # T5's scores are not scaled
                parameter.data.mul_(_T5["d_kv"] ** -0.5)
    return model


def _copied(value):
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return list(value) if isinstance(value, list) else value


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def opened(folder):
    """Our model of a directory of ours."""
    config, state = open_checkpoint(folder)
    model = build_model(config)
    model.load_state_dict(state)
    return model.eval()


def imported(model, folder):
    """(directory of ours, our model) of a model of transformers."""
    import_checkpoint(saved(model, folder / "theirs"), folder / "ours")
    return folder / "ours", opened(folder / "ours")


def ids(rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def lengths(rows, length):
    return torch.tensor([length, length // 2 + 1, 1, length - 1][:rows])


@torch.no_grad()
def both_logits(theirs, ours, rows=4, source=14, target=11, name=""):
    """Of the same text: theirs, ours, and which of them are of real tokens. Sources are padded at the end."""
    tokens, real = ids(rows, source), lengths(rows, source)
    mask = (torch.arange(source) < real[:, None]).long()
    if name in BOTH:
        inputs = ids(rows, target, seed=1)
        out = theirs(
            input_ids=tokens,
            attention_mask=mask,
            decoder_input_ids=inputs,
            decoder_attention_mask=torch.ones_like(inputs),
        )
        return out.logits, ours(tokens, inputs, real), torch.ones(rows, target, dtype=torch.bool)
    out = theirs(input_ids=tokens, attention_mask=mask)
    mine = ours(tokens, real) if name in ENCODERS else ours(tokens)
    return out.logits, mine, mask.bool()


def close(theirs, ours, real, most=2e-5):
    found = (theirs - ours)[real].abs().max().item()
    assert found <= most, f"{found:.2e} apart"


def tensors_of(model):
    return dict(model.named_parameters())


every = pytest.mark.parametrize("name", ALL)
