"""Settings of the text of a stage: corpus, tokenizer and windows."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterator
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from lit_llm.config.problems import InputError
from lit_llm.config.section import Items, OneOf, Section, config_error
from lit_llm.data import tokenizer_file
from lit_llm.data.synthetic import Synthetic

CYCLE = 1000
"""Number of windows in which a mixture gives each source exactly its share."""


MOST_PATTERNS = 10_000
"""Most paths and globs of one corpus."""


class PythonStdlib(Section):
    """Sources of this interpreter's standard library without tests: about 10 MB, available without a network."""

    kind: Literal["python-stdlib"] = "python-stdlib"
    """Python's own library sources."""


def _encoding(name: str) -> str:
    try:
        "".encode(name)  # some of Python's codecs do not encode text
        return codecs.lookup(name).name
    except LookupError:
        raise config_error(("", f"{name!r} is no encoding that Python knows; for example utf-8 or latin-1")) from None


Encoding = Annotated[str, AfterValidator(_encoding)]
Errors = Literal["strict", "skip"]


def expanded(path: str) -> str:
    """A path with `~` and `$NAME` expanded."""
    return os.path.expandvars(os.path.expanduser(path))


FilePath = Annotated[str, AfterValidator(expanded)]
"""A path or a glob, relative to the YAML file that names it; `~` and `$NAME` are expanded as in a shell."""


class TextFiles(Section):
    """Text files; each file is one document."""

    kind: Literal["text"] = "text"
    """Text files."""
    files: Items[FilePath] = Field(min_length=1, max_length=MOST_PATTERNS)
    """Paths or globs: `["corpus/**/*.txt"]`."""
    encoding: Encoding = "utf-8"
    """Encoding of the files."""
    errors: Errors = "strict"
    """strict: files of another encoding are refused, all in one message. skip: they are left out, and counted."""


Scalar = str | int | float | bool


class Records(Section):
    """Documents of a corpus of records: objects of JSON, rows of a table."""

    text: str = Field("text", min_length=1)
    """The key or column that holds the document; `meta.body` is the key `body` of the object `meta`."""
    where: dict[str, Scalar | Annotated[Items[Scalar], Field(min_length=1)]] = {}
    """Keep only the records with these values, or one of each list: `{red_pajama_subset: [arxiv, c4]}`. Other records,
    and those without the key, are skipped. A key may have dots, like `text`."""
    skip_missing: bool = False
    """Leave out records without text (the key is missing, or null), and count them. Otherwise they are refused."""


class JsonLines(Records):
    """JSON lines, each an object with a document: RedPajama, C4, the Pile, Dolma."""

    kind: Literal["jsonl"] = "jsonl"
    """JSON lines."""
    files: Items[FilePath] = Field(min_length=1, max_length=MOST_PATTERNS)
    """Paths or globs: `["c4/*.jsonl.zst"]`; plain, .gz, .zst, .bz2 or .xz. Several processes read the parts of a plain
    file at once; one process reads a compressed file."""
    errors: Errors = "strict"
    """strict: a line that is not UTF-8 is refused. skip: it is left out, and counted."""


class Parquet(Records):
    """Parquet files, one document in each row: FineWeb, OpenWebText, all that the Hugging Face Hub has converted."""

    kind: Literal["parquet"] = "parquet"
    """Parquet files."""
    files: Items[FilePath] = Field(min_length=1, max_length=MOST_PATTERNS)
    """Paths or globs: `["fineweb/**/*.parquet"]`. Other columns are not read."""


class HuggingFace(Records):
    """A downloaded dataset of the Hugging Face Hub, or a folder in the same form; needs `lit-llm[hf]`.

    Nothing is downloaded: `hf download --type dataset ORG/NAME` does that. All files in the cache are read: a partial
    download is a smaller corpus with another fingerprint. The files may be Parquet, JSON lines or Arrow.
    """

    kind: Literal["huggingface"] = "huggingface"
    """A dataset of the Hugging Face Hub."""
    path: FilePath = Field(min_length=1)
    """`ORG/NAME` on the Hub, a folder with data files, or one that `save_to_disk` has written."""
    name: str | None = None
    """The configuration (subset), as the dataset's card calls it; None for a single one."""
    split: str = "train"
    """The split whose documents are read. All of them are read, and two fractions of them are held out."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; None: what `main` was when it was downloaded."""


class ByteTokenizer(Section):
    """One token per UTF-8 byte, after the two special ones."""

    kind: Literal["bytes"] = "bytes"
    """Bytes."""

    @property
    def vocabulary(self) -> int:
        return 258


class SymbolTokenizer(Section):
    """One token per symbol of a synthetic task, after the two special ones."""

    kind: Literal["symbols"] = "symbols"
    """Symbols."""
    vocabulary: int = Field(64, gt=2)
    """Number of tokens, the 2 special ones included. May be more than a task has, so that tasks can share it."""


class BytePairTokenizer(Section):
    """Byte-level BPE, trained on the training documents; equal corpora give equal tokenizers."""

    kind: Literal["bpe"] = "bpe"
    """Byte-level byte-pair encoding."""
    vocabulary: int = Field(4096, ge=258)
    """Number of tokens, the 256 bytes and 2 special ones included."""
    training_bytes: int = Field(100_000_000, gt=0)
    """Bytes of text to train on. A larger corpus is sampled in the order of a hash of the documents' content: the same
    random sample for any order of the documents."""


class FileTokenizer(Section):
    """A `tokenizer.json` of the `tokenizers` library, as models on the Hugging Face Hub have it.

    Its end of a document becomes id 0 and its <s> id 1, by exchanging ids; a missing one is added. No text can spell a
    special token, and dropout in the file is not applied. Long documents are cut between words where that changes no
    id; one with more than 16 million characters without such a place is refused.
    """

    kind: Literal["file"] = "file"
    """A `tokenizer.json`."""
    path: FilePath
    """The file. Its content is part of a run's fingerprint, its path is not."""
    end_of_document: str | None = Field(None, min_length=1)
    """The token that ends a document; None: the first of the usual ones in the file (<|endoftext|>, </s>, ...), else a
    new one."""
    begin: str | None = Field(None, min_length=1)
    """The token that begins a target; None: the first of the usual ones in the file (<s>, <bos>, ...), else a new
    one."""

    @model_validator(mode="after")
    def _is_one(self) -> FileTokenizer:
        try:
            self.layout()
        except InputError as error:
            raise config_error(*((problem.key, problem.message) for problem in error.problems)) from None
        return self

    def layout(self) -> tokenizer_file.Layout:
        """Layout of the file's ids. Raises InputError if it is missing or no tokenizer."""
        return tokenizer_file.read(Path(self.path), self.end_of_document, self.begin)

    @property
    def vocabulary(self) -> int:
        return self.layout().vocabulary


_Single = PythonStdlib | TextFiles | JsonLines | Parquet | HuggingFace
SingleCorpus = Annotated[_Single, OneOf(default=PythonStdlib)]


def _source_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise config_error(("", f"{name!r} is not a plain name: letters, digits, '-' and '_'"))
    return name


SourceName = Annotated[str, AfterValidator(_source_name)]
"""Name of a text among several; part of the names of metrics."""


class Source(Section):
    """One text of a mixture."""

    corpus: Annotated[_Single | Synthetic, OneOf(default=PythonStdlib)]
    """Origin of its documents; not a mixture. Synthetic tasks mix with each other only."""
    weight: float = Field(1.0, gt=0)
    """Share of the windows, relative to the other weights. Resolved to windows in a thousand."""


class Mixture(Section):
    """Several texts, read in fixed shares. Each is tokenised separately, by one shared tokenizer."""

    kind: Literal["mixture"] = "mixture"
    """A mixture."""
    sources: dict[SourceName, Source]
    """Texts by name. The names are in the metrics `val/target_nll/<source>`, and so part of a run's fingerprint. They
    also break ties: in the rounding of shares, and in the order of two sources with the same text."""

    @field_validator("sources")
    @classmethod
    def _resolved(cls, sources: dict[str, Source]) -> dict[str, Source]:
        """Replace the weights by windows in CYCLE, so that 3 : 1 and 6 : 2 are the same mixture."""
        if len(sources) < 2:
            raise config_error(
                ("", f"has {len(sources)} of the two sources that it needs; one alone is a corpus itself")
            )
        total = sum(Fraction(source.weight) for source in sources.values())
        quotas = {name: Fraction(source.weight) * CYCLE / total for name, source in sources.items()}
        findings = [
            (f"{name}.weight", f"{sources[name].weight:g} of {float(total):g} is less than one window in {CYCLE}")
            for name, quota in quotas.items()
            if quota < 1 - Fraction(1, 10**9)  # 0.001 of 1 is one window, whatever its last bit
        ]
        if findings:
            raise config_error(*findings)
        counts = largest_remainders(quotas)
        return {name: source.model_copy(update={"weight": float(counts[name])}) for name, source in sources.items()}


def largest_remainders(quotas: dict[str, Fraction]) -> dict[str, int]:
    """Integers near the quotas with the same sum (Hamilton's method), ties by name."""
    counts = {name: int(quota) for name, quota in quotas.items()}
    missing = int(sum(quotas.values())) - sum(counts.values())
    for name in sorted(quotas, key=lambda name: (counts[name] - quotas[name], name))[:missing]:
        counts[name] += 1
    return counts


Corpus = Annotated[_Single | Mixture | Synthetic, OneOf(default=PythonStdlib)]
Tokenizer = Annotated[
    ByteTokenizer | BytePairTokenizer | FileTokenizer | SymbolTokenizer, OneOf(default=BytePairTokenizer)
]


def identity_of(tokenizer: Tokenizer) -> dict[str, object]:
    """Plain data on which the tokens depend: for a file its content and the chosen ids, not its path."""
    if isinstance(tokenizer, FileTokenizer):
        return {"kind": tokenizer.kind, **asdict(tokenizer.layout())}
    return tokenizer.model_dump(mode="json")


def never_equal(one: Tokenizer, other: Tokenizer) -> bool:
    """True where two tokenizers differ for any training text. A trained one is compared by its size only."""
    if isinstance(one, BytePairTokenizer) or isinstance(other, BytePairTokenizer):
        built_in = {ByteTokenizer, SymbolTokenizer} & {type(one), type(other)}
        return bool(built_in) or one.vocabulary != other.vocabulary
    return identity_of(one) != identity_of(other)


class DataConfig(Section):
    """The text of a stage."""

    corpus: Corpus = PythonStdlib()
    """Origin of the documents."""
    tokenizer: Tokenizer = BytePairTokenizer()
    """Tokenizer. Losses per token compare only within one tokenizer; bits per byte compare across tokenizers that keep
    the text unchanged. They are left out for a file whose steps may change it."""
    sequence_length: int = Field(gt=0)
    """Tokens of a window. Documents are joined with an end-of-document token and cut without overlap."""
    batch_size: int = Field(gt=0)
    """Windows per optimiser step."""
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the documents that is held out for choices. The selection depends on their content alone, without white
    space, case and Unicode's compatible forms (NFKC)."""
    test_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the documents that is held out for final tables, selected in the same way; 0: no test split, and final
    tables are measured on the validation documents."""
    near_duplicates: Literal["drop", "keep"] = "drop"
    """drop: leave out training documents that share 80% of their runs of five words with a held-out document, and test
    documents that do so with a validation document; the data's meta.json counts them. keep: leave out none. Examples of
    synthetic tasks are never left out: equal ones are in one split, and others have other answers."""

    @property
    def drops_near_duplicates(self) -> bool:
        """True where near-duplicates are left out."""
        return self.near_duplicates == "drop" and not self.tasks

    @property
    def has_test(self) -> bool:
        """True where there is a test split."""
        return self.test_fraction > 0

    @property
    def tasks(self) -> dict[str, Synthetic]:
        """{source: its synthetic task}; empty for text. The name of a single source is ''."""
        sources = (
            {name: source.corpus for name, source in self.corpus.sources.items()}
            if isinstance(self.corpus, Mixture)
            else {"": self.corpus}
        )
        return {name: corpus for name, corpus in sources.items() if isinstance(corpus, Synthetic)}

    @model_validator(mode="after")
    def _leaves_training_text(self) -> DataConfig:
        _check_fractions(self.validation_fraction, self.test_fraction)
        if findings := [*self._task_problems()]:
            raise config_error(*findings)
        return self

    def _task_problems(self) -> Iterator[tuple[str, str]]:
        """(key, message) of settings that do not fit synthetic tasks."""
        tasks, symbols = self.tasks, isinstance(self.tokenizer, SymbolTokenizer)
        if not tasks:
            if symbols:
                yield "tokenizer", "symbols are those of a synthetic task, and this corpus is text; use bytes or bpe"
            return
        if isinstance(self.corpus, Mixture) and len(tasks) < len(self.corpus.sources):
            yield "corpus.sources", "a text and a synthetic task share no symbols; mix tasks with tasks"
        needed = 2 + max(each.task.symbols for each in tasks.values())
        if not symbols or self.tokenizer.vocabulary < needed:
            message = (
                f"write `tokenizer: {{kind: symbols, vocabulary: {needed}}}`, or more: the symbols of the task and 2"
            )
            yield "tokenizer", message + ("" if symbols else "; a synthetic task has no text")
        lengths = {each.task.length: name for name, each in tasks.items()}
        if len(lengths) > 1:
            message = "one window holds one example, and these have several lengths: "
            yield "corpus.sources", message + ", ".join(f"{name} {length}" for length, name in lengths.items())
        elif self.sequence_length not in lengths:
            tokens = next(iter(lengths))
            message = f"write {tokens}: the tokens of an example of this task, its end of the document included"
            yield "sequence_length", message


def _check_fractions(validation: float, test: float) -> None:
    if validation + test >= 1:
        message = f"{test:g} for test and {validation:g} for validation leave nothing to train on; their sum must be "
        raise config_error(("test_fraction", message + "less than 1"))


FIELD = re.compile(r"\{([A-Za-z_][\w.]*)\}")
"""A field of a record in a template: `{question}`, `{meta.body}`."""

Examples = Annotated[JsonLines | Parquet | HuggingFace, OneOf(default=JsonLines)]


class InstructionConfig(Section):
    """Examples of tasks, each an input and a target. Without packing, as in the FLAN finetuning of arXiv 2510.26622,
    one example is one row of a batch.

    Examples whose input and target are equal without white space, case and Unicode's compatible forms (NFKC) are in one
    split. Near-duplicates are left out of documents only: with a template, different questions share most of their runs
    of five words.
    """

    examples: Examples
    """Origin of the examples: files in FLAN's form as they are, others by templates. Their `text` is not used."""
    validation_files: Examples | None = None
    """Separate examples for validation. Absent: `validation_fraction` of `examples`."""
    test_files: Examples | None = None
    """Separate examples for the test split. Absent: `test_fraction` of `examples`."""
    inputs: str = "{inputs}"
    """Template of the input: `"Question: {question}\\nAnswer:"`. The fields are keys or columns that hold strings; a
    key may have dots, as in `where`."""
    targets: str = "{targets}"
    """Template of the target, to which an end-of-document token is added. A target without text is an error."""
    task: str | None = None
    """The field that names an example's task; validation losses are then also reported by task."""
    input_length: int = Field(gt=0)
    """Most tokens of an input (2048 in the paper)."""
    target_length: int = Field(gt=1)
    """Most tokens of a target, including its end-of-document token (512 in the paper)."""
    over_long: Literal["truncate", "refuse"] = "truncate"
    """truncate: cut off the end of a longer input or target, and count it; a target keeps its end-of-document token.
    refuse: an error that names the first one."""
    batch_size: int = Field(gt=0)
    """Examples per optimiser step."""
    packing: Literal["none", "greedy"] = "none"
    """greedy: examples share rows up to the length of the batch's longest example; each sees only itself, at unchanged
    positions. Steps have the same examples and loss in fewer rows, so it is not part of the fingerprint; with dropout,
    as with another micro_batch_size (which counts rows), other entries are drawn."""
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the examples that is held out for choices without `validation_files`. The selection depends on their
    content alone, so equal examples are in the same split."""
    test_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the examples that is held out for final tables without `test_files`, selected in the same way; 0: no
    test split."""

    @property
    def fractions(self) -> tuple[float, float]:
        """Shares of `examples` for validation and for test; 0 for a split with separate files."""
        validation = 0.0 if self.validation_files else self.validation_fraction
        return validation, 0.0 if self.test_files else self.test_fraction

    @property
    def has_test(self) -> bool:
        """True where there is a test split."""
        return self.test_files is not None or self.test_fraction > 0

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that are read, each once."""
        named = [*FIELD.findall(self.inputs), *FIELD.findall(self.targets), *([self.task] if self.task else [])]
        return tuple(dict.fromkeys(named))

    @model_validator(mode="after")
    def _reads_targets(self) -> InstructionConfig:
        findings = []
        if not FIELD.search(self.targets):
            findings.append(("targets", f"{self.targets!r} has no field, so all answers are the same; write {{name}}"))
        for name in ("examples", "validation_files", "test_files"):
            place = getattr(self, name)
            if place is not None and place.text != "text":
                message = "has no meaning here: `inputs` and `targets` say which fields are read"
                findings.append((f"{name}.text", message))
        if findings:
            raise config_error(*findings)
        _check_fractions(*self.fractions)
        return self
