"""Masked language modelling: what is hidden, what stands there, and what an encoder-only model is given."""

import math

import numpy as np
import pytest
import torch

from lit_llm.data.batches import WindowCollator
from lit_llm.objectives.base import EOD
from lit_llm.objectives.config import MaskedLM, MasksConfig

TEXT, LENGTH = 1000, 128
MASK = TEXT


def examples(objective, count, length=LENGTH):
    """Windows of one token, 7, in every place: any other was put there."""
    return [objective.example(np.full(length, 7), np.random.default_rng(n), TEXT) for n in range(count)]


@pytest.mark.parametrize("rate", [0.15, 0.3, 0.5, 0.001])
@pytest.mark.parametrize("length", [16, 128, 1000])
def test_so_many_tokens_of_every_window_count(rate, length):
    objective = MaskedLM(rate=rate)
    expected = max(1, round(rate * length))
    [(share, lengths)] = objective.lengths(length)
    assert (share, lengths) == (1.0, (length, expected, 0))
    assert {int(made.counted.sum()) for made in examples(objective, 20, length)} == {expected}


def test_nothing_is_changed_where_nothing_is_asked():
    text = np.random.default_rng(0).integers(2, TEXT, 5000)
    for replacement in ("bert", "mask"):
        made = MaskedLM(replacement=replacement).example(text, np.random.default_rng(1), TEXT)
        assert made.target.tolist() == text.tolist()
        assert (made.source[~made.counted] == text[~made.counted]).all()


def test_bert_masks_eighty_of_a_hundred_draws_ten_and_keeps_ten():
    """10,000 windows, three standard errors each; a drawn token is the old one once in the text's vocabulary."""
    made = examples(MaskedLM(), 10_000)
    at = np.concatenate([each.source[each.counted] for each in made])
    same = 0.1 + 0.1 / (TEXT - 2)
    for found, share in (((at == MASK).mean(), 0.8), ((at == 7).mean(), same)):
        assert abs(found - share) <= 3 * math.sqrt(share * (1 - share) / len(at))
    drawn = at[(at != MASK) & (at != 7)]
    assert drawn.min() >= 2
    assert drawn.max() < TEXT
    middle, deviation = (TEXT + 1) / 2, math.sqrt(((TEXT - 2) ** 2 - 1) / 12)
    assert abs(drawn.mean() - middle) <= 3 * deviation / math.sqrt(len(drawn))


def test_every_place_is_hidden_equally_often():
    counts = sum(made.counted.astype(int) for made in examples(MaskedLM(rate=0.25), 10_000))
    assert np.abs(counts - 2500).max() <= 5 * math.sqrt(10_000 * 0.25 * 0.75)


def test_by_choice_all_that_is_hidden_is_the_mask():
    for made in examples(MaskedLM(replacement="mask"), 20):
        assert (made.source[made.counted] == MASK).all()
        assert (made.source[~made.counted] == 7).all()


@pytest.mark.parametrize("intra_document", [False, True])
def test_an_encoder_only_model_reads_the_window_and_answers_in_its_places(intra_document):
    windows = np.random.default_rng(0).integers(2, TEXT, (4, 32))
    windows[1:, 10] = EOD
    objective, masks = MaskedLM(), MasksConfig(intra_document=intra_document)
    batch = WindowCollator(objective, "encoder_only", masks, TEXT, seed=3).batch(windows, first=8)
    assert batch.inputs["tokens_BT"].shape == batch.targets.shape == batch.weights.shape == (4, 32)
    assert torch.equal(batch.targets, torch.from_numpy(windows))
    assert batch.weights.sum(1).tolist() == [objective.count(32)] * 4
    changed = batch.inputs["tokens_BT"] != batch.targets
    assert (batch.weights[changed] == 1).all()
    if not intra_document:
        assert batch.inputs.keys() == {"tokens_BT"}
    else:  # the end belongs to the document that it closes, hidden or not
        expected = [[0] * 32] + [[0] * 11 + [1] * 21] * 3
        assert batch.inputs["documents_BT"].tolist() == expected


def test_windows_of_one_document_have_nothing_to_separate():
    windows = np.random.default_rng(0).integers(2, TEXT, (2, 32))
    masks = MasksConfig(intra_document=True)
    batch = WindowCollator(MaskedLM(), "encoder_only", masks, TEXT).batch(windows)
    assert batch.inputs.keys() == {"tokens_BT"}
