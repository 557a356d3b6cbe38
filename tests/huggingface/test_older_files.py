"""A config.json as older versions of transformers wrote it means what transformers of today reads in it."""

import json

import pytest
import transformers

from lit_llm.huggingface.architectures import read_values
from lit_llm.huggingface.checkpoint import read_config
from lit_llm.models.resolve import resolve_model

GEMMA = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 7, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh", "vocab_size": 99,
    "rope_theta": 5000.0, "sliding_window": 12, "torch_dtype": "bfloat16", "query_pre_attn_scalar": 24,
}  # fmt: skip
T5 = {
    "architectures": ["T5ForConditionalGeneration"], "d_ff": 96, "d_kv": 16, "d_model": 64, "decoder_start_token_id": 0,
    "dropout_rate": 0.1, "eos_token_id": 1, "initializer_factor": 1.0, "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06, "model_type": "t5", "num_decoder_layers": 2, "num_heads": 4, "num_layers": 3,
    "output_past": True, "pad_token_id": 0, "relative_attention_num_buckets": 32, "tie_word_embeddings": False,
    "use_cache": True, "vocab_size": 99,
}  # fmt: skip
"""Keys that files of T5 v1.1's kind share. `relative_attention_max_distance` was no key of theirs at first."""
OLD = {
    "llama": {
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 96, "max_position_embeddings": 4096,
        "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 3, "num_key_value_heads": 4,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
        "torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 99,
    },
    "llama, scaled linearly": {
        "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 99,
        "rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "qwen3": {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3, "head_dim": 32, "vocab_size": 99,
        "rope_theta": 1000000, "rope_scaling": None, "sliding_window": None, "use_sliding_window": False,
        "max_window_layers": 28, "attention_bias": False, "tie_word_embeddings": True, "rms_norm_eps": 1e-06,
    },
    "gemma2": {
        **GEMMA, "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "hidden_act": "gelu_pytorch_tanh",
        "cache_implementation": "hybrid", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },
    "gemma2, by its defaults": {"model_type": "gemma2"},
    "t5gemma": {
        "model_type": "t5gemma", "architectures": ["T5GemmaForConditionalGeneration"], "vocab_size": 99,
        "encoder": {**GEMMA, "model_type": "t5_gemma_module", "is_decoder": False},
        "decoder": {**GEMMA, "model_type": "t5_gemma_module", "is_decoder": True, "cross_attention_hidden_size": 64},
    },
    "t5gemma2": {
        "model_type": "t5gemma2",
        "encoder": {
            "model_type": "t5gemma2_encoder",
            "text_config": {
                **GEMMA, "rope_local_base_freq": 100.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
            "vision_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        },
        "decoder": {**GEMMA, "rope_local_base_freq": 200.0, "sliding_window_pattern": 3},
    },
    "flan-t5": {
        **T5, "feed_forward_proj": "gated-gelu", "n_positions": 512, "relative_attention_max_distance": 128,
        "transformers_version": "4.23.1",
    },
    "t5 v1.1, saved anew": {
        **T5, "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_gated_act": True,
        "classifier_dropout": 0.0, "torch_dtype": "float16", "transformers_version": "4.41.2",
    },
    "ul2": {**T5, "feed_forward_proj": "gated-silu", "dense_act_fn": "silu", "is_gated_act": True},
    "ul2, by the name of its activation alone": {**T5, "feed_forward_proj": "gated-silu", "n_positions": 512},
    "mt5": {
        **T5, "model_type": "mt5", "architectures": ["MT5ForConditionalGeneration"], "feed_forward_proj": "gated-gelu",
        "tokenizer_class": "T5Tokenizer", "transformers_version": "4.10.0.dev0",
    },
    "olmo2": {
        "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 98,
        "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 96,
        "max_position_embeddings": 4096, "model_type": "olmo2", "num_attention_heads": 4, "num_hidden_layers": 3,
        "num_key_value_heads": 4, "pad_token_id": 97, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 500000,
        "tie_word_embeddings": False, "torch_dtype": "float32", "transformers_version": "4.47.0", "use_cache": True,
        "vocab_size": 99,
    },
    "modernbert": {
        "architectures": ["ModernBertForMaskedLM"], "attention_bias": False, "classifier_activation": "gelu",
        "classifier_bias": False, "classifier_pooling": "mean", "decoder_bias": True, "deterministic_flash_attn": False,
        "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "gradient_checkpointing": False,
        "hidden_activation": "gelu", "hidden_size": 64, "initializer_cutoff_factor": 2.0, "intermediate_size": 96,
        "layer_norm_eps": 1e-05, "local_attention": 128, "local_rope_theta": 10000.0, "mlp_bias": False,
        "model_type": "modernbert", "norm_bias": False, "norm_eps": 1e-05, "num_attention_heads": 4,
        "num_hidden_layers": 7, "position_embedding_type": "absolute", "sep_token_id": 2, "cls_token_id": 1,
        "tie_word_embeddings": True, "torch_dtype": "float32", "vocab_size": 99, "pad_token_id": 0,
    },
    "modernbert, other thetas": {
        "model_type": "modernbert", "global_attn_every_n_layers": 2, "global_rope_theta": 80.0, "local_rope_theta": 9.0,
    },
}  # fmt: skip
"""The keys that stand in the files of published checkpoints, small."""


@pytest.mark.parametrize("name", OLD)
def test_an_older_file_is_the_model_that_transformers_reads_in_it(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OLD[name]))
    architecture, model = read_config(tmp_path / "config.json")
    today = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    assert resolve_model(model) == resolve_model(read_values(architecture, today))


@pytest.mark.parametrize(("name", "activation"), [("flan-t5", "geglu_tanh"), ("ul2", "swiglu"), ("mt5", "geglu_tanh")])
def test_the_gate_of_a_t5_is_the_one_that_its_file_names(name, activation, tmp_path):
    """transformers' documentation: T5 v1.1 and mT5 have gated GELU by tanh, UL2 has gated SiLU."""
    (tmp_path / "config.json").write_text(json.dumps(OLD[name]))
    _, model = read_config(tmp_path / "config.json")
    assert model.feed_forward.activation == activation
