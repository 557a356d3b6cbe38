"""A corpus as its sources: one, or those of a mixture. What each holds, who it is, and how much of it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version

from lit_llm.config.fingerprint import fingerprint
from lit_llm.config.problems import InputError, Problem, noted
from lit_llm.data.config import CYCLE, BytePairTokenizer, Corpus, DataConfig, FileTokenizer, Mixture, identity_of
from lit_llm.data.corpora import FORMAT, Documents, open_corpus


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
        with noted(problems), blamed(name):
            found[name] = open_corpus(source.corpus)
    if problems:
        raise InputError(*problems)
    return found


@contextmanager
def blamed(name: str) -> Iterator[None]:
    """What is wrong with a source's text is told at that source's key."""
    try:
        yield
    except InputError as error:
        if not name:
            raise
        key = f"corpus.sources.{name}"
        problems = [replace(problem, key=f"{key}.{problem.key}" if problem.key else key) for problem in error.problems]
        raise InputError(*problems, hint=error.hint) from None


def identify(config: DataConfig, documents: Mapping[str, Documents] | None = None) -> Identity:
    """Reads the sources, for their digests. Windows are cut later and do not matter here."""
    documents = documents or open_sources(config.corpus)
    tokenizer = _tokenizer(config, documents)
    sources = []
    for name, found in documents.items():
        split = {"format": FORMAT, "tokenizer": tokenizer, "held_out": config.validation_fraction}
        share = int(config.corpus.sources[name].weight) if isinstance(config.corpus, Mixture) else CYCLE
        sources.append(Source(name, share, fingerprint({"documents": found.digest, **split})))
    sources.sort(key=lambda source: (source.digest, source.name))
    # Names are in it because a result's metrics bear them.
    digest = fingerprint([[source.name, source.share, source.digest] for source in sources])
    return Identity(digest, tokenizer, tuple(sources))


def _tokenizer(config: DataConfig, documents: Mapping[str, Documents]) -> str:
    choice = config.tokenizer
    about: dict[str, object] = {"format": FORMAT, "tokenizer": identity_of(choice)}
    if isinstance(choice, BytePairTokenizer):  # trained on each source's training documents, once, whatever its share
        about |= {
            "library": version("tokenizers"),
            "documents": sorted(found.digest for found in documents.values()),
            "held_out": config.validation_fraction,
        }
    if isinstance(choice, FileTokenizer):
        about |= {"library": version("tokenizers")}
    return fingerprint(about)
