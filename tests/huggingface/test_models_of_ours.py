"""Models built here, exported, and loaded by transformers; directories of ours as files that experiments extend."""

import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from lit_llm.data.tokenizers import SPECIAL, train_bpe
from lit_llm.experiment.load import load_experiment
from lit_llm.huggingface import export_checkpoint, export_folder, import_checkpoint, open_checkpoint
from lit_llm.huggingface.architectures import checked
from lit_llm.huggingface.from_config import layer_ranges
from lit_llm.models.build import build_model
from lit_llm.models.resolve import layer_range, resolve_model
from tests.huggingface.small_peers import DECODERS, ENCODERS, MODELS, both_logits, close, ids, imported, opened, peer

SMALL = {"d_model": 32, "vocabulary": 61, "feed_forward": {"d_ff": 48}}
GEMMA = {"norm": {"placement": "sandwich"}, "embedding": {"scaled": True}}
GEGLU = {"activation": "geglu_tanh", "d_ff": 40}
OURS = {
    "llama": {
        **SMALL, "attention": {"heads": 4, "kv_heads": 1, "rope_theta": 300.0, "rope_factor": 4.0},
        "norm": {"eps": 1e-2}, "decoder": {"layers": 2},
    },
    "qwen3": {
        **SMALL, "attention": {"heads": 2, "head_dim": 10, "qkv_norm": ["q", "k"], "qkv_norm_scale": True},
        "tie_embeddings": "none",
        "decoder": {"layers": 3, "layer_ranges": {"0-2/2": {"self_attention": {"window": 4}}}},
    },
    "gemma2": {
        **SMALL, **GEMMA, "attention": {"heads": 4, "kv_heads": 2, "softcap": 1.5, "scale": 0.25},
        "output": {"softcap": 2.0}, "feed_forward": GEGLU,
        "decoder": {"layers": 3, "layer_ranges": {"1": {"self_attention": {"window": 3}}}},
    },
    "mistral": {  # 3 heads, which do not divide 32: Llama's class refuses to build that
        **SMALL, "attention": {"heads": 3, "head_dim": 10, "window": 5}, "tie_embeddings": "none",
        "decoder": {"layers": 2},
    },
    "qwen2": {
        **SMALL,
        "attention": {
            "heads": 4, "kv_heads": 2, "head_dim": 10, "qkv_bias": ["q", "k", "v"], "rope_factor": 4.0,
            "rope_scaling": "yarn", "rope_original_length": 8,
        },
        "decoder": {"layers": 3, "layer_ranges": {"1": {"self_attention": {"window": 4}}}},
    },
    "olmo2": {
        **SMALL, "norm": {"placement": "output"},
        "attention": {
            "heads": 3, "kv_heads": 1, "head_dim": 10, "qkv_norm": ["q", "k"], "qkv_norm_over": "concat",
            "qkv_norm_scale": True, "rope_factor": 8.0, "rope_scaling": "llama3", "rope_original_length": 9,
        },
        "decoder": {"layers": 2},
    },
    "gemma3_text": {
        **SMALL, **GEMMA, "feed_forward": GEGLU,
        "attention": {"heads": 2, "kv_heads": 1, "head_dim": 10, "qkv_norm": ["q", "k"], "qkv_norm_scale": True},
        "decoder": {"layers": 3, "layer_ranges": {"0-1": {"self_attention": {"window": 3, "rope_theta": 50.0}}}},
    },
    "t5": {
        **SMALL, "family": "encoder_decoder", "tie_embeddings": "inputs",
        "feed_forward": {"activation": "relu", "d_ff": 40},
        "attention": {
            "heads": 3, "head_dim": 7, "scale": 1.0, "rope": "none", "relative_bias": "shared", "relative_buckets": 8,
            "relative_distance": 20,
        },
        "encoder": {"layers": 3}, "decoder": {"layers": 2},
    },
    "ul2": {  # scores scaled by 1/4 or by 1/2: T5's class has no factor
        **SMALL, "family": "encoder_decoder", "feed_forward": {**GEGLU, "activation": "swiglu"},
        "attention": {"heads": 3, "head_dim": 16, "rope": "none", "relative_bias": "shared"},
        "encoder": {"layers": 2}, "decoder": {"layers": 2, "cross_attention": {"scale": 0.5}},
    },
    "t5gemma": {
        **SMALL, **GEMMA, "family": "encoder_decoder", "tie_embeddings": "none", "feed_forward": GEGLU,
        "attention": {"heads": 4}, "encoder": {"layers": 2, "d_model": 24, "attention": {"heads": 2, "window": 3}},
        "decoder": {"layers": 3, "cross_attention": {"rope": "none"}, "self_attention": {"window": 4}},
    },
    "t5gemma2": {
        **SMALL, **GEMMA, "family": "encoder_decoder", "feed_forward": GEGLU,
        "attention": {"heads": 4, "kv_heads": 2, "qkv_norm": ["q", "k"], "qkv_norm_scale": True},
        "encoder": {"layers": 3, "layer_ranges": {"1": {"attention": {"window": 3, "window_right": 4}}}},
        "decoder": {"layers": 2, "cross_attention_mode": "merged", "self_attention": {"rope": "restart"}},
    },
    "modernbert": {
        **SMALL, "family": "encoder_only", "attention": {"heads": 4, "rope_theta": 500.0},
        "norm": {"function": "layer_norm", "skip_first": True}, "embedding": {"norm": True},
        "feed_forward": {"activation": "geglu", "d_ff": 40}, "output": {"head": "dense", "bias": True},
        "encoder": {"layers": 3, "layer_ranges": {"0-1": {"attention": {"window": 3, "rope_theta": 50.0}}}},
    },
}  # fmt: skip
"""A point inside each architecture, with as much as may differ from a preset of it."""


def built(section):
    """Our model with scales that are not one."""
    config = checked(section)
    model = build_model(config, seed=3).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    return config, model


@pytest.mark.parametrize("name", OURS)
def test_transformers_computes_the_same_with_a_model_of_ours(name, tmp_path):
    config, ours = built(OURS[name])
    said = export_checkpoint(config, ours.state_dict(), tmp_path / "out")
    name = "t5" if name == "ul2" else name
    assert said.startswith(MODELS[name].__name__)
    theirs, found = MODELS[name].from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    images = ("vision_tower", "multi_modal_projector")
    assert not [key for key in found["missing_keys"] if not any(part in key for part in images)]
    assert not found["unexpected_keys"]
    close(*both_logits(theirs.eval(), ours, name=name))


@pytest.mark.parametrize("name", OURS)
def test_transformers_reads_text_with_the_tokenizer_of_an_export(name, tmp_path):
    """Judge: the tokenizers library, and the ids that the config.json names. Without a word on it, transformers takes
    the class of the architecture: Gemma's wants an <unk>, which our tokenizers have not."""
    train_bpe(["the end of one line, and of another"] * 9, 280, tmp_path / "tokenizer.json")
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    config, ours = built({**OURS[name], "vocabulary": 300})
    export_checkpoint(config, ours.state_dict(), tmp_path / "out", tmp_path / "tokenizer.json", *SPECIAL)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "  another line,\nof \u00e4 <unk>"
    assert theirs(text, add_special_tokens=False)["input_ids"] == library.encode(text, add_special_tokens=False).ids
    first = SPECIAL[1] if name in DECODERS else ""  # as `lit-llm generate` reads a text
    assert theirs.decode(theirs(text)["input_ids"]) == first + text
    assert (theirs.eos_token, theirs.bos_token) == SPECIAL
    named = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert theirs.eos_token_id == library.token_to_id("<eod>") == named.eos_token_id
    assert theirs.bos_token_id == library.token_to_id("<s>") == named.bos_token_id
    assert theirs.pad_token_id == named.pad_token_id


def test_the_token_that_ends_an_image_is_one_like_all_others(tmp_path):
    """T5Gemma 2 reads it from a vector of its own: that of its row, in an export."""
    config, ours = built(OURS["t5gemma2"])
    export_checkpoint(config, ours.state_dict(), tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    values["encoder"]["eoi_token_index"] = values["eoi_token_index"] = 7
    (tmp_path / "out" / "config.json").write_text(json.dumps(values))
    import_checkpoint(tmp_path / "out", tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "again")
    theirs = MODELS["t5gemma2"].from_pretrained(tmp_path / "again", attn_implementation="eager").eval()
    assert theirs.config.eoi_token_index == 7
    tokens = torch.full((1, 6), 7)
    with torch.no_grad():
        out = theirs(input_ids=tokens, attention_mask=torch.ones_like(tokens), decoder_input_ids=ids(1, 4)).logits
        assert torch.allclose(out, ours(tokens, ids(1, 4)), atol=2e-5)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({**OURS["llama"], "attention": {"heads": 4, "output_norm": "head"}}, "output_norm"),
        ({**OURS["qwen3"], "attention": {**OURS["qwen3"]["attention"], "qkv_norm": ["q", "k", "v"]}}, "qkv_norm"),
        ({**OURS["llama"], "norm": {"scale": False}}, "norm.scale"),
        ({**OURS["olmo2"], "norm": {"placement": "pre"}}, "norm.placement"),
        ({**OURS["qwen2"], "attention": {"heads": 4, "qkv_bias": ["q"]}}, "qkv_bias"),
        ({**OURS["t5"], "tie_embeddings": "decoder"}, "tie_embeddings"),
        ({**OURS["ul2"], "attention": {**OURS["ul2"]["attention"], "heads": 4, "scale": 0.3}}, "scale"),
        ({**OURS["ul2"], "attention": {**OURS["ul2"]["attention"], "heads": 4, "kv_heads": 1}}, "kv_heads"),
        ({**OURS["llama"], "attention": {"heads": 4, "relative_bias": "shared"}}, "relative_bias"),
        ({**OURS["llama"], "feed_forward": {"activation": "relu_squared", "d_ff": 48}}, "activation"),
        ({**OURS["gemma2"], "norm": {"placement": "post"}}, "norm.placement"),
        ({**OURS["t5gemma"], "decoder": {"layers": 2, "cross_attention": {"rope": "continuous"}}}, "rope"),
        ({**OURS["t5gemma2"], "decoder": {"layers": 2, "cross_attention_mode": "merged"}}, "rope"),
        ({**OURS["modernbert"], "output": {"bias": True}}, "output.head"),
        ({**OURS["llama"], "decoder": {"layers": 2, "retention": "gated"}}, "decoder.retention"),
        ({**OURS["llama"], "decoder": {"layers": 2, "gated_deltanet": "gated"}}, "decoder.gated_deltanet"),
        ({**OURS["llama"], "decoder": {"layers": 2, "experts": "token_choice"}}, "decoder.experts"),
        (
            {
                **SMALL,
                "family": "encoder_decoder",
                "attention": {"heads": 4},
                "encoder": {"layers": 2},
                "decoder": {"layers": 2},
                "tie_layers": True,
            },
            "tie_layers",
        ),
        ({**OURS["llama"], "attention": {"heads": 4, "value_residual": "fixed"}}, "value_residual"),
        ({**OURS["llama"], "embedding": {"positions": "continuous", "max_positions": 16}}, "embedding.positions"),
        (
            {
                **SMALL,
                "family": "decoder_decoder",
                "attention": {"heads": 4, "qkv_norm": ["k"], "qkv_norm_scale": True},
                "self_decoder": {"layers": 1, "retention": "gated"},
                "cross_decoder": {"layers": 2},
            },
            "decoder_decoder",
        ),
    ],
)
def test_what_transformers_does_not_know_is_named_and_stays_ours(section, key, tmp_path):
    config, ours = built(section)
    said = export_checkpoint(config, ours.state_dict(), tmp_path / "out")
    assert key in said
    assert "not for transformers" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.yaml", "weights.safetensors"]
    again = opened(tmp_path / "out")
    assert again.config == ours.config
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_an_experiment_extends_what_was_imported(name, tmp_path):
    """On the training of a preset whose own model is quite another one."""
    folder, ours = imported(peer(name), tmp_path)
    file = tmp_path / "experiment.yaml"
    objective = "masked_lm" if ours.config.family == "encoder_only" else "causal_lm"
    training = f"pretrain: {{objective: {objective}, data: {{tokenizer: bytes}}}}"
    file.write_text(f"extends: [_training.yaml, ours/model.yaml]\n{training}\nmodel: {{vocabulary: 300}}\n")
    (tmp_path / "_training.yaml").write_text(
        "pretrain: {data: {sequence_length: 64, batch_size: 4}, training: {max_steps: 9}, "
        f"objective: {'masked_lm' if name in ENCODERS else 'prefix_lm'}}}\n"
    )
    found = resolve_model(load_experiment(file).model)
    assert found == ours.config.model_copy(update={"vocabulary": 300})
    assert resolve_model(open_checkpoint(folder)[0]) == ours.config


@pytest.mark.parametrize("name", DECODERS)
def test_what_was_imported_stands_on_the_papers_presets(name, tmp_path):
    """Their parameter-free norms on queries, keys and values must not come along."""
    _, ours = imported(peer(name), tmp_path)
    file = tmp_path / "experiment.yaml"
    file.write_text("extends: [decllm-tiny, ours/model.yaml]\nmodel: {vocabulary: 1024}\n")
    assert resolve_model(load_experiment(file).model) == ours.config.model_copy(update={"vocabulary": 1024})


@pytest.mark.parametrize(
    ("layers", "ranges"),
    [
        ([], []),
        ([4], ["4"]),
        ([0, 2, 4, 6], ["0-6/2"]),
        ([1, 2, 4, 5, 7, 8], ["1-7/3", "2-8/3"]),
        ([0, 1, 2, 3, 4, 6, 7, 8, 9, 10], ["0-4", "6-10"]),
        ([5, 11, 17], ["5-17/6"]),
    ],
)
def test_ranges_are_few_and_name_each_layer_once(layers, ranges):
    assert layer_ranges(layers) == ranges
    assert sorted(index for name in ranges for index in layer_range(name)) == layers
