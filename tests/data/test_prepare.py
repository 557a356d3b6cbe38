"""A corpus is tokenised once, whole or not at all, and split by what the documents say."""

import json
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
from pydantic import ValidationError

from lit_llm.config.problems import InputError
from lit_llm.data import corpora, processes
from lit_llm.data import shards as module
from lit_llm.data.config import DataConfig
from lit_llm.data.prepare import open_prepared, prepare
from lit_llm.data.sources import identify
from lit_llm.data.splits import SPLITS, content_hash, split_of
from lit_llm.data.tokenizers import Bytes, train_bpe
from lit_llm.objectives.config import EOD


def config(folder, tokenizer="bytes", length=16, fraction=0.2, test=0.2):
    return DataConfig.model_validate(
        {
            "corpus": {"kind": "text", "files": [f"{folder}/*.txt"]},
            "tokenizer": tokenizer,
            "sequence_length": length,
            "batch_size": 2,
            "validation_fraction": fraction,
            "test_fraction": test,
        }
    )


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Sixty documents of one to thirty words, one of them twice, two of them empty."""
    folder, words = tmp_path_factory.mktemp("documents"), random.Random(1)
    texts = [" ".join(words.choices("der die das ein eine 世界 🙂 <eod> <s>".split(), k=n % 30 + 1)) for n in range(59)]
    for number, text in enumerate([*texts, texts[7], "", ""]):
        (folder / f"{number:02}.txt").write_text(text)
    return folder


def held_out(text):
    """Whether a document is in the validation or in the test split."""
    return split_of(content_hash(text), 0.2, 0.2) != "train"


def ids(prepared, split):
    """All tokens of a split of the only source."""
    (source,) = prepared.sources
    tokens = prepared.open(source, split)
    return tokens.read(np.array([0]), len(tokens))[0]


def read(prepared, split):
    """The documents of a split, from the tokens on disk."""
    tokens = ids(prepared, split)
    ends = np.flatnonzero(tokens == EOD)
    assert ends[-1] == len(tokens) - 1
    return [prepared.tokenizer().decode(part[:-1].tolist()) for part in np.split(tokens, ends[:-1] + 1)]


@pytest.mark.parametrize("tokenizer", ["bytes", {"kind": "bpe", "vocabulary": 300}])
def test_every_document_is_there_once_closed_by_its_end(documents, tmp_path, tokenizer):
    prepared = prepare(config(documents, tokenizer), tmp_path)
    expected = [text for path in sorted(documents.iterdir()) if (text := path.read_text())]
    assert sorted(text for split in SPLITS for text in read(prepared, split)) == sorted(expected)


@pytest.mark.parametrize("tokenizer", ["bytes", {"kind": "bpe", "vocabulary": 300}])
def test_tokens_are_those_of_the_documents_and_one_end_for_each(documents, tmp_path, tokenizer):
    prepared = prepare(config(documents, tokenizer), tmp_path)
    texts = [text for path in documents.iterdir() if (text := path.read_text())]
    lengths = [len(ids) for ids in prepared.tokenizer().encode(texts)]
    (source,) = prepared.sources
    assert sum(source.count(split) for split in SPLITS) == sum(lengths) + len(texts)
    assert json.loads((source.folder / "meta.json").read_text())["documents"] == len(texts)


def test_the_order_of_the_documents_is_kept(documents, tmp_path):
    prepared = prepare(config(documents), tmp_path)
    texts = [path.read_text() for path in sorted(documents.iterdir()) if path.read_text()]
    for split in SPLITS:
        assert read(prepared, split) == [text for text in texts if split_of(content_hash(text), 0.2, 0.2) == split]


def test_chunks_do_not_change_what_is_written(documents, tmp_path, monkeypatch):
    whole = prepare(config(documents), tmp_path / "whole")
    monkeypatch.setattr(module, "_CHUNK", 40)
    cut = prepare(config(documents), tmp_path / "cut")
    for split in SPLITS:
        assert np.array_equal(ids(whole, split), ids(cut, split))


# --- the split -----------------------------------------------------------------------------------------------------


def test_the_same_text_under_two_names_lies_on_one_side(documents, tmp_path):
    prepared = prepare(config(documents, fraction=0.4, test=0.3), tmp_path)
    train, validation, test = (set(read(prepared, split)) for split in SPLITS)
    assert not train & validation | train & test | validation & test


def test_the_share_that_is_held_out_is_about_the_fraction():
    """A coin of probability p for each of 20,000 texts: five standard deviations are 5 sqrt(p (1 - p) / 20,000)."""
    for fraction in (0.01, 0.05, 0.3, 0.9):
        found = [split_of(content_hash(f"text number {number}"), fraction, 0.07) for number in range(20_000)]
        for split, share in (("validation", fraction), ("test", 0.07)):
            assert abs(found.count(split) / 20_000 - share) < 5 * (share * (1 - share) / 20_000) ** 0.5


def test_a_larger_fraction_holds_out_more_and_never_others():
    texts = [f"text {number}" for number in range(500)]

    def chosen(split, *fractions):
        return {text for text in texts if split_of(content_hash(text), *fractions) == split}

    assert chosen("validation", 0.1, 0) < chosen("validation", 0.3, 0)
    assert chosen("test", 0.1, 0.1) < chosen("test", 0.1, 0.3)
    assert chosen("validation", 0.1, 0) == chosen("validation", 0.1, 0.3)


def test_which_documents_are_held_out_does_not_depend_on_the_tokenizer_or_the_other_documents(documents, tmp_path):
    pair = {"kind": "bpe", "vocabulary": 300}
    both = [prepare(config(documents, tokenizer), tmp_path) for tokenizer in ("bytes", pair)]
    assert read(both[0], "validation") == read(both[1], "validation")


def test_the_tokenizer_is_trained_on_the_training_documents_alone(tmp_path):
    """A word that is only ever held out must not become a token."""
    texts = [f"{n} zzzzzzzz zzzzzzzz" if held_out(f"{n} zzzzzzzz zzzzzzzz") else f"{n} aaaaaaaa" for n in range(90)]
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(texts):
        if held_out(text) == ("z" in text):
            (folder / f"{number}.txt").write_text(text)
    prepared = prepare(config(folder, {"kind": "bpe", "vocabulary": 300}, length=4), tmp_path / "out")
    tokenizer = prepared.tokenizer()
    assert len(tokenizer.encode(["aaaaaaaa"])[0]) < 8
    assert len(tokenizer.encode(["zzzzzzzz"])[0]) == 8


# --- once, and whole -----------------------------------------------------------------------------------------------


def test_what_is_there_is_not_tokenised_again_also_for_other_windows(documents, tmp_path):
    calls = []
    first = prepare(config(documents), tmp_path, lambda *step: calls.append(step))
    assert calls
    assert calls[-1][0] == "tokenising"
    assert calls[-1][1] <= calls[-1][2]
    calls.clear()
    second = prepare(config(documents, length=8), tmp_path, lambda *step: calls.append(step))
    assert calls == []
    assert (second.digest, second.sources) == (first.digest, first.sources)
    assert open_prepared(config(documents), tmp_path, first.digest).sources == first.sources


def complete(root):
    """Folders of tokens under their final names."""
    return {path.parent for path in root.glob("*/meta.json") if not path.parent.name.startswith(".")}


PROGRAM = """
import json, os, signal, sys
from pathlib import Path
from lit_llm.data.config import DataConfig
from lit_llm.data.prepare import prepare

data, root, mode = DataConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def progress(what, done, total):
    if mode == "die" and what == "tokenising":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "tokenising":
        Path(root, f"worked-{os.getpid()}").touch()

children = []
for number in range(int(sys.argv[4])):
    child = os.fork()
    if not child:
        (root / f"answer-{number}").write_text(json.dumps(prepare(data, root, progress).digest))
        os._exit(0)
    children.append(child)
sys.exit(max(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in children))
"""


def in_processes(data, root, mode, number):
    """prepare() in that many processes at once; the largest exit code or signal."""
    root.mkdir()
    command = [sys.executable, "-c", PROGRAM, data.model_dump_json(), str(root), mode, str(number)]
    return subprocess.run(command, check=False).returncode


@pytest.mark.parametrize("tokenizer", ["bytes", {"kind": "bpe", "vocabulary": 300}])
def test_a_process_killed_in_the_middle_leaves_nothing_that_looks_complete(documents, tmp_path, tokenizer):
    data, root = config(documents, tokenizer), tmp_path / "data"
    assert in_processes(data, root, "die", 1) == signal.SIGKILL
    assert complete(root) == set()
    assert list(root.glob(".*/"))
    prepared = prepare(data, root)
    fresh = prepare(data, tmp_path / "fresh")
    for split in SPLITS:
        assert np.array_equal(ids(prepared, split), ids(fresh, split))
    assert complete(root) == {source.folder for source in prepared.sources}
    assert list(root.rglob(".*")) == []  # what was left is gone


def test_an_error_in_the_middle_leaves_no_folder(documents, tmp_path):
    def fail(*step):
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        prepare(config(documents), tmp_path, fail)
    assert complete(tmp_path) == set()
    assert list(tmp_path.rglob(".*")) == []


def test_eight_processes_at_once_tokenise_once(documents, tmp_path):
    data, root = config(documents), tmp_path / "data"
    assert in_processes(data, root, "live", 8) == 0
    answers = [path.read_text() for path in root.glob("answer-*")]
    assert (len(answers), len(set(answers))) == (8, 1)
    assert len(list(root.glob("worked-*"))) == 1
    assert len(complete(root)) == 1


def test_others_may_read_what_one_has_prepared(documents, tmp_path):
    """On a cluster the store is shared: no folder may be its owner's alone beyond what the umask says."""
    before = os.umask(0o022)
    try:
        (source,) = prepare(config(documents), tmp_path / "data").sources
    finally:
        os.umask(before)
    assert source.folder.stat().st_mode & 0o777 == 0o755


# --- a corpus that changes -----------------------------------------------------------------------------------------


def test_a_text_that_is_not_the_one_identified_is_never_stored_under_its_digest(tmp_path):
    """Identified, edited, prepared, restored: the tokens are those of the text that the digest is of."""
    folder = write(tmp_path / "texts", *each_split(3))
    for tokenizer in ("bytes", {"kind": "bpe", "vocabulary": 300}):
        data, root = config(folder, tokenizer, length=4), tmp_path / str(tokenizer)[:5]
        identity, text = identify(data), (folder / "7.txt").read_text()
        (folder / "7.txt").write_text(text.upper())
        with pytest.raises(InputError, match="corpus: the text changed while it was tokenised; run again"):
            prepare(data, root, identity=identity)
        (folder / "7.txt").write_text(text)
        prepared = prepare(data, root, identity=identity)
        assert text in read(prepared, "train")


def test_a_text_that_changes_and_changes_back_between_two_attempts_leaves_no_part(tmp_path, monkeypatch):
    """What an interrupted attempt has read meanwhile is not taken for a finished part."""
    monkeypatch.setattr(corpora, "PART", 1)
    monkeypatch.setattr(processes, "cores", lambda: 1)
    folder = write(tmp_path / "texts", *each_split(3))
    data, text = config(folder, length=4), (folder / "3.txt").read_text()

    def edit_then_stop(what, done, total):
        if what == "tokenising":
            (folder / "3.txt").write_text(text.upper())
            if done == total:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(data, tmp_path / "out", edit_then_stop)
    assert list((tmp_path / "out").glob(".*/0*.json"))
    (folder / "3.txt").write_text(text)
    prepared = prepare(data, tmp_path / "out")
    assert text in read(prepared, "validation")


def test_a_tokenizer_file_that_is_not_the_one_identified_is_not_kept(tmp_path):
    folder = write(tmp_path / "texts", *each_split(3))
    path = tmp_path / "tokenizer.json"
    train_bpe(["some words"], 300, path)
    data = config(folder, {"kind": "file", "path": str(path)}, length=4)
    identity = identify(data)
    train_bpe(["and more and more"], 300, path)
    with pytest.raises(InputError, match="the text changed"):
        prepare(data, tmp_path / "out", identity=identity)
    assert not list((tmp_path / "out").rglob("*.json"))


# --- what cannot be prepared ---------------------------------------------------------------------------------------


def write(folder, *texts):
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def of_split(split, number):
    """So many texts that belong to a split."""
    texts = (f"{n} and more words" for n in range(1000))
    return [text for text in texts if split_of(content_hash(text), 0.2, 0.2) == split][:number]


def each_split(number):
    """The texts of all splits, the training documents last."""
    return [text for split in ("test", "validation", "train") for text in of_split(split, number)]


@pytest.mark.parametrize("tokenizer", ["bytes", {"kind": "bpe", "vocabulary": 300}])
@pytest.mark.parametrize(
    ("lacking", "key"),
    [
        ("train", "validation_fraction"),
        ("validation", "validation_fraction"),
        ("test", "test_fraction (0: no test split)"),
    ],
)
def test_a_corpus_without_a_window_in_a_split_is_refused_with_what_to_do(tmp_path, tokenizer, lacking, key):
    texts = [text for split in SPLITS if split != lacking for text in of_split(split, 9)]
    with pytest.raises(InputError) as caught:
        prepare(config(write(tmp_path / "texts", *texts), tokenizer), tmp_path / "out")
    assert str(caught.value) == (
        f"data.corpus: the {lacking} part has 0 tokens, less than one window of 16; use more text, shorter sequences "
        f"or another {key}"
    )


def test_without_a_test_fraction_a_corpus_needs_no_test_documents(tmp_path):
    texts = of_split("train", 3) + of_split("validation", 3)
    prepared = prepare(config(write(tmp_path / "texts", *texts), test=0), tmp_path / "out")
    assert [source.count("test") for source in prepared.sources] == [0]


def test_the_test_fraction_is_part_of_the_identity(documents):
    assert len({identify(config(documents, test=test)).digest for test in (0, 0.1, 0.2)}) == 3


def test_fractions_that_leave_nothing_to_train_on_are_refused(documents):
    with pytest.raises(ValidationError, match=r"0\.4 for test and 0\.6 for validation leave nothing to train on"):
        config(documents, fraction=0.6, test=0.4)


def test_the_smallest_corpus_that_fits_is_one_window_for_each_split(tmp_path):
    texts = each_split(1)
    folder = write(tmp_path / "texts", *texts)
    shortest = min(len(Bytes().encode([text])[0]) + 1 for text in texts)
    prepared = prepare(config(folder, length=shortest), tmp_path / "out")
    (source,) = prepared.sources
    assert all(source.count(split) >= shortest for split in SPLITS)
    with pytest.raises(InputError, match="less than one window"):
        prepare(config(folder, length=max(map(source.count, SPLITS)) + 1), tmp_path / "out")


def test_a_document_that_is_not_utf_8_stops_it_and_leaves_nothing(tmp_path):
    folder = write(tmp_path / "texts", "fine words here", b"\xff\xfe broken")
    with pytest.raises(InputError, match=r"1\.txt: is not UTF-8 \(byte 0\)"):
        prepare(config(folder), tmp_path / "out")
    assert complete(tmp_path / "out") == set()
    assert list((tmp_path / "out").rglob(".*")) == []
