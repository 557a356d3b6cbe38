"""Tokenised instruction data: examples tokenised once, read by number.

```
<root>/examples/<digest>/tokens.bin     ids, each example's input and then its target, ended by end-of-document
<root>/examples/<digest>/<split>.npy    a row for each example: first token, tokens of input and target, task
<root>/examples/<digest>/<split>.contents.npy  content hashes of a split's examples, in the same order
<root>/examples/<digest>/meta.json      tasks, counts, and how many were cut off
```
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lit_llm.config.problems import InputError, Problem
from lit_llm.data.checksums import is_complete, verify
from lit_llm.data.config import InstructionConfig, Tokenizer
from lit_llm.data.instructions import KEY, Example, identify_examples, read_examples
from lit_llm.data.prepare import Progress, check_unchanged, prepared_once
from lit_llm.data.record_files import SKIPPED
from lit_llm.data.shards import token_type
from lit_llm.data.splits import SPLITS, content_hash, split_of
from lit_llm.data.tokenizers import open_tokenizer
from lit_llm.objectives.config import EOD
from lit_llm.store.store import write_json

_CHUNK = 4096  # examples tokenised at once


def prepare_examples(
    config: InstructionConfig,
    tokenizer: Tokenizer,
    tokenizer_folder: Path,
    root: Path,
    digest: str,
    progress: Progress = lambda *_: None,
) -> None:
    """Tokenise the examples if they are not in `root` yet. Several processes may call it at once.

    Raises InputError for an example without a target, one that is too long where that is refused, and a split without
    examples.
    """

    def write(work: Path) -> None:
        _write(config, tokenizer, tokenizer_folder, work, progress)
        check_unchanged(identify_examples(config, tokenizer_folder.name) == digest, work, KEY)

    prepared_once(_folder(root, digest), write)
    verify(_folder(root, digest))


def is_prepared(root: Path, digest: str) -> bool:
    """True where these examples are tokenised."""
    return is_complete(_folder(root, digest))


class ExampleSet:
    """Tokenised examples, written by `prepare_examples`."""

    def __init__(self, root: Path, digest: str, tokenizer: Tokenizer) -> None:
        """Open the examples. Raises InputError for a changed or missing file."""
        self._folder = folder = _folder(root, digest)
        verify(folder)
        meta = json.loads((folder / "meta.json").read_text())
        self.tasks: tuple[str, ...] = tuple(meta["tasks"])
        """Names of the tasks; a single empty one for examples without tasks."""
        self.lost_bytes: int = meta["lost_bytes"]
        """Bytes of text that the tokenizer has dropped or does not know."""
        self.skipped: dict[str, int] = meta["skipped"]
        """Numbers of unreadable records that were left out, by `record_files.SKIPPED`."""
        self._tokens = np.memmap(folder / "tokens.bin", dtype=token_type(tokenizer), mode="r")
        self._index = {split: np.load(folder / f"{split}.npy", mmap_mode="r") for split in SPLITS}

    def count(self, split: str) -> int:
        return len(self._index[split])

    @property
    def held_out_splits(self) -> tuple[str, ...]:
        """Held-out splits with examples."""
        return tuple(split for split in SPLITS if split != "train" and self.count(split))

    def evaluated_split(self, wanted: str) -> str:
        """The split that evaluations read: `wanted`, or validation where `wanted` has no example."""
        return wanted if self.count(wanted) else "validation"

    def read(self, split: str, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(input, target) ids of an example."""
        start, source, target, _ = self._index[split][number].tolist()
        ids = np.asarray(self._tokens[start : start + source + target], dtype=np.int64)
        return ids[:source], ids[source:]

    def contents(self, split: str) -> np.ndarray:
        """Content hashes of a split's examples, in their order."""
        return np.asarray(np.load(self._folder / f"{split}.contents.npy"))

    def task_of(self, split: str) -> np.ndarray:
        """Number of each example's task."""
        return np.asarray(self._index[split][:, 3])

    def sample_of_lengths(self, split: str, count: int) -> list[tuple[int, int]]:
        """(tokens of the input, tokens of the target) of `count` evenly spread examples; all where there are fewer."""
        wanted = min(count, self.count(split))
        rows = self._index[split][np.arange(wanted) * self.count(split) // wanted]
        return [(int(source), int(target)) for _, source, target, _ in rows]


def _folder(root: Path, digest: str) -> Path:
    return root / "examples" / digest


def _write(
    config: InstructionConfig, choice: Tokenizer, tokenizer_folder: Path, work: Path, progress: Progress
) -> None:
    tokenizer, kind = open_tokenizer(choice, tokenizer_folder), token_type(choice)
    tasks: dict[str, int] = {}
    rows: dict[str, list[tuple[int, int, int, int]]] = {split: [] for split in SPLITS}
    contents: dict[str, list[int]] = {split: [] for split in SPLITS}
    cut, first_token, done, lost, left_out = {"inputs": 0, "targets": 0}, 0, 0, 0, Counter[str]()
    splits = {"examples": None, "validation_files": "validation", "test_files": "test"}
    sources = [(name, split) for name, split in splits.items() if getattr(config, name) is not None]
    # An incomplete file has a name that `prepared_once` removes.
    with (work / ".tokens").open("wb") as file:
        for name, split in sources:
            for chunk in _chunks(read_examples(config, name, left_out)):
                texts = [text for example in chunk for text in (example.source, example.target)]
                ids = iter(tokenizer.encode(texts))
                for example in chunk:
                    source, target = next(ids), np.append(next(ids), EOD)
                    lost += tokenizer.lost_bytes(example.source, source)
                    lost += tokenizer.lost_bytes(example.target, target)
                    _check_length(config, name, example, len(source), len(target))
                    cut["inputs"] += len(source) > config.input_length
                    cut["targets"] += len(target) > config.target_length
                    source = source[: config.input_length]
                    if len(target) > config.target_length:
                        target = np.append(target[: config.target_length - 1], EOD)
                    content = content_hash(example.source, example.target)
                    side = split or split_of(content, *config.fractions)
                    contents[side].append(content)
                    rows[side].append(
                        (first_token, len(source), len(target), tasks.setdefault(example.task, len(tasks)))
                    )
                    file.write(np.concatenate([source, target]).astype(kind).tobytes())
                    first_token += len(source) + len(target)
                done += len(chunk)
                progress("tokenising examples", done, 0)
    _check_counts(config, {split: len(examples_of_split) for split, examples_of_split in rows.items()})
    for split, examples_of_split in rows.items():
        np.save(work / f"{split}.npy", np.asarray(examples_of_split, dtype=np.int64))
        np.save(work / f"{split}.contents.npy", np.asarray(contents[split], dtype=np.uint64))
    (work / ".tokens").rename(work / "tokens.bin")
    counts = {split: len(examples_of_split) for split, examples_of_split in rows.items()}
    skipped = {what: left_out[what] for what in SKIPPED}
    about = {"tasks": list(tasks), "examples": counts, "cut_off": cut, "lost_bytes": lost, "skipped": skipped}
    write_json(work / "meta.json", about)


def _check_counts(config: InstructionConfig, counts: dict[str, int]) -> None:
    """Raise InputError for a split without examples. A test split of fraction 0 may be empty."""
    if not config.has_test:
        del counts["test"]
    for split, count in counts.items():
        if not count:
            key = "test_fraction" if split == "test" else "validation_fraction"
            raise InputError(Problem(f"no example is left for {split}; use more examples, or another {key}", KEY))


def _chunks(examples: Iterator[Example]) -> Iterator[list[Example]]:
    while chunk := list(itertools.islice(examples, _CHUNK)):
        yield chunk


def _check_length(config: InstructionConfig, name: str, example: Example, source: int, target: int) -> None:
    if config.over_long == "truncate":
        return
    for what, length, most in (("input", source, config.input_length), ("target", target, config.target_length)):
        if length > most:
            message = f"its {what} has {length} tokens, more than {what}_length {most}; `over_long: truncate` cuts it"
            raise InputError(Problem(message, f"{KEY}.{name}: {example.place}"))
