"""Ids of a `tokenizer.json`, read without the tokenizers library, for plans."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lit_llm.config.problems import InputError, Problem, did_you_mean

ENDS = (
    "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<eod>", "<|eos|>", "<｜end▁of▁sentence｜>", "[EOS]", "[SEP]"
)  # fmt: skip
BEGINS = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<｜begin▁of▁sentence｜>", "[BOS]", "[CLS]")
"""Usual names of the two tokens; the first that a file marks as special is taken."""


@dataclass(frozen=True)
class Layout:
    """Ids of a file. A missing token is appended: its id is then the file's number of ids, or one more."""

    digest: str
    """Hash of the file's content on which the ids of documents depend; see `of_documents`."""
    ids: int
    """Largest id of the file, plus one."""
    end: int
    """The file's id of the token that ends a document."""
    begin: int
    """The file's id of the token that begins a target."""

    @property
    def vocabulary(self) -> int:
        return max(self.ids, self.end + 1, self.begin + 1)

    def order(self, rows: int, back: bool = False) -> list[int]:
        """The file's id for each of our ids, where the end is 0 and the beginning 1; back: our id for each file's id.

        rows: number of ids, at least `vocabulary`; ids beyond are equal in both.
        """
        theirs = list(range(rows))
        for ours, special in enumerate((self.end, self.begin)):
            place = theirs.index(special)
            theirs[ours], theirs[place] = theirs[place], theirs[ours]
        return sorted(range(rows), key=theirs.__getitem__) if back else theirs


def read(path: Path, end: str | None = None, begin: str | None = None) -> Layout:
    """Read the layout of a file. Raises InputError at the responsible key of the configuration."""
    try:
        status = path.stat()
        # Cached by the file's state: a study validates its tokenizer hundreds of times.
        digest, tokens, special = _tokens(str(path), status.st_size, status.st_mtime_ns, status.st_ino)
    except OSError as error:
        reason = "is a directory; name the file" if path.is_dir() else f"cannot be read: {error.strerror}"
        raise InputError(Problem(f"{path} {reason}", "path")) from None
    except ValueError as error:
        raise InputError(Problem(f"{path} is no tokenizer.json: {error}", "path")) from None
    ids = max(tokens.values()) + 1
    ends = _find(tokens, special, end, ENDS, "end_of_document", ids)
    begins = _find(tokens, special, begin, BEGINS, "begin", max(ids, ends + 1))
    if ends == begins:
        raise InputError(Problem(f"{begin} ends a document already; leave it out for a new token", "begin"))
    return Layout(digest, ids, ends, begins)


def _find(
    tokens: Mapping[str, int], special: frozenset[str], name: str | None, usual: tuple[str, ...], key: str, new: int
) -> int:
    if name is None:
        # A token that is not marked as special was learnt: in web pages <s> is a tag.
        return next((tokens[token] for token in usual if token in special), new)
    if name not in tokens:
        near = did_you_mean(name, sorted(special)[:50])
        raise InputError(Problem(f"the tokenizer has no token {name!r}{near}; without the key a new one is added", key))
    return tokens[name]


@lru_cache(maxsize=8)
def _tokens(path: str, size: int, modified: int, inode: int) -> tuple[str, dict[str, int], frozenset[str]]:
    """(hash of the content, {token: id}, special tokens). Raises OSError, or ValueError for content of no tokenizer."""
    raw = Path(path).read_bytes()
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from None
    tokens = tokens_of(content)
    special = frozenset(token["content"] for token in content.get("added_tokens") or [] if token.get("special"))
    text = json.dumps(of_documents(content), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest(), tokens, special


def of_documents(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content without the parts that have no effect on the ids of documents: added tokens such as <s>, truncation,
    padding and dropout (random tokens). An export changes the first of them, and the tokenizer stays the same.
    """
    model = {key: value for key, value in content["model"].items() if key != "dropout"}
    return {**content, "truncation": None, "padding": None, "post_processor": None, "model": model}


def tokens_of(content: Any) -> dict[str, int]:
    """{token: id} in the library's numbering. Raises ValueError for content that is no tokenizer."""
    model: Any = content.get("model") if isinstance(content, dict) else None
    try:
        vocabulary = model["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [piece, score], the id is the place
            tokens = {str(piece): index for index, (piece, _) in enumerate(vocabulary)}
        else:
            tokens = {str(token): int(index) for token, index in vocabulary.items()}
        new = len(vocabulary)
        for added in content.get("added_tokens") or []:
            # The library ignores the written id of a token that its model does not have, and gives it the next one.
            if (token := str(added["content"])) not in tokens:
                tokens[token], new = new, new + 1
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError("it has no `model.vocab`, or one of another form") from None
    if not tokens or min(tokens.values()) < 0 or len(set(tokens.values())) < len(tokens):
        raise ValueError("its vocabulary is empty, has ids below 0, or one id for two tokens")
    return tokens
