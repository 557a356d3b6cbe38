"""Tokenizers. All have the end of a document as id 0 and <s> as id 1, and give the bytes that a token stands for."""

from __future__ import annotations

import hashlib
import heapq
import json
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lit_llm.config.problems import InputError, Problem
from lit_llm.data import config, tokenizer_file
from lit_llm.objectives.config import BOS, EOD

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


class FromFile:
    """A `tokenizer.json` of the `tokenizers` library, with ids exchanged so that the special tokens come first.

    end, begin: its special tokens; see `config.FileTokenizer`. Raises InputError for a file that the library refuses.
    """

    def __init__(self, path: Path, end: str | None, begin: str | None) -> None:
        from tokenizers import Tokenizer as Library

        self._layout = tokenizer_file.read(path, end, begin)
        self._content = json.loads(path.read_bytes())
        self._tokens = tokenizer_file.tokens_of(self._content)
        closing = {token for token, i in self._tokens.items() if i in (self._layout.end, self._layout.begin)}
        try:
            self._library = Library.from_str(json.dumps(_for_documents(self._content, closing)))
            self._library.encode_special_tokens = True
            ids = set(self._library.get_vocab().values())
        except Exception as error:  # the library raises bare Exceptions
            raise InputError(Problem(f"the tokenizers library refuses {path}: {error}", "tokenizer.path")) from None
        if ids != set(self._tokens.values()):
            raise InputError(
                Problem(f"the tokenizers library numbers the tokens of {path} otherwise", "tokenizer.path")
            )
        self.vocabulary = self._layout.vocabulary
        self._theirs = np.array(self._layout.order(self.vocabulary))
        self._ours = np.array(self._layout.order(self.vocabulary, back=True))

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        with _regex_errors():
            encoded = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        encoded_texts = [self._ours[np.asarray(item.ids, dtype=np.int64)] for item in encoded]
        if any(len(ids) and ids.min() <= max(EOD, BOS) for ids in encoded_texts):
            message = "reads a text as its end of a document or its <s>; name other tokens, or none for new ones"
            raise InputError(Problem(message, "tokenizer.end_of_document"))
        return encoded_texts

    def decode(self, ids: Iterable[int]) -> str:
        file_ids = (int(self._theirs[i]) for i in ids if i not in (EOD, BOS) and i < self.vocabulary)
        return str(self._library.decode([i for i in file_ids if i < self._layout.ids], skip_special_tokens=True))

    def splits_at(self, text: str, place: int) -> bool:
        """Whether a word ends at this index and both halves have the ids of the whole text.

        Only the characters around the index are tokenised, since rules for words look no further."""
        left, right = text[max(0, place - _AROUND) : place], text[place : place + _AROUND]
        with _regex_errors():
            before, after, whole = (
                self._library.encode(part, add_special_tokens=False) for part in (left, right, left + right)
            )
        last = len(before.ids)
        return whole.ids == before.ids + after.ids and len(set(whole.word_ids[max(0, last - 1) : last + 1])) == 2

    def byte_lengths(self) -> np.ndarray | None:
        """Bytes of each id in the text as the tokenizer normalises it (NFC).

        A space that it inserts before a document counts as one byte, and the unknown token as none."""
        length = _byte_length(self._content)
        if length is None:
            return None
        model, lengths = self._content["model"], np.zeros(self.vocabulary, dtype=np.int64)
        fallback = bool(model.get("byte_fallback"))
        added = {token["content"]: token.get("special") for token in self._content.get("added_tokens") or []}
        unknown = {self._tokens.get(model.get("unk_token")), model.get("unk_id"), self._layout.end, self._layout.begin}
        for token, index in self._tokens.items():
            if index not in unknown and (not added.get(token) or (fallback and _BYTE.fullmatch(token))):
                as_it_is = token in added and not (fallback and _BYTE.fullmatch(token))
                lengths[index] = self._added_length(token, length) if as_it_is else length(token)
        lengths = lengths[self._theirs]
        return np.asarray(lengths)

    def lost_bytes(self, text: str, ids: np.ndarray) -> int:
        if self._lengths is None or not text:
            return 0
        normal = text if text.isascii() or not self._normalizes_nfc else unicodedata.normalize("NFC", text)
        # A space that the tokenizer inserts before a text is in its ids but not in the text.
        rest = len(normal.encode()) + self._count_inserted_spaces(normal, ids) - int(self._lengths[ids].sum())
        # Unknown tokens count as lost even where other ids have surplus bytes.
        return max(abs(rest), int(np.isin(ids, self._unknown).sum()))

    def _added_length(self, token: str, length: Callable[[str], int]) -> int:
        """Bytes of text of an added token. length: gives the bytes of a token in the model's alphabet."""
        normal, normalized = token, self._added[token].get("normalized", True)
        if normalized and self._library.normalizer:
            normal = self._library.normalizer.normalize_str(token)
        if "▁" not in normal or length("▁") != 1:
            return len(normal.encode())
        # ▁ is a space where tokens are matched after the replacement of spaces, or where the model also has the token.
        spaces = normalized and any(map(_is_space, _steps(self._content.get("normalizer"))))
        return length(normal) if spaces or token in self._model_tokens else len(normal.encode())

    @cached_property
    def _model_tokens(self) -> set[str]:
        """Tokens of the model's vocabulary."""
        vocabulary = self._content["model"]["vocab"]
        return set(vocabulary) if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}

    def _count_inserted_spaces(self, text: str, ids: np.ndarray) -> int:
        """Number of spaces that the tokenizer inserts before a text, and after added tokens in it."""
        normalizing, splitting = self._inserted_spaces
        if not any(normalizing + splitting):
            return 0
        count, place, normalize = 0, 0, True
        for index in [*ids[np.isin(ids, list(self._added_ids))], -1]:
            token = self._added_ids.get(int(index))
            at = text.find(token, place) if token else len(text)
            if at < 0:  # made by the model
                continue
            options = self._added[token] if token else {}
            normalized = bool(token) and options.get("normalized", True)
            part = text[place : at + len(token or "")] if normalized else text[place:at]
            if normalize and part:  # parts of the text between tokens that are matched literally
                count += normalizing[part[0] == " "]
            if at > place and not (place and self._first_only):
                count += splitting[text[place] == " "]
            normalize = not normalized
            place = at + len(token or "")
            while options.get("rstrip") and text[place : place + 1].isspace():
                place += 1
        return count

    @cached_property
    def _added(self) -> dict[str, dict[str, Any]]:
        """{token: its options} of the added tokens that are not special."""
        added = self._content.get("added_tokens") or []
        return {token["content"]: token for token in added if not token.get("special")}

    @cached_property
    def _added_ids(self) -> dict[int, str]:
        return {int(self._ours[self._tokens[token]]): token for token in self._added if not _BYTE.fullmatch(token)}

    @cached_property
    def _unknown(self) -> list[int]:
        """Ids of unknown text."""
        model = self._content["model"]
        unknown = {self._tokens.get(model.get("unk_token")), model.get("unk_id")} - {None}
        return [int(self._ours[index]) for index in unknown]

    @cached_property
    def _first_only(self) -> bool:
        """Whether the pre-tokenizer inserts no space after added tokens."""
        steps = _steps(self._content.get("pre_tokenizer"))
        return any(step["type"] == "Metaspace" and step.get("prepend_scheme") == "first" for step in steps)

    @cached_property
    def _lengths(self) -> np.ndarray | None:
        return self.byte_lengths()

    @cached_property
    def _normalizes_nfc(self) -> bool:
        return any(step["type"] == "NFC" for step in _steps(self._content.get("normalizer")))

    @cached_property
    def _inserted_spaces(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Numbers of characters that the normalizer, and the pre-tokenizer, insert before a text: each a pair (text
        without a leading space, with one)."""
        normalizer, pre_tokenizer = self._library.normalizer, self._library.pre_tokenizer
        normalizing, splitting = [], []
        for text in ("a", " a"):
            normal = normalizer.normalize_str(text) if normalizer else text
            split = pre_tokenizer.pre_tokenize_str(normal) if pre_tokenizer else [(normal, ())]
            normalizing.append(len(normal) - len(text))
            splitting.append(sum(len(piece) for piece, _ in split) - len(normal))
        return (normalizing[0], normalizing[1]), (splitting[0], splitting[1])


@contextmanager
def _regex_errors() -> Iterator[None]:
    """Raise InputError where a regular expression of the file takes too many steps, such as `(a+)+b` for aaaa.

    The library panics after ten million steps for one match, with an error that is no Exception.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        message = f"the tokenizers library gives up on a text ({error}): simplify the regular expressions of the file"
        raise InputError(Problem(message, "tokenizer.path")) from None


_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_AROUND = 256
"""Characters on both sides of an index that decide whether a text may be cut there."""


def _for_documents(content: dict[str, Any], closing: set[str]) -> dict[str, Any]:
    """The content of a tokenizer's file with special tokens renamed so that no text can spell them; their ids stay.

    The library's option not to match them does not suffice: a Unigram model still has </s> among its pieces, and in web
    pages <s> is a tag. Truncation, padding and dropout (random tokens) are removed.
    """
    content = {**content, "truncation": None, "padding": None, "post_processor": None}
    model = content["model"] = {key: value for key, value in content["model"].items() if key != "dropout"}
    added = [dict(token) for token in content.get("added_tokens") or []]
    fixed = {model.get("unk_token")} if isinstance(model["vocab"], dict) else set()
    fixed |= {"".join(merge.split(" ") if isinstance(merge, str) else merge) for merge in model.get("merges") or []}
    special = {token["content"] for token in added if token.get("special")} | closing
    hidden = {name for name in special - fixed if not (model.get("byte_fallback") and _BYTE.fullmatch(name))}

    def name_of(token: str) -> str:
        return f"\U0010ffff{token.encode().hex()}\U0010ffff" if token in hidden else token

    if isinstance(model["vocab"], list):
        model["vocab"] = [[name_of(piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {name_of(token): index for token, index in model["vocab"].items()}
    # Fallback bytes stay tokens of the model: as special tokens they would be left out when decoding.
    bytes_of_model = {token for token in model["vocab"] if _BYTE.fullmatch(token)} if model.get("byte_fallback") else {}
    content["added_tokens"] = [
        {**token, "content": name_of(token["content"])} for token in added if token["content"] not in bytes_of_model
    ]
    return content


def _byte_length(content: dict[str, Any]) -> Callable[[str], int] | None:
    """Function for the bytes of a token in the model's alphabet; None where tokens do not add up to the text."""
    model = content["model"]
    # Files of older library versions have no type of model.
    kind = model.get("type") or (
        "Unigram" if isinstance(model["vocab"], list) else "BPE" if "merges" in model else None
    )
    if kind not in ("BPE", "Unigram") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    steps = [step for key in ("normalizer", "pre_tokenizer") for step in _steps(content.get(key))]
    kinds = {"▁" if _is_space(step) else step["type"] for step in steps if not _keeps_text(step)}
    if kinds == {"ByteLevel"}:
        return len  # one character of the alphabet stands for one byte
    if kinds == {"▁"}:
        return lambda token: 1 if _BYTE.fullmatch(token) else len(token.replace("▁", " ").encode())
    return None


def _keeps_text(step: dict[str, Any]) -> bool:
    """Whether a step of a tokenizer only separates words, or normalises like Unicode's NFC."""
    return step["type"] in ("NFC", "Digits", "UnicodeScripts") or (
        step["type"] in ("Split", "Punctuation") and step.get("behavior", "Isolated") != "Removed"
    )


def _is_space(step: dict[str, Any]) -> bool:
    """Whether a step replaces spaces by ▁, or inserts one before a text."""
    return step in (
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        {"type": "Prepend", "prepend": "▁"},
    ) or (step["type"] == "Metaspace" and step.get("replacement") == "▁")


def _steps(component: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Steps of a normalizer or a pre-tokenizer, in order."""
    if component and component["type"] == "Sequence":
        for part in component.get("normalizers") or component.get("pretokenizers") or []:
            yield from _steps(part)
    elif component:
        yield component


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
