"""Tokens in shards: one for each part of a corpus, written by any number of processes, read as one sequence.

```
<folder>/00000.train.bin  00000.validation.bin    ids of part 0's documents, each closed by the end-of-document token
<folder>/00000.json                               how many; written after them, so a part that has it is finished
```
Every file appears whole, under its name, by a rename. A process may be killed at any moment: what it has finished is
kept, the rest is done again, and the tokens are the same whoever wrote them.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from lit_llm.config.problems import InputError, Problem
from lit_llm.data import config
from lit_llm.data.corpora import Part
from lit_llm.data.tokenizers import open_tokenizer
from lit_llm.objectives.config import EOD
from lit_llm.tracking.store import read_json, write_json

SPLITS = ("train", "validation")
_PIECE = 1 << 18  # characters of a document that are tokenised as one
_CHUNK = 1 << 20  # characters tokenised at once: a tokenizer's objects take fifty times the text
_MOST_MAPS = 4096  # shards mapped at once; a process may have 65530 maps

_opened = lru_cache(maxsize=1)(open_tokenizer)


# --- writing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What is the same for all parts of a corpus."""

    folder: Path
    tokenizer: config.Tokenizer
    tokenizer_folder: Path
    validation_fraction: float
    cut: str
    """How the corpus was cut into parts: a part finished under another cut is another part."""

    def finished(self, number: int) -> dict[str, Any] | None:
        """What a finished part holds."""
        found = read_json(self.folder / f"{number:05}.json")
        return found if found is not None and found["cut"] == self.cut else None


def write_shards(job: Job, parts: Sequence[Part], progress: Callable[[int, int], None]) -> None:
    """Tokenise the parts that are not finished, a process for each core where there are several.

    progress: called with (bytes done, bytes in all). Raises InputError for a document that cannot be read.
    """
    total = sum(part.size for part in parts)
    todo = [number for number in range(len(parts)) if job.finished(number) is None]
    done = total - sum(parts[number].size for number in todo)
    progress(done, total)
    processes = min(cores(), len(todo))
    with ExitStack() as stack:
        numbers: Iterable[int]
        if processes > 1:
            numbers = stack.enter_context(_in_processes(processes, job, parts, todo))
        else:  # processes of their own would take longer to start
            numbers = (tokenise(job, number, parts[number]) for number in todo)
        for number in numbers:
            done += parts[number].size
            progress(done, total)


@contextmanager
def _in_processes(count: int, job: Job, parts: Sequence[Part], todo: Sequence[int]) -> Iterator[Iterator[int]]:
    """The numbers of the parts, each when it is finished.

    The processes end with the block, however it ends, and with this process, however that ends.
    """
    context = multiprocessing.get_context("spawn")  # a fork would inherit the tokenizer's threads, half alive
    reader, writer = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(count, context, initializer=_settle, initargs=(reader,))
    # Processes inherit what is blocked: Ctrl-C in the terminal is for the coordinator alone, from their first moment.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        futures = [pool.submit(tokenise, job, number, parts[number]) for number in todo]
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield (future.result() for future in as_completed(futures))
        pool.shutdown()
    except BrokenProcessPool:
        message = "a process that tokenised was killed, perhaps for want of memory; finished parts are kept, so the "
        raise InputError(Problem(message + "same command goes on from there", "corpus")) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        writer.close()  # the kernel does it where this process is killed
        pool.shutdown(cancel_futures=True)
        reader.close()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _settle(coordinator: Connection) -> None:
    """In a worker, before its first part."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a process

    def end_with_it() -> None:
        wait([coordinator])
        os._exit(1)  # at once: what is half written has no name yet

    threading.Thread(target=end_with_it, daemon=True).start()


def tokenise(job: Job, number: int, part: Part) -> int:
    """Write one part's shards, and return its number. Takes the memory of its largest document and of one chunk."""
    tokenizer = _opened(job.tokenizer, job.tokenizer_folder)
    kind = token_type(job.tokenizer)
    tokens, documents = dict.fromkeys(SPLITS, 0), 0
    # Another process may be at the same part still: one whose coordinator was killed just now.
    names = {split: f"{number:05}.{split}.bin" for split in SPLITS}
    written = {split: job.folder / f".{name}.{os.getpid()}" for split, name in names.items()}
    try:
        with ExitStack() as stack:
            files = {split: stack.enter_context(path.open("wb")) for split, path in written.items()}
            whole = job.tokenizer.kind == "file"
            for chunk in _chunks(part, job.validation_fraction, whole):
                encoded = tokenizer.encode([piece for piece, _, _ in chunk])
                for ids, (_, split, ends) in zip(encoded, chunk, strict=True):
                    ids = np.append(ids, EOD) if ends else ids
                    files[split].write(ids.astype(kind).tobytes())
                    tokens[split] += len(ids)
                    documents += ends
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        for split, path in written.items():
            path.rename(job.folder / names[split])
        write_json(job.folder / f"{number:05}.json", {"cut": job.cut, "tokens": tokens, "documents": documents})
    except OSError as error:
        message = f"tokenising stopped: {error.strerror}: {error.filename}; finished parts are kept"
        raise InputError(Problem(message, "corpus")) from None
    return number


def token_type(tokenizer: config.Tokenizer) -> type[np.unsignedinteger]:
    return np.uint16 if tokenizer.vocabulary <= 1 << 16 else np.uint32


def held_out(text: str, fraction: float) -> bool:
    """Whether a document is for validation. By content, so that a repeated document cannot be on both sides."""
    total = hashlib.sha256()
    for begin in range(0, len(text), _CHUNK):
        total.update(text[begin : begin + _CHUNK].encode())
    return int.from_bytes(total.digest()[:8]) < fraction * 2**64


def _chunks(documents: Iterable[str], fraction: float, whole: bool) -> Iterator[list[tuple[str, str, bool]]]:
    """(piece of a document, its split, whether the document ends with it), about _CHUNK characters at once.

    whole: documents are not cut. Not every tokenizer gives the pieces of a text the ids that the text has.
    """
    chunk, size = [], 0
    for text in documents:
        split, left = SPLITS[held_out(text, fraction)] if text else "", len(text)
        for piece in [text] * bool(text) if whole else pieces(text):
            left -= len(piece)
            chunk.append((piece, split, not left))
            size += len(piece)
            if size >= _CHUNK:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


_BREAK = re.compile(r"\S[ \n]")


def pieces(text: str) -> Iterator[str]:
    """A long text in pieces of at most _PIECE characters, so that the memory that a document takes is bounded.

    They are cut between a word and the space after it. There a byte-level tokenizer cuts as well, so it gives the ids
    of the whole text, but in a word of _PIECE / 4 characters.
    """
    begin = 0
    while len(text) - begin > _PIECE:
        end = begin + _PIECE
        places = [match.end() - 1 for match in _BREAK.finditer(text, end - _PIECE // 4, end)]
        end = places[-1] if places else end
        yield text[begin:end]
        begin = end
    if begin < len(text):
        yield text[begin:] if begin else text


# --- reading -------------------------------------------------------------------------------------------------------


class Shards:
    """The shards of a split as one sequence of tokens, each mapped from disk when it is first read."""

    def __init__(self, folder: Path, split: str, counts: Sequence[int], kind: type[np.unsignedinteger]) -> None:
        """counts: tokens of each shard."""
        self.folder, self.split, self.kind = folder, split, kind
        self.ends = np.cumsum(np.asarray(counts, dtype=np.int64))
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The `length` tokens from each of these places: len(starts) x length ids. They may lie in several shards."""
        out = np.empty((len(starts), length), dtype=np.int64)
        shards = np.searchsorted(self.ends, starts, side="right")  # the first that ends beyond it: no empty one
        # A window is a slice, whose copy is faster than gathering its positions.
        for row, start, shard in zip(out, starts.tolist(), shards.tolist(), strict=True):
            filled = 0
            while filled < length:
                inside = start + filled - (int(self.ends[shard - 1]) if shard else 0)
                found = self._map(shard)[inside : inside + length - filled]
                row[filled : filled + len(found)] = found
                filled, shard = filled + len(found), shard + 1
        return out

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            if len(self._maps) >= _MOST_MAPS:
                del self._maps[next(iter(self._maps))]  # the oldest
            path = self.folder / f"{shard:05}.{self.split}.bin"
            empty = self.ends[shard] == (self.ends[shard - 1] if shard else 0)  # no file of no bytes can be mapped
            self._maps[shard] = np.empty(0, self.kind) if empty else np.memmap(path, dtype=self.kind, mode="r")
        return self._maps[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}  # a pickled map would be a copy of the tokens
