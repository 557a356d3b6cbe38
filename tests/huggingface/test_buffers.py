"""Buffers that older files hold beside the parameters are no part of the network."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_llm.config.problems import InputError
from lit_llm.huggingface import import_checkpoint, open_checkpoint
from tests.huggingface.small_peers import peer, saved


def test_inverse_frequencies_of_rope_beside_the_parameters_change_nothing(tmp_path):
    theirs = saved(peer("llama"), tmp_path / "theirs")
    import_checkpoint(theirs, tmp_path / "plain")
    path = theirs / "model.safetensors"
    tensors = load_file(path)
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)}
    save_file(tensors | buffers | {"model.rotary_emb.inv_freq": torch.ones(4)}, path)
    import_checkpoint(theirs, tmp_path / "ours")
    (config, state), (other, expected) = (open_checkpoint(tmp_path / name) for name in ("ours", "plain"))
    assert config == other
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    save_file(tensors | {"model.layers.0.self_attn.inv_freq": torch.ones(4)}, path)
    with pytest.raises(InputError, match="is not known"):
        import_checkpoint(theirs, tmp_path / "refused")
