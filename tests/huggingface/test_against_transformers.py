"""Checkpoints of transformers here, and ours there: the same function, judged by transformers itself."""

import pytest
import torch
import transformers

from lit_llm.generation import generate
from lit_llm.huggingface import export_folder, import_checkpoint
from lit_llm.training.config import TrainingConfig
from lit_llm.training.module import LitModel
from tests.huggingface.small_peers import (
    BOS,
    BOTH,
    DECODERS,
    MODELS,
    both_logits,
    close,
    every,
    ids,
    imported,
    opened,
    peer,
    tensors_of,
    values_of,
)


@every
def test_an_imported_model_has_the_logits_of_its_source(name, tmp_path):
    theirs = peer(name)
    _, ours = imported(theirs, tmp_path)
    close(*both_logits(theirs, ours, name=name))


@every
def test_untied_embeddings_are_imported_apart(name, tmp_path):
    tied = name in ("llama", "qwen3", "mistral", "qwen2", "olmo2")  # the others are tied by default
    theirs = peer(name) if name in ("t5", "mt5") else peer(name, tie_word_embeddings=tied)
    if name in ("t5", "mt5"):  # their configs say nothing of it: transformers unties what a file holds apart
        theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight.flip(0).clone())
    _, ours = imported(theirs, tmp_path)
    assert (ours.output is None) == tied
    close(*both_logits(theirs, ours, name=name))


def test_one_file_goes_before_shards_that_lie_beside_it(tmp_path):
    """Of another model, as a folder has that was written twice."""
    shards, single = peer("llama"), peer("llama")
    single.get_input_embeddings().weight.data.mul_(-0.5)
    shards.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    index = tmp_path / "theirs" / "model.safetensors.index.json"
    kept = index.read_bytes()
    single.save_pretrained(tmp_path / "once")
    (tmp_path / "once" / "model.safetensors").rename(tmp_path / "theirs" / "model.safetensors")
    assert index.read_bytes() == kept
    import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    theirs = MODELS["llama"].from_pretrained(tmp_path / "theirs", attn_implementation="eager").eval()
    close(*both_logits(theirs, opened(tmp_path / "ours")))


@every
def test_there_and_back_every_tensor_is_bit_equal(name, tmp_path):
    theirs = peer(name)
    folder, ours = imported(theirs, tmp_path)
    export_folder(folder, tmp_path / "back")
    back = MODELS[name].from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    before, after = tensors_of(theirs), tensors_of(back)
    assert before.keys() == after.keys()
    images = ("vision_tower", "multi_modal_projector", "eoi_embedding")
    for key in before:
        assert any(part in key for part in images) or torch.equal(before[key], after[key]), key
    close(*both_logits(back, ours, name=name))


@pytest.mark.parametrize("kind", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@every
def test_half_precision_survives_the_round_trip(name, kind, tmp_path):
    """Norm weights w are kept as 1 + w, and in bfloat16 that would round most of w away."""
    theirs, exact = peer(name).to(kind), peer(name)
    folder, ours = imported(theirs, tmp_path)
    exact.load_state_dict(theirs.state_dict())  # the same numbers, computed with in float32
    close(*both_logits(exact, ours, name=name))
    export_folder(folder, tmp_path / "back")
    back = MODELS[name].from_pretrained(tmp_path / "back")
    if name in ("t5", "mt5"):
        back.to(kind)  # transformers keeps one of their matrices in float32 where the file is in float16
    assert {parameter.dtype for parameter in back.parameters()} == {kind}
    for key, value in tensors_of(theirs).items():
        if "vision" not in key and "multi_modal" not in key and "eoi" not in key:
            assert torch.equal(value, tensors_of(back)[key]), key


@pytest.mark.parametrize("name", [*DECODERS, *BOTH])
def test_greedy_text_is_transformers_token_for_token(name, tmp_path):
    """Longer than every window, so that caches have rolled on."""
    theirs = peer(name)
    _, ours = imported(theirs, tmp_path)
    prompts = ids(3, 9)
    theirs.generation_config.eos_token_id = None
    options = {"max_new_tokens": 20, "do_sample": False}
    if name in BOTH:
        # The token to start with, and no guess at which tokens are padding.
        out = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), decoder_start_token_id=BOS, **options)[
            :, 1:
        ]
    else:
        whole = torch.cat([torch.full((3, 1), BOS), prompts], dim=1)
        out = theirs.generate(whole, attention_mask=torch.ones_like(whole), **options)[:, 10:]
    mine = generate(ours, prompts.tolist(), max_new_tokens=20, stop=(), begin=BOS, end=1)
    assert [answer.tokens for answer in mine] == out.tolist()


@pytest.mark.parametrize("name", [*DECODERS, *BOTH])
def test_targets_have_the_log_likelihood_that_transformers_gives_them(name, tmp_path):
    """The sum over the targets of a row: transformers' own mean loss times their number."""
    theirs = peer(name)
    _, ours = imported(theirs, tmp_path)
    tokens, targets = ids(1, 12), ids(1, 9, seed=5)
    inputs = torch.cat([torch.full((1, 1), BOS), targets[:, :-1]], dim=1)
    with torch.no_grad():
        if name in BOTH:
            mask = torch.ones_like(tokens)
            loss = theirs(
                input_ids=tokens,
                attention_mask=mask,
                decoder_input_ids=inputs,
                decoder_attention_mask=torch.ones_like(inputs),
                labels=targets,
            ).loss
            logits = ours(tokens, inputs)
        else:
            whole = torch.cat([tokens, targets], dim=1)
            labels = torch.cat([torch.full_like(tokens, -100), targets], dim=1)
            loss = theirs(input_ids=whole, labels=labels).loss
            logits = ours(whole)[:, tokens.shape[1] - 1 : -1]
    mine = logits.log_softmax(-1).gather(-1, targets[..., None]).sum()
    assert mine.item() == pytest.approx(-loss.item() * 9, abs=1e-4)


def test_a_sharded_checkpoint_is_the_whole_one(tmp_path):
    theirs = peer("gemma2")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len([*(tmp_path / "shards").glob("*.safetensors")]) > 2
    import_checkpoint(tmp_path / "shards", tmp_path / "ours")
    close(*both_logits(theirs, opened(tmp_path / "ours"), name="gemma2"))


@pytest.mark.parametrize("window", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("name", ["t5gemma", "t5gemma2", "modernbert"])
def test_windows_of_encoders_reach_as_far_as_theirs(name, window, tmp_path):
    values = values_of(name)
    if name == "modernbert":
        values["local_attention"] = window
    elif name == "t5gemma":
        values["encoder"]["sliding_window"] = window
    else:
        values["encoder"]["text_config"]["sliding_window"] = window
    theirs = peer(name, **values)
    folder, ours = imported(theirs, tmp_path)
    close(*both_logits(theirs, ours, name=name))
    export_folder(folder, tmp_path / "back")
    back = MODELS[name].from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    close(*both_logits(back, ours, name=name))


def test_auto_classes_find_what_is_exported(tmp_path):
    folder, ours = imported(peer("llama"), tmp_path)
    export_folder(folder, tmp_path / "back")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    close(*both_logits(back.eval(), ours, name="llama"))


LOCAL, GLOBAL = "sliding_attention", "full_attention"


@pytest.mark.parametrize("kinds", [(LOCAL, GLOBAL), (GLOBAL, LOCAL), (LOCAL, LOCAL)])
@pytest.mark.parametrize("name", ["t5gemma", "t5gemma2"])
def test_stacks_of_local_or_of_global_layers_alone(name, kinds, tmp_path):
    """And an encoder with what its decoder does not have: other softcaps, scales and rotations."""
    values = values_of(name)
    encoder = values["encoder"] if name == "t5gemma" else values["encoder"]["text_config"]
    for side, kind in zip((encoder, values["decoder"]), kinds, strict=True):
        side["layer_types"] = [kind] * side["num_hidden_layers"]
    encoder["query_pre_attn_scalar"] = encoder["head_dim"]  # the usual scale, and the decoder's is not
    encoder["rope_parameters"] = peer_rope(name, 30.0)
    if name == "t5gemma":
        encoder["attn_logit_softcapping"] = None
    theirs = peer(name, **values)
    folder, ours = imported(theirs, tmp_path)
    close(*both_logits(theirs, ours, name=name))
    (folder / "config.json").unlink()  # so that it has to be written anew
    export_folder(folder, tmp_path / "back")
    back = MODELS[name].from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    close(*both_logits(back, ours, name=name))


def peer_rope(name, theta):
    one = {"rope_type": "default", "rope_theta": theta}
    return one if name == "t5gemma" else {LOCAL: one, GLOBAL: {**one, "rope_theta": 7 * theta}}


def test_all_dropouts_together_are_those_of_t5(tmp_path):
    """transformers draws in the same order from the same generator. Its stacks also drop what leaves their last norm,
    which ours do not; that is switched off here.
    """

    class OnEmbeddings(torch.nn.Dropout):
        def forward(self, x):
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x) if self.calls % 2 else x

    theirs = peer("t5", dropout_rate=0.3)
    _, ours = imported(theirs, tmp_path)
    for stack in (theirs.encoder, theirs.decoder):
        stack.dropout = OnEmbeddings(0.3)
    rates = dict.fromkeys(("dropout", "attention_dropout", "feed_forward_dropout"), 0.3)
    LitModel(ours, TrainingConfig.model_validate({"max_steps": 1, **rates}))
    source, target = ids(2, 9), ids(2, 7, seed=1)
    logits = []
    for model in (theirs, ours):
        model.double().train()
        torch.manual_seed(5)
        logits.append(
            theirs(input_ids=source, decoder_input_ids=target).logits if model is theirs else ours(source, target)
        )
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-4)  # transformers has float32 inside
    assert not torch.allclose(logits[1], ours.eval()(source, target))
