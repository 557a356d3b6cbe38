"""Tokenise a corpus once, into files that batches are read from.

```
<root>/tokenizers/<digest>/tokenizer.json    a trained tokenizer
<root>/<digest>/                             the shards of one source; complete where it exists under this name
<root>/near_duplicates/<digest>/             signatures of the held-out documents of all sources
<root>/mixtures/<digest>.json                sources of a stage with their shares: one, or a mixture's
```
Every folder has the checksums of its files (see `checksums.py`), which are compared whenever it is opened.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lit_llm.config.hashing import fingerprint
from lit_llm.config.problems import InputError, Problem
from lit_llm.data.checksums import is_complete, verify, write_checksums
from lit_llm.data.config import DataConfig, SingleCorpus
from lit_llm.data.corpora import Documents
from lit_llm.data.near_duplicate_identity import identify_signatures
from lit_llm.data.near_duplicates import write_signatures
from lit_llm.data.processes import leave_if_imported
from lit_llm.data.record_files import SKIPPED
from lit_llm.data.shards import Job, Shards, contents_of, disk_problem, token_type, write_shards
from lit_llm.data.sources import (
    Identity,
    error_context,
    held_out_texts,
    identify,
    identify_held_out,
    open_sources,
    source_error_context,
)
from lit_llm.data.splits import SPLITS, content_hash, split_of
from lit_llm.data.tokenizers import Tokenizer, open_tokenizer, write_tokenizer
from lit_llm.objectives.config import EOD
from lit_llm.store.locks import locked
from lit_llm.store.store import write_json

Progress = Callable[[str, int, int], None]
"""Callback that gets (name of the work, bytes done, total bytes)."""


@dataclass(frozen=True)
class PreparedSource:
    """Tokens of one source."""

    name: str
    """Empty where the corpus is no mixture."""
    share: int
    """Windows in every CYCLE; 0 where training does not read it."""
    folder: Path
    tokens: Mapping[str, tuple[int, ...]]
    """{split: number of tokens in each shard}."""
    lost_bytes: int = 0
    """Bytes of its text that the tokenizer has dropped or does not know."""

    def count(self, split: str) -> int:
        """Number of tokens of a split."""
        return sum(self.tokens[split])

    def contents(self, split: str) -> np.ndarray:
        """Content hashes of a split's documents, each once, in ascending order."""
        return np.unique(self.document_contents(split))

    def document_contents(self, split: str) -> np.ndarray:
        """Content hash of each document of a split, in the order of the text."""
        parts = [contents_of(self.folder, split, part) for part in range(len(self.tokens[split]))]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint64)

    def evaluated_split(self, wanted: str) -> str:
        """The split that evaluations read: `wanted`, or validation where `wanted` has no document."""
        return wanted if self.count(wanted) else "validation"


@dataclass(frozen=True)
class Prepared:
    """Tokenised text of one source or several."""

    config: DataConfig
    digest: str
    tokenizer_folder: Path
    sources: tuple[PreparedSource, ...]

    @property
    def root(self) -> Path:
        """Folder of all tokenised data."""
        return self.tokenizer_folder.parents[1]

    def open(self, source: PreparedSource, split: str) -> Shards:
        """All tokens of a source's split, read from disk on demand."""
        return Shards(source.folder, split, source.tokens[split], token_type(self.config.tokenizer))

    @property
    def held_out_splits(self) -> tuple[str, ...]:
        """Held-out splits with at least one window of every source."""
        length = self.config.sequence_length
        return tuple(
            split
            for split in SPLITS
            if split != "train" and all(source.count(split) >= length for source in self.sources)
        )

    def text_of(self, source: PreparedSource, split: str, content: int, length: int) -> str:
        """The first tokens of the document with this content hash, as text."""
        for part, count in enumerate(source.tokens[split]):
            numbers = np.flatnonzero(contents_of(source.folder, split, part) == content)
            if len(numbers):
                shard = Shards(source.folder, split, source.tokens[split], token_type(self.config.tokenizer))
                ids = shard.read(np.array([sum(source.tokens[split][:part])]), count)[0]
                begins = [0, *(np.flatnonzero(ids == EOD) + 1).tolist()]
                begin, end = begins[numbers[0]], begins[numbers[0] + 1] - 1
                return self.tokenizer().decode(ids[begin : min(end, begin + length)].tolist())
        raise KeyError(content)

    def tokenizer(self) -> Tokenizer:
        return open_tokenizer(self.config.tokenizer, self.tokenizer_folder)

    def byte_lengths(self, *more: PreparedSource) -> np.ndarray | None:
        """V: bytes of text that each id stands for; see `Tokenizer.byte_lengths`.

        more: further texts. Also None where the tokenizer has lost bytes of any text, since bits per byte would then
        leave out the lost text.
        """
        lost = any(source.lost_bytes for source in (*self.sources, *more))
        return None if lost else self.tokenizer().byte_lengths()


def prepare(
    config: DataConfig, root: Path, progress: Progress = lambda *_: None, identity: Identity | None = None
) -> Prepared:
    """Tokenise the parts of the corpus that are not in `root` yet. Several processes may call it at once.

    identity: result of `identify`, which is called when absent. After a kill or an interrupt the next call continues.
    Raises InputError when the corpus cannot be read or has changed since it was identified, or when a source is too
    small to give each split one window.
    """
    leave_if_imported()
    documents = open_sources(config.corpus)
    identity = identity or identify(config, documents)
    prepared_once(tokenizer_folder(root, identity.tokenizer), _tokenizer_writer(config, documents, identity, progress))
    verify(tokenizer_folder(root, identity.tokenizer))
    signatures = None
    if config.drops_near_duplicates and any(not is_complete(root / source.digest) for source in identity.sources):
        signatures = _signatures_folder(config, documents, root)
        prepared_once(signatures, _signature_writer(config, documents, identity, progress))
        verify(signatures)
    job = partial(
        Job,
        tokenizer=config.tokenizer,
        tokenizer_folder=tokenizer_folder(root, identity.tokenizer),
        validation_fraction=config.validation_fraction,
        test_fraction=config.test_fraction,
        near_duplicates=signatures,
    )
    for source in identity.sources:
        log_progress = partial(progress, f"tokenising {source.name}".rstrip())
        write = _shard_writer(documents[source.name], job, lambda: identify(config) == identity, log_progress)
        with source_error_context(source.name):
            prepared_once(root / source.digest, write)
    sources = [{"name": s.name, "share": s.share, "digest": s.digest} for s in identity.sources]
    mixture = {"tokenizer": identity.tokenizer, "sources": sources}
    (root / "mixtures").mkdir(exist_ok=True)
    write_json(_mixture_file(root, identity.digest), {**mixture, _CHECKSUM: fingerprint(mixture)})
    prepared = open_prepared(config, root, identity.digest)
    _check_windows(prepared)
    return prepared


def prepare_held_out(
    corpora: Mapping[str, SingleCorpus], data: Prepared, progress: Progress = lambda *_: None
) -> tuple[PreparedSource, ...]:
    """Tokenise texts that only evaluations read, in the folder of the model's data and with its tokenizer.

    Their documents form the split `validation`. Raises InputError when a text cannot be read, at `corpora.<name>`.
    """
    leave_if_imported()
    config, tokenizer = data.config, data.tokenizer_folder.name
    texts = held_out_texts(corpora, config, tokenizer)
    digests = {name: text.digest for name, text in texts.items()}
    for name, text in texts.items():
        job = partial(
            Job,
            tokenizer=config.tokenizer,
            tokenizer_folder=data.tokenizer_folder,
            validation_fraction=text.fraction,
            test_fraction=0.0,
            splits=("validation",),
        )
        log_progress = partial(progress, f"tokenising {name}")
        write = _shard_writer(
            text.documents, job, lambda: identify_held_out(corpora, config, tokenizer) == digests, log_progress
        )
        with error_context(f"corpora.{name}", instead_of="corpus"):
            prepared_once(data.root / text.digest, write)
    return open_held_out(digests, data)


def open_held_out(digests: Mapping[str, str], data: Prepared) -> tuple[PreparedSource, ...]:
    """Open the texts of `prepare_held_out`. digests: those of `identify_held_out`."""
    return tuple(_open_source(data.root, name, 0, digest) for name, digest in sorted(digests.items()))


def is_prepared(root: Path, digest: str) -> bool:
    """True where `prepare` has written this text."""
    if not _mixture_file(root, digest).is_file():
        return False
    mixture = _read_mixture(root, digest)
    folders = [
        tokenizer_folder(root, mixture["tokenizer"]),
        *(root / source["digest"] for source in mixture["sources"]),
    ]
    return all(map(is_complete, folders))


def open_prepared(config: DataConfig, root: Path, digest: str) -> Prepared:
    """Open the data of `prepare`. Raises InputError for a changed or missing file."""
    mixture = _read_mixture(root, digest)
    verify(tokenizer_folder(root, mixture["tokenizer"]))
    sources = tuple(
        _open_source(root, source["name"], source["share"], source["digest"]) for source in mixture["sources"]
    )
    return Prepared(config, digest, tokenizer_folder(root, mixture["tokenizer"]), sources)


def _open_source(root: Path, name: str, share: int, digest: str) -> PreparedSource:
    verify(root / digest)
    meta = json.loads((root / digest / "meta.json").read_text())
    tokens = {split: tuple(meta["tokens"][split]) for split in SPLITS}
    return PreparedSource(name, share, root / digest, tokens, sum(meta["lost_bytes"].values()))


def _mixture_file(root: Path, digest: str) -> Path:
    return root / "mixtures" / f"{digest}.json"


_CHECKSUM = "checksum"
"""Key in a mixture's file of the fingerprint of all other keys."""


def _read_mixture(root: Path, digest: str) -> dict[str, Any]:
    path = _mixture_file(root, digest)
    try:
        mixture: dict[str, Any] = json.loads(path.read_bytes())
        if mixture.pop(_CHECKSUM) == fingerprint(mixture):
            return mixture
        message = "has changed since it was written"
    except OSError as error:
        message = f"cannot be read ({error.strerror})"
    except (ValueError, AttributeError, KeyError, TypeError):
        message = "has changed since it was written"
    raise InputError(Problem(f"{message}; delete the file and run again: it is written anew", str(path)))


def tokenizer_folder(root: Path, digest: str) -> Path:
    """Folder of the tokenizer with this digest."""
    return root / "tokenizers" / digest


def _check_windows(prepared: Prepared) -> None:
    config = prepared.config
    splits = [split for split in SPLITS if split != "test" or config.has_test]
    problems = [
        Problem(
            f"the {split} part has {source.count(split)} tokens, less than one window of {config.sequence_length}; use "
            f"more text, shorter sequences or another {_fraction_key(split, config)}",
            f"corpus.sources.{source.name}" if source.name else "data.corpus",
        )
        for source in prepared.sources
        for split in splits
        if source.count(split) < config.sequence_length
    ]
    if problems:
        raise InputError(*problems)


def _fraction_key(split: str, config: DataConfig) -> str:
    """Key of the configuration that makes a split larger."""
    if split == "test":
        return "test_fraction (0: no test split)"
    largest = "test_fraction" if config.test_fraction > config.validation_fraction else "validation_fraction"
    return largest if split == "train" else "validation_fraction"


def prepared_once(folder: Path, write: Callable[[Path], Mapping[str, str] | None]) -> None:
    """Make a folder, unless it exists, with `write`, which fills a working folder. One process at a time.

    write: may return checksums that it has computed. It gets the files that an earlier attempt has finished.
    """
    if is_complete(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f"{folder.name}.lock"), patience=math.inf):
        if is_complete(folder):
            return
        if folder.is_dir():
            shutil.rmtree(folder)  # written before there were checksums
        work = folder.with_name(f".{folder.name}")
        work.mkdir(exist_ok=True)
        try:
            _remove_incomplete(work)
            checksums = write(work)
            _remove_incomplete(work)
            write_checksums(work, checksums or {})
            work.rename(folder)
        except BaseException as error:
            _remove_incomplete(work)
            with suppress(OSError):
                work.rmdir()  # if no file is finished
            if isinstance(error, OSError) and is_complete(folder):
                return  # this process was stopped, and another one has finished the folder meanwhile
            if isinstance(error, OSError):
                raise InputError(disk_problem(error)) from None
            raise


def _remove_incomplete(work: Path) -> None:
    """Remove incomplete files of a killed process."""
    for path in work.glob(".*"):
        path.unlink(missing_ok=True)


def _tokenizer_writer(
    config: DataConfig, documents: Mapping[str, Documents], identity: Identity, progress: Progress
) -> Callable[[Path], None]:
    def write(work: Path) -> None:
        write_tokenizer(config.tokenizer, _training_texts(documents, config, progress), work)
        check_unchanged(identify(config) == identity, work)

    return write


def _signatures_folder(config: DataConfig, documents: Mapping[str, Documents], root: Path) -> Path:
    digests = [text.digest for text in documents.values()]
    return root / "near_duplicates" / identify_signatures(digests, config.validation_fraction, config.test_fraction)


def _signature_writer(
    config: DataConfig, documents: Mapping[str, Documents], identity: Identity, progress: Progress
) -> Callable[[Path], None]:
    def write(work: Path) -> None:
        fractions = (config.validation_fraction, config.test_fraction)
        write_signatures(work, documents, fractions, partial(progress, "signing held-out documents"))
        check_unchanged(identify(config) == identity, work)

    return write


def check_unchanged(unchanged: bool, work: Path, key: str = "corpus") -> None:
    """Raise InputError, and remove `work`, if the text has changed since its digest was computed."""
    if not unchanged:
        shutil.rmtree(work)
        raise InputError(
            Problem(
                "the text changed while it was tokenised; run again. Of a study that was opened by its name it is "
                "another text by now: give the study's file",
                key,
            )
        )


def _training_texts(documents: Mapping[str, Documents], config: DataConfig, progress: Progress) -> Iterator[str]:
    """The training documents of all sources."""
    total, done, reported = sum(texts.size for texts in documents.values()), 0, 0
    progress("training the tokenizer", 0, total)
    for name, texts in documents.items():
        for part in texts.parts():
            with source_error_context(name):
                for text in part:
                    if split_of(content_hash(text), config.validation_fraction, config.test_fraction) == "train":
                        yield text  # `train_bpe` cuts what is long
                    done += len(text)
                    if done - reported > 1 << 20:
                        reported = done
                        progress("training the tokenizer", min(done, total), total)


def _shard_writer(
    documents: Documents,
    job: Callable[..., Job],
    unchanged: Callable[[], bool],
    progress: Callable[[int, int], None],
) -> Callable[[Path], Mapping[str, str]]:
    """Writer of the shards of one text.

    job: makes the job from its folder and cut. unchanged: whether the text still has the digest of its identity.
    """

    def write(work: Path) -> Mapping[str, str]:
        parts, state = documents.parts(), documents.state()
        job_of_text = job(folder=work, cut=fingerprint([[part.size for part in parts], state]))
        write_shards(job_of_text, parts, progress)
        check_unchanged(documents.state() == state and unchanged(), work)
        finished = [job_of_text.finished(number) or {} for number in range(len(parts))]
        tokens = {split: [part["tokens"][split] for part in finished] for split in SPLITS}
        meta = {"tokens": tokens, "documents": sum(part["documents"] for part in finished)}
        for key in ("documents_of", "near_duplicates", "bytes", "lost_bytes"):
            meta[key] = {split: sum(part[key][split] for part in finished) for split in SPLITS}
        meta["skipped"] = {what: sum(part["skipped"].get(what, 0) for part in finished) for what in SKIPPED}
        write_json(work / "meta.json", meta)
        return {name: digest for part in finished for name, digest in part["files"].items()}

    return write
