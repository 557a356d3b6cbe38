"""Small texts, prepared, and small models of both families."""

import hashlib
import json
import random

import numpy as np
import pytest
import torch

from lit_llm.config.section import validate
from lit_llm.config.tree import read_yaml
from lit_llm.data.config import DataConfig
from lit_llm.data.prepare import prepare

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def write(tmp_path_factory):
    """write({name: text}): a folder with these files."""

    def files(texts):
        folder = tmp_path_factory.mktemp("texts")
        for name, text in texts.items():
            (folder / name).write_text(text)
        return folder

    return files


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """prepared(a corpus, window=..., fraction=..., test=...): its bytes as tokens."""

    def of(corpus, window=32, fraction=0.5, root=None, test=0):
        text = json.dumps(
            {
                "corpus": corpus,
                "tokenizer": "bytes",
                "sequence_length": window,
                "batch_size": 2,
                "validation_fraction": fraction,
                "test_fraction": test,
            }
        )
        return prepare(validate(DataConfig, read_yaml(text, "f")), root or tmp_path_factory.mktemp("data"))

    return of


@pytest.fixture(scope="session")
def documents():
    """60 texts of 3 to 90 letters, all different."""
    draw = random.Random(1)
    return ["".join(draw.choices("abcdefgh ", k=draw.randint(3, 90))) + f"{number:02}" for number in range(60)]


@pytest.fixture(scope="session")
def data(prepared, write, documents):
    folder = write({f"{number:02}.txt": text for number, text in enumerate(documents)})
    return prepared({"kind": "text", "files": [f"{folder}/*.txt"]})


@pytest.fixture(scope="session")
def held_out(documents):
    """The ids of the documents that half of all holds out, as their content decides: a byte is its value + 2, 0 the
    end."""
    hashes = [hashlib.sha256(" ".join(text.split()).encode()).digest() for text in documents]
    chosen = [text for text, found in zip(documents, hashes, strict=True) if int.from_bytes(found[:8]) < 0.5 * 2**64]
    assert 15 < len(chosen) < 45
    return [ids_of(text) for text in chosen]


def ids_of(text):
    return np.array([byte + 2 for byte in text.encode()] + [0])
