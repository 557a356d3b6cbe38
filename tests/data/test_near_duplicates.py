"""Documents that say nearly the same lie in one split, and the others of such a pair are left out and counted."""

from __future__ import annotations

import json
import os
import random
from types import SimpleNamespace

import numpy as np
import pytest

from lit_llm.config.host import process_name
from lit_llm.config.problems import InputError
from lit_llm.data import corpora, near_duplicate_identity, near_duplicates, processes, splits
from lit_llm.data.config import DataConfig
from lit_llm.data.near_duplicate_identity import THRESHOLD
from lit_llm.data.near_duplicates import WORDS, signature
from lit_llm.data.prepare import prepare
from lit_llm.data.sources import identify
from lit_llm.data.splits import SPLITS, content_hash, split_of

FRACTIONS = (0.2, 0.2)


def words_of(seed, count=120):
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghij", k=6)) for _ in range(count)]


def text_in(split, seed, change=lambda words: words):
    """The first text of a series that belongs to a split, each with another last word after the change."""
    words = change(words_of(seed))
    texts = (" ".join([*words, f"end{number}"]) for number in range(1000))
    return next(text for text in texts if split_of(content_hash(text), *FRACTIONS) == split)


def unlike(count, seed=100):
    """So many texts of each split that have no common words."""
    return [text_in(split, seed + 10 * place + number) for place, split in enumerate(SPLITS) for number in range(count)]


def mixed(*sources, near="drop"):
    content = {
        name: {"corpus": {"kind": "text", "files": [f"{folder}/*.txt"]}}
        for name, folder in zip("ab", sources, strict=False)
    }
    return DataConfig.model_validate(
        {
            "corpus": {"kind": "mixture", "sources": content} if len(sources) > 1 else content["a"]["corpus"],
            "tokenizer": "bytes", "sequence_length": 16, "batch_size": 2,
            "validation_fraction": FRACTIONS[0], "test_fraction": FRACTIONS[1], "near_duplicates": near,
        }
    )  # fmt: skip


def write(folder, *texts):
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:02}.txt").write_text(text)
    return folder


def read(prepared, number=0):
    """{split: its documents}."""
    source, found = prepared.sources[number], {}
    for split in SPLITS:
        tokens = prepared.open(source, split)
        ids = tokens.read(np.array([0]), len(tokens))[0]
        found[split] = [prepared.tokenizer().decode(part) for part in np.split(ids, np.flatnonzero(ids == 0) + 1)[:-1]]
    return found


def meta(prepared, number=0):
    return json.loads((prepared.sources[number].folder / "meta.json").read_text())


def shingles(words):
    return {tuple(words[place : place + WORDS]) for place in range(len(words) - WORDS + 1)}


@pytest.mark.parametrize("changed", [0, 1, 3, 8, 20, 60])
def test_common_minhashes_estimate_the_jaccard_similarity_of_runs_of_five_words(changed):
    """A binomial share of 120: four standard errors are 4 sqrt(J (1 - J) / 120)."""
    one = words_of(0, 400)
    two = [*one[: 400 - changed], *words_of(1, changed)]
    left, right = shingles(one), shingles(two)
    jaccard = len(left & right) / len(left | right)
    estimate = (signature(" ".join(one)) == signature(" ".join(two))).mean()
    assert abs(estimate - jaccard) <= 4 * (jaccard * (1 - jaccard) / 120) ** 0.5


def test_a_long_document_has_the_signature_of_its_words_however_it_is_cut(monkeypatch):
    text = " ".join(words_of(2, 300))
    whole = signature(text)
    monkeypatch.setattr(splits, "_CHUNK", 50)
    assert (signature(text) == whole).all()
    assert signature("only four words here") is None


def test_chinese_is_compared_by_its_characters():
    text = "".join(random.Random(0).choices([chr(code) for code in range(0x4E00, 0x4F00)], k=200))
    assert (
        (signature(text) == signature(text[:-2])).mean()
        > THRESHOLD
        > 0.3
        > (signature(text) == signature(text[::-1])).mean()
    )


def corpus_with_pairs(root):
    """A near-duplicate of every kind of pair, beside four texts of each split that stand alone."""
    alone = unlike(4)
    pairs = {
        (one, two): (text_in(one, seed), text_in(two, seed, lambda words: words[:-3]))
        for seed, (one, two) in enumerate(
            [("validation", "train"), ("test", "train"), ("validation", "test"), ("train", "train"), ("test", "test")]
        )
    }
    texts = [*alone, *(text for pair in pairs.values() for text in pair)]
    random.Random(0).shuffle(texts)
    return write(root, *texts), pairs


def test_of_a_pair_the_held_out_document_stays_and_validation_before_test(tmp_path):
    folder, pairs = corpus_with_pairs(tmp_path / "texts")
    prepared = prepare(mixed(folder), tmp_path / "drop")
    found = read(prepared)
    for (one, two), texts in pairs.items():
        assert [text in found[split] for split, text in zip((one, two), texts, strict=True)] == [True, one == two]
    assert meta(prepared)["near_duplicates"] == {"train": 2, "validation": 0, "test": 1}
    assert meta(prepared)["documents_of"] == {split: len(texts) for split, texts in found.items()}
    kept = prepare(mixed(folder, near="keep"), tmp_path / "keep")
    assert sum(map(len, read(kept).values())) == sum(map(len, found.values())) + 3
    assert read(kept)["validation"] == found["validation"]
    assert identify(mixed(folder)).digest != identify(mixed(folder, near="keep")).digest


@pytest.mark.parametrize(("name", "other"), [("FORMAT", -1), ("THRESHOLD", 0.9), ("version", lambda library: "0")])
def test_what_is_left_out_by_another_rule_is_another_text(tmp_path, monkeypatch, name, other):
    folder = write(tmp_path / "text", *unlike(3))
    before = {near: identify(mixed(folder, near=near)) for near in ("drop", "keep")}
    monkeypatch.setattr(near_duplicate_identity, name, other)
    assert identify(mixed(folder)).digest != before["drop"].digest
    assert identify(mixed(folder, near="keep")) == before["keep"]


def test_parts_read_by_several_processes_leave_out_the_same(tmp_path, monkeypatch):
    folder, _ = corpus_with_pairs(tmp_path / "texts")
    whole = prepare(mixed(folder), tmp_path / "whole")
    monkeypatch.setattr(corpora, "PART", 4000)
    monkeypatch.setattr(near_duplicates, "_ALONE", 0)
    parts = prepare(mixed(folder), tmp_path / "parts")
    assert len(parts.sources[0].tokens["train"]) > 3
    assert read(parts) == read(whole)


def end_at_once(job, number, part):
    os._exit(1)


@pytest.mark.parametrize(
    ("doing", "after"),
    [(processes.TOKENISING, "goes on from there"), (processes.SIGNING, "the same command begins with it anew")],
)
def test_a_killed_process_says_what_it_was_doing_and_what_is_left_of_it(monkeypatch, doing, after):
    monkeypatch.setattr(processes, "cores", lambda: 2)
    parts = [SimpleNamespace(size=1)] * 2
    with pytest.raises(InputError, match=f"a process that was {doing} was killed.*{after}"):
        processes.over_parts(end_at_once, None, parts, [0, 1], lambda done, total: None, doing=doing)


def test_a_part_gets_its_name_when_all_of_its_signatures_are_written(tmp_path, monkeypatch):
    """A process whose coordinator was killed may be at the same part still."""
    texts, names = unlike(2), []
    save = np.savez
    monkeypatch.setattr(np, "savez", lambda path, **arrays: (names.append(path.name), save(path, **arrays)))
    job = near_duplicates._Job(tmp_path, *FRACTIONS)
    assert near_duplicates._sign(job, 3, texts) == 3
    assert names == [f".00003.{process_name()}.npz"]
    (left,) = tmp_path.iterdir()
    assert left.name == ".00003.npz"
    with np.load(left) as signed:
        assert len(signed["signatures"]) == 4  # the two of validation and the two of test


def test_a_document_that_another_source_holds_out_is_left_out_here(tmp_path):
    held, copy = text_in("validation", 0), text_in("train", 0, lambda words: words[:-3])
    rest = unlike(2)
    one, two = write(tmp_path / "one", held, *rest), write(tmp_path / "two", copy, *unlike(2, 200))
    alone = prepare(mixed(two), tmp_path / "alone")
    assert copy in read(alone)["train"]
    both = prepare(mixed(one, two), tmp_path / "both")
    number = [source.name for source in both.sources].index("b")
    assert copy not in read(both, number)["train"]


def test_a_pair_that_shares_half_of_its_shingles_stays(tmp_path):
    """Forty fresh words of 121, at the end: 76 common shingles of 158."""
    held = text_in("validation", 0)
    far = text_in("train", 0, lambda words: [*words[:-40], *words_of(9, 40)])
    rest = unlike(2)
    prepared = prepare(mixed(write(tmp_path / "texts", held, far, *rest)), tmp_path / "out")
    assert far in read(prepared)["train"]
    assert meta(prepared)["near_duplicates"] == {"train": 0, "validation": 0, "test": 0}


def test_bands_find_nearly_all_pairs_at_the_threshold():
    """1 - (1 - s^5)^24, the S curve of locality-sensitive hashing, at s = 0.8 and far below."""

    def found(similarity):
        return 1 - (1 - similarity**near_duplicates._ROWS) ** near_duplicates._BANDS

    assert found(THRESHOLD) > 0.9999
    assert found(0.2) < 0.01
