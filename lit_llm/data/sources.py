"""Sources of a corpus, one or those of a mixture: their documents, identities and shares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version

from lit_llm.config.hashing import digest_of_file, fingerprint
from lit_llm.config.problems import InputError, Problem, collect_errors
from lit_llm.data.config import (
    CYCLE,
    BytePairTokenizer,
    Corpus,
    DataConfig,
    FileTokenizer,
    Mixture,
    SingleCorpus,
    identity_of,
)
from lit_llm.data.corpora import FORMAT, Documents, open_corpus
from lit_llm.data.near_duplicate_identity import identify_signatures


@dataclass(frozen=True)
class Source:
    """One source of a stage's text."""

    name: str
    """Empty where the corpus is no mixture."""
    share: int
    """Windows in every CYCLE."""
    digest: str
    """Digest of its tokens: documents, tokenizer, split. Shared by all studies that read it in the same way."""


@dataclass(frozen=True)
class Identity:
    """Identity of the data of a stage."""

    digest: str
    """Digest of all sources with their names and shares."""
    tokenizer: str
    """Digest of the tokenizer: its settings and, where it is trained, its training documents."""
    sources: tuple[Source, ...]
    """Sources in an order that depends on their contents, not on the file."""


def open_sources(corpus: Corpus) -> dict[str, Documents]:
    """{source: its documents}. Raises InputError with the problems of all sources."""
    if not isinstance(corpus, Mixture):
        return {"": open_corpus(corpus)}
    documents: dict[str, Documents] = {}
    problems: list[Problem] = []
    for name, source in corpus.sources.items():
        with collect_errors(problems), source_error_context(name):
            documents[name] = open_corpus(source.corpus)
    if problems:
        raise InputError(*problems)
    return documents


@contextmanager
def source_error_context(name: str) -> Iterator[None]:
    """Report errors of a source's text at the source's key."""
    with error_context(f"corpus.sources.{name}") if name else nullcontext():
        yield


@contextmanager
def error_context(key: str, instead_of: str = "") -> Iterator[None]:
    """Report errors of a text at keys inside `key`. instead_of: prefix of the text's keys that `key` replaces."""
    try:
        yield
    except InputError as error:
        inner = [problem.key.removeprefix(instead_of) for problem in error.problems]
        inner = [part if part[:1] in (".", ":", "") else f".{part}" for part in inner]
        problems = [replace(problem, key=key + part) for problem, part in zip(error.problems, inner, strict=True)]
        raise InputError(*problems, hint=error.hint) from None


def identify(config: DataConfig, documents: Mapping[str, Documents] | None = None) -> Identity:
    """Identity of a stage's data. Reads the sources for their digests; windows have no part in it."""
    documents = documents or open_sources(config.corpus)
    tokenizer = _tokenizer(config, documents)
    # A document of one source may be a near-duplicate of a document that another source holds out.
    digests = [text.digest for text in documents.values()] if config.drops_near_duplicates else []
    near = (
        identify_signatures(digests, config.validation_fraction, config.test_fraction) if digests else fingerprint([])
    )
    sources = []
    for name, text in documents.items():
        share = int(config.corpus.sources[name].weight) if isinstance(config.corpus, Mixture) else CYCLE
        digest = _digest(text, tokenizer, config.validation_fraction, config.test_fraction, near_duplicates=near)
        sources.append(Source(name, share, digest))
    sources.sort(key=lambda source: (source.digest, source.name))
    # Names are included since a result's metrics contain them.
    digest = fingerprint([[source.name, source.share, source.digest] for source in sources])
    return Identity(digest, tokenizer, tuple(sources))


def _digest(documents: Documents, tokenizer: str, validation: float, test: float, **more: str) -> str:
    """Digest of a source's tokens."""
    split = {"format": FORMAT, "tokenizer": tokenizer, "held_out": [validation, test]}
    return fingerprint({"documents": documents.digest, **split, **more})


def _tokenizer(config: DataConfig, documents: Mapping[str, Documents]) -> str:
    choice = config.tokenizer
    about: dict[str, object] = {"format": FORMAT, "tokenizer": identity_of(choice)}
    if isinstance(choice, BytePairTokenizer):  # trained once on the training documents of all sources, for any shares
        about |= {
            "library": version("tokenizers"),
            "documents": sorted(text.digest for text in documents.values()),
            "held_out": [config.validation_fraction, config.test_fraction],
        }
    if isinstance(choice, FileTokenizer):
        about |= {"library": version("tokenizers")}
    return fingerprint(about)


# --- texts that only evaluation reads ------------------------------------------------------------------------------

UNNAMED = "corpus"
"""Name of the single source of a corpus that is no mixture, where it needs one."""


@dataclass(frozen=True)
class HeldOut:
    """A text that only evaluations read."""

    documents: Documents
    fraction: float
    """Share of its documents that is read: 1, or the held-out fraction for a text that shares files with training."""
    digest: str
    """Digest of its tokens."""


def identify_held_out(corpora: Mapping[str, SingleCorpus], config: DataConfig, tokenizer: str) -> dict[str, str]:
    """{text: digest of its tokens}, for the fingerprint of evaluations; see `held_out_texts`."""
    return {name: text.digest for name, text in held_out_texts(corpora, config, tokenizer).items()}


def held_out_texts(corpora: Mapping[str, SingleCorpus], config: DataConfig, tokenizer: str) -> dict[str, HeldOut]:
    """Texts that only evaluations read. Reads them for their digests.

    config, tokenizer: the model's training data, and the digest of its tokenizer (`Identity.tokenizer`). Held-out
    documents are selected by content alone, so a file that training reads too holds out the same documents here. Raises
    InputError with the problems of all texts, at `corpora.<name>`.
    """
    if not corpora:
        return {}
    training = open_sources(config.corpus)
    trained_on = {digest_of_file(path) for documents in training.values() for _, path in documents.files}
    taken = {name or UNNAMED for name in training}
    texts: dict[str, HeldOut] = {}
    problems: list[Problem] = []
    for name, corpus in sorted(corpora.items()):
        if name in taken:
            problems.append(Problem("is the name of a text that was trained on; call it otherwise", f"corpora.{name}"))
            continue
        with collect_errors(problems), error_context(f"corpora.{name}", instead_of="corpus"):
            documents = open_corpus(corpus)
            shares_files = any(digest_of_file(path) in trained_on for _, path in documents.files)
            fraction = config.validation_fraction if shares_files else 1.0
            texts[name] = HeldOut(documents, fraction, _digest(documents, tokenizer, fraction, 0.0, only="validation"))
    if problems:
        raise InputError(*problems)
    return texts
