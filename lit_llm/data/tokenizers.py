"""Tokenizers. All have the end of a document as id 0 and <s> as id 1, and give the bytes that a token stands for."""

from __future__ import annotations

import hashlib
import heapq
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from lit_llm.config.problems import InputError, Problem
from lit_llm.data import config, tokenizer_file
from lit_llm.data.library_tokenizer import FromFile

SPECIAL = ("<eod>", "<s>")
"""First two tokens of the built-in tokenizers."""

FILE = "tokenizer.json"
"""Name of the tokenizer's file in its folder."""


class Tokenizer(Protocol):
    """Text to ids and back."""

    vocabulary: int

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids. Ids without text are left out: special ones, and those from `vocabulary` on, which a
        model may have in addition (sentinels, modes, rows that pad its tables)."""
        ...

    def byte_lengths(self) -> np.ndarray | None:
        """V: bytes of text that each id stands for, 0 for special ones.

        None where they do not add up to the text (WordPiece); bits per byte are then undefined.
        """
        ...

    def lost_bytes(self, text: str, ids: np.ndarray) -> int:
        """Bytes of a text that its ids do not stand for, since the tokenizer has dropped or does not know them.

        Where the ids stand for more bytes than the text has, the number of surplus bytes. 0 where `byte_lengths` is
        None.
        """
        ...


class Bytes:
    """UTF-8 bytes, shifted past the special ids."""

    vocabulary = 256 + len(SPECIAL)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) + len(SPECIAL) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        byte_ids = (i for i in ids if len(SPECIAL) <= i < self.vocabulary)
        return bytes(i - len(SPECIAL) for i in byte_ids).decode(errors="replace")

    def byte_lengths(self) -> np.ndarray:
        return np.array([0] * len(SPECIAL) + [1] * 256)

    def lost_bytes(self, text: str, ids: np.ndarray) -> int:
        return 0


class Symbols:
    """Symbols of synthetic tasks: numbers with a space between, shifted past the special ids."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Raises InputError for a text that is no list of symbols."""
        return [self._ids(text) for text in texts]

    def _ids(self, text: str) -> np.ndarray:
        count = self.vocabulary - len(SPECIAL)
        try:
            ids = np.array([int(word) for word in text.split()], dtype=np.int64)
        except ValueError:
            ids = np.array([-1])
        if len(ids) and not 0 <= ids.min() <= ids.max() < count:
            message = f"{text[:40]!r} is no list of symbols: numbers from 0 to {count - 1} with a space between"
            raise InputError(Problem(message))
        return ids + len(SPECIAL)

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(str(i - len(SPECIAL)) for i in ids if len(SPECIAL) <= i < self.vocabulary)

    def byte_lengths(self) -> None:
        return None  # bits per byte of a synthetic task mean nothing

    def lost_bytes(self, text: str, ids: np.ndarray) -> int:
        return 0


_PIECE = 1 << 18  # characters of a text that are tokenised as one
_BREAK = re.compile(r"\S[ \n]")
_TRIES = 10  # places that are tried in each quarter of a piece


def pieces(text: str, splits_at: Callable[[str, int], bool] | None = None) -> Iterator[str]:
    """Pieces of a long text of about _PIECE characters, which bounds the memory for a document.

    Cuts are between a word and the space after it, where the byte-level tokenizer splits too, so the ids are those of
    the whole text, except in a word of _PIECE / 4 characters. With `splits_at`, cuts are only where it returns True: a
    piece without such a place is longer.
    """
    begin, end = 0, _PIECE
    while end < len(text):
        places = [match.end() - 1 for match in _BREAK.finditer(text, end - _PIECE // 4, end)]
        cut = places[-1] if places else end
        if splits_at:
            cut = next((place for place in places[: -_TRIES - 1 : -1] if splits_at(text, place)), 0)
        if cut:
            yield text[begin:cut]
            begin, end = cut, cut + _PIECE
        else:
            end += _PIECE // 4
    if begin < len(text):
        yield text[begin:] if begin else text


def sample(documents: Iterable[str], size: int) -> list[str]:
    """Documents in the order of a hash of their content, each once, until they have `size` bytes.

    One pass, in memory for the result. It does not depend on the order of the documents, and a sample of samples is the
    sample of the whole: parts of a corpus may be sampled separately.
    """
    chosen: list[tuple[bytes, int, str]] = []  # a heap with the largest hash first
    hashes: set[bytes] = set()  # of chosen documents: a repeated text must not fill the sample
    total = 0
    for text in documents:
        raw = text.encode()
        # The first bytes of the digest select held-out documents: the rank takes later ones, inverted.
        rank = bytes(255 - byte for byte in hashlib.sha256(raw).digest()[8:24])
        if rank in hashes or (total >= size and rank < chosen[0][0]):
            continue
        hashes.add(rank)
        heapq.heappush(chosen, (rank, len(raw), text))
        total += len(raw)
        while total - chosen[0][1] >= size:
            gone, length, _ = heapq.heappop(chosen)
            hashes.remove(gone)
            total -= length
    return [text for _, _, text in sorted(chosen, reverse=True)]


def _first_bytes(texts: Iterable[str], size: int) -> Iterator[str]:
    """Pieces of the texts, until they have `size` bytes."""
    for piece in (piece for text in texts for piece in pieces(text)):
        if size <= 0:
            return
        size -= len(piece.encode())
        yield piece


def train_bpe(documents: Iterable[str], vocabulary: int, path: Path, training_bytes: int = 100_000_000) -> None:
    """Train a byte-level BPE on a `sample` and write it to `path`. Equal documents give equal files."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(_first_bytes(sample(documents, training_bytes), training_bytes), trainer)
    library.save(str(path))


def write_tokenizer(choice: config.Tokenizer, documents: Iterable[str], folder: Path) -> None:
    """Write the tokenizer's file to `folder`: trained on the documents, or copied."""
    if isinstance(choice, config.BytePairTokenizer):
        train_bpe(documents, choice.vocabulary, folder / FILE, choice.training_bytes)
    elif isinstance(choice, config.FileTokenizer):
        tokenizer = FromFile(Path(choice.path), choice.end_of_document, choice.begin)  # a wrong file is refused here
        try:
            tokenizer.byte_lengths()
        except (AttributeError, KeyError, TypeError) as error:
            message = f"{choice.path} has a form that cannot be read: {type(error).__name__}: {error}"
            raise InputError(Problem(message, "tokenizer.path")) from None
        shutil.copyfile(choice.path, folder / FILE)


def layout_of(choice: config.Tokenizer, folder: Path) -> tokenizer_file.Layout | None:
    """Layout of any tokenizer, the digest of its file and its special ids; None for bytes and symbols.

    folder: that of the tokenised data's tokenizer, which has the file of a trained one.
    """
    if isinstance(choice, config.ByteTokenizer | config.SymbolTokenizer):
        return None
    if isinstance(choice, config.BytePairTokenizer):
        return tokenizer_file.read(folder / FILE, *SPECIAL)
    return choice.layout()


def open_tokenizer(choice: config.Tokenizer, folder: Path) -> Tokenizer:
    """The tokenizer that was used for the tokenised data in `folder`."""
    if isinstance(choice, config.ByteTokenizer):
        return Bytes()
    if isinstance(choice, config.SymbolTokenizer):
        return Symbols(choice.vocabulary)
    if isinstance(choice, config.BytePairTokenizer):
        return FromFile(folder / FILE, *SPECIAL)
    tokenizer = FromFile(folder / FILE, choice.end_of_document, choice.begin)
    if tokenizer.vocabulary != choice.vocabulary:
        raise InputError(Problem(f"{choice.path} has changed since the text was tokenised with it", "tokenizer.path"))
    return tokenizer
