"""Documents that are kept separate, in whole models: nothing crosses a border, and within one nothing changes."""

import itertools

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lit_llm.objectives.collate import collate
from lit_llm.objectives.config import EOD, MasksConfig
from lit_llm.training.stability import largest_attention_logit
from tests.tiny_models import PAPER_NORMS, VOCABULARY, build, ids, other

ENDS = (3, 4, 9)
"""Where the end-of-document tokens of a window of T stand: documents of 4, 1, 5 and 4 tokens, the last one open."""
T = 14
CUTS = range(1, T)
OUTPUT_NORMS = ["none", "head", "concat", "after_out"]


@pytest.fixture(scope="module")
def dec():
    return build("decllm", *PAPER_NORMS["decllm"])


@pytest.fixture(scope="module")
def red():
    return build("redllm", *PAPER_NORMS["redllm"])


def window(ends=ENDS, length=T):
    tokens = np.random.default_rng(0).integers(2, VOCABULARY, size=length)
    tokens[list(ends)] = EOD
    return tokens


def batch(windows, cuts, family, intra_document=True, prefix="causal"):
    sources = [tokens[:cut] for tokens, cut in zip(windows, cuts, strict=True)]
    targets = [tokens[cut:] for tokens, cut in zip(windows, cuts, strict=True)]
    return collate(sources, targets, family, MasksConfig(intra_document=intra_document, prefix=prefix))


def logits(model, batch):
    """One row of logits for each counted target, in the order of the targets."""
    with torch.no_grad():
        return model(**batch.inputs)[batch.weights.bool()]


def document_of_token(place):
    """An end-of-document token belongs to the document that it closes."""
    return sum(end < place for end in ENDS)


def targets_reached(model, cut, family, prefix, place):
    """The targets (as places of the window) whose logits move when the token at `place` is another one."""
    tokens = window()
    changed = tokens.copy()
    changed[place] = 2 + (changed[place] - 1) % (VOCABULARY - 2)
    before, after = (batch([text], [cut], family, prefix=prefix) for text in (tokens, changed))
    moved = (logits(model, before) - logits(model, after)).abs().amax(-1) > 1e-9
    return {cut + int(index) for index in moved.nonzero()}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", ["red", "causal", "bidirectional"])
def test_a_token_reaches_the_later_targets_that_its_own_document_predicts_and_no_others(request, kind, cut):
    """Target t is predicted by the token before it, so from that token's document. Tested for every token but EOD, as
    its change would move a border. In both families the same targets: the comparison is of equal contexts."""
    model = request.getfixturevalue("red" if kind == "red" else "dec")
    family, prefix = ("encoder_decoder", "causal") if kind == "red" else ("decoder", kind)
    for place in set(range(T)) - set(ENDS):
        wanted = {t for t in range(cut, T) if place < t and document_of_token(place) == document_of_token(t - 1)}
        assert targets_reached(model, cut, family, prefix, place) == wanted, f"token {place}"


def test_joined_every_earlier_token_reaches_every_target(dec, red):
    """What the test above would see without separation."""
    for model, family in ((dec, "decoder"), (red, "encoder_decoder")):
        tokens = window()
        changed = other(torch.tensor(tokens)[None], 0)[0].numpy()
        before, after = (batch([text], [7], family, intra_document=False) for text in (tokens, changed))
        assert ((logits(model, before) - logits(model, after)).abs().amax(-1) > 1e-9).all()


@pytest.mark.parametrize("ends", [(), (T - 1,)])
@pytest.mark.parametrize(
    ("kind", "cut"), [("bidirectional", 6), *((kind, cut) for kind in ("red", "causal") for cut in (0, 1, 6, T - 1))]
)
def test_windows_of_one_document_are_joined_to_the_bit(request, kind, ends, cut):
    """There is nothing to separate, and no mask is made. An EOD at the end closes the one document."""
    model = request.getfixturevalue("red" if kind == "red" else "dec")
    family, prefix = ("encoder_decoder", "causal") if kind == "red" else ("decoder", kind)
    windows = [window(ends), window(ends)[::-1] if not ends else window(ends)]
    joined, separate = (batch(windows, [cut, cut], family, mode, prefix) for mode in (False, True))
    assert joined.inputs.keys() == separate.inputs.keys()
    assert torch.equal(logits(model, joined), logits(model, separate))


@pytest.mark.parametrize("kind", ["red", "causal", "bidirectional"])
def test_a_row_of_one_document_beside_a_row_of_several_is_as_if_joined(request, kind):
    """Here the mask is made, for the other row's sake."""
    model = request.getfixturevalue("red" if kind == "red" else "dec")
    family, prefix = ("encoder_decoder", "causal") if kind == "red" else ("decoder", kind)
    one = window(())
    both = batch([one, window()], [5, 8], family, prefix=prefix)
    assert "documents_BT" in both.inputs
    assert_close(logits(model, both)[: T - 5], logits(model, batch([one], [5], family, False, prefix)))


def spans():
    borders = [0, *(end + 1 for end in ENDS), T]
    return list(itertools.pairwise(borders))


def test_decoder_only_each_document_is_as_if_it_were_alone(dec):
    """RoPE knows distances only, so it does not matter where in the window a document stands."""
    tokens = torch.from_numpy(window())[None]
    documents = torch.tensor([[document_of_token(place) for place in range(T)]])
    together = dec(tokens, documents_BT=documents)
    for start, end in spans():
        assert_close(together[:, start:end], dec(tokens[:, start:end]), rtol=1e-5, atol=1e-6)  # angles are float32


@pytest.mark.parametrize("prefix", [1, 2, 6, 7, 12, T])
def test_decoder_only_an_open_prefix_opens_the_part_of_each_document_that_it_covers(dec, prefix):
    tokens = torch.from_numpy(window())[None]
    documents = torch.tensor([[document_of_token(place) for place in range(T)]])
    for given in (prefix, torch.tensor([prefix])):
        together = dec(tokens, prefix_length=given, documents_BT=documents)
        for start, end in spans():
            alone = dec(tokens[:, start:end], prefix_length=min(max(prefix - start, 0), end - start))
            assert_close(together[:, start:end], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_tokens_of_an_open_prefix_see_the_later_ones_of_their_document_and_of_no_other(dec, as_tensor):
    """A prefix of 7 covers documents 0 and 1 and the first two tokens of document 2."""
    prefix = torch.tensor([7]) if as_tensor else 7
    documents = torch.tensor([[document_of_token(place) for place in range(T)]])
    tokens = torch.from_numpy(window())[None]
    for place in range(T):
        changed = dec(other(tokens, place), prefix, documents) - dec(tokens, prefix, documents)
        start, end = next((start, end) for start, end in spans() if start <= place < end)
        wanted = set(range(start if place < 7 else place, end))
        assert set(changed.abs().amax(dim=(0, 2)).gt(1e-9).nonzero().flatten().tolist()) == wanted


def across(red, cut):
    """The logits, in the window and alone, of the document that the cut runs through."""
    tokens = torch.from_numpy(window())[None]
    numbers = torch.tensor([[document_of_token(place) for place in range(T)]])
    source, target = tokens[:, :cut], tokens[:, cut:]
    together = red(source, target, documents_BS=numbers[:, :cut], documents_BT=numbers[:, cut:])
    start, end = next((start, end) for start, end in spans() if start < cut < end)
    return together[:, : end - cut], red(tokens[:, start:cut], tokens[:, cut:end])


@pytest.mark.parametrize("cut", [2, 7, 12])
@pytest.mark.parametrize("rope", ["continuous", "none"])
def test_encoder_decoder_a_document_on_both_sides_of_the_cut_is_as_if_it_were_alone(rope, cut):
    """Continuous positions go on over the cut, so distances within a document are those that it has alone."""
    red = build("redllm", *PAPER_NORMS["redllm"], f"decoder.cross_attention.rope={rope}")
    together, alone = across(red, cut)
    assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_encoder_decoder_restarted_positions_are_those_of_the_window():
    """Target token 0 is at 0 and the document's first source token where it stands in the window, not at 0: only a
    document that begins the window is as if it were alone."""
    red = build("redllm", *PAPER_NORMS["redllm"], "decoder.cross_attention.rope=restart")
    first, later = across(red, 2), across(red, 7)
    assert_close(*first, rtol=1e-5, atol=1e-6)
    assert (later[0] - later[1]).abs().max() > 1e-4


@pytest.mark.parametrize("output_norm", OUTPUT_NORMS)
def test_without_a_source_a_documents_decoder_is_a_decoder_only_model(output_norm):
    """Cross-attention adds exactly nothing, whatever norm follows it: what is left is DecLLM with the same weights."""
    switches = [*PAPER_NORMS["decllm"], f"attention.output_norm={output_norm}"]
    red, dec = build("redllm", *switches, "tie_embeddings=all"), build("decllm", *switches, "tie_embeddings=all")
    dec.load_state_dict({name: value for name, value in red.state_dict().items() if name in dec.state_dict()})
    source, target = ids(2, 5), ids(2, 6)
    documents = {"documents_BS": torch.tensor([[0] * 5, [0] * 3 + [1] * 2]), "documents_BT": torch.full((2, 6), 2)}
    assert_close(red(source, target, **documents), dec(target))


@pytest.mark.parametrize("output_norm", OUTPUT_NORMS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_are_finite_where_targets_have_no_source_and_the_unread_source_gets_none(output_norm, precision):
    switches = ["attention.qkv_norm=[q, k, v]", f"attention.output_norm={output_norm}", "tie_embeddings=none"]
    red = build("redllm", *switches, "attention.output_norm_scale=true", double=False)
    source, target = torch.arange(2, 8)[None], torch.arange(20, 26)[None]
    documents = {"documents_BS": torch.tensor([[0, 0, 1, 1, 1, 1]]), "documents_BT": torch.tensor([[1, 1, 2, 2, 3, 3]])}
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        out = red(source, target, **documents)
    assert out.isfinite().all()
    out[:, 2:].float().square().sum().backward()  # of the targets without a source
    for name, parameter in red.named_parameters():
        gradient = torch.zeros(()) if parameter.grad is None else parameter.grad
        assert gradient.isfinite().all(), name
        if "encoder" in name or "cross_attention." in name:
            assert (gradient == 0).all(), name
    assert red.decoder.layers[0].self_attention.v.weight.grad.abs().sum() > 0
    red.zero_grad()
    red(source, target, **documents)[:, :2].square().sum().backward()  # of those with one
    read = red.encoder_embedding.weight.grad.abs().sum(-1) > 0
    assert read[:8].tolist() == [False] * 4 + [True] * 4, "the source tokens of document 1, and of no other"


def test_documents_of_one_side_only_are_refused(red):
    with pytest.raises(ValueError, match="give both"):
        red(ids(1, 3), ids(1, 3), documents_BS=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="give both"):
        red(ids(1, 3), ids(1, 3), documents_BT=torch.zeros(1, 3))


@pytest.mark.parametrize("kind", ["red", "causal", "bidirectional"])
def test_random_cuts_and_micro_batches_give_each_row_what_it_gets_alone(request, kind):
    """Padded rows of many cuts, in pieces of two: each row's logits are those of its own batch of one."""
    model = request.getfixturevalue("red" if kind == "red" else "dec")
    family, prefix = ("encoder_decoder", "causal") if kind == "red" else ("decoder", kind)
    windows = [window((2 + row, 5 + row)) for row in range(5)]
    cuts = [int(cut) for cut in np.random.default_rng(1).integers(1, T, size=5)]
    assert len(set(cuts)) > 2
    whole = batch(windows, cuts, family, prefix=prefix)
    alone = torch.cat(
        [logits(model, batch([w], [cut], family, prefix=prefix)) for w, cut in zip(windows, cuts, strict=True)]
    )
    assert_close(logits(model, whole), alone)
    assert_close(torch.cat([logits(model, piece) for piece in whole.micro_batches(2)]), alone)


def test_the_largest_attention_logit_is_looked_for_within_documents(dec):
    """Two documents in one window have the largest logit of the two, each alone."""
    tokens = torch.from_numpy(window((6,)))[None]
    documents = torch.tensor([[0] * 7 + [1] * (T - 7)])

    def largest(**inputs):
        one = collate([np.array([])], [np.array([5])], "decoder")
        one.inputs = inputs
        return largest_attention_logit(dec, one)

    alone = [largest(tokens_BT=tokens[:, :7]), largest(tokens_BT=tokens[:, 7:])]
    assert_close(largest(tokens_BT=tokens, documents_BT=documents), max(alone), rtol=1e-5, atol=0)
    assert largest(tokens_BT=tokens) > max(alone) * 1.001, "across them is a larger one, or this would show nothing"
