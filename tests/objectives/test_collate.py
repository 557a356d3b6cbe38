"""From (source, target) to what a family reads: the docstring's picture, to the token."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lit_llm.objectives.collate import collate
from lit_llm.objectives.config import BOS, EOD, MasksConfig

S1, S2, S3, T1, T2, T3 = 11, 12, 13, 21, 22, 23
OPEN, SEPARATE = MasksConfig(prefix="bidirectional"), MasksConfig(intra_document=True)


def rows(*lists):
    return [np.array(row, dtype=np.uint16) for row in lists]  # as token files hold them


def test_the_picture_of_a_decoder():
    """<s> s1 s2 t1 t2 predicts s1 s2 t1 t2 t3, and only t1 t2 t3 count."""
    batch = collate(rows([S1, S2]), rows([T1, T2, T3]), "decoder")
    assert batch.inputs.keys() == {"tokens_BT", "source_length"}
    assert batch.inputs["tokens_BT"].tolist() == [[BOS, S1, S2, T1, T2]]
    assert batch.targets.tolist() == [[S1, S2, T1, T2, T3]]
    assert batch.weights.tolist() == [[0, 0, 1, 1, 1]]


def test_the_picture_of_an_encoder_decoder():
    batch = collate(rows([S1, S2]), rows([T1, T2, T3]), "encoder_decoder")
    assert batch.inputs.keys() == {"source_BS", "target_BT"}
    assert batch.inputs["source_BS"].tolist() == [[S1, S2]]
    assert batch.inputs["target_BT"].tolist() == [[BOS, T1, T2]]
    assert batch.targets.tolist() == [[T1, T2, T3]]
    assert batch.weights.tolist() == [[1, 1, 1]]


def test_rows_of_different_lengths_are_padded_at_their_end_for_a_decoder():
    batch = collate(rows([S1], [S1, S2, S3]), rows([T1, T2], [T1, T2]), "decoder")
    assert batch.inputs["tokens_BT"].tolist() == [[BOS, S1, T1, EOD, EOD], [BOS, S1, S2, S3, T1]]
    assert batch.targets.tolist() == [[S1, T1, T2, EOD, EOD], [S1, S2, S3, T1, T2]]
    assert batch.weights.tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 1, 1]]


def test_rows_of_different_lengths_are_padded_at_their_end_for_an_encoder_decoder():
    batch = collate(rows([S1], [S1, S2, S3]), rows([T1, T2, T3], [T1]), "encoder_decoder")
    assert batch.inputs["source_BS"].tolist() == [[S1, EOD, EOD], [S1, S2, S3]]
    assert batch.inputs["source_lengths"].tolist() == [1, 3]
    assert batch.inputs["target_BT"].tolist() == [[BOS, T1, T2], [BOS, EOD, EOD]]
    assert batch.targets.tolist() == [[T1, T2, T3], [T1, EOD, EOD]]
    assert batch.weights.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_an_empty_source_is_one_end_of_document_token():
    batch = collate(rows([], []), rows([T1, T2], [T1]), "encoder_decoder")
    assert batch.inputs["source_BS"].tolist() == [[EOD], [EOD]]
    assert "source_lengths" not in batch.inputs
    mixed = collate(rows([], [S1, S2]), rows([T1], [T1]), "encoder_decoder")
    assert mixed.inputs["source_BS"].tolist() == [[EOD, EOD], [S1, S2]]
    assert mixed.inputs["source_lengths"].tolist() == [1, 2], "the end-of-document token is read, the padding is not"


def test_an_empty_source_leaves_a_decoder_every_token_as_target():
    """Causal language modelling: the loss is on the whole window, the first token included."""
    batch = collate(rows([]), rows([T1, T2, T3]), "decoder")
    assert batch.inputs["tokens_BT"].tolist() == [[BOS, T1, T2]]
    assert batch.targets.tolist() == [[T1, T2, T3]]
    assert batch.weights.tolist() == [[1, 1, 1]]


def test_a_padding_id_inside_a_target_counts_like_any_other():
    """EOD is also what pads; where it ends, and not what it is, tells the padding."""
    for family in ("decoder", "encoder_decoder"):
        batch = collate(rows([S1], [S1]), rows([T1, EOD, T2], [T1]), family)
        counted = batch.targets[batch.weights.bool()]
        assert counted.tolist() == [T1, EOD, T2, T1]


def test_an_open_prefix_covers_the_source_and_the_start_token():
    """<s> s1 s2 see each other; from the place of s2 t1 is predicted, and t1 itself stays outside: no leak."""
    batch = collate(rows([S1, S2]), rows([T1, T2, T3]), "decoder", OPEN)
    assert batch.inputs["prefix_length"] == 3
    inside = batch.inputs["tokens_BT"][0, :3].tolist()
    assert inside == [BOS, S1, S2]
    assert not set(batch.targets[batch.weights.bool()].tolist()) & set(inside)


@pytest.mark.parametrize("masks", [MasksConfig(), OPEN, SEPARATE])
def test_the_source_of_a_decoder_begins_with_the_start_token_and_holds_no_target(masks):
    """Whatever the masks: <s> s1 s2; an empty source is <s> alone, the one token that tells nothing."""
    sources, targets = rows([S1, S2], [], [S1, S2, S3]), rows([T1, T2], [T3], [T1])
    batch = collate(sources, targets, "decoder", masks)
    lengths = batch.inputs["source_length"].tolist()
    read = [row[:length].tolist() for row, length in zip(batch.inputs["tokens_BT"], lengths, strict=True)]
    assert read == [[BOS, S1, S2], [BOS], [BOS, S1, S2, S3]]
    assert collate(sources[:1], targets[:1], "decoder", masks).inputs["source_length"] == 3


def test_open_prefixes_of_different_lengths_are_a_tensor():
    batch = collate(rows([S1], [S1, S2, S3]), rows([T1, T2], [T1]), "decoder", OPEN)
    assert_close(batch.inputs["prefix_length"], torch.tensor([2, 4]))


@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_every_target_token_counts_once_and_nothing_else(family):
    """The paired comparison: both families are asked for the same tokens, in the same order."""
    sources, targets = rows([S1], [], [S1, S2, S3]), rows([T1, T2], [T3], [T2, T3, T1])
    batch = collate(sources, targets, family)
    assert batch.targets[batch.weights.bool()].tolist() == [T1, T2, T3, T2, T3, T1]
    assert batch.weights.sum() == 6


@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_the_target_stands_one_place_behind_the_input_that_predicts_it(family):
    """Teacher forcing: the input at t + 1 is the target at t, where both are real."""
    batch = collate(rows([S1, S2], [S1]), rows([T1, T2, T3], [T1, T2]), family)
    inputs = batch.inputs["tokens_BT" if family == "decoder" else "target_BT"]
    assert (inputs[:, 0] == BOS).all()
    after = batch.weights[:, 1:].bool()
    assert_close(inputs[:, 1:][after], batch.targets[:, :-1][after])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_pieces_together_are_the_batch(family, size):
    sources = [np.arange(2, 2 + n) for n in (1, 3, 2, 4, 2)]
    targets = [np.arange(40, 40 + n) for n in (2, 1, 3, 2, 2)]
    batch = collate(sources, targets, family, OPEN)
    micro_batches = list(batch.micro_batches(size))
    assert [len(piece) for piece in micro_batches] == [min(size, 5 - start) for start in range(0, 5, size)]
    wanted = {
        "decoder": {"tokens_BT", "prefix_length", "source_length"},
        "encoder_decoder": {"source_BS", "target_BT", "source_lengths"},
    }
    assert batch.inputs.keys() == wanted[family]
    for name, value in batch.inputs.items():
        assert_close(torch.cat([piece.inputs[name] for piece in micro_batches]), value)
    assert_close(torch.cat([piece.targets for piece in micro_batches]), batch.targets)
    assert_close(torch.cat([piece.weights for piece in micro_batches]), batch.weights)
    for each in (batch, *micro_batches):
        assert_close(each.places, each.weights.flatten().nonzero().squeeze(-1))
        assert each.counts == each.weights.sum(1).tolist()


def test_a_prefix_length_of_all_rows_goes_with_every_piece():
    batch = collate(rows([S1], [S2], [S3]), rows([T1], [T2], [T3]), "decoder", OPEN)
    assert [piece.inputs["prefix_length"] for piece in batch.micro_batches(2)] == [2, 2]


def test_a_batch_goes_to_a_device_with_all_its_tensors():
    moved = collate(rows([S1], [S1, S2]), rows([T1], [T1]), "decoder", OPEN).to(torch.device("meta"))
    tensors = [*moved.inputs.values(), moved.targets, moved.weights, moved.places]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


# --- documents -----------------------------------------------------------------------------------------------------

A, B, C, D, E = 31, 32, 33, 34, 35


def test_the_picture_of_documents_in_a_decoder():
    """a b ■ | c d e: ■ belongs to the document that it closes, and predicts c from there. The cut changes nothing."""
    for cut in range(6):
        text = [A, B, EOD, C, D, E]
        batch = collate(rows(text[:cut]), rows(text[cut:]), "decoder", SEPARATE)
        assert batch.inputs["tokens_BT"].tolist() == [[BOS, A, B, EOD, C, D]]
        assert batch.inputs["documents_BT"].tolist() == [[0, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("source", "target", "of_source", "of_target"),
    [
        ([A, B], [EOD, C, D, E], [0, 0], [0, 0, 1, 1]),
        ([A, B, EOD], [C, D, E], [0, 0, 0], [0, 1, 1]),  # <s> goes with the ■ in whose place it stands
        ([A, EOD, B, C], [D, E], [0, 0, 1, 1], [1, 1]),
        ([A, EOD, EOD, B], [C, EOD, D], [0, 0, 1, 2], [2, 2, 2]),  # an empty document is one too
        ([], [A, EOD, B, C], [0], [0, 0, 0, 1]),  # what stands for an empty source belongs to the first document
        ([], [EOD, B, C], [0], [0, 0, 1]),
    ],
)
def test_the_picture_of_documents_in_an_encoder_decoder(source, target, of_source, of_target):
    batch = collate(rows(source), rows(target), "encoder_decoder", SEPARATE)
    assert batch.inputs["documents_BS"].tolist() == [of_source]
    assert batch.inputs["documents_BT"].tolist() == [of_target]
    assert batch.inputs["documents_BS"].shape == batch.inputs["source_BS"].shape
    assert batch.inputs["documents_BT"].shape == batch.inputs["target_BT"].shape


@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_joined_documents_have_no_numbers_and_neither_has_a_batch_of_single_ones(family):
    sources, targets = rows([A, EOD], [B]), rows([C, D, E], [D, EOD])
    assert not {"documents_BS", "documents_BT"} & collate(sources, targets, family).inputs.keys()
    one = collate(sources[1:], targets[1:], family, SEPARATE)
    assert not {"documents_BS", "documents_BT"} & one.inputs.keys(), "an EOD at the end has nothing behind it"
    assert "documents_BT" in collate(sources, targets, family, SEPARATE).inputs


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_documents_go_with_their_rows_into_pieces_and_to_a_device(family, size):
    sources, targets = rows([A], [A, EOD, B], []), rows([EOD, C, D], [C], [A, EOD, B, C])
    batch = collate(sources, targets, family, MasksConfig(prefix="bidirectional", intra_document=True))
    names = {"decoder": ["documents_BT"], "encoder_decoder": ["documents_BS", "documents_BT"]}[family]
    for name in names:
        assert_close(torch.cat([piece.inputs[name] for piece in batch.micro_batches(size)]), batch.inputs[name])
        assert batch.to(torch.device("meta")).inputs[name].device.type == "meta"
    assert [len(piece) for piece in batch.micro_batches(size)] == [
        len(piece.inputs[names[0]]) for piece in batch.micro_batches(size)
    ]
