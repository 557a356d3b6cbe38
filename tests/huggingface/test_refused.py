"""What cannot be imported is refused by name, in one message, and nothing is written."""

import json
import pickle
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_llm.config.problems import InputError
from lit_llm.huggingface import export_folder, import_checkpoint, open_checkpoint
from tests.commands import lit_llm
from tests.huggingface.small_peers import every, imported, peer, saved


@pytest.fixture
def checkpoint(tmp_path):
    return saved(peer("gemma2"), tmp_path / "theirs")


def refused(folder):
    """The message, of an import that leaves nothing behind."""
    out = folder.parent / "out" / "ours"
    with pytest.raises(InputError) as error:
        import_checkpoint(folder, out)
    assert not out.parent.exists()
    return str(error.value)


def change(folder, **keys):
    path = folder / "config.json"
    values = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "gone"}))
    return folder


def rewrite(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    return folder


class Bomb:
    def __reduce__(self):
        return open, ("exploded", "w")


def test_a_pickle_is_not_opened(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    said = refused(checkpoint)
    assert "pytorch_model.bin" in said
    assert "save_pretrained" in said
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_beside_safetensors_is_left_alone(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (checkpoint / "optimizer.pt").write_bytes(pickle.dumps(Bomb()))
    import_checkpoint(checkpoint, tmp_path / "ours")
    assert not (tmp_path / "exploded").exists()


def test_without_transformers_the_message_names_the_extra(tmp_path, monkeypatch):
    """An export does not take the missing library for a model that transformers does not have."""
    folder, _ = imported(peer("llama"), tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "lit-llm[hf]" in refused(tmp_path / "theirs")
    with pytest.raises(InputError, match=r"lit-llm\[hf\]"):
        export_folder(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_no_folder_no_config_no_weights(checkpoint, tmp_path):
    assert "nowhere" in refused(tmp_path / "nowhere")
    (checkpoint / "model.safetensors").unlink()
    assert "model.safetensors" in refused(checkpoint)
    (checkpoint / "config.json").unlink()
    assert "config.json" in refused(checkpoint)


@pytest.mark.parametrize("text", ["", "{", "[]", '"llama"', "{" * 100_000])
def test_what_is_no_config_json(text, checkpoint):
    (checkpoint / "config.json").write_text(text)
    assert "config.json" in refused(checkpoint)


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 64, b"PK\x03\x04 a zip"])
def test_what_is_no_safetensors_file(content, checkpoint):
    (checkpoint / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in refused(checkpoint)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"model_type": "mixtral"}, "mixtral"),
        ({"model_type": "gemma"}, "gemma2"),
        ({"model_type": "gone"}, "model_type"),
        ({"model_type": ["gemma2"]}, "model_type"),
        ({"architectures": 5}, "architectures"),
        ({"layer_types": [[], [], [], []]}, "layer_types"),
        ({"rms_norm_eps": float("nan")}, "eps"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta"),
        ({"architectures": ["Gemma2ForSequenceClassification"]}, "Gemma2ForSequenceClassification"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"hidden_activation": "relu6"}, "relu6"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "beta_fast": 16}}, "beta_fast"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0, "rope_theta": 1e4}}, "longrope"),
        ({"rope_parameters": "gone", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_theta": 1e4, "head_dim": 7}}, "rope_parameters.head_dim"),
        ({"rope_parameters": {"full_attention": None}}, "rope_parameters.full_attention"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"per_layer_config": {"0": {"intermediate_size": 8}}}, "per_layer_config"),
        ({"rope_local_base_freq": 1e4}, "rope_local_base_freq"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"auto_map": {"AutoModel": "modeling.Evil"}}, "auto_map"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["linear_attention"] * 4}, "layer_types"),
        ({"sliding_window": None}, "sliding_window"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": "four"}, "num_hidden_layers"),
        ({"hidden_size": -32}, "hidden_size"),
        ({"num_key_value_heads": 3}, "kv_heads"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
    ],
)
def test_what_we_do_not_have_is_named(keys, named, checkpoint):
    assert named in refused(change(checkpoint, **keys))


def test_all_that_is_in_the_way_is_said_at_once(checkpoint):
    said = refused(change(checkpoint, attention_bias=True, num_local_experts=8, hidden_activation="relu6"))
    assert all(name in said for name in ("attention_bias", "num_local_experts", "hidden_activation"))


@pytest.mark.parametrize(
    ("name", "keys", "named"),
    [
        ("t5", {"tie_word_embeddings": True, "scale_decoder_outputs": "gone"}, "tie_word_embeddings: true, or absent"),
        ("t5", {"feed_forward_proj": "gated-tanh", "dense_act_fn": "gone"}, "dense_act_fn"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("olmo2", {"attention_bias": True}, "attention_bias"),
        ("mistral", {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
    ],
)
def test_what_one_architecture_does_not_share_is_named(name, keys, named, tmp_path):
    assert named in refused(change(saved(peer(name), tmp_path / "theirs"), **keys))


@pytest.mark.parametrize("key", ["low_freq_factor", "high_freq_factor"])
def test_other_turns_than_llama_3s_are_named(key, tmp_path):
    folder = saved(peer("mistral"), tmp_path / "theirs")
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    assert f"rope_parameters.{key}" in refused(change(folder, rope_parameters={**rope, key: 2.0}))


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("name", ["t5gemma", "t5gemma2"])
def test_a_side_is_named_with_its_key(name, side, tmp_path):
    folder = saved(peer(name), tmp_path / "theirs")
    values = json.loads((folder / "config.json").read_text())
    text = "text_config" in values[side]
    (values[side]["text_config"] if text else values[side])["attention_bias"] = True
    said = refused(change(folder, **values))
    assert f"{side}.{'text_config.' * text}attention_bias" in said
    assert f"{side}: " in refused(change(folder, **{side: [1]}))
    values["decoder"]["rms_norm_eps"] = 0.5
    assert "rms_norm_eps" in refused(change(folder, **values))


@every
def test_tensors_that_are_missing_too_many_or_of_another_shape_are_named(name, tmp_path):
    folder = saved(peer(name), tmp_path / "theirs")
    tensors = load_file(folder / "model.safetensors")
    gone, cut = [
        key for key in tensors if any(layer in key for layer in ("layers.1.", "block.1.")) and "vision" not in key
    ][:2]

    def edit(tensors):
        del tensors[gone]
        tensors[cut] = tensors[cut][:-1].clone()
        tensors["model.score.weight"] = torch.zeros(2)

    said = refused(rewrite(folder, edit))
    assert f"{gone}: is missing" in said
    assert f"{cut}: has the shape" in said
    assert "model.score.weight: is not known" in said


def test_a_key_that_transformers_class_does_not_read_is_refused(tmp_path):
    """Llama has no windows: a model that applied the file's would be another one than transformers builds."""
    folder = saved(peer("llama"), tmp_path / "theirs")
    keys = {"sliding_window": 3, "layer_types": ["sliding_attention"] * 4, "query_pre_attn_scalar": 9}
    said = refused(change(folder, **keys))
    assert all(f"{key}: " in said for key in keys)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict.fromkeys(keys)))
    import_checkpoint(folder, tmp_path / "ours")


def test_ropes_of_layers_without_a_kind_are_refused(tmp_path):
    """T5Gemma 2 has one rope for each kind of layer: transformers ignores a flat one."""
    folder = saved(peer("t5gemma2"), tmp_path / "theirs")
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["decoder"]["rope_parameters"] = {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}
    path.write_text(json.dumps(values))
    said = refused(folder)
    assert "decoder.rope_parameters.factor: 8.0 is not known" in said
    assert "decoder.rope_parameters.rope_theta: 500000.0 is not known" in said


def test_a_whole_rotation_may_be_written_out(checkpoint):
    import_checkpoint(change(checkpoint, partial_rotary_factor=1.0), checkpoint.parent / "fine")


def test_quantised_tensors_are_named(checkpoint):
    key = "model.layers.0.mlp.up_proj.weight"
    said = refused(rewrite(checkpoint, lambda tensors: tensors.update({key: tensors[key].to(torch.int8)})))
    assert key in said
    assert "quantised" in said


def test_a_tied_matrix_that_differs_is_refused(checkpoint):
    tied = "model.embed_tokens.weight"
    rewrite(checkpoint, lambda tensors: tensors.update({"lm_head.weight": tensors[tied].clone()}))
    import_checkpoint(checkpoint, checkpoint.parent / "fine")
    said = refused(rewrite(checkpoint, lambda tensors: tensors.update({"lm_head.weight": tensors[tied] + 1})))
    assert "lm_head.weight" in said


@pytest.mark.parametrize("file", ["../elsewhere.safetensors", "gone.safetensors", "pytorch_model.bin"])
def test_an_index_names_files_beside_it(file, checkpoint):
    saved(peer("gemma2"), checkpoint.parent / "elsewhere")
    (checkpoint.parent / "elsewhere" / "model.safetensors").rename(checkpoint.parent / "elsewhere.safetensors")
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"")
    index = {"weight_map": {"model.norm.weight": file}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert file in refused(checkpoint)


def test_an_index_that_promises_more_than_a_file_has(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "shard.safetensors")
    index = {"weight_map": {"model.nothing.weight": "shard.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.nothing.weight" in refused(checkpoint)


def test_a_place_that_is_taken_is_left_as_it_is(checkpoint, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    folder, _ = imported(peer("llama"), tmp_path / "other")
    for write in (lambda out: import_checkpoint(checkpoint, out), lambda out: export_folder(folder, out)):
        with pytest.raises(InputError, match="already"):
            write(tmp_path / "taken")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["file"]


def test_a_directory_of_ours_that_was_changed_says_what_is_wrong(tmp_path):
    folder, _ = imported(peer("llama"), tmp_path)
    path = folder / "model.yaml"
    path.write_text(path.read_text().replace("layers: 4", "layers: 5"))
    with pytest.raises(InputError, match=r"decoder\.layers\.4\..*is missing"):
        open_checkpoint(folder)
    path.write_text(path.read_text().replace("heads: 4", "haeds: 4"))
    with pytest.raises(InputError, match="did you mean 'heads'"):
        open_checkpoint(folder)
    path.unlink()
    with pytest.raises(InputError, match="lit-llm import"):
        open_checkpoint(folder)


def test_the_command_answers_with_a_message_and_exit_code_2(checkpoint, tmp_path):
    change(checkpoint, attention_bias=True)
    done = lit_llm("import", checkpoint, cwd=tmp_path)
    assert done.returncode == 2
    assert "attention_bias" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "imported").exists()
