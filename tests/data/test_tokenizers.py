"""Tokenizers give the text back, count its bytes, and leave the ends of documents to us."""

import subprocess
import sys

import numpy as np
import pytest

from lit_llm.data.tokenizers import SPECIAL, Bytes, FromFile, train_bpe
from lit_llm.objectives.config import BOS, EOD

TEXTS = [
    "plain words",
    "  leading, trailing and   inner spaces ",
    "lines\nand\r\nother\rlines\n\n",
    "tabs\tand\x00zeros\x1b",
    "Grüße, žluťoučký, Ελλάδα, 世界, हिन्दी, עברית",
    "emoji 🙂👩‍👩‍👧 and combined e\u0301",
    "\ufeffmark, \u2028 separator, \xa0 space, \u200b nothing",
    "<eod>",
    "<s>",
    "a<eod>b<s>c </s> <eod><eod>",
    "don't can't 123456789 x**2",
    "",
]
CORPUS = [*TEXTS, "the <eod> of the <s> is the <eod> of <s> " * 50, "lorem ipsum dolor sit amet " * 200]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe(CORPUS, 400, path)
    return FromFile(path, *SPECIAL)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, bpe):
    return Bytes() if request.param == "bytes" else bpe


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_comes_back_as_it_was(tokenizer, text):
    (ids,) = tokenizer.encode([text])
    assert tokenizer.decode(ids.tolist()) == text


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(tokenizer, text):
    """Bits per byte divide by this: an error here is an error in every comparison of tokenizers."""
    (ids,) = tokenizer.encode([text])
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())


@pytest.mark.parametrize("text", TEXTS)
def test_no_text_can_end_a_document_or_open_a_target(tokenizer, text):
    """A page about tokenizers that spells <eod> is no end of a document."""
    (ids,) = tokenizer.encode([text])
    assert not np.isin(ids, [EOD, BOS]).any()
    assert ids.dtype == np.int64


def test_the_first_two_ids_are_the_special_ones_and_stand_for_no_text(tokenizer):
    assert (SPECIAL[EOD], SPECIAL[BOS]) == ("<eod>", "<s>")
    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (tokenizer.vocabulary,)
    assert lengths[:2].tolist() == [0, 0]
    assert lengths[2:].min() == 1
    assert tokenizer.decode([EOD, BOS]) == ""


def test_texts_are_encoded_one_by_one_whatever_is_beside_them(tokenizer):
    together = tokenizer.encode(TEXTS)
    for text, ids in zip(TEXTS, together, strict=True):
        assert np.array_equal(tokenizer.encode([text])[0], ids)


def test_bytes_are_shifted_past_the_special_ids():
    assert Bytes().vocabulary == 258
    assert Bytes().encode(["\x00A\xff"])[0].tolist() == [2, 2 + 65, 2 + 0xC3, 2 + 0xBF]


def test_a_trained_vocabulary_has_every_byte_and_at_most_the_size_that_was_asked_for(bpe):
    assert 258 <= bpe.vocabulary <= 400
    assert (bpe.byte_lengths() == 1).sum() == 256
    (ids,) = bpe.encode(["lorem ipsum"])
    assert len(ids) < len("lorem ipsum")


TRAIN = """
import sys
from pathlib import Path
from lit_llm.data.tokenizers import train_bpe
documents = ["lorem ipsum dolor sit amet " * 30, "sed do eiusmod tempor " * 40, "aa bb cc dd " * 9]
train_bpe((text for text in documents), 300, Path(sys.argv[1]))
"""


def test_two_trainings_write_the_same_bytes(tmp_path):
    paths = [tmp_path / name for name in ("here.json", "again.json", "other.json")]
    for path in paths[:2]:
        sys.argv, before = ["", str(path)], sys.argv
        exec(TRAIN, {})
        sys.argv = before
    command = [sys.executable, "-c", TRAIN, str(paths[2])]
    subprocess.run(command, check=True, env={"PYTHONHASHSEED": "5", "TOKENIZERS_PARALLELISM": "false"})
    assert len({path.read_bytes() for path in paths}) == 1
