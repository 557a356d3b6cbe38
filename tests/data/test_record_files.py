"""Records come back whatever the format, in parts that lose and repeat nothing, or are refused with the place."""

import bz2
import gzip
import json
import lzma
import pickle
import random
import shutil

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import zstandard

from lit_llm.config.problems import InputError
from lit_llm.data import record_files
from lit_llm.data.config import DataConfig
from lit_llm.data.corpora import open_corpus
from lit_llm.data.sources import identify

COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def documents(count=40):
    words = random.Random(0)
    return [" ".join(words.choices('a\nb ü 世界 🙂 \u2028 " \\ \x85 c'.split(" "), k=n + 1)) for n in range(count)]


def redpajama(texts, subset="arxiv"):
    """Lines as RedPajama has them; its meta is an object."""
    return [
        {"text": t, "meta": {"id": n, "even": n % 2 == 0}, "red_pajama_subset": subset} for n, t in enumerate(texts)
    ]


def lines(records, ascii=False):
    return "".join(json.dumps(record, ensure_ascii=ascii) + "\n" for record in records).encode()


def write(path, records):
    """A file of records in the format that its name says."""
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(records), path, row_group_size=7)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(records)
        with pa.ipc.new_stream(path, table.schema) as file:
            file.write_table(table, max_chunksize=7)
    else:
        path.write_bytes(COMPRESS[path.suffix.removesuffix(".jsonl")](lines(records)))
    return path


NAMES = ["a.jsonl", "a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.zst", "a.parquet", "a.arrow"]


def opened(path, **keys):
    if path.suffix == ".arrow":
        reader = record_files.ArrowPart.cut(
            path, record_files.Fields.of(keys.get("text", "text"), keys.get("where", {}))
        )
        return [text for part in reader for text in part]
    kind = "parquet" if path.suffix == ".parquet" else "jsonl"
    return open_corpus(config({"kind": kind, "files": [str(path)], **keys}).corpus)


def config(corpus):
    return DataConfig.model_validate({"corpus": corpus, "tokenizer": "bytes", "sequence_length": 8, "batch_size": 2})


def told(act):
    with pytest.raises(InputError) as caught:
        act()
    return "\n".join(map(str, caught.value.problems))


# --- what is read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_documents_come_back_in_order_whatever_the_format(tmp_path, name):
    assert list(opened(write(tmp_path / name, redpajama(documents())))) == documents()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ({"red_pajama_subset": "c4"}, lambda n: n >= 40),
        ({"red_pajama_subset": ("c4", "arxiv", "book")}, lambda n: True),
        ({"meta.even": True}, lambda n: n % 2 == 0),
        ({"meta.id": (3, 4, 5.0)}, lambda n: n % 40 in (3, 4, 5)),
        ({"meta.id": (3, 4), "red_pajama_subset": "c4"}, lambda n: n in (43, 44)),
    ],
)
def test_where_keeps_the_records_with_one_of_the_values(tmp_path, name, where, kept):
    path = write(tmp_path / name, redpajama(documents()) + redpajama(documents(), "c4"))
    expected = [text for n, text in enumerate(documents() * 2) if kept(n)]
    assert list(opened(path, where=where)) == expected


@pytest.mark.parametrize(("value", "kept"), [(1, ["1", "1.0"]), ("1", ['"1"']), (True, ["true"])])
def test_one_is_not_true_and_not_a_word(tmp_path, value, kept):
    path = tmp_path / "a.jsonl"
    values = [{"text": json.dumps(n), "n": n} for n in (1, "1", True, 1.0, None, [1], {"1": 1})]
    path.write_bytes(lines([*values, {"text": "without"}]))
    assert list(opened(path, where={"n": value})) == kept


@pytest.mark.parametrize("name", NAMES)
def test_the_document_may_lie_inside_another_object(tmp_path, name):
    records = [{"text": 1, "meta": {"body": text, "x": 2}} for text in documents()]
    assert list(opened(write(tmp_path / name, records), text="meta.body")) == documents()


def test_a_key_with_a_dot_in_it_is_found_before_a_path(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([{"a.b": "yes", "a": {"b": "no"}}]))
    assert list(opened(path, text="a.b")) == ["yes"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_lines_may_be_empty_end_in_crlf_begin_with_a_mark_and_lack_the_last_end(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(
        COMPRESS[suffix](b'\xef\xbb\xbf{"text": "1"}\r\n\r\n  \n\n{"text": "2\\u2028"}\n{"text": "\\ud83d\\ude42"}')
    )
    assert list(opened(path)) == ["1", "2\u2028", "🙂"]


def test_a_mark_at_the_beginning_moves_no_line_into_two_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(record_files, "PART", 100)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines([{"text": text} for text in documents()]))
    corpus = opened(tmp_path / "a.jsonl")
    assert len(corpus.parts()) > 5
    assert list(corpus) == documents()


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_files_may_be_joined(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(b"".join(COMPRESS[suffix](lines([{"text": text}])) for text in documents()))
    assert list(opened(path)) == documents()


@pytest.mark.parametrize("suffix", [".gz", ".bz2"])
def test_zeros_behind_an_archive_are_padding(tmp_path, suffix):
    """Tapes and block devices fill their last block with them."""
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](lines([{"text": "x"}])) + bytes(512))
    assert list(opened(path)) == ["x"]


def test_an_arrow_file_is_read_like_a_stream(tmp_path):
    table = pa.Table.from_pylist(redpajama(documents()))
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=7)
    assert opened(tmp_path / "a.arrow") == documents()


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_strings_of_every_arrow_type_are_read(tmp_path, kind):
    parquet.write_table(pa.table({"text": pa.array(documents()).cast(kind)}), tmp_path / "a.parquet")
    assert list(opened(tmp_path / "a.parquet")) == documents()


# --- parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("size", [1, 37, 150, 1000, 10**9])
def test_parts_of_any_size_hold_every_document_once_and_in_order(tmp_path, monkeypatch, name, size):
    monkeypatch.setattr(record_files, "PART", size)
    corpus = opened(write(tmp_path / name, redpajama(documents())))
    parts = pickle.loads(pickle.dumps(corpus.parts()))
    assert [text for part in parts for text in part] == documents() == list(corpus)
    assert len(parts) > 1 or size >= 1000
    if name == "a.jsonl":
        assert sum(part.size for part in parts) == corpus.size
        assert all(part.size >= size for part in parts[:-1])


def test_arrow_parts_hold_every_document_once(tmp_path, monkeypatch):
    monkeypatch.setattr(record_files, "PART", 100)
    path = write(tmp_path / "a.arrow", redpajama(documents()))
    parts = record_files.ArrowPart.cut(path, record_files.Fields("text"))
    assert len(parts) > 2
    assert [text for part in parts for text in part] == documents()


def test_a_line_as_long_as_many_parts_belongs_to_one(tmp_path, monkeypatch):
    monkeypatch.setattr(record_files, "PART", 10)
    texts = ["a", "b" * 200, "c", "d" * 30]
    corpus = opened(write(tmp_path / "a.jsonl", [{"text": text} for text in texts]))
    assert list(corpus) == texts
    assert [list(part) for part in corpus.parts()] == [[text] for text in texts]


def test_only_the_columns_that_are_needed_are_read(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", redpajama(documents()))
    asked, real = [], parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        parquet.ParquetFile, "iter_batches", lambda *a, **k: asked.append(k["columns"]) or real(*a, **k)
    )
    list(opened(path, where={"meta.even": True}))
    assert {name for names in asked for name in names} == {"text", "meta.even"}


# --- what is refused, before anything starts -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', "is not JSON: Expecting ',' delimiter"),
        (b"plain words", "is not JSON"),
        (b'["text", "x"]', "should be an object"),
        (b"null", "should be an object"),
        (b'{"text": "x"}{"text": "y"}', "is not JSON: Extra data"),
        (b'{"text":\n"x"}', "is not JSON"),
        (b'{"txt": "x"}', "has no text under 'text' - did you mean 'txt'?"),
        (b'{"text": null}', "has no text under 'text'"),
        (b'{"text": 3}', "'text' should be a string, not 3"),
        (b'{"text": ["x"]}', """'text' should be a string, not ["x"]"""),
        (b'{"text": "\xff"}', "is not UTF-8 (byte 10 of the line)"),
        (b'{"text": "a\\ud83d"}', "'text' has \\ud83d, half of a character"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
@pytest.mark.parametrize("before", [0, 30])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_broken_line_is_told_with_its_file_and_number(tmp_path, monkeypatch, line, message, before, suffix):
    """The first line already when the corpus is opened; parts do not shift the number."""
    monkeypatch.setattr(record_files, "PART", 100)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](b'{"text": "good words"}\n\n' * before + line + b'\n{"text": "more"}\n'))
    said = told(lambda: list(opened(path)) if before else opened(path))
    assert said.startswith(f"corpus: {path}:{2 * before + 1}: ")
    assert message in said
    assert "\n" not in said


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_what_is_not_compressed_as_its_name_says_is_refused_when_opened(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(lines(redpajama(documents())))
    assert told(lambda: opened(path)).startswith(f"corpus: {path}:1: is damaged or cannot be read: ")


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("left", [0.3, 0.9, -1])
def test_a_truncated_file_is_refused_and_not_read_as_a_shorter_one(tmp_path, suffix, left):
    words = random.Random(0)
    records = [{"text": "".join(words.choices("abcdefghijkl 世界", k=200))} for _ in range(3000)]
    path, whole = tmp_path / f"a.jsonl{suffix}", COMPRESS[suffix](lines(records))
    path.write_bytes(whole[: int(len(whole) * left) if left > 0 else left])
    said = told(lambda: list(opened(path)))
    assert said.startswith(f"corpus: {path}:")
    assert "is damaged or cannot be read" in said


def test_a_gz_with_wrong_bytes_inside_is_refused(tmp_path):
    content = bytearray(gzip.compress(lines(redpajama(documents(400)))))
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    assert "a.jsonl.gz:" in told(lambda: list(opened(tmp_path / "a.jsonl.gz")))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_columns_that_are_not_there_are_told_with_the_nearest(tmp_path, name):
    path = write(tmp_path / name, redpajama(documents()))
    said = told(lambda: opened(path, text="txet", where={"meta.odd": True}))
    assert f"corpus: {path}: has no column 'txet' - did you mean 'text'?" in said
    assert f"corpus: {path}: has no column 'meta.odd'" in said
    assert f"corpus: {path}: column 'meta.id' should hold strings, not int64" in told(
        lambda: opened(path, text="meta.id")
    )


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_table_that_is_none_is_refused_when_opened(tmp_path, name):
    (tmp_path / name).write_bytes(b"These are plain words and no table at all.")
    assert told(lambda: opened(tmp_path / name)).startswith(f"corpus: {tmp_path / name}: is no ")
    whole = write(tmp_path / f"whole{name}", redpajama(documents())).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    assert told(lambda: opened(tmp_path / name)).startswith(f"corpus: {tmp_path / name}: is no ")


def test_a_row_without_text_is_told_with_its_row_group(tmp_path):
    records = redpajama(documents(20))
    records[16]["text"] = None  # row groups hold seven rows
    path = write(tmp_path / "a.parquet", records)
    corpus = opened(path)
    assert (
        told(lambda: list(corpus))
        == f"corpus: {path} row group 2, row 2: column 'text' has no text; `skip_missing: true` leaves such records out"
    )
    assert len(list(opened(path, where={"meta.even": False}))) == 10  # what is skipped needs none


def test_a_damaged_row_group_is_told_when_its_part_is_read(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": documents()}), path, row_group_size=10, compression="gzip")
    column = parquet.ParquetFile(path).metadata.row_group(2).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    corpus = opened(path)
    assert told(lambda: list(corpus)).startswith(f"corpus: {path} row group 2: is damaged: ")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_corpus_of_which_nothing_is_kept_is_refused_when_opened(tmp_path, monkeypatch, name):
    monkeypatch.setattr(record_files, "PART", 500)
    path = write(tmp_path / name, redpajama(documents()))
    said = told(lambda: opened(path, where={"red_pajama_subset": ("c4", "book")}))
    assert said == (
        "corpus.where: no record of these files has {red_pajama_subset: ['c4', 'book']}, so there are no documents"
    )


def test_a_corpus_whose_only_match_is_its_last_record_is_read(tmp_path):
    records = redpajama(["x"] * 2500) + redpajama(["the one"], "c4")
    path = write(tmp_path / "a.jsonl", records)
    assert list(opened(path, where={"red_pajama_subset": "c4"})) == ["the one"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.parquet"])
def test_files_without_documents_are_refused(tmp_path, name):
    path = tmp_path / name
    if name == "a.parquet":
        parquet.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    else:
        path.write_bytes(COMPRESS[path.suffix.removesuffix(".jsonl")](b"\n  \n\n"))
    assert told(lambda: opened(path)) == "corpus: these files hold no documents"


def test_every_file_that_is_wrong_is_told_at_once(tmp_path):
    (tmp_path / "a.jsonl").write_text("{")
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}')
    (tmp_path / "c.jsonl").write_text("[]")
    corpus = config({"kind": "jsonl", "files": [f"{tmp_path}/*.jsonl"]}).corpus
    assert [line.split(":")[1].strip()[-7:] for line in told(lambda: open_corpus(corpus)).split("\n")] == [
        "a.jsonl",
        "c.jsonl",
    ]
    missing = config({"kind": "parquet", "files": [f"{tmp_path}"]}).corpus
    assert f"is a directory; write {tmp_path}/**/*.parquet" in told(lambda: open_corpus(missing))


# --- identity ------------------------------------------------------------------------------------------------------


def test_what_is_read_of_the_files_is_in_the_digest_and_where_they_lie_is_not(tmp_path):
    write(tmp_path / "a.jsonl", redpajama(documents()))
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "other/b.jsonl")

    def digest(path="a.jsonl", **keys):
        return identify(config({"kind": "jsonl", "files": [str(tmp_path / path)], **keys})).digest

    assert digest() == digest("other/b.jsonl") == digest(text="text", where={})
    assert digest(where={"meta.id": [3, 1]}) == digest(where={"meta.id": [1, 3.0, 3]})
    assert digest(where={"meta.even": True}) == digest(where={"meta.even": [True]})
    two = {"meta.even": True, "red_pajama_subset": "arxiv"}
    assert digest(where=two) == digest(where=dict(reversed(two.items())))
    different = [digest(), digest(text="red_pajama_subset"), digest(where={"meta.id": 1})]
    different += [digest(where={"meta.id": [1, 3]}), digest(where={"red_pajama_subset": "arxiv"})]
    write(tmp_path / "a.jsonl", redpajama(documents(41)))
    assert len({*different, digest()}) == 6


@pytest.mark.parametrize("where", [{"a": []}, {"a": None}, {"a": [None]}, ["a"], "a"])
def test_a_condition_has_values(where):
    with pytest.raises(ValueError, match="where"):
        config({"kind": "jsonl", "files": ["a"], "where": where})
