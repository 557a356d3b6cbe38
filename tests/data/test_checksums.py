"""What lies prepared on disk is what was written: any other byte is refused, with the file and the next step."""

import json
import os
import shutil

import numpy as np
import pytest

from lit_llm.config.problems import InputError
from lit_llm.data import checksums
from lit_llm.data.config import ByteTokenizer, DataConfig, InstructionConfig
from lit_llm.data.examples import ExampleSet, prepare_examples
from lit_llm.data.instructions import identify_examples
from lit_llm.data.prepare import is_prepared, open_prepared, prepare


@pytest.fixture(scope="module")
def written(tmp_path_factory, corpus):
    """A root with a prepared text (BPE) and prepared examples, the text's configuration, and both digests."""
    root = tmp_path_factory.mktemp("root")
    config = DataConfig.model_validate(
        {
            "corpus": {"kind": "text", "files": [f"{corpus}/*.txt"]},
            "tokenizer": {"kind": "bpe", "vocabulary": 300},
            "sequence_length": 16,
            "batch_size": 2,
            "validation_fraction": 0.2,
        }
    )
    file = root / "examples.jsonl"
    file.write_text("".join(json.dumps({"inputs": f"ask {n}", "targets": f"{n}"}) + "\n" for n in range(60)))
    section = InstructionConfig.model_validate(
        {"examples": {"kind": "jsonl", "files": [str(file)]}, "input_length": 20, "target_length": 8, "batch_size": 4}
    )
    examples = identify_examples(section, "bytes")
    prepare_examples(section, ByteTokenizer(), root / "bytes", root, examples)
    return root, config, prepare(config, root).digest, section, examples


@pytest.fixture
def copy(written, tmp_path):
    """The same in a place of its own, to be damaged."""
    root, *rest = written
    shutil.copytree(root, tmp_path / "root")
    return tmp_path / "root", *rest


def other_byte(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def refused(opened):
    with pytest.raises(InputError) as error:
        opened()
    return [(problem.key, problem.message) for problem in error.value.problems]


@pytest.mark.parametrize("name", ["00000.train.bin", "00000.contents.npz", "meta.json", "00000.test.bin"])
def test_another_byte_in_a_source_is_refused_with_the_file_and_the_folder_to_delete(copy, name):
    root, config, digest, *_ = copy
    folder = open_prepared(config, root, digest).sources[0].folder
    other_byte(folder / name)
    for opened in (lambda: open_prepared(config, root, digest), lambda: prepare(config, root)):
        ((key, message),) = refused(opened)
        assert key == str(folder / name)
        assert (
            message
            == f"has changed since it was written; delete the folder {folder} and run again: it is prepared anew"
        )


def test_what_the_message_says_gives_the_same_tokens_again(copy):
    root, config, digest, *_ = copy
    before = open_prepared(config, root, digest)
    folder, place = before.sources[0].folder, np.array([0])
    tokens = before.open(before.sources[0], "train").read(place, 500)
    other_byte(folder / "00000.train.bin")
    shutil.rmtree(folder)
    assert not is_prepared(root, digest)  # so that a plan does not look for what is not there
    again = prepare(config, root)
    assert (again.open(again.sources[0], "train").read(place, 500) == tokens).all()


def test_a_cut_shard_a_missing_one_and_a_tokenizer_with_another_byte_are_named(copy):
    root, config, digest, *_ = copy
    prepared = open_prepared(config, root, digest)
    folder = prepared.sources[0].folder
    with (folder / "00000.train.bin").open("r+b") as file:
        file.truncate(1000)
    (folder / "00000.validation.bin").unlink()
    found = refused(lambda: open_prepared(config, root, digest))
    assert [key for key, _ in found] == [str(folder / f"00000.{split}.bin") for split in ("train", "validation")]
    assert "is missing" in found[1][1]
    other_byte(prepared.tokenizer_folder / "tokenizer.json")
    ((key, _),) = refused(lambda: prepare(config, root))
    assert key == str(prepared.tokenizer_folder / "tokenizer.json")


def test_a_shard_that_is_cut_while_it_is_read_gives_no_tokens(copy):
    """One token that is left would otherwise fill the row."""
    root, config, digest, *_ = copy
    prepared = open_prepared(config, root, digest)
    tokens = prepared.open(prepared.sources[0], "train")
    with (prepared.sources[0].folder / "00000.train.bin").open("r+b") as file:
        file.truncate(2)
    ((key, message),) = refused(lambda: tokens.read(np.array([0]), 16))
    assert key.endswith("00000.train.bin")
    assert "is shorter" in message


def test_another_share_in_a_mixtures_file_is_refused(copy):
    root, _, digest, *_ = copy
    path = root / "mixtures" / f"{digest}.json"
    path.write_text(path.read_text().replace("1000", "999"))
    ((key, message),) = refused(lambda: is_prepared(root, digest))
    assert key == str(path)
    assert "delete the file and run again" in message


@pytest.mark.parametrize("name", ["tokens.bin", "train.npy", "validation.contents.npy", "meta.json"])
def test_another_byte_in_examples_is_refused(copy, name):
    root, _, _, section, examples = copy
    file = root / "examples" / examples / name
    other_byte(file)
    prepare_again = lambda: prepare_examples(section, ByteTokenizer(), root / "bytes", root, examples)  # noqa: E731
    for opened in (lambda: ExampleSet(root, examples, ByteTokenizer()), prepare_again):
        ((key, _),) = refused(opened)
        assert key == str(file)


def test_a_folder_without_checksums_is_written_anew(copy):
    root, config, digest, *_ = copy
    folder = open_prepared(config, root, digest).sources[0].folder
    (folder / checksums.FILE).unlink()
    (folder / "00000.train.bin").write_bytes(b"")
    prepared = prepare(config, root)
    assert (folder / "00000.train.bin").stat().st_size == 2 * prepared.sources[0].count("train") > 0


def test_an_untouched_folder_is_read_once(copy, monkeypatch):
    root, config, digest, *_ = copy
    for path in (path for path in root.rglob("*") if path.is_file()):
        os.utime(path, (1, 1))
    read, digest_of_file = [], checksums.digest_of_file
    monkeypatch.setattr(checksums, "digest_of_file", lambda path: read.append(path) or digest_of_file(path))
    open_prepared(config, root, digest)
    once = len(read)
    open_prepared(config, root, digest)
    assert len(read) == once > 0
