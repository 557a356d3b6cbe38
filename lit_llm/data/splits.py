"""Which split a document belongs to: training, validation or test, by its normalised content alone.

The same document is on the same side in every corpus, whatever its order, its file, or the white space in it. Loads
neither torch nor numpy.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator

SPLITS = ("train", "validation", "test")
"""What is trained on; what choices are made by; what final tables are measured on."""

_CHUNK = 1 << 20  # characters normalised at once


def split_of(content: int, validation: float, test: float) -> str:
    """The split of a document with this `content_hash`, where these shares of all documents are held out.

    Validation has the lowest hashes and test those above them, so another `test` moves no document into or out of
    validation.
    """
    place = content / 2**64
    return "validation" if place < validation else "test" if place < validation + test else "train"


def content_hash(*texts: str) -> int:
    """64 bits of SHA-256 of the normalised texts, joined as one.

    An example of an instruction, (input, target), so has the hash of the document that holds both.
    """
    total, begun = hashlib.sha256(), False
    for text in texts:
        for number, piece in enumerate(normalised(text)):
            total.update((piece if number or not begun else f" {piece}").encode())
            begun = True
    return int.from_bytes(total.digest()[:8])


def normalised(text: str) -> Iterator[str]:
    """A text in pieces without what makes no other document: Unicode's compatible forms (NFKC), case, white space.

    Runs of white space become one space, and none is left at the ends. Takes memory for one chunk.
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
    """A text cut where halves normalise as the whole: before an ASCII character, which composes with none before it.

    A chunk without one (a million characters of Chinese) is longer.
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
