"""Which text is read, as which tokens, in what windows."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from lit_llm.config.section import Items, OneOf, Section, impossible

CYCLE = 1000
"""Windows after which a mixture has given each source exactly its share."""


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


_Single = PythonStdlib | TextFiles
SingleCorpus = Annotated[_Single, OneOf(default=PythonStdlib)]


def _source_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise impossible(("", f"{name!r} is not a plain name: letters, digits, '-' and '_'"))
    return name


class Source(Section):
    """One text of a mixture."""

    corpus: SingleCorpus
    """Where its documents come from; not a mixture again."""
    weight: float = Field(1.0, gt=0)
    """Its share of the windows, relative to the other weights. Resolved to windows of every thousand."""


class Mixture(Section):
    """Several texts, read in fixed shares. Each is tokenised on its own, by a tokenizer that they share."""

    kind: Literal["mixture"] = "mixture"
    """A mixture."""
    sources: dict[Annotated[str, AfterValidator(_source_name)], Source]
    """Its texts. Their names are those of the metrics `val/target_nll/<source>`; they change no number."""

    @field_validator("sources")
    @classmethod
    def _resolved(cls, sources: dict[str, Source]) -> dict[str, Source]:
        """The same with weights that are windows of CYCLE, so that 3 : 1 and 6 : 2 are one mixture."""
        if len(sources) < 2:
            raise impossible(("", f"has {len(sources)} of the two sources that it needs; one alone is a corpus itself"))
        total = sum(Fraction(source.weight) for source in sources.values())
        quotas = {name: Fraction(source.weight) * CYCLE / total for name, source in sources.items()}
        findings = [
            (f"{name}.weight", f"{sources[name].weight:g} of {float(total):g} is less than one window in {CYCLE}")
            for name, quota in quotas.items()
            if quota < 1 - Fraction(1, 10**9)  # 0.001 of 1 is one window, whatever its last bit
        ]
        if findings:
            raise impossible(*findings)
        counts = largest_remainders(quotas)
        return {name: source.model_copy(update={"weight": float(counts[name])}) for name, source in sources.items()}


def largest_remainders(quotas: dict[str, Fraction]) -> dict[str, int]:
    """Whole numbers near the quotas with the same sum (Hamilton's method), ties by name."""
    counts = {name: int(quota) for name, quota in quotas.items()}
    missing = int(sum(quotas.values())) - sum(counts.values())
    for name in sorted(quotas, key=lambda name: (counts[name] - quotas[name], name))[:missing]:
        counts[name] += 1
    return counts


Corpus = Annotated[_Single | Mixture, OneOf(default=PythonStdlib)]
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
