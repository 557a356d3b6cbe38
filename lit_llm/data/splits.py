"""Split of a document (training, validation or test), by its normalised content alone.

A document is in the same split in every corpus, for any order, file and white space. Loads neither torch nor numpy.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator

SPLITS = ("train", "validation", "test")
"""Splits: for training; for choices; for final tables."""

_CHUNK = 1 << 20  # characters normalised at once


def split_of(content: int, validation: float, test: float) -> str:
    """Split of a document. content: its `content_hash`; validation, test: shares of held-out documents.

    Validation has the lowest hashes and test the next ones, so the choice of `test` does not change validation.
    """
    place = content / 2**64
    return "validation" if place < validation else "test" if place < validation + test else "train"


def content_hash(*texts: str) -> int:
    """64 bits of SHA-256 of the normalised texts, joined as one.

    An instruction example (input, target) thus has the hash of a document that consists of both.
    """
    total, begun = hashlib.sha256(), False
    for text in texts:
        for number, piece in enumerate(normalised(text)):
            total.update((piece if number or not begun else f" {piece}").encode())
            begun = True
    return int.from_bytes(total.digest()[:8])


def normalised(text: str) -> Iterator[str]:
    """A text normalised in Unicode's compatible forms (NFKC), case and white space, in pieces.

    Runs of white space become one space, with none at the ends. Takes memory for one chunk.
    """
    begun = gap = False
    for chunk in _chunks(text):
        folded = unicodedata.normalize("NFKC", chunk).casefold()
        words = " ".join(folded.split())
        if words:
            if begun and (gap or folded[0].isspace()):
                yield " "
            yield words
            begun, gap = True, folded[-1].isspace()
        else:
            gap = True


def _chunks(text: str) -> Iterator[str]:
    """Chunks of a text that normalise as the whole: cut before an ASCII character, which composes with none before it.

    A chunk without an ASCII character (a million characters of Chinese) is longer.
    """
    begin = 0
    while len(text) - begin > _CHUNK:
        end = begin + _CHUNK
        while end < len(text) and not text[end].isascii():
            end += 1
        yield text[begin:end]
        begin = end
    if begin < len(text):
        yield text[begin:]
