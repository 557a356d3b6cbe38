"""Datasets of the Hub are found where `datasets` and `hf download` put them, and nothing asks the network."""

import os
import socket
import subprocess
import sys
import time

import pytest

from lit_llm.config.problems import InputError
from lit_llm.data.config import DataConfig, HuggingFace
from lit_llm.data.corpora import open_corpus
from lit_llm.data.sources import identify

datasets = pytest.importorskip("datasets")

TEXTS = [f"document {n} " * (n + 1) for n in range(50)]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Whoever asks for a name on the network is caught, also where the error is swallowed."""
    asked = []

    def refuse(*address, **options):
        asked.append(address)
        raise OSError("there is no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    datasets.disable_progress_bars()
    yield
    assert asked == []


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the Hub."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def rows(texts=TEXTS):
    return datasets.Dataset.from_dict({"text": texts, "lang": ["en" if text in TEXTS[::2] else "de" for text in texts]})


def texts(path, **keys):
    return list(open_corpus(HuggingFace(path=str(path), **keys)))


def told(path, **keys):
    with pytest.raises(InputError) as caught:
        texts(path, **keys)
    (problem,) = caught.value.problems
    return str(problem)


def write_data_files(folder, kind="parquet"):
    (folder / "data").mkdir(parents=True)
    for split, part in {"train": TEXTS[:40], "validation": TEXTS[40:]}.items():
        for number in range(2):
            half = rows(part[number * len(part) // 2 : (number + 1) * len(part) // 2])
            name = folder / f"data/{split}-0000{number}-of-00002.{kind}"
            half.to_parquet(name) if kind == "parquet" else half.to_json(name)
    return folder


def write_snapshot(cache, commit="a" * 40, ref="main"):
    """The layout of the Hub's cache: the files are blobs, a snapshot links to them."""
    repo = cache / "datasets--ORG--NAME"
    made = write_data_files(repo / "made")
    (repo / "blobs").mkdir()
    for number, file in enumerate(sorted(made.glob("data/*"))):
        link = repo / "snapshots" / commit / file.relative_to(made)
        link.parent.mkdir(parents=True, exist_ok=True)
        file.rename(repo / f"blobs/{number}")
        link.symlink_to(os.path.relpath(repo / f"blobs/{number}", link.parent))
    (repo / "refs").mkdir()
    (repo / "refs" / ref).write_text(commit)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_folder_of_data_files_has_the_splits_that_its_names_say(tmp_path, kind):
    folder = write_data_files(tmp_path / "set", kind)
    assert texts(folder) == TEXTS[:40]
    assert texts(folder, split="validation") == TEXTS[40:]
    assert texts(folder, where={"lang": "de"}) == TEXTS[1:40:2]
    assert texts(folder) == datasets.load_dataset(str(folder), split="train", cache_dir=tmp_path / "peer")["text"][:]


def test_the_card_of_a_dataset_says_what_its_configurations_are(tmp_path):
    folder = write_data_files(tmp_path / "set")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- {config_name: one, data_files: [{split: train, path: data/train-00001*}]}\n"
        "- {config_name: two, data_files: [{split: all, path: 'data/*'}]}\n---\n"
    )
    assert texts(folder, name="one") == TEXTS[20:40]
    assert texts(folder, name="two", split="all") == TEXTS
    assert told(folder).startswith("corpus.name: ")
    assert "one" in told(folder)
    assert told(folder, name="three").startswith("corpus.name: ")


def test_what_save_to_disk_wrote_is_read_in_its_order(tmp_path):
    chosen = rows().select(range(49, -1, -2))
    chosen.save_to_disk(tmp_path / "one", num_shards=3)
    assert texts(tmp_path / "one") == TEXTS[::-2]
    datasets.DatasetDict({"train": rows(), "test": chosen}).save_to_disk(tmp_path / "several")
    assert texts(tmp_path / "several") == TEXTS
    assert texts(tmp_path / "several", split="test", where={"lang": "de"}) == TEXTS[::-2]
    assert told(tmp_path / "several", split="tests") == "corpus.split: 'tests' is not possible - did you mean 'test'?"


def test_a_downloaded_dataset_is_found_by_its_name(cache):
    write_snapshot(cache)
    assert texts("ORG/NAME") == TEXTS[:40]
    assert texts("ORG/NAME", revision="main", split="validation") == TEXTS[40:]
    assert texts("ORG/NAME", revision="a" * 40) == TEXTS[:40]
    assert "hf download --type dataset ORG/NAME --revision v2" in told("ORG/NAME", revision="v2")


def test_what_was_not_downloaded_is_told_at_once_with_the_command_that_does_it(cache):
    start = time.monotonic()
    assert told("ORG/NAME") == (
        "corpus.path: ORG/NAME is no folder here and not in the Hub's cache; "
        "`hf download --type dataset ORG/NAME` fetches it"
    )
    assert time.monotonic() - start < 5
    assert told("a/b/c") == "corpus.path: 'a/b/c' is no folder, and no ORG/NAME of the Hub"


def test_the_command_that_is_named_is_one_that_the_hub_knows():
    hf = os.path.join(os.path.dirname(sys.executable), "hf")
    told = subprocess.run([hf, "download", "--help"], capture_output=True, text=True, check=True).stdout
    assert "--type" in told
    assert "dataset" in told
    assert "--revision" in told


def test_files_on_the_network_are_not_asked_for(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for number, place in enumerate(("https://example.com/a.parquet", "hf://datasets/ORG/OTHER/a.parquet")):
        (folder / "README.md").write_text(f"---\nconfigs:\n- {{config_name: c{number}, data_files: '{place}'}}\n---\n")
        for name in (f"c{number}", None):
            assert told(folder, name=name) == (
                f"corpus.path: {folder}: its files {place} are not on this machine; download them first"
            )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("set.py", "x = 1", "scripts are no longer supported"),
        ("a.xyz", "hello", "data files found"),
        ("a.csv", "text\nhello\n", "its files are read as 'csv'; read here are Parquet, JSON lines and Arrow"),
        ("state.json", "{", "is damaged"),
        ("dataset_dict.json", "[]", "is damaged"),
    ],
)
def test_a_folder_that_cannot_be_read_is_refused_with_the_reason(tmp_path, name, content, message):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / name).write_text(content)
    assert message in told(folder)


def test_a_missing_or_damaged_shard_is_told_by_its_name(tmp_path):
    rows().save_to_disk(tmp_path / "one", num_shards=2)
    shard = tmp_path / "one/data-00001-of-00002.arrow"
    shard.write_bytes(shard.read_bytes()[:300])
    assert told(tmp_path / "one").startswith(f"corpus: {shard}: is no Arrow file, or a damaged one")
    shard.unlink()
    assert told(tmp_path / "one") == f"corpus: {shard}: cannot be read: No such file or directory"


def test_without_the_library_the_package_to_install_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert told(tmp_path) == "corpus: a dataset of the Hub needs the `datasets` library: pip install 'lit-llm[hf]'"


def test_the_text_identifies_and_not_the_name(tmp_path, cache):
    def digest(path, **keys):
        corpus = {"kind": "huggingface", "path": str(path), **keys}
        config = {"corpus": corpus, "tokenizer": "bytes", "sequence_length": 8, "batch_size": 2}
        return identify(DataConfig.model_validate(config)).digest

    write_snapshot(cache)
    same = {digest("ORG/NAME"), digest(write_data_files(tmp_path / "copy")), digest("ORG/NAME", revision="main")}
    assert len(same) == 1
    assert digest("ORG/NAME", split="validation") not in same
    assert digest("ORG/NAME", where={"lang": "de"}) not in same
