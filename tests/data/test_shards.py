"""Tokens in shards: the same whoever wrote them and however often they were killed, read as one sequence."""

import hashlib
import itertools
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import psutil
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from lit_llm.config.problems import InputError, Problem
from lit_llm.data import corpora, processes, record_files, shards, tokenizers
from lit_llm.data.config import DataConfig, JsonLines
from lit_llm.data.library_tokenizer import FromFile
from lit_llm.data.prepare import prepare
from lit_llm.data.shards import Shards
from lit_llm.data.splits import SPLITS
from lit_llm.data.tokenizers import SPECIAL, pieces, train_bpe
from lit_llm.objectives.config import EOD

PAIR = {"kind": "bpe", "vocabulary": 400}


def config(folder, tokenizer="bytes", near_duplicates="drop"):
    corpus = {"kind": "text", "files": [f"{folder}/*.txt"]}
    content = {"corpus": corpus, "tokenizer": tokenizer, "sequence_length": 16, "batch_size": 2}
    return DataConfig.model_validate(
        content | {"validation_fraction": 0.2, "test_fraction": 0.1, "near_duplicates": near_duplicates}
    )


def write_documents(folder, number, words):
    folder.mkdir()
    draw, letters = random.Random(0), "abcdefghij"
    for n in range(number):
        text = " ".join("".join(draw.choices(letters, k=draw.randint(1, 8))) for _ in range(words))
        (folder / f"{n:03}.txt").write_text(f"{n}\n{text} 世界 🙂")
    return folder


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Sixty documents of about 1 kB."""
    return write_documents(tmp_path_factory.mktemp("shards") / "texts", 60, 200)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(corpora, "PART", 5000)


def tokens_of(prepared):
    """{split: all ids} of the only source."""
    (source,) = prepared.sources
    opened = {split: prepared.open(source, split) for split in SPLITS}
    return {split: found.read(np.array([0]), len(found))[0] for split, found in opened.items()}


def contents(root):
    """{name: hash} of every file but the locks."""
    files = [path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- the same tokens, whoever writes them --------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["bytes", PAIR], ids=["bytes", "bpe"])
def test_the_number_of_processes_changes_no_byte(documents, tmp_path, monkeypatch, small_parts, tokenizer):
    for count in (1, 3):
        monkeypatch.setattr(processes, "cores", lambda count=count: count)
        prepare(config(documents, tokenizer), tmp_path / str(count))
    one, three = (contents(tmp_path / str(count)) for count in (1, 3))
    assert one == three
    assert len([name for name in one if name.endswith("train.bin")]) > 5


def test_how_the_corpus_is_cut_into_parts_changes_no_token(documents, tmp_path, monkeypatch):
    """Every document appears once and in order: the shards together are the one shard of an uncut corpus."""
    whole = prepare(config(documents), tmp_path / "whole")
    monkeypatch.setattr(corpora, "PART", 5000)
    cut = prepare(config(documents), tmp_path / "cut")
    assert [len(source.tokens["train"]) > 5 for prepared in (whole, cut) for source in prepared.sources] == [
        False,
        True,
    ]
    for split in SPLITS:
        assert np.array_equal(tokens_of(whole)[split], tokens_of(cut)[split])
    texts = [text for path in sorted(documents.iterdir()) if (text := path.read_text())]
    found = []
    for split in SPLITS:
        ids = tokens_of(cut)[split]
        found += [cut.tokenizer().decode(part) for part in np.split(ids, np.flatnonzero(ids == EOD) + 1)[:-1]]
    assert sorted(found) == sorted(texts)


def test_one_part_is_tokenised_without_another_process(documents, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("a process was started")

    monkeypatch.setattr(processes, "_in_processes", refuse)
    assert len(tokens_of(prepare(config(documents), tmp_path))["train"]) > 10_000


def test_a_part_of_an_older_cut_is_not_taken_for_one_of_the_new(documents, tmp_path, monkeypatch):
    """A killed run of a version that cut the corpus elsewhere has left parts under the same numbers."""
    whole = prepare(config(documents), tmp_path / "whole")
    monkeypatch.setattr(corpora, "PART", 5000)

    def fail_in_the_middle(what, done, total):
        if what == "tokenising" and done > total / 2:
            raise RuntimeError

    monkeypatch.setattr(processes, "cores", lambda: 1)
    with pytest.raises(RuntimeError):
        prepare(config(documents), tmp_path / "again", fail_in_the_middle)
    assert len(list(tmp_path.glob("again/.*/0*.json"))) > 5
    monkeypatch.setattr(corpora, "PART", 9000)
    again = prepare(config(documents), tmp_path / "again")
    for split in SPLITS:
        assert np.array_equal(tokens_of(again)[split], tokens_of(whole)[split])


# --- killed and restarted ------------------------------------------------------------------------------------------

PROGRAM = """
import sys
from pathlib import Path
from lit_llm.config.problems import InputError
from lit_llm.data import corpora, processes, record_files, shards, tokenizers
from lit_llm.data.config import DataConfig, JsonLines
from lit_llm.data.prepare import prepare

corpora.PART = int(sys.argv[3])
processes.cores = lambda: 2
if __name__ == "__main__":
    try:
        prepare(DataConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]), lambda *step: print(*step, flush=True))
    except InputError as error:
        sys.exit(str(error))
"""


@pytest.fixture
def start(tmp_path):
    """start(config, root, part): the program that prepares in two processes."""
    (tmp_path / "program.py").write_text(PROGRAM)
    started = []

    def run(data, root, part, **options):
        command = [sys.executable, tmp_path / "program.py", data.model_dump_json(), root, str(part)]
        started.append(subprocess.Popen(command, text=True, stderr=subprocess.PIPE, **options))
        return started[-1]

    yield run
    for process in started:
        process.kill()


def family(process):
    """The workers: children that are not multiprocessing's own tracker."""
    found = []
    for child in psutil.Process(process.pid).children():
        with suppress(psutil.Error):  # it has ended meanwhile
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
    return found


def killed_and_restarted(start, data, root, part, victim, rounds, most):
    """Kill the coordinator or a worker at random moments, then let it finish. Returns how many rounds were killed.

    A round is killed once it has finished up to `most` parts, so that no machine is too fast or too slow for it.
    """
    draw, kills = random.Random(len(victim)), 0
    for _ in range(rounds):
        process = start(data, root, part, stdout=subprocess.DEVNULL)
        goal, workers = finished_parts(root) + draw.randint(0, most), []
        while process.poll() is None and not (workers and finished_parts(root) >= goal):
            time.sleep(draw.uniform(0, 0.02))
            with suppress(psutil.NoSuchProcess):
                workers = family(process)
        if process.poll() is not None:  # all was done before the goal
            break
        try:
            psutil.Process(process.pid if victim == "coordinator" else draw.choice(workers).pid).kill()
        except psutil.NoSuchProcess:
            continue
        error = process.communicate(timeout=200)[1]
        kills += 1
        if victim == "coordinator":
            assert psutil.wait_procs(workers, timeout=100)[1] == []  # no orphan
        elif process.returncode:  # else it was done already
            assert "was killed, perhaps for want of memory" in error
            assert "Traceback" not in error
    final = start(data, root, part, stdout=subprocess.DEVNULL)
    assert final.communicate(timeout=300)[1] == ""
    assert final.returncode == 0
    return kills


def finished_parts(root):
    return len(list(root.glob(".*/0*.json")))


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["coordinator", "worker"])
@pytest.mark.parametrize("tokenizer", ["bytes", PAIR], ids=["bytes", "bpe"])
def test_kills_at_random_moments_change_no_byte(tmp_path, start, monkeypatch, victim, tokenizer):
    """12 MB in 200 parts, killed eight times within the first 160."""
    data = config(write_documents(tmp_path / "texts", 200, 11_000), tokenizer)
    monkeypatch.setattr(corpora, "PART", 60_000)
    prepare(data, tmp_path / "undisturbed")
    kills = killed_and_restarted(start, data, tmp_path / "killed", 60_000, victim, rounds=8, most=18)
    assert kills >= 4
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


def test_what_a_killed_tokenisation_has_finished_is_not_done_again(documents, tmp_path, start, small_parts):
    """Killed when half of the parts are done: the files of the finished ones are not written anew."""
    data, root = config(documents), tmp_path / "killed"
    process = start(data, root, 5000, stdout=subprocess.PIPE)
    for line in process.stdout:
        *_, done, total = line.split()
        if "tokenising" in line and int(done) > int(total) / 3:
            workers = family(process)
            process.kill()
            break
    process.communicate(timeout=200)
    assert psutil.wait_procs(workers, timeout=100)[1] == []  # they end by themselves
    before = {path.name: path.stat() for path in root.glob(".*/0*.json")}
    assert len(before) > 3
    prepare(data, tmp_path / "whole")
    (source,) = prepare(data, root).sources
    assert all((source.folder / name).stat().st_ino == stat.st_ino for name, stat in before.items())
    assert contents(root) == contents(tmp_path / "whole")


def test_ctrl_c_ends_it_quietly_without_orphans_and_it_goes_on(tmp_path, start, monkeypatch):
    """The signal goes to the whole group, as a terminal sends it."""
    data, root = config(write_documents(tmp_path / "texts", 40, 11_000)), tmp_path / "data"
    process = start(data, root, 60_000, stdout=subprocess.PIPE, start_new_session=True)
    for line in process.stdout:
        if "tokenising" in line and int(line.split()[1]) > 0:
            break
    workers = family(process)
    assert len(workers) == 2
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=200)[1]
    assert error.count("Traceback") == 1  # this program's own KeyboardInterrupt, none of a worker's
    assert psutil.wait_procs(workers, timeout=100)[1] == []
    assert list(root.glob(".*/0*.json"))
    monkeypatch.setattr(corpora, "PART", 60_000)
    prepare(data, root)
    prepare(data, tmp_path / "whole")
    assert contents(root) == contents(tmp_path / "whole")


def test_workers_do_not_load_torch(documents, tmp_path, start):
    """torch is seconds and hundreds of megabytes for every core."""
    process = start(config(documents), tmp_path / "data", 500, stdout=subprocess.PIPE)
    process.stdout.readline()
    maps = ""
    while process.poll() is None and "tokenizers" not in maps:
        for worker in family(process):
            try:
                maps = " ".join(found.path for found in worker.memory_maps())
            except psutil.Error:
                continue
    process.communicate(timeout=300)
    assert process.returncode == 0
    assert "libtorch" not in maps


# --- what a user hears ---------------------------------------------------------------------------------------------


def test_an_unreadable_document_is_told_by_a_worker_as_it_is_told_here(tmp_path, monkeypatch):
    monkeypatch.setattr(record_files, "PART", 5000)
    texts = [path.read_text() for path in sorted(write_documents(tmp_path / "texts", 60, 200).iterdir())]
    lines = [json.dumps({"text": text}) for text in texts]
    lines[30] = '{"text": "broken'
    file = tmp_path / "all.jsonl"
    file.write_text("\n".join(lines))
    plain = config(tmp_path, near_duplicates="keep")  # signing would read it before
    asked = plain.model_copy(update={"corpus": JsonLines(files=(str(file),))})
    said = []
    for count in (1, 2):
        monkeypatch.setattr(processes, "cores", lambda count=count: count)
        with pytest.raises(InputError) as caught:
            prepare(asked, tmp_path / str(count))
        said.append([(problem.key, problem.message[:11]) for problem in caught.value.problems])
    assert said[0] == said[1] == [(f"corpus: {file}:31", "is not JSON")]
    assert list((tmp_path / "1").glob(".*/00000.json"))  # what was done before is kept


def test_an_error_of_the_user_keeps_its_parts_on_its_way_between_processes():
    error = InputError(Problem("message", "key"), "second", hint="hint")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.problems, copy.hint, str(copy)) == (error.problems, error.hint, str(error))


def test_a_disk_that_takes_no_more_is_one_message(documents, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "file")

    monkeypatch.setattr(shards.os, "fsync", full)
    monkeypatch.setattr("lit_llm.data.prepare.write_json", full)
    with pytest.raises(InputError, match="corpus: tokenising stopped: No space left on device"):
        prepare(config(documents), tmp_path / "data")


def test_a_script_without_a_guard_is_told_what_it_lacks(documents, tmp_path):
    """Each process imports the script, which would begin all over: there it ends instead of waiting for itself."""
    program = PROGRAM.replace('if __name__ == "__main__":', "if True:")
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, tmp_path / "program.py", config(documents).model_dump_json(), tmp_path / "data", "5000"]
    done = subprocess.run(command, text=True, capture_output=True, timeout=300)
    assert done.returncode == 1
    assert 'outside of `if __name__ == "__main__":`' in done.stderr
    assert "Traceback" not in done.stderr


# --- long documents ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "several words  and   runs of\n\n  space\t\tand tabs \n" * 40,
        "世界 🙂 Grüße don't 123 x**2\x1c \x85 \u2028 " * 40,
        "a" * 500,
        " " * 500,
        "x" + " \n" * 300,
    ],
)
@pytest.mark.parametrize("size", [100, 333, 1000])
def test_a_long_document_is_cut_where_a_byte_level_tokenizer_cuts_as_well(tmp_path, monkeypatch, text, size):
    """Judge: the library's own tokenisation of the whole text. Where there is no such place, the text is kept."""
    train_bpe(["several words and runs of space and tabs " * 20, "  \n\n aaaa"], 330, tmp_path / "tokenizer.json")
    tokenizer = FromFile(tmp_path / "tokenizer.json", *SPECIAL)
    monkeypatch.setattr(tokenizers, "_PIECE", size)
    cut = list(pieces(text))
    assert "".join(cut) == text
    assert all(0 < len(piece) <= size for piece in cut)
    if all(end[-1].strip() and start[0] in " \n" for end, start in itertools.pairwise(cut)):
        ids = np.concatenate(tokenizer.encode(cut))
        assert np.array_equal(ids, tokenizer.encode([text])[0])
    else:
        assert len(set(text.strip())) < 2  # only in what has no word end


def test_a_document_of_many_pieces_has_one_end_and_lies_on_one_side(documents, tmp_path, monkeypatch):
    whole = prepare(config(documents, PAIR), tmp_path / "whole")
    monkeypatch.setattr(tokenizers, "_PIECE", 100)
    cut = prepare(config(documents, PAIR), tmp_path / "cut")
    for split in SPLITS:
        assert np.array_equal(tokens_of(whole)[split], tokens_of(cut)[split])


def test_a_document_is_not_cut_for_a_tokenizer_that_would_notice(documents, tmp_path, monkeypatch):
    """SentencePiece begins every text with a space: a piece in the middle would have one that the text has not."""
    save_sentencepiece(tmp_path / "metaspace.json")
    file = {"kind": "file", "path": str(tmp_path / "metaspace.json")}
    whole = prepare(config(documents, file), tmp_path / "whole")
    monkeypatch.setattr(tokenizers, "_PIECE", 100)
    cut = prepare(config(documents, file), tmp_path / "cut")
    for split in SPLITS:
        assert np.array_equal(tokens_of(whole)[split], tokens_of(cut)[split])


def save_sentencepiece(path):
    """As Llama 2's: words are not told apart before the model."""
    library = Tokenizer(models.BPE(unk_token="<unk>"))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special)
    library.train_from_iterator(["some words that are said"] * 5, trainer)
    library.save(str(path))


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")
NATIVE = "some words, that are said.\n\nDon't say 12345 of them!\n  {x: 'y'};\t(e\u0301 世界。)\n世界\n" * 30


def save_byte_level(path, pattern, normalizer=None, added=()):
    library = Tokenizer(models.BPE())
    library.normalizer = normalizer
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library.train_from_iterator([NATIVE], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    library.add_tokens([AddedToken(text, **flags) for text, flags in added])
    library.save(str(path))


@pytest.mark.parametrize("size", [60, 150, 333])
@pytest.mark.parametrize(
    ("pattern", "options", "least"),
    [
        (GPT2, {}, 2),
        (LLAMA3, {}, 2),  # it takes the line end after a stop into the stop's word
        (QWEN, {"normalizer": normalizers.NFC()}, 2),
        (GPT2, {"added": [("are said", {}), ("words,", {"rstrip": True})]}, 2),
        (GPT2, {"normalizer": normalizers.Strip()}, 0),
        (GPT2, {"normalizer": normalizers.Prepend("x")}, 0),
        (r"[\s\S]+", {}, 0),
    ],
    ids=["gpt2", "llama3", "qwen", "added", "strip", "prepend", "no-words"],
)
def test_a_document_is_cut_for_a_tokenizer_of_a_file_where_no_id_changes(
    tmp_path, monkeypatch, pattern, options, least, size
):
    """Judge: the library's own tokenisation of the whole text."""
    save_byte_level(tmp_path / "tokenizer.json", pattern, **options)
    tokenizer = FromFile(tmp_path / "tokenizer.json", None, None)
    monkeypatch.setattr(tokenizers, "_PIECE", size)
    cut = list(pieces(NATIVE, tokenizer.splits_at))
    assert "".join(cut) == NATIVE
    assert len(cut) >= least if least else len(cut) == 1
    assert np.array_equal(np.concatenate(tokenizer.encode(cut)), tokenizer.encode([NATIVE])[0])


def test_a_document_is_not_cut_where_no_word_ends_however_equal_it_looks_from_near(tmp_path, monkeypatch):
    """Without words, merges pair the units of a run from its far beginning: 299 of them before the cut, 128 in view."""
    library = Tokenizer(models.BPE({"x": 0, "y": 1, "Ġ": 2, "Ġx": 3, "ĠxĠx": 4}, [("Ġ", "x"), ("Ġx", "Ġx")]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = FromFile(tmp_path / "tokenizer.json", None, None)
    monkeypatch.setattr(tokenizers, "_PIECE", 600)
    assert list(pieces("y" + " x" * 1000, tokenizer.splits_at)) == ["y" + " x" * 1000]


def test_a_document_that_takes_too_much_memory_uncut_is_refused_with_its_file(tmp_path, monkeypatch):
    folder = write_documents(tmp_path / "texts", 20, 100)
    (folder / "007.txt").write_text("long " * 1000)
    monkeypatch.setattr(shards, "_MOST", 4000)
    monkeypatch.setattr(tokenizers, "_PIECE", 1000)
    save_sentencepiece(tmp_path / "sentencepiece.json")
    save_byte_level(tmp_path / "byte_level.json", GPT2)
    with pytest.raises(InputError, match=r"007\.txt: a document has 5000 characters .* split the document") as caught:
        prepare(config(folder, {"kind": "file", "path": str(tmp_path / "sentencepiece.json")}), tmp_path / "data")
    assert len(caught.value.problems) == 1
    for other in ("bytes", PAIR, {"kind": "file", "path": str(tmp_path / "byte_level.json")}):
        prepare(config(folder, other), tmp_path / "data")


# --- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[50], [1] * 50, [0, 13, 0, 0, 20, 1, 16, 0], [3, 47], [49, 0, 1]])
def test_a_window_over_many_shards_is_that_of_the_tokens_in_one_row(tmp_path, counts):
    row = np.random.default_rng(0).integers(0, 60000, 50).astype(np.uint16)
    for number, part in enumerate(np.split(row, np.cumsum(counts)[:-1])):
        part.tofile(tmp_path / f"{number:05}.train.bin")
    found = Shards(tmp_path, "train", counts, np.uint16)
    assert len(found) == 50
    for length in (1, 2, 7, 50):
        starts = np.random.default_rng(1).permutation(50 - length + 1)
        expected = np.stack([row[start : start + length] for start in starts])
        for opened in (found, pickle.loads(pickle.dumps(found))):
            got = opened.read(starts, length)
            assert got.dtype == np.int64
            assert np.array_equal(got, expected)


def test_a_pickled_reader_takes_no_tokens_along(tmp_path):
    np.zeros(100_000, dtype=np.uint16).tofile(tmp_path / "00000.train.bin")
    found = Shards(tmp_path, "train", [100_000], np.uint16)
    found.read(np.array([0]), 10)
    assert len(pickle.dumps(found)) < 2000


def test_only_what_is_read_is_opened(tmp_path):
    """A terabyte has sixty thousand shards; opening it opens none."""
    found = Shards(tmp_path / "nothing here", "train", [10, 10], np.uint16)
    assert len(found) == 20
    np.arange(10, dtype=np.uint16).tofile(tmp_path / "00001.train.bin")
    found = Shards(tmp_path, "train", [10, 10], np.uint16)
    assert found.read(np.array([12]), 3).tolist() == [[2, 3, 4]]


def test_more_shards_are_read_than_a_process_may_have_files(tmp_path):
    """A terabyte has sixty thousand shards; a process may have 1024 files by default, here fewer."""
    count = 300
    for number in range(count):
        np.array([number], dtype=np.uint16).tofile(tmp_path / f"{number:05}.train.bin")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
    try:
        read = Shards(tmp_path, "train", [1] * count, np.uint16).read(np.array([0, 1]), count - 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert np.array_equal(read, [np.arange(count - 1), np.arange(1, count)])


def test_meta_counts_what_the_shards_hold(documents, tmp_path, small_parts):
    (source,) = prepare(config(documents), tmp_path).sources
    meta = json.loads((source.folder / "meta.json").read_text())
    for split in SPLITS:
        sizes = [path.stat().st_size // 2 for path in sorted(source.folder.glob(f"*.{split}.bin"))]
        assert meta["tokens"][split] == sizes == list(source.tokens[split])
    assert meta["documents"] == 60
