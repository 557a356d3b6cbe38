"""Shards of tokens: one for each part of a corpus, written by any number of processes, read as one sequence.

```
<folder>/00000.train.bin, .validation.bin, .test.bin    ids of part 0's documents, each ended by the end-of-document
                                                        token
<folder>/00000.contents.npz content hashes of part 0's documents, for each split
<folder>/00000.json         counts, and the files' SHA-256; written last, so a part that has it is finished
```
Every file is renamed to its name when it is complete. A process may be killed at any moment: finished parts are kept,
the rest is done again, and the tokens are the same for any process.
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

from lit_llm.config.hashing import digest_of_file
from lit_llm.config.host import process_name
from lit_llm.config.problems import InputError, Problem
from lit_llm.data import config
from lit_llm.data.checksums import damaged
from lit_llm.data.corpora import Part
from lit_llm.data.library_tokenizer import FromFile
from lit_llm.data.near_duplicates import HeldOutSignatures
from lit_llm.data.processes import over_parts
from lit_llm.data.splits import SPLITS, content_hash, split_of
from lit_llm.data.tokenizers import open_tokenizer, pieces
from lit_llm.objectives.config import EOD
from lit_llm.store.store import read_json, write_json

_MOST = 1 << 24  # characters of a document that cannot be cut
_CHUNK = 1 << 20  # characters tokenised at once: a tokenizer's objects take fifty times the text

_opened = lru_cache(maxsize=1)(open_tokenizer)
_signatures = lru_cache(maxsize=1)(HeldOutSignatures)


# --- writing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Settings that are common to all parts of a corpus."""

    folder: Path
    tokenizer: config.Tokenizer
    tokenizer_folder: Path
    validation_fraction: float
    test_fraction: float
    cut: str
    """Fingerprint of the cut of the corpus into parts; a finished part counts only under the same cut."""
    splits: tuple[str, ...] = SPLITS
    """Splits that are written; the shards of other splits are empty."""
    near_duplicates: Path | None = None
    """Folder of the held-out documents' signatures, to leave out near-duplicates; None: keep near-duplicates."""

    def finished(self, number: int) -> dict[str, Any] | None:
        """Content of the JSON file of a finished part; None for an unfinished one."""
        record = read_json(self.folder / f"{number:05}.json")
        return record if record is not None and record["cut"] == self.cut and "files" in record else None


def write_shards(job: Job, parts: Sequence[Part], progress: Callable[[int, int], None]) -> None:
    """Tokenise the unfinished parts, in a process for each core if there are several.

    progress: called with (bytes done, total bytes). Raises InputError for a document that cannot be read.
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
    # Another process, of another host or whose coordinator was just killed, may still write the same part.
    names = {split: f"{number:05}.{split}.bin" for split in SPLITS}
    written = {split: job.folder / f".{name}.{process_name()}" for split, name in names.items()}
    contents = job.folder / f".{number:05}.{process_name()}.npz"
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
            split: np.array(content_hashes, dtype=np.uint64) for split, content_hashes in sorter.contents.items()
        }
        np.savez(contents, **of_documents)
        digests = {names[split]: content_hashes.hexdigest() for split, content_hashes in hashes.items()}
        digests[f"{number:05}.contents.npz"] = digest_of_file(contents)
        contents.rename(job.folder / f"{number:05}.contents.npz")
        about = {"cut": job.cut, "tokens": tokens, "bytes": bytes_of, "lost_bytes": lost, "files": digests}
        about |= {**sorter.counts(), "skipped": dict(part.skipped)}
        write_json(job.folder / f"{number:05}.json", about)
    except OSError as error:
        raise InputError(disk_problem(error)) from None
    return number


def disk_problem(error: OSError) -> Problem:
    """Problem of a disk that is full or fails."""
    return Problem(f"tokenising stopped: {error.strerror}: {error.filename}; finished parts are kept", "corpus")


class _Sorter:
    """Assigns documents to splits and counts them."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.contents: dict[str, list[int]] = {split: [] for split in SPLITS}
        """{split: hashes of its documents}."""
        self.left_out = dict.fromkeys(SPLITS, 0)
        """{split: number of documents left out as near-duplicates of another split's}."""
        self.signatures = _signatures(job.near_duplicates) if job.near_duplicates else None

    def split_of(self, text: str) -> str:
        """Split of a document, which is counted; '' for a document that is not written."""
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
        """Counts for the part's JSON file."""
        documents = {split: len(hashes) for split, hashes in self.contents.items()}
        return {"documents": sum(documents.values()), "documents_of": documents, "near_duplicates": self.left_out}


def token_type(tokenizer: config.Tokenizer) -> type[np.unsignedinteger]:
    return np.uint16 if tokenizer.vocabulary <= 1 << 16 else np.uint32


def _chunks(
    part: Part, sorter: _Sorter, splits_at: Callable[[str, int], bool] | None
) -> Iterator[list[tuple[str, str, bool]]]:
    """Chunks of about _CHUNK characters, lists of (piece of a document, its split, whether the document ends with it).

    splits_at: as for `pieces`. Raises InputError for a document that is too long and cannot be cut.
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
    with np.load(folder / f"{part:05}.contents.npz") as arrays:
        return np.asarray(arrays[split])


# --- reading -------------------------------------------------------------------------------------------------------


class Shards:
    """The shards of a split as one sequence of tokens. Files are not kept open: a corpus may have sixty thousand."""

    def __init__(self, folder: Path, split: str, counts: Sequence[int], kind: type[np.unsignedinteger]) -> None:
        """counts: number of tokens of each shard."""
        self.folder, self.split, self.kind = folder, split, kind
        self.ends = np.cumsum(np.asarray(counts, dtype=np.int64))
        self._begins = [0, *self.ends.tolist()]
        self._size = np.dtype(kind).itemsize

    def __len__(self) -> int:
        return self._begins[-1]

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The `length` tokens from each start, which may span shards: len(starts) x length ids."""
        out = np.empty((len(starts), length), dtype=np.int64)
        shards = np.searchsorted(
            self.ends, starts, side="right"
        )  # the first shard that ends after the start, never an empty one
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
