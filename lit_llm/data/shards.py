"""Tokens in shards: one for each part of a corpus, written by any number of processes, read as one sequence.

```
<folder>/00000.train.bin, .validation.bin, .test.bin    ids of part 0's documents, each closed by the end-of-document
                                                        token
<folder>/00000.json         how many; written after them, so a part that has it is finished
```
Every file appears whole, under its name, by a rename. A process may be killed at any moment: what it has finished is
kept, the rest is done again, and the tokens are the same whoever wrote them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
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
from lit_llm.data.splits import SPLITS, content_hash, split_of
from lit_llm.data.tokenizers import FromFile, open_tokenizer, pieces
from lit_llm.launch import cores
from lit_llm.objectives.config import EOD
from lit_llm.tracking.store import read_json, write_json

_MOST = 1 << 24  # characters of a document that cannot be cut
_CHUNK = 1 << 20  # characters tokenised at once: a tokenizer's objects take fifty times the text

_opened = lru_cache(maxsize=1)(open_tokenizer)


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
    ours, theirs = context.Pipe()
    pool = ProcessPoolExecutor(count, context, initializer=_settle, initargs=(theirs,))
    # Processes inherit what is blocked: Ctrl-C in the terminal is for the coordinator alone, from their first moment.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        futures = [pool.submit(tokenise, job, number, parts[number]) for number in todo]
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield (future.result() for future in as_completed(futures))
        pool.shutdown()
    except BrokenProcessPool:
        message = (
            "a process that tokenised was killed, perhaps for want of memory; finished parts are kept, so the same "
            "command goes on from there"
            if ours.poll()
            else "no process that tokenises could start: it was killed, perhaps for want of memory, or the script "
            'calls this outside of `if __name__ == "__main__":`, and each process reads the script anew'
        )
        raise InputError(Problem(message, "corpus")) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        ours.close()  # the kernel does it where this process is killed
        pool.shutdown(cancel_futures=True)
        theirs.close()


def leave_if_imported() -> None:
    """End a worker that would start over, because it has to import a script that is not written for that.

    The process that has started it says so. Here it would wait for that one, which waits for it.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # what multiprocessing itself goes by
        sys.exit(1)


def _settle(coordinator: Connection) -> None:
    """In a worker, before its first part."""
    coordinator.send_bytes(b"here")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a process

    def end_with_it() -> None:
        wait([coordinator])
        os._exit(1)  # at once: what is half written has no name yet

    threading.Thread(target=end_with_it, daemon=True).start()


def tokenise(job: Job, number: int, part: Part) -> int:
    """Write one part's shards, and return its number.

    Takes the memory of its largest document, and of the tokens of one chunk or of one document that cannot be cut.
    """
    tokenizer = _opened(job.tokenizer, job.tokenizer_folder)
    splits_at = tokenizer.splits_at if job.tokenizer.kind == "file" and isinstance(tokenizer, FromFile) else None
    kind = token_type(job.tokenizer)
    tokens, documents = dict.fromkeys(SPLITS, 0), 0
    # Another process may be at the same part still: one whose coordinator was killed just now.
    names = {split: f"{number:05}.{split}.bin" for split in SPLITS}
    written = {split: job.folder / f".{name}.{os.getpid()}" for split, name in names.items()}
    try:
        with ExitStack() as stack:
            files = {split: stack.enter_context(path.open("wb")) for split, path in written.items()}
            for chunk in _chunks(part, job, splits_at):
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


def _chunks(
    part: Part, job: Job, splits_at: Callable[[str, int], bool] | None
) -> Iterator[list[tuple[str, str, bool]]]:
    """(piece of a document, its split, whether the document ends with it), about _CHUNK characters at once.

    splits_at: as for `pieces`. Raises InputError for a document that is too long to be tokenised uncut.
    """
    chunk, size = [], 0
    for number, text in enumerate(part):
        split = split_of(content_hash(text), job.validation_fraction, job.test_fraction) if text else ""
        left = len(text)
        if split not in job.splits:
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
        file = os.open(f"{self.folder}/{shard:05}.{self.split}.bin", os.O_RDONLY)
        try:
            return np.frombuffer(os.pread(file, count * self._size, begin * self._size), self.kind)
        finally:
            os.close(file)
