"""Double decoder (arXiv 2605.18807): an encoder-decoder at every block, a loss on every token, and no leak."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from lit_llm import load_experiment
from lit_llm.components.forward_context import ForwardContext
from lit_llm.components.masks import AttentionMask
from lit_llm.config.problems import InputError
from lit_llm.experiment.cost import cost_of
from lit_llm.generation import generate, prefill
from lit_llm.huggingface.architectures import nearest
from lit_llm.huggingface.to_config import SpecialTokens
from lit_llm.models.adapt import adaptation_of
from lit_llm.models.build import build_model
from lit_llm.models.cost import decode_flops, prefill_flops
from lit_llm.models.families import EncoderDecoder
from lit_llm.models.resolved import not_analysed
from lit_llm.objectives.collate import collate
from lit_llm.objectives.config import EOD, MasksConfig
from tests.tiny_models import PAPER_NORMS, build, config, ids, moved, other, resolved

T, BLOCK = 12, 5
MERGED = "decoder.cross_attention_mode=merged"
CASES = [
    ["attention.output_norm=head", "attention.kv_heads=2"],
    [MERGED],
    [MERGED, "attention.rope=restart", "attention.qkv_norm=[q, k]"],
    ["decoder.cross_attention.rope=restart", "decoder.layer_ranges.0.cross_attention_mode=none"],
    ["attention.rope=none", "attention.softcap=2.0"],
]


# --- the formula -----------------------------------------------------------------------------------------------------


class CausalEncoder(EncoderDecoder):
    """An encoder-decoder whose encoder sees no later token."""

    def encode(self, source_BS, *_):
        position = torch.arange(source_BS.shape[1])
        x_BSD = self.embed_source(source_BS, position)
        return self.encoder(x_BSD, ForwardContext(x_BSD, AttentionMask(causal=True), {"self": position}))


@pytest.mark.parametrize("overrides", CASES)
def test_every_block_is_decoded_as_the_target_of_an_encoder_decoder_whose_source_is_all_before_it(overrides):
    model, tokens = build("double", *overrides), ids(2, T)
    peer = CausalEncoder(resolved("redllm", *overrides)).double().eval()
    peer.load_state_dict(model.state_dict())
    found = model(tokens)
    for start in range(BLOCK, T, BLOCK):
        # Its target continues after the source, as the block does.
        expected = peer(tokens[:, :start], tokens[:, start : start + BLOCK])
        assert_close(found[:, start : start + BLOCK], expected, rtol=0, atol=1e-6)  # angles are float32


@pytest.mark.parametrize("overrides", [[], [MERGED, "attention.output_norm=head"]])
def test_a_text_of_one_block_is_read_by_the_decoder_alone(overrides):
    model, tokens = build("double", *overrides), ids(2, BLOCK)
    alone = [each for each in overrides if each != MERGED]
    peer = build("decllm", *alone)
    peer.load_state_dict({name: model.state_dict()[name] for name in peer.state_dict()})
    assert_close(model(tokens), peer(tokens), rtol=0, atol=1e-12)


def test_parameters_and_their_initial_values_are_those_of_redllm():
    ours, theirs = (dict(build(family, double=False).named_parameters()) for family in ("double", "redllm"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- a loss on every token, and no leak ------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [PAPER_NORMS["double"], [MERGED]])
def test_a_token_changes_its_own_and_all_later_logits_and_no_earlier_one(overrides):
    model, tokens = build("double", *overrides), ids(2, T)
    whole = model(tokens)
    for place in range(T):
        assert_close(moved(whole, model(other(tokens, place))), torch.arange(T) >= place)


@pytest.mark.parametrize("overrides", [PAPER_NORMS["double"], [MERGED]])
def test_a_prediction_has_gradients_through_its_own_block_and_through_the_encoders_earlier_ones(overrides):
    """And through nothing else: token t + 1, which it predicts, and later ones are read by neither stack for it."""
    model, read = build("double", *overrides), []
    model.embedding.register_forward_hook(lambda _, __, out: read.append(out))
    logits_TV = model(ids(1, T))[0]
    assert read[0].shape[1] == 2 * BLOCK
    for t in range(T):
        gradients = torch.autograd.grad(logits_TV[t].logsumexp(0), read, retain_graph=True)
        encoder, decoder = (gradient[0].abs().sum(-1) > 0 for gradient in gradients)
        start, at = t // BLOCK * BLOCK, torch.arange(T)
        assert_close(encoder, at[: 2 * BLOCK] < start)
        assert_close(decoder, (at >= start) & (at <= t))


def test_its_batches_are_decllms_with_every_token_a_target():
    window = ids(1, T)[0].numpy()
    ours, theirs = (collate([window[:0]], [window], family) for family in ("double_decoder", "decoder"))
    assert ours.weights.all()
    assert torch.equal(ours.targets, theirs.targets)
    assert torch.equal(ours.inputs["tokens_BT"], theirs.inputs["tokens_BT"])
    costs = [cost_of(load_experiment(preset)) for preset in ("doubledecoder-tiny", "decllm-tiny", "redllm-tiny")]
    assert [cost.loss_tokens / cost.tokens for cost in costs] == [1, 1, 0.5]
    assert costs[0].parameters == costs[2].parameters


@pytest.mark.parametrize("overrides", [PAPER_NORMS["double"], [MERGED]])
def test_documents_that_are_kept_separate_read_nothing_of_each_other(overrides):
    """Blocks are the row's: a document may begin within one."""
    model, window = build("double", *overrides), ids(1, T)[0].numpy()
    window[[3, 7]] = EOD  # documents of <s> and 4 tokens, of 4 more, and of the rest
    batch = collate([window[:0]], [window], "double_decoder", MasksConfig(intra_document=True))
    document, whole = batch.inputs["documents_BT"][0], model(**batch.inputs)
    assert document.tolist() == [0] * 5 + [1] * 4 + [2] * 3
    for place in range(T):
        inputs = {**batch.inputs, "tokens_BT": other(batch.inputs["tokens_BT"], place)}
        seen = (document == document[place]) & (torch.arange(T) >= place)
        assert_close(moved(whole, model(**inputs)), seen)


# --- cost ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [["decoder.layers=3", "attention.kv_heads=2"], [MERGED]])
def test_prefill_and_decode_cost_what_they_are_seen_to_compute(overrides):
    """<s> and 11 more tokens, then 7 steps: the encoder reads two blocks, then the third, then none."""
    model, steps = build_model(config("double", *overrides)).eval(), 7
    of, layers, called = model.config, len(model.encoder.layers), {}

    def measured(run):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            run()
        return counter.get_total_flops()

    def generating():
        for token in range(steps):
            called["decoding"].step(torch.tensor([2 + token]))

    hidden = lambda tokens: 4 * 32 * (tokens**2 - tokens * (tokens + 1) // 2)  # noqa: E731 - pairs behind a triangle
    reading = measured(lambda: called.update(decoding=prefill(model, [ids(1, T - 1)[0].tolist()])))
    rest = T - 2 * BLOCK
    assert T * prefill_flops(of, T) == reading - layers * hidden(2 * BLOCK) - len(model.decoder.layers) * hidden(rest)
    assert steps * decode_flops(of, T, steps) == pytest.approx(measured(generating) - layers * hidden(BLOCK))


# --- what is refused, and what is taken ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("attention.window=3", "window: a double decoder's stacks go on by whole blocks.*write window: null"),
        ("encoder.attention.relative_bias=alibi", "encoder: relative_bias: .*write relative_bias: none"),
        ("feed_forward.convolution=[input]", r"convolution: .*write convolution: \[\]"),
        ("decoder.gla={}", "no component in their place"),
        ("encoder.experts={count: 2}", "no component in their place"),
        ("output.future_tokens=1", "this model is double_decoder"),
        ("block=0", "greater than 0"),
    ],
)
def test_what_cannot_go_on_by_blocks_is_refused(override, message):
    with pytest.raises(InputError, match=message):
        config("double", override)


def test_an_open_prefix_is_refused_wherever_one_can_be_asked_for():
    with pytest.raises(InputError, match=r"masks.prefix: bidirectional: a double decoder is causal in both stacks"):
        load_experiment("doubledecoder-tiny", ["pretrain.objective=prefix_lm", "pretrain.masks.prefix=bidirectional"])
    with pytest.raises(ValueError, match="a double decoder is causal in both stacks"):
        generate(build("double"), [[5, 6]], max_new_tokens=1, prefix="bidirectional")
    with pytest.raises(ValueError, match="a double decoder is causal in both stacks"):
        build("double")(ids(1, T), prefix_length=3)


def test_analysis_and_export_say_why_they_cannot():
    assert "source grows with every block" in not_analysed(resolved("double"))
    tokens = SpecialTokens(begin=1, end=0)
    assert "double_decoder" in nearest(resolved("double"), tokens)[2]["family"]


def test_a_decoder_becomes_both_stacks():
    taken = adaptation_of(resolved("double"), dict.fromkeys(("encoder", "decoder"), resolved("decllm"))).taken
    for name in ("encoder.layers.1.self_attention.k.weight", "decoder.layers.1.cross_attention.k.weight"):
        assert taken[name][1] == "decoder.layers.1.self_attention.k.weight"
    assert taken.keys() == dict(build("double").named_parameters()).keys()
