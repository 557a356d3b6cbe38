"""Tokens in shards: one for each part of a corpus, written by any number of processes, read as one sequence.

```
<folder>/00000.train.bin, .validation.bin, .test.bin    ids of part 0's documents, each closed by the end-of-document
                                                        token
<folder>/00000.contents.npz content hashes of part 0's documents, for each split
<folder>/00000.json         how many, and the files' SHA-256; written after them, so a part that has it is finished
```
Every file appears whole, under its name, by a rename. A process may be killed at any moment: what it has finished is
kept, the rest is done again, and the tokens are the same whoever wrote them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lit_llm.config.fingerprint import digest_of_file
from lit_llm.config.problems import InputError, Problem
from lit_llm.data import config
from lit_llm.data.checksums import damaged
from lit_llm.data.corpora import Part
from lit_llm.data.near_duplicates import HeldOutSignatures
from lit_llm.data.processes import over_parts
from lit_llm.data.splits import SPLITS, content_hash, split_of
from lit_llm.data.tokenizers import FromFile, open_tokenizer, pieces
from lit_llm.objectives.config import EOD
from lit_llm.store.store import read_json, write_json

_MOST = 1 << 24  # characters of a document that cannot be cut
_CHUNK = 1 << 20  # characters tokenised at once: a tokenizer's objects take fifty times the text

_opened = lru_cache(maxsize=1)(open_tokenizer)
_signatures = lru_cache(maxsize=1)(HeldOutSignatures)


# --- writing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What is the same for all parts of a corpus."""

    folder: Path
    tokenizer: config.Tokenizer
    tokenizer_folder: Path
    validation_fraction: float
    test_fraction: float
    cut: str
    """How the corpus was cut into parts: a part finished under another cut is another part."""
    splits: tuple[str, ...] = SPLITS
    """Which are written; of another one the shards are empty."""
    near_duplicates: Path | None = None
    """Signatures of the held-out documents, whose near-duplicates are left out; None: they are kept."""

    def finished(self, number: int) -> dict[str, Any] | None:
        """What a finished part holds."""
        found = read_json(self.folder / f"{number:05}.json")
        return found if found is not None and found["cut"] == self.cut and "files" in found else None


def write_shards(job: Job, parts: Sequence[Part], progress: Callable[[int, int], None]) -> None:
    """Tokenise the parts that are not finished, a process for each core where there are several.

    progress: called with (bytes done, bytes in all). Raises InputError for a document that cannot be read.
    """
    todo = [number for number in range(len(parts)) if job.finished(number) is None]
    over_parts(tokenise, job, parts, todo, progress)


def tokenise(job: Job, number: int, part: Part) -> int:
    """Write one part's shards, and return its number.

    Takes the memory of its largest document, and of the tokens of one chunk or of one document that cannot be cut.
    """
    tokenizer = _opened(job.tokenizer, job.tokenizer_folder)
    splits_at = tokenizer.splits_at if job.tokenizer.kind == "file" and isinstance(tokenizer, FromFile) else None
    kind = token_type(job.tokenizer)
    tokens, sorter = dict.fromkeys(SPLITS, 0), _Sorter(job)
    bytes_of, lost = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    hashes = {split: hashlib.sha256() for split in SPLITS}
    # Another process may be at the same part still: one whose coordinator was killed just now.
    names = {split: f"{number:05}.{split}.bin" for split in SPLITS}
    written = {split: job.folder / f".{name}.{os.getpid()}" for split, name in names.items()}
    contents = job.folder / f".{number:05}.{os.getpid()}.npz"
    try:
        with ExitStack() as stack:
            files = {split: stack.enter_context(path.open("wb")) for split, path in written.items()}
            for chunk in _chunks(part, sorter, splits_at):
                encoded = tokenizer.encode([piece for piece, _, _ in chunk])
                for ids, (piece, split, ends) in zip(encoded, chunk, strict=True):
                    ids = np.append(ids, EOD) if ends else ids
                    raw = ids.astype(kind).tobytes()
                    files[split].write(raw)
                    hashes[split].update(raw)
                    tokens[split] += len(ids)
                    bytes_of[split] += len(piece.encode())
                    lost[split] += tokenizer.lost_bytes(piece, ids)
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        for split, path in written.items():
            path.rename(job.folder / names[split])
        of_documents: dict[str, Any] = {
            split: np.array(found, dtype=np.uint64) for split, found in sorter.contents.items()
        }
        np.savez(contents, **of_documents)
        digests = {names[split]: found.hexdigest() for split, found in hashes.items()}
        digests[f"{number:05}.contents.npz"] = digest_of_file(contents)
        contents.rename(job.folder / f"{number:05}.contents.npz")
        about = {"cut": job.cut, "tokens": tokens, "bytes": bytes_of, "lost_bytes": lost, "files": digests}
        about |= {**sorter.counts(), "skipped": dict(part.skipped)}
        write_json(job.folder / f"{number:05}.json", about)
    except OSError as error:
        raise InputError(stopped(error)) from None
    return number


def stopped(error: OSError) -> Problem:
    """What a disk that takes no more is called."""
    return Problem(f"tokenising stopped: {error.strerror}: {error.filename}; finished parts are kept", "corpus")


class _Sorter:
    """The split of each document, and what was put where."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.contents: dict[str, list[int]] = {split: [] for split in SPLITS}
        """Hashes of the documents of each split."""
        self.left_out = dict.fromkeys(SPLITS, 0)
        """Near-duplicates of documents of another split."""
        self.signatures = _signatures(job.near_duplicates) if job.near_duplicates else None

    def split_of(self, text: str) -> str:
        """The document's split, which it is counted for; empty for one that is not written."""
        if not text:
            return ""
        content = content_hash(text)
        split = split_of(content, self.job.validation_fraction, self.job.test_fraction)
        if split not in self.job.splits:
            return ""
        if self.signatures is not None and self.signatures.near_another_split(text, split):
            self.left_out[split] += 1
            return ""
        self.contents[split].append(content)
        return split

    def counts(self) -> dict[str, Any]:
        """For the part's file."""
        documents = {split: len(found) for split, found in self.contents.items()}
        return {"documents": sum(documents.values()), "documents_of": documents, "near_duplicates": self.left_out}


def token_type(tokenizer: config.Tokenizer) -> type[np.unsignedinteger]:
    return np.uint16 if tokenizer.vocabulary <= 1 << 16 else np.uint32


def _chunks(
    part: Part, sorter: _Sorter, splits_at: Callable[[str, int], bool] | None
) -> Iterator[list[tuple[str, str, bool]]]:
    """(piece of a document, its split, whether the document ends with it), about _CHUNK characters at once.

    splits_at: as for `pieces`. Raises InputError for a document that is too long to be tokenised uncut.
    """
    chunk, size = [], 0
    for number, text in enumerate(part):
        split, left = sorter.split_of(text), len(text)
        if not split:
            continue
        for piece in pieces(text, splits_at):
            if len(piece) > _MOST:
                message = f"a document has {len(piece)} characters that this tokenizer cannot take in pieces; the most "
                message += f"are {_MOST}: split the document, or use another tokenizer"
                raise InputError(Problem(message, f"corpus: {part.file_of(number)}"))
            left -= len(piece)
            chunk.append((piece, split, not left))
            size += len(piece)
            if size >= _CHUNK:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


def contents_of(folder: Path, split: str, part: int) -> np.ndarray:
    """Content hashes of the documents that a shard holds, in their order."""
    with np.load(folder / f"{part:05}.contents.npz") as found:
        return np.asarray(found[split])


# --- reading -------------------------------------------------------------------------------------------------------


class Shards:
    """The shards of a split as one sequence of tokens. No file stays open: a corpus may have sixty thousand."""

    def __init__(self, folder: Path, split: str, counts: Sequence[int], kind: type[np.unsignedinteger]) -> None:
        """counts: tokens of each shard."""
        self.folder, self.split, self.kind = folder, split, kind
        self.ends = np.cumsum(np.asarray(counts, dtype=np.int64))
        self._begins = [0, *self.ends.tolist()]
        self._size = np.dtype(kind).itemsize

    def __len__(self) -> int:
        return self._begins[-1]

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The `length` tokens from each of these places: len(starts) x length ids. They may lie in several shards."""
        out = np.empty((len(starts), length), dtype=np.int64)
        shards = np.searchsorted(self.ends, starts, side="right")  # the first that ends beyond it: no empty one
        for row, start, shard in zip(out, starts.tolist(), shards.tolist(), strict=True):
            filled = 0
            while filled < length:
                count = min(length - filled, self._begins[shard + 1] - start - filled)
                row[filled : filled + count] = self._tokens(shard, start + filled - self._begins[shard], count)
                filled, shard = filled + count, shard + 1
        return out

    def _tokens(self, shard: int, begin: int, count: int) -> np.ndarray:
        path = self.folder / f"{shard:05}.{self.split}.bin"
        file = os.open(path, os.O_RDONLY)
        try:
            raw = os.pread(file, count * self._size, begin * self._size)
        finally:
            os.close(file)
        if len(raw) < count * self._size:
            raise InputError(damaged(path, "is shorter than when it was opened"))
        return np.frombuffer(raw, self.kind)
