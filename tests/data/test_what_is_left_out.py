"""Text that cannot be read is refused all at once, before anything is tokenised, or left out where one asks for it."""

import errno
import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from lit_llm.config.problems import InputError
from lit_llm.data.config import ByteTokenizer, DataConfig, InstructionConfig, JsonLines, Parquet, TextFiles
from lit_llm.data.corpora import open_corpus
from lit_llm.data.examples import prepare_examples
from lit_llm.data.instructions import identify_examples, read_examples
from lit_llm.data.prepare import prepare


def refused(config):
    with pytest.raises(InputError) as error:
        list(open_corpus(config))
    return [str(problem) for problem in error.value.problems]


@pytest.fixture
def latin(tmp_path):
    """Thirty files of text, two of them in Latin-1."""
    for number in range(30):
        text = f"größe {number} " * 20
        (tmp_path / f"{number:02}.txt").write_bytes(text.encode("latin-1" if number in (3, 7) else "utf-8"))
    return tmp_path


def test_all_files_of_another_encoding_are_told_when_the_corpus_is_opened(latin):
    with pytest.raises(InputError) as error:
        open_corpus(TextFiles(files=(f"{latin}/*.txt",)))
    assert [problem.key for problem in error.value.problems] == [f"corpus.files: {latin}/{n}.txt" for n in ("03", "07")]
    assert "is not UTF-8 (byte 2); name its `encoding`" in error.value.problems[0].message


def test_an_encoding_is_read_and_one_that_does_not_exist_is_told(latin):
    file = str(latin / "03.txt")
    (text,) = open_corpus(TextFiles(files=(file,), encoding="latin-1"))
    assert text.startswith("größe 3")
    for name in ("utf-9", "hex"):
        with pytest.raises(ValidationError, match="is no encoding"):
            TextFiles(files=(file,), encoding=name)
    plain, named = TextFiles(files=(file,), errors="skip"), TextFiles(files=(file,), encoding="latin1")
    assert "none of these files is utf-8" in refused(plain)[0]
    assert open_corpus(named).digest == open_corpus(TextFiles(files=(file,), encoding="latin-1")).digest


def prepared(corpus, root):
    section = {"corpus": corpus, "tokenizer": "bytes", "sequence_length": 8, "batch_size": 2, "near_duplicates": "keep"}
    data = prepare(DataConfig.model_validate(section | {"validation_fraction": 0.2, "test_fraction": 0.2}), root)
    return json.loads((data.sources[0].folder / "meta.json").read_text())


def test_a_file_that_cannot_be_read_is_never_left_out(latin, monkeypatch):
    """A full disk or a lost connection is no matter of encodings."""
    documents = open_corpus(TextFiles(files=(f"{latin}/*.txt",), errors="skip"))
    read_bytes = Path.read_bytes

    def broken(path):
        if path.name == "05.txt":
            raise OSError(errno.EIO, "Input/output error")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", broken)
    with pytest.raises(InputError, match=r"05.txt: cannot be read: Input/output error"):
        list(documents)
    (latin / "05.txt").write_text("not read before")
    with pytest.raises(InputError, match=r"05.txt: cannot be read: Input/output error"):
        open_corpus(TextFiles(files=(f"{latin}/*.txt",), errors="skip"))


def test_files_that_are_left_out_are_counted(latin):
    meta = prepared({"kind": "text", "files": [f"{latin}/*.txt"], "errors": "skip"}, latin / "root")
    assert meta["skipped"] == {"without_text": 0, "undecodable": 2}
    assert meta["documents"] == 28


def lines(path, *, missing=True, broken=True):
    rows = [json.dumps({"text": f"document {number}"}).encode() for number in range(30)]
    rows += [b'{"id": 3}', b'{"text": null}'] * missing + ['{"text": "größe"}'.encode("latin-1")] * broken
    path.write_bytes(b"\n".join(rows))
    return str(path)


def test_records_without_text_and_lines_of_another_encoding_are_left_out_where_one_asks_for_it(tmp_path):
    both = lines(tmp_path / "both.jsonl")
    corpus = {"kind": "jsonl", "files": [both], "skip_missing": True, "errors": "skip"}
    meta = prepared(corpus, tmp_path / "root")
    assert meta["skipped"] == {"without_text": 2, "undecodable": 1}
    assert meta["documents"] == 30
    assert "has no text under 'text'" in refused(JsonLines(files=(both,)))[0]
    assert "`skip_missing: true`" in refused(JsonLines(files=(both,)))[0]
    assert "`errors: skip`" in refused(JsonLines(files=(lines(tmp_path / "b.jsonl", missing=False),)))[0]


def test_rows_without_text_are_left_out_where_one_asks_for_it(tmp_path):
    path = str(tmp_path / "a.parquet")
    pa.parquet.write_table(pa.table({"text": ["one", None, "two"]}), path)
    assert "`skip_missing: true`" in refused(Parquet(files=(path,)))[0]
    documents = open_corpus(Parquet(files=(path,), skip_missing=True))
    assert list(documents) == ["one", "two"]
    pa.parquet.write_table(pa.table({"text": pa.array([None, None], pa.string())}), path)
    assert "hold no documents" in refused(Parquet(files=(path,), skip_missing=True))[0]


def test_examples_without_a_field_and_lines_of_another_encoding_are_counted(tmp_path):
    """One without either field counts once, one that `where` leaves out not at all."""
    path = tmp_path / "asked.jsonl"
    rows = [{"inputs": f"{n}?", "targets": f"{n}", "kind": "sum"} for n in range(60)]
    rows += [{"inputs": "no answer?", "kind": "sum"}, {"targets": "no question", "kind": "sum"}, {"kind": "sum"}]
    rows += [{"inputs": "other?", "targets": "other", "kind": "other"}] * 5
    text = [json.dumps(row).encode() for row in rows] + ['{"inputs": "größe"}'.encode("latin-1")]
    path.write_bytes(b"\n".join(text))
    chosen = JsonLines(files=(str(path),), where={"kind": "sum"}, skip_missing=True, errors="skip")
    config = InstructionConfig(examples=chosen, input_length=8, target_length=4, batch_size=2)
    left_out = Counter()
    assert len(list(read_examples(config, "examples", left_out))) == 60
    assert left_out == {"without_text": 3, "undecodable": 1}


@pytest.mark.parametrize("compressed", [False, True])
def test_records_that_are_looked_at_before_they_are_read_count_once(compressed, tmp_path):
    """Those without text come first, where a file's form is looked for, and a document."""
    rows = [{"inputs": f"{n}?", "targets": None} for n in range(3)]
    rows += [{"inputs": f"{n}?", "targets": f"{n}"} for n in range(60)]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = tmp_path / ("asked.jsonl.gz" if compressed else "asked.jsonl")
    path.write_bytes(gzip.compress(content) if compressed else content)
    section = {"examples": {"kind": "jsonl", "files": [str(path)], "skip_missing": True}, "batch_size": 2}
    section |= {"inputs": "{targets}", "targets": "{targets}"}
    config = InstructionConfig.model_validate(section | {"input_length": 8, "target_length": 4})
    digest = identify_examples(config, "bytes")
    prepare_examples(config, ByteTokenizer(), tmp_path / "bytes", tmp_path / "root", digest)
    meta = json.loads((tmp_path / "root" / "examples" / digest / "meta.json").read_text())
    assert meta["skipped"] == {"without_text": 3, "undecodable": 0}


LONG_WINDOW = bytes.fromhex(
    "28b52ffd0090450100d07b2274657874223a2022646f632030227d0a3132333435227d0a05006016301f98199885926718"
)


def test_a_window_that_is_too_long_is_called_so(tmp_path):
    """Written by `zstd --long=31`."""
    path = tmp_path / "long.jsonl.zst"
    path.write_bytes(LONG_WINDOW)
    assert "window of more than 128 MiB (zstd --long)" in refused(JsonLines(files=(str(path),)))[0]


def test_a_home_and_variables_stand_for_what_they_are_in_a_shell(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.txt").write_text("text")
    for written in ("~/x.txt", "$HOME/*.txt"):
        assert list(open_corpus(TextFiles(files=(written,)))) == ["text"]
