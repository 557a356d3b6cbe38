"""Tokenizers. All have the end of a document as id 0 and <s> as id 1, and can say how many bytes a token stands for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from lit_llm.data import config

SPECIAL = ("<eod>", "<s>")


class Tokenizer(Protocol):
    """Text to ids and back."""

    vocabulary: int

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def byte_lengths(self) -> np.ndarray:
        """V: bytes of text that each id stands for, 0 for the special ones."""
        ...


class Bytes:
    """UTF-8 bytes, shifted past the special ids."""

    vocabulary = 256 + len(SPECIAL)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) + len(SPECIAL) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i - len(SPECIAL) for i in ids if i >= len(SPECIAL)).decode(errors="replace")

    def byte_lengths(self) -> np.ndarray:
        return np.array([0] * len(SPECIAL) + [1] * 256)


class BytePair:
    """A byte-level BPE in the `tokenizers` library's JSON."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Library

        self._library = Library.from_file(str(path))
        # A document that contains "<eod>" spells it in bytes: only we may end a document. The file does not keep this.
        self._library.encode_special_tokens = True
        self.vocabulary = self._library.get_vocab_size()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(item.ids, dtype=np.int64) for item in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._library.decode(list(ids)))

    def byte_lengths(self) -> np.ndarray:
        # In the byte-level alphabet one character stands for one byte.
        lengths = np.zeros(self.vocabulary, dtype=np.int64)
        for token, index in self._library.get_vocab().items():
            lengths[index] = 0 if token in SPECIAL else len(token)
        return lengths


def train_bpe(documents: Iterable[str], vocabulary: int, path: Path) -> None:
    """Train a byte-level BPE and write it to `path`. The same documents give the same file."""
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
    library.train_from_iterator(documents, trainer)
    library.save(str(path))


def open_tokenizer(choice: config.Tokenizer, folder: Path) -> Tokenizer:
    """The tokenizer that was used for the tokenised data in `folder`."""
    if isinstance(choice, config.ByteTokenizer):
        return Bytes()
    return BytePair(folder / "tokenizer.json")
