"""Near-duplicates of held-out documents, by MinHash signatures of their words.

Two documents are near-duplicates where they share at least 80% of their runs of five words: the Jaccard similarity of
their shingles (five words as in arXiv 2107.06499, the threshold as in arXiv 2112.11446). It is estimated from 120
MinHashes (Broder 1997), with a standard error of 0.037 at the threshold. Candidates are documents that agree in one of
24 bands of 5 MinHashes, which finds 1 - (1 - 0.8^5)^24 = 99.99% of the pairs at the threshold.

Only signatures of held-out documents are kept, about 0.7 kB each; all other documents are compared with them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lit_llm.config.host import process_name
from lit_llm.data.corpora import Documents, Part
from lit_llm.data.near_duplicate_identity import THRESHOLD
from lit_llm.data.processes import SIGNING, over_parts
from lit_llm.data.sources import source_error_context
from lit_llm.data.splits import content_hash, normalised, split_of

WORDS = 5
"""Words of a shingle. A shorter document has no shingle: only its content hash is compared."""
_BANDS, _ROWS = 24, 5
_ALONE = 50_000_000  # bytes of text up to which signing takes less time than starting processes

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
"""A word; in Chinese and Japanese, which have no spaces between words, a character."""
_POWERS = np.cumprod(np.full(WORDS, 0x9E3779B97F4A7C15, dtype=np.uint64))


def signature(text: str) -> np.ndarray | None:
    """120 MinHashes of 32 bits of a document's shingles, in memory for one chunk; None without a shingle."""
    from rensa import RMinHash

    minhashes, before = None, np.empty(0, dtype=np.uint64)
    for chunk in _whole_words(text):
        (hashed,) = RMinHash.hash_token_sets([_WORD.findall(chunk)])
        words = np.concatenate([before, np.array(hashed, dtype=np.uint64)])
        if len(words) >= WORDS:
            windows = np.lib.stride_tricks.sliding_window_view(words, WORDS)
            shingles = (windows * _POWERS).sum(axis=1, dtype=np.uint64)
            offsets = np.array([0, len(shingles)], dtype=np.uint64)
            matrix = RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets, _BANDS * _ROWS, 1)
            minima = np.array(matrix.to_rows()[0], dtype=np.uint32)
            minhashes = minima if minhashes is None else np.minimum(minhashes, minima)
        before = words[1 - WORDS :]
    return minhashes


def _whole_words(text: str) -> Iterator[str]:
    """Pieces of the normalised text that end with a word."""
    rest = ""
    for piece in normalised(text):
        whole, space, last = (rest + piece).rpartition(" ")
        if space:
            yield whole
        rest = last
    yield rest


def _bands(signatures: np.ndarray) -> np.ndarray:
    """Keys for the lookup of documents: n x 120 MinHashes -> n x 24 numbers of 64 bits."""
    rows = signatures.reshape(-1, _BANDS, _ROWS).astype(np.uint64)
    keys = (rows * _POWERS[:_ROWS]).sum(axis=2, dtype=np.uint64) + np.arange(_BANDS, dtype=np.uint64)
    # The low half of a product depends on the low halves of its factors alone, so the upper half is folded in.
    return np.asarray((keys ^ (keys >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93))


class HeldOutSignatures:
    """Signatures of the held-out documents, written by `write_signatures` and mapped from disk."""

    def __init__(self, folder: Path) -> None:
        self._signatures, self._validation, self._keys, self._owners = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("signatures", "validation", "keys", "owners")
        )

    def near_another_split(self, text: str, split: str) -> bool:
        """True where a document is a near-duplicate of a held-out document of a split with precedence.

        A training document is compared with all held-out ones, a test document with those of validation, a validation
        document with none. The rule depends on no order, and leaves no near-duplicates in two splits.
        """
        if split == "validation" or not len(self._keys):
            return False
        if (minhashes := signature(text)) is None:
            return False
        keys = _bands(minhashes).ravel()
        first, last = (np.searchsorted(self._keys, keys, side=side) for side in ("left", "right"))
        places = [self._owners[a:b] for a, b in zip(first.tolist(), last.tolist(), strict=True) if a < b]
        if not places:
            return False
        others = np.unique(np.concatenate(places))
        if split == "test":
            others = others[self._validation[others]]
        return bool(((self._signatures[others] == minhashes).mean(axis=1) >= THRESHOLD).any())


@dataclass(frozen=True)
class _Job:
    """Settings that are common to all parts of a corpus."""

    folder: Path
    validation_fraction: float
    test_fraction: float


def write_signatures(
    folder: Path,
    documents: Mapping[str, Documents],
    fractions: tuple[float, float],
    progress: Callable[[int, int], None],
) -> None:
    """Compute and write the signatures of the held-out documents of all sources, in a process for each core."""
    signatures, validation = [], []
    for name, text in documents.items():
        with source_error_context(name):
            parts = text.parts()
            alone = text.size < _ALONE
            over_parts(_sign, _Job(folder, *fractions), parts, range(len(parts)), progress, alone, SIGNING)
        for number in range(len(parts)):
            with np.load(_file(folder, number)) as part:
                signatures.append(part["signatures"])
                validation.append(part["validation"])
    signed = np.concatenate(signatures)
    keys = _bands(signed)
    owners = np.repeat(np.arange(len(signed), dtype=np.uint32), _BANDS)
    order = np.argsort(keys.ravel(), kind="stable")
    np.save(folder / "signatures.npy", signed)
    np.save(folder / "validation.npy", np.concatenate(validation))
    np.save(folder / "keys.npy", keys.ravel()[order])
    np.save(folder / "owners.npy", owners[order])


def _file(folder: Path, number: int) -> Path:
    return folder / f".{number:05}.npz"  # a name that `prepared_once` removes


def _sign(job: _Job, number: int, part: Part) -> int:
    """Write the signatures of one part's held-out documents, and return its number."""
    signatures, validation = [], []
    for text in part:
        split = split_of(content_hash(text), job.validation_fraction, job.test_fraction) if text else "train"
        if split != "train" and (minhashes := signature(text)) is not None:
            signatures.append(minhashes)
            validation.append(split == "validation")
    # Another process, of another host or whose coordinator was just killed, may still write the same part.
    written = job.folder / f".{number:05}.{process_name()}.npz"
    np.savez(
        written,
        signatures=np.array(signatures, dtype=np.uint32).reshape(-1, _BANDS * _ROWS),
        validation=np.array(validation, dtype=bool),
    )
    written.rename(_file(job.folder, number))
    return number
