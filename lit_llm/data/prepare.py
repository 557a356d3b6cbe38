"""Tokenise a corpus once, into files that are mapped into memory.

`<folder>/train.bin` and `validation.bin` hold the documents' ids one after the other, each document closed by the
end-of-document token; `meta.json` says how many, and is part of the folder's atomic finish: a folder that exists under
its final name is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from lit_llm.config.problems import InputError, Problem
from lit_llm.data.config import ByteTokenizer, DataConfig
from lit_llm.data.corpora import Documents, data_digest, open_corpus
from lit_llm.data.tokenizers import Tokenizer, open_tokenizer, write_tokenizer
from lit_llm.objectives.config import EOD

SPLITS = ("train", "validation")
_CHUNK = 4 << 20  # characters tokenised at once: enough to keep all cores busy, little memory

Progress = Callable[[str, int, int], None]
"""Called with (what is done, done, total)."""


@dataclass(frozen=True)
class Prepared:
    """Tokenised text, ready to be read."""

    folder: Path
    config: DataConfig
    digest: str
    tokens: dict[str, int]
    """Number of tokens of each split."""

    def open(self, split: str) -> np.ndarray:
        """All tokens of a split, mapped from disk."""
        return np.memmap(self.folder / f"{split}.bin", dtype=token_type(self.config), mode="r")

    def tokenizer(self) -> Tokenizer:
        return open_tokenizer(self.config.tokenizer, self.folder)

    def windows(self, split: str) -> int:
        """Number of whole windows of sequence_length tokens."""
        return self.tokens[split] // self.config.sequence_length


def token_type(config: DataConfig) -> type[np.unsignedinteger]:
    return np.uint16 if config.tokenizer.vocabulary <= 1 << 16 else np.uint32


def prepare(config: DataConfig, root: Path, progress: Progress = lambda *_: None, digest: str = "") -> Prepared:
    """Tokenise the corpus into `root/<digest>`, unless it is there. Several processes may ask at once.

    Raises InputError when the corpus cannot be read, or is too small to give each split one window.
    """
    from filelock import FileLock

    documents = open_corpus(config.corpus)
    digest = digest or data_digest(config, documents)
    folder = root / digest
    if not folder.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{digest}.lock"):
            if not folder.is_dir():
                _write(config, documents, folder, progress)
    prepared = open_prepared(config, root, digest)
    for split in SPLITS:
        if not prepared.windows(split):
            raise InputError(
                Problem(
                    f"the {split} part has {prepared.tokens[split]} tokens, less than one window of "
                    f"{config.sequence_length}; use more text, shorter sequences or another validation_fraction",
                    "data.corpus",
                )
            )
    return prepared


def open_prepared(config: DataConfig, root: Path, digest: str) -> Prepared:
    """What `prepare` has written."""
    meta = json.loads((root / digest / "meta.json").read_text())
    return Prepared(root / digest, config, digest, meta["tokens"])


def _write(config: DataConfig, documents: Documents, folder: Path, progress: Progress) -> None:
    work = folder.with_name(f".{folder.name}")  # ours alone: the caller holds the lock
    shutil.rmtree(work, ignore_errors=True)  # what a killed process has left
    work.mkdir()
    try:
        if not isinstance(config.tokenizer, ByteTokenizer):
            progress("training the tokenizer", 0, 0)
            train = (text for text in documents if not held_out(text, config.validation_fraction))
            write_tokenizer(config.tokenizer, train, work)
        tokenizer = open_tokenizer(config.tokenizer, work)
        tokens, done, count = dict.fromkeys(SPLITS, 0), 0, 0
        with (work / "train.bin").open("wb") as train_file, (work / "validation.bin").open("wb") as validation_file:
            files: dict[str, IO[bytes]] = {"train": train_file, "validation": validation_file}
            for texts in _chunks(documents):
                for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
                    split = SPLITS[held_out(text, config.validation_fraction)]
                    closed = np.append(ids, EOD).astype(token_type(config))
                    files[split].write(closed.tobytes())
                    tokens[split] += len(closed)
                count += len(texts)
                done += sum(len(text) for text in texts)
                progress("tokenising", min(done, documents.size), documents.size)
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        (work / "meta.json").write_text(json.dumps({"tokens": tokens, "documents": count}, indent=1))
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def held_out(text: str, fraction: float) -> bool:
    """Whether a document is for validation. By content, so that a repeated document cannot be on both sides."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) < fraction * 2**64


def _chunks(documents: Documents) -> Iterator[list[str]]:
    texts, size = [], 0
    for text in documents:
        if not text:
            continue
        texts.append(text)
        size += len(text)
        if size >= _CHUNK:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts
