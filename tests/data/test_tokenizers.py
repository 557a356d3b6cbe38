"""Tokenizers give the text back, count its bytes, and leave the ends of documents to us."""

import random
import subprocess
import sys

import numpy as np
import pytest

from lit_llm.data.library_tokenizer import FromFile
from lit_llm.data.splits import content_hash, split_of
from lit_llm.data.tokenizers import SPECIAL, Bytes, sample, train_bpe
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
from lit_llm.data.splits import content_hash, split_of
from lit_llm.data.library_tokenizer import FromFile
from lit_llm.data.tokenizers import SPECIAL, Bytes, sample, train_bpe
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


# --- training on a part of a large corpus --------------------------------------------------------------------------


def many(count=400, seed=0):
    words = random.Random(seed)
    return ["".join(words.choices("abcdefgh ü\n", k=words.randint(1, 200))) for _ in range(count)]


def size(texts):
    return sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("limit", [1, 100, 5000, 20_000])
def test_a_sample_is_the_shortest_run_of_documents_by_hash_that_has_the_bytes(limit):
    found = sample(iter(many()), limit)
    assert limit <= size(found) < limit + 400
    assert size(found[:-1]) < limit
    larger = sample(many(), 2 * limit)
    assert larger[: len(found)] == found  # one order, cut at another place


def test_a_sample_depends_on_no_order_and_can_be_made_of_samples_of_parts():
    texts = [*many(), *many()[:50]]  # some of them twice
    whole, shuffled = sample(many(), 5000), texts.copy()
    random.Random(1).shuffle(shuffled)
    parts = [sample(shuffled[start : start + 60], 5000) for start in range(0, len(shuffled), 60)]
    assert sample(shuffled, 5000) == whole
    assert sample([text for part in parts[::-1] for text in part], 5000) == whole


def test_a_sample_of_a_small_corpus_is_all_of_it():
    assert sorted(sample([*many(), *many()], 10**9)) == sorted(set(many()))


def test_a_sample_holds_no_more_than_its_bytes_and_is_not_of_the_first_documents():
    texts = many(4000)
    chosen = set(sample(texts, size(texts) // 10))
    places = [number for number, text in enumerate(texts) if text in chosen]
    # Uniform over 4000 places: the mean of n of them deviates by 4000 / sqrt(12 n).
    assert abs(np.mean(places) - 2000) < 5 * 4000 / (12 * len(places)) ** 0.5


def test_what_is_held_out_says_nothing_about_what_is_sampled():
    """Both go by a hash of the content; by the same bits, a sample of all documents would be of one side only."""
    texts = many(4000)
    chosen = sample(texts, size(texts) // 10)
    share = np.mean([split_of(content_hash(text), 0.15, 0.15) != "train" for text in chosen])
    assert 0.2 < share < 0.4  # five standard deviations of about 400 draws are 0.11


def test_the_tokenizer_of_a_large_corpus_is_that_of_its_sample(tmp_path):
    train_bpe(many(), 300, tmp_path / "whole.json", 5000)
    train_bpe(sample(many()[::-1], 5000), 300, tmp_path / "sample.json", 5000)
    train_bpe(many(), 300, tmp_path / "more.json", 10_000)
    texts = [(tmp_path / f"{name}.json").read_bytes() for name in ("whole", "sample", "more")]
    assert texts[0] == texts[1] != texts[2]


def test_of_a_document_longer_than_the_limit_the_beginning_is_taken(tmp_path):
    """A word of the second half must not become a token."""
    long = "aaaaaaaa " * 200_000 + "zzzzzzzz " * 200_000
    train_bpe([long], 300, tmp_path / "tokenizer.json", 1000)
    tokenizer = FromFile(tmp_path / "tokenizer.json", *SPECIAL)
    lengths = [len(tokenizer.encode([word])[0]) for word in ("aaaaaaaa", "zzzzzzzz")]
    assert lengths[0] < lengths[1] == 8
