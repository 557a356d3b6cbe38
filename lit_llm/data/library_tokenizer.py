"""A tokenizer.json, read by the `tokenizers` library: ids of its texts, their bytes, and places to cut a text at."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lit_llm.config.problems import InputError, Problem
from lit_llm.data import tokenizer_file
from lit_llm.objectives.config import BOS, EOD


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
        """True where a word ends at this index and both halves have the ids of the whole text.

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
        """True where the pre-tokenizer inserts no space after added tokens."""
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
    pages <s> is a tag.
    """
    content = tokenizer_file.of_documents(content)
    model = content["model"]
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
    """True where a step of a tokenizer only separates words, or normalises like Unicode's NFC."""
    return step["type"] in ("NFC", "Digits", "UnicodeScripts") or (
        step["type"] in ("Split", "Punctuation") and step.get("behavior", "Isolated") != "Removed"
    )


def _is_space(step: dict[str, Any]) -> bool:
    """True where a step replaces spaces by ▁, or inserts one before a text."""
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
