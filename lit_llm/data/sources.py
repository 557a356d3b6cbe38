"""A corpus as its sources: one, or those of a mixture. What each holds, who it is, and how much of it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version

from lit_llm.config.fingerprint import digest_of_file, fingerprint
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
    """Windows of every CYCLE."""
    digest: str
    """Identity of its tokens: documents, tokenizer, split. Shared by all studies that read it so."""


@dataclass(frozen=True)
class Identity:
    """Who the data of a stage is."""

    digest: str
    """Of all of it: the sources with their names and shares."""
    tokenizer: str
    """Of the tokenizer: its settings and, where it is trained, what on."""
    sources: tuple[Source, ...]
    """In an order that depends on their contents, not on how they are written down."""


def open_sources(corpus: Corpus) -> dict[str, Documents]:
    """The documents of each source, by its name. Raises InputError with the problems of all of them."""
    if not isinstance(corpus, Mixture):
        return {"": open_corpus(corpus)}
    found: dict[str, Documents] = {}
    problems: list[Problem] = []
    for name, source in corpus.sources.items():
        with collect_errors(problems), blamed(name):
            found[name] = open_corpus(source.corpus)
    if problems:
        raise InputError(*problems)
    return found


@contextmanager
def blamed(name: str) -> Iterator[None]:
    """What is wrong with a source's text is told at that source's key."""
    with error_context(f"corpus.sources.{name}") if name else nullcontext():
        yield


@contextmanager
def error_context(key: str, instead_of: str = "") -> Iterator[None]:
    """What is wrong with a text is told inside `key`. instead_of: the beginning of the text's own keys that it is."""
    try:
        yield
    except InputError as error:
        inner = [problem.key.removeprefix(instead_of) for problem in error.problems]
        inner = [part if part[:1] in (".", ":", "") else f".{part}" for part in inner]
        problems = [replace(problem, key=key + part) for problem, part in zip(error.problems, inner, strict=True)]
        raise InputError(*problems, hint=error.hint) from None


def identify(config: DataConfig, documents: Mapping[str, Documents] | None = None) -> Identity:
    """Reads the sources, for their digests. Windows are cut later and do not matter here."""
    documents = documents or open_sources(config.corpus)
    tokenizer = _tokenizer(config, documents)
    # A document of one source may be a near-duplicate of one that another source holds out.
    digests = [found.digest for found in documents.values()] if config.near_duplicates == "drop" else []
    near = (
        identify_signatures(digests, config.validation_fraction, config.test_fraction) if digests else fingerprint([])
    )
    sources = []
    for name, found in documents.items():
        share = int(config.corpus.sources[name].weight) if isinstance(config.corpus, Mixture) else CYCLE
        digest = _digest(found, tokenizer, config.validation_fraction, config.test_fraction, near_duplicates=near)
        sources.append(Source(name, share, digest))
    sources.sort(key=lambda source: (source.digest, source.name))
    # Names are in it because a result's metrics bear them.
    digest = fingerprint([[source.name, source.share, source.digest] for source in sources])
    return Identity(digest, tokenizer, tuple(sources))


def _digest(documents: Documents, tokenizer: str, validation: float, test: float, **more: str) -> str:
    """Identity of a source's tokens."""
    split = {"format": FORMAT, "tokenizer": tokenizer, "held_out": [validation, test]}
    return fingerprint({"documents": documents.digest, **split, **more})


def _tokenizer(config: DataConfig, documents: Mapping[str, Documents]) -> str:
    choice = config.tokenizer
    about: dict[str, object] = {"format": FORMAT, "tokenizer": identity_of(choice)}
    if isinstance(choice, BytePairTokenizer):  # trained on each source's training documents, once, whatever its share
        about |= {
            "library": version("tokenizers"),
            "documents": sorted(found.digest for found in documents.values()),
            "held_out": [config.validation_fraction, config.test_fraction],
        }
    if isinstance(choice, FileTokenizer):
        about |= {"library": version("tokenizers")}
    return fingerprint(about)


# --- texts that only evaluation reads ------------------------------------------------------------------------------

UNNAMED = "corpus"
"""What the one source of a corpus that is no mixture is called beside others."""


@dataclass(frozen=True)
class HeldOut:
    """A text for evaluation."""

    documents: Documents
    fraction: float
    """Share of its documents that is read: all; of a text with files that were trained on too, those held out there."""
    digest: str
    """Identity of its tokens."""


def identify_held_out(corpora: Mapping[str, SingleCorpus], config: DataConfig, tokenizer: str) -> dict[str, str]:
    """The digest of each text's tokens, for the fingerprint of what reads them; see `held_out_texts`."""
    return {name: text.digest for name, text in held_out_texts(corpora, config, tokenizer).items()}


def held_out_texts(corpora: Mapping[str, SingleCorpus], config: DataConfig, tokenizer: str) -> dict[str, HeldOut]:
    """Reads the texts, for their digests.

    config, tokenizer: the data that the model was trained on, and the identity of its tokenizer (`Identity.tokenizer`).
    Which documents are held out depends on their content alone, so of a file that was trained on the same fraction is
    left here as there. Raises InputError with the problems of all texts, at `corpora.<name>`.
    """
    if not corpora:
        return {}
    training = open_sources(config.corpus)
    trained_on = {digest_of_file(path) for documents in training.values() for _, path in documents.files}
    taken = {name or UNNAMED for name in training}
    found: dict[str, HeldOut] = {}
    problems: list[Problem] = []
    for name, corpus in sorted(corpora.items()):
        if name in taken:
            problems.append(Problem("is the name of a text that was trained on; call it otherwise", f"corpora.{name}"))
            continue
        with collect_errors(problems), error_context(f"corpora.{name}", instead_of="corpus"):
            documents = open_corpus(corpus)
            known = any(digest_of_file(path) in trained_on for _, path in documents.files)
            fraction = config.validation_fraction if known else 1.0
            found[name] = HeldOut(documents, fraction, _digest(documents, tokenizer, fraction, 0.0, only="validation"))
    if problems:
        raise InputError(*problems)
    return found
