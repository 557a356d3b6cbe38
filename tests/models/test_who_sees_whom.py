"""Which token reaches which logit, in whole models: causal, bidirectional prefix, encoder and padding."""

import pytest
import torch
from torch.testing import assert_close

from tests.tiny_models import PAPER_NORMS, build, ids, moved, other

T, S, PREFIX = 9, 6, 4


@pytest.fixture(scope="module")
def dec():
    return build("decllm", *PAPER_NORMS["decllm"])


@pytest.fixture(scope="module")
def red():
    return build("redllm", *PAPER_NORMS["redllm"])


def after(place, length=T):
    return torch.arange(length) >= place


@pytest.mark.parametrize("place", range(T))
def test_decoder_only_a_token_changes_its_own_and_later_logits_and_no_earlier_one(dec, place):
    tokens = ids(2, T)
    assert_close(moved(dec(tokens), dec(other(tokens, place))), after(place))


@pytest.mark.parametrize("place", range(T))
def test_encoder_decoder_a_target_changes_its_own_and_later_logits_and_no_earlier_one(red, place):
    source, target = ids(2, S), ids(2, T)
    assert_close(moved(red(source, target), red(source, other(target, place))), after(place))


@pytest.mark.parametrize("place", range(S))
def test_every_source_token_reaches_every_logit(red, place):
    source, target = ids(2, S), ids(2, T)
    assert moved(red(source, target), red(other(source, place), target)).all()


@pytest.mark.parametrize("place", range(S))
def test_source_tokens_see_each_other(red, place):
    source = ids(2, S)
    assert moved(red.encode(source), red.encode(other(source, place))).all()


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("place", range(T))
def test_prefix_tokens_see_each_other_and_not_the_future(dec, place, as_tensor):
    """BiAttn: a token of the prefix reaches all logits, one behind it only its own and later ones."""
    tokens, prefix = ids(2, T), torch.tensor([PREFIX, PREFIX]) if as_tensor else PREFIX
    changed = moved(dec(tokens, prefix_length=prefix), dec(other(tokens, place), prefix_length=prefix))
    assert_close(changed, after(0 if place < PREFIX else place))


def test_without_prefix_length_the_mask_stays_closed(dec):
    tokens = ids(2, T)
    opened, closed = dec(tokens, prefix_length=PREFIX), dec(tokens)
    assert_close(moved(opened, closed), after(0))
    assert_close(moved(dec(other(tokens, 2)), closed), after(2))


@pytest.mark.parametrize("prefix", [*range(T + 1)])
def test_a_prefix_as_number_equals_it_as_tensor(dec, prefix):
    tokens = ids(3, T)
    assert_close(dec(tokens, prefix_length=prefix), dec(tokens, prefix_length=torch.full((3,), prefix)))


def test_rows_with_prefixes_of_their_own_equal_each_row_alone(dec):
    tokens, prefixes = ids(4, T), [1, 4, 7, T]
    together = dec(tokens, prefix_length=torch.tensor(prefixes))
    for row, prefix in enumerate(prefixes):
        assert_close(together[row : row + 1], dec(tokens[row : row + 1], prefix_length=prefix))


@pytest.mark.parametrize("prefix", [0, 1, torch.tensor([0, 1])])
def test_a_prefix_of_nothing_or_of_one_token_is_the_causal_model(dec, prefix):
    """One token sees itself anyway; the design calls such a mask a no-op."""
    tokens = ids(2, T)
    assert_close(dec(tokens, prefix_length=prefix), dec(tokens))


@pytest.mark.parametrize("prefix", [T + 1, torch.tensor([2, T + 1])])
def test_a_prefix_longer_than_the_input_is_refused(dec, prefix):
    with pytest.raises(ValueError, match=f"prefix_length {T + 1} is longer than the {T} tokens"):
        dec(ids(2, T), prefix_length=prefix)


@pytest.mark.parametrize("rope", ["continuous", "restart", "none"])
def test_a_padded_source_is_the_source_alone(rope):
    """Its padding is not read, and its target goes on where the row's own source ended, not where the batch's did."""
    red = build("redllm", *PAPER_NORMS["redllm"], f"decoder.cross_attention.rope={rope}")
    lengths, target = [2, S, 4], ids(3, T)
    source = ids(3, S)
    together = red(source, target, source_lengths=torch.tensor(lengths))
    for row, length in enumerate(lengths):
        alone = red(source[row : row + 1, :length], target[row : row + 1])
        assert_close(together[row : row + 1], alone)


def test_what_stands_in_the_padding_does_not_matter(red):
    source, target, lengths = ids(2, S), ids(2, T), torch.tensor([3, 3])
    padded = red(source, target, source_lengths=lengths)
    assert_close(padded, red(other(source, 3, 4, 5), target, source_lengths=lengths), rtol=0, atol=0)
    assert moved(padded, red(other(source, 2), target, source_lengths=lengths)).all()


def test_a_source_without_padding_needs_no_lengths(red):
    source, target = ids(2, S), ids(2, T)
    assert_close(red(source, target, source_lengths=torch.tensor([S, S])), red(source, target))


def test_an_empty_source_is_refused_with_the_way_out(red):
    with pytest.raises(ValueError, match="one end-of-document token"):
        red(ids(2, 0), ids(2, T))
