"""Which text is read, as which tokens, in what windows."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lit_llm.config.section import Items, OneOf, Section


class PythonStdlib(Section):
    """The sources of this interpreter's standard library, tests left out: about 10 MB, there without a network."""

    kind: Literal["python-stdlib"] = "python-stdlib"
    """Python's own library sources."""


class TextFiles(Section):
    """UTF-8 text files; each file is one document."""

    kind: Literal["text"] = "text"
    """Text files."""
    files: Items[str] = Field(min_length=1)
    """Paths or globs, relative to the working directory: `["corpus/**/*.txt"]`."""


class ByteTokenizer(Section):
    """One token per UTF-8 byte, after the two special ones."""

    kind: Literal["bytes"] = "bytes"
    """Bytes."""

    @property
    def vocabulary(self) -> int:
        return 258


class BytePairTokenizer(Section):
    """Byte-level BPE, trained on the training documents; the same corpus gives the same tokenizer."""

    kind: Literal["bpe"] = "bpe"
    """Byte-level byte-pair encoding."""
    vocabulary: int = Field(4096, ge=258)
    """Number of tokens, the 256 bytes and 2 special ones included."""


Corpus = Annotated[PythonStdlib | TextFiles, OneOf(default=PythonStdlib)]
Tokenizer = Annotated[ByteTokenizer | BytePairTokenizer, OneOf(default=BytePairTokenizer)]


class DataConfig(Section):
    """The text of a stage."""

    corpus: Corpus = PythonStdlib()
    """Where the documents come from."""
    tokenizer: Tokenizer = BytePairTokenizer()
    """How text becomes tokens. Losses per token compare only for one tokenizer; bits per byte compare always."""
    sequence_length: int = Field(gt=0)
    """Tokens of a window. Documents are joined with an end-of-document token and cut without overlap."""
    batch_size: int = Field(gt=0)
    """Windows per optimiser step."""
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the documents that is held out; which ones depends on their content alone."""
