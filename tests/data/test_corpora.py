"""Which documents a corpus has, and what a user hears where it has none."""

import os
import shutil
import time
from pathlib import Path

import pytest

from lit_llm.config.problems import InputError
from lit_llm.data import corpora
from lit_llm.data.config import DataConfig, PythonStdlib, TextFiles
from lit_llm.data.corpora import open_corpus, read_text
from lit_llm.data.sources import identify


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with three documents and one that is empty."""
    monkeypatch.chdir(tmp_path)
    for name, text in {"a.txt": "one", "b.txt": "two", "empty.txt": "", "sub/c.txt": "three"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def texts(*files):
    return list(open_corpus(TextFiles(files=files)))


def refused(*files):
    with pytest.raises(InputError) as caught:
        open_corpus(TextFiles(files=files))
    return [str(problem) for problem in caught.value.problems]


def digest(folder, tokenizer="bytes", fraction=0.05, length=8):
    return identify(
        DataConfig.model_validate(
            {
                "corpus": {"kind": "text", "files": [f"{folder}/**/*.txt"]},
                "tokenizer": tokenizer,
                "validation_fraction": fraction,
                "sequence_length": length,
                "batch_size": 2,
            }
        )
    ).digest


def test_globs_find_files_in_an_order_of_their_own_and_an_empty_one_is_no_document(folder):
    assert texts("**/*.txt") == ["one", "two", "three"]
    assert texts("sub/*.txt", "b.txt", "a.txt") == ["one", "two", "three"]
    assert len(open_corpus(TextFiles(files=("**/*.txt",))).files) == 3
    assert open_corpus(TextFiles(files=("**/*.txt",))).size == len("onetwothree")


def test_a_file_is_read_once_whichever_way_it_is_named(folder):
    assert texts("a.txt", "./a.txt", "*.txt", f"{folder}/a.txt", "sub/../a.txt") == ["one", "two"]


def test_a_name_with_signs_of_a_glob_is_meant_literally_where_it_is_a_file(folder):
    (folder / "x[1].txt").write_text("brackets")
    assert texts("x[1].txt") == ["brackets"]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("nowhere.txt", "corpus.files: nowhere.txt: no file matches; looked for in HERE"),
        ("no/**/*.txt", "corpus.files: no/**/*.txt: no file matches; looked for in HERE"),
        ("sub", "corpus.files: sub: is a directory; write sub/**/*.txt"),
        ("sub/", "corpus.files: sub/: is a directory; write sub/**/*.txt"),
        ("empty.txt", "corpus.files: empty.txt: these files are all empty"),
    ],
)
def test_files_that_are_not_there_or_say_nothing_are_refused(folder, pattern, said):
    assert refused(pattern) == [said.replace("HERE", os.getcwd())]


def test_a_link_that_leads_nowhere_is_a_document_that_cannot_be_read(folder):
    os.symlink("gone", folder / "link.txt")
    for pattern in ("link.txt", "*.txt"):
        assert refused(pattern) == [f"corpus.files: {folder}/link.txt: cannot be read: No such file or directory"]


def test_all_patterns_that_find_nothing_are_told_at_once(folder):
    assert [message.split(": ")[1] for message in refused("x.txt", "a.txt", "y.txt")] == ["x.txt", "y.txt"]


def test_a_document_that_is_not_utf_8_is_named_with_the_place(tmp_path):
    (tmp_path / "latin.txt").write_bytes("abc é".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt: is not UTF-8 \(byte 4\); name its `encoding`"):
        read_text(tmp_path / "latin.txt")


def test_only_pythons_own_sources_fall_back_on_latin_1(tmp_path):
    old = tmp_path / "old.py"
    old.write_bytes("# -*- latin-1 -*- é".encode("latin-1"))
    assert read_text(old, python=True).endswith("é")
    with pytest.raises(InputError, match=r"old\.py: is not UTF-8 \(byte 18\)"):
        read_text(old)
    assert "old.py: is not UTF-8" in refused(str(old))[0]
    (tmp_path / "new.py").write_text("é")
    assert list(open_corpus(TextFiles(files=(f"{tmp_path}/*.py",), errors="skip"))) == ["é", ""]


@pytest.mark.parametrize("pattern", ["c/*.txt", "c/**/*.txt", "**/*.txt", "c/**/**/*.txt"])
def test_each_file_counts_once_among_those_that_are_looked_at(folder, monkeypatch, pattern):
    (folder / "c").mkdir()
    for number in range(15):
        (folder / "c" / f"{number}.txt").write_text("text")
    monkeypatch.setattr(corpora, "MOST_FILES", 15 + 7)  # the four files and three folders beside them
    assert set(texts(pattern)) >= {"text"}
    monkeypatch.setattr(corpora, "MOST_FILES", 14)
    assert "leads past more than 14 files and folders" in refused(pattern)[0]


@pytest.mark.parametrize("good", [True, False])
def test_a_large_file_that_has_not_changed_is_decoded_once(tmp_path, monkeypatch, good):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "a.txt"
    path.write_bytes("é".encode("utf-8" if good else "latin-1") * (1 << 20))
    os.utime(path, (time.time() - 60,) * 2)
    reads, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path.name) or read_bytes(path))

    def opened(**more):
        corpora._undecodable.cache_clear()  # as another command begins
        try:
            return open_corpus(TextFiles(files=(str(path),), **more)).digest
        except InputError as error:
            return str(error)

    first = opened()
    assert reads.count("a.txt") == 1
    assert [opened(), opened()] == [first] * 2
    assert reads.count("a.txt") == 1
    assert ("is not UTF-8 (byte 0)" in first) == (not good)
    opened(encoding="latin-1")
    assert reads.count("a.txt") == 2
    path.write_bytes(("é" if not good else "e").encode() * (1 << 20))
    os.utime(path, (time.time() - 30,) * 2)
    assert opened() != first


def test_line_ends_are_kept_and_the_mark_of_the_file_is_none_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffa\r\n\ufeffb\rc\n".encode())
    assert read_text(tmp_path / "a.txt") == "a\r\n\ufeffb\rc\n"


def test_the_digest_is_that_of_the_contents_the_tokenizer_and_the_split(folder, tmp_path_factory):
    first = digest(folder)
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("copy") / "x")
    (copy / "empty.txt").unlink()
    assert digest(copy) == first
    assert digest(folder, length=16) == first
    others = {digest(folder, fraction=0.1), digest(folder, tokenizer="bpe")}
    (copy / "b.txt").write_text("twO")
    assert len(others | {digest(copy), first}) == 4


@pytest.fixture(scope="session")
def stdlib():
    return open_corpus(PythonStdlib())


def test_the_standard_library_is_there_without_its_tests(stdlib):
    names = [name for name, _ in stdlib.files]
    assert {"argparse.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert names == sorted(names)
    assert stdlib.size > 5_000_000


def test_every_document_of_the_standard_library_can_be_read(stdlib):
    assert all(stdlib)
