"""A small set of real instructions, made of the glosses of WordNet: words defined, found, chosen and put in their kind.

    define    What does the verb "sigh" mean?          heave or utter a sigh
    word      Which verb means: expel air?             exhale
    choose    Which of these means "expel air":
              hold, exhale, sing or bend?              exhale
    hypernym  "dog" is a kind of what?                 canine

WordNet (https://wordnet.princeton.edu) may be used, changed and passed on for any purpose under the WordNet license of
Princeton University, which wants its notice on every copy; it stands at the head of each of its files. Of a gloss the
definition is used, without the examples that follow it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from lit_llm.config.problems import InputError, Problem, SourceLocation, collect_errors, some
from lit_llm.data.splits import content_hash
from lit_llm.store.store import write_text

TASKS = ("define", "word", "choose", "hypernym")

_PARTS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
"""The letters of wndb(5) by the ends of the files' names; satellite adjectives (s) are adjectives here."""
_NAMES = {"n": "noun", "v": "verb", "a": "adjective", "r": "adverb"}
_TEMPLATES = {
    "define": (
        'Define the {part} "{word}".',
        'What does the {part} "{word}" mean?',
        'Explain the {part} "{word}" in a few words.',
    ),
    "word": ("Which {part} means: {gloss}?", "Name the {part} for this: {gloss}", 'The {part} for "{gloss}" is'),
    "choose": (
        'Which of these means "{gloss}": {options}?',
        'Choose the {part} for "{gloss}". Options: {options}.',
    ),
    "hypernym": ('"{word}" is a kind of what?', 'What kind of thing is "{word}"?', "{word} is a kind of"),
}
_CHOICES = 4
_WORD = 24
"""Characters of the longest word that is asked for or given."""
_HELD_OUT = 10
"""Of so many synsets one is held out."""


@dataclass(frozen=True)
class Synset:
    """Words of one meaning."""

    key: str
    """Part of speech and byte offset: how pointers name it."""
    words: tuple[str, ...]
    """The most usual first."""
    gloss: str
    """The definition; empty where it cannot be told from the examples."""
    whole: str
    """The definition with its examples."""
    kinds: tuple[str, ...]
    """Keys of what it is a kind of; instances (Rome is a city) are not."""

    @property
    def part(self) -> str:
        return self.key[0]

    @property
    def word(self) -> str:
        return self.words[0]

    @cached_property
    def digest(self) -> bytes:
        """Of the content, so that another version's offsets and order do not matter."""
        return hashlib.sha256("\n".join([self.part, *self.words, self.gloss]).encode()).digest()

    @cached_property
    def held_out(self) -> bool:
        """By the gloss alone, so that synsets of one gloss are on one side."""
        return int.from_bytes(hashlib.sha256(self.gloss.encode()).digest()[:8]) % _HELD_OUT == 0


def write_glosses(
    wordnet: Path, out: Path, *, limit: int | None = None, seed: int = 0, characters: int = 80
) -> dict[str, int]:
    """Write instructions to `out`/train.jsonl, and instructions and questions about other synsets beside it.

    train.jsonl     {"inputs", "targets", "task"}, FLAN's form; at most `limit` records, in an order that `seed` draws
    held_out.jsonl  the same about the held-out synsets, for validation
    choices.jsonl   {"inputs", "choices", "answer", "task"}: four choices, of which number `answer` is right

    text.jsonl      {"text"}: a dictionary's entries, with their examples, of all synsets that are not held out, to
                    pretrain on

    The last three are the same whatever the limit and the seed; the first records of each are a fair sample of it.

    wordnet: a folder with data.noun, data.verb, data.adj and data.adv (format: wndb(5)). characters: of the longest
    gloss; with 80, a byte pair tokenizer trained on prose needs less than 64 tokens for inputs and 32 for targets.
    No synset of train.jsonl stands in the others, neither asked for nor as an answer or a wrong choice; nor does a
    gloss, nor, white space and case aside, a question of held_out.jsonl with its answer.

    Returns the number of records by file and task. Raises InputError for a folder without those files, and for files
    of another format.
    """
    made = _Maker(read_wordnet(wordnet), characters)
    held_out = list(made.instructions(True, 0))
    asked = {_content(record) for record in held_out}  # "Lemon sole" and "lemon sole" are two synsets, one question
    trained_on = (record for record in made.instructions(False, seed) if _content(record) not in asked)
    train = sorted(trained_on, key=lambda record: _rank(seed, record))[:limit]
    others = {"held_out": held_out, "choices": made.choices(), "text": made.entries()}
    counts: Counter[str] = Counter()
    files = {"train": train} | {n: sorted(o, key=lambda record: _rank(0, record)) for n, o in others.items()}
    for name, records in files.items():
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_text(out / f"{name}.jsonl", "".join(lines))
        counts.update(f"{name}/{record.get('task', 'entries')}" for record in records)
    return dict(sorted(counts.items()))


def _content(record: dict[str, Any]) -> int:
    return content_hash(record["inputs"], record["targets"])


def _rank(seed: int, record: dict[str, Any]) -> bytes:
    said = [str(record.get(key)) for key in ("task", "inputs", "text")]
    return hashlib.sha256("/".join([str(seed), *said]).encode()).digest()


# --- WordNet's files -----------------------------------------------------------------------------------------------


def read_wordnet(folder: Path) -> dict[str, Synset]:
    """All synsets by key, in the order of the files. Raises InputError as `write_glosses` does."""
    paths = {part: folder / f"data.{name}" for name, part in _PARTS.items()}
    if missing := [path.name for path in paths.values() if not path.is_file()]:
        hint = "`apt install wordnet-base` puts them into /usr/share/wordnet; elsewhere give the dict folder of WordNet"
        raise InputError(Problem(f"has no {some(missing)}; {hint} 3.0 or 3.1", str(folder)))
    problems: list[Problem] = []
    found: dict[str, Synset] = {}
    for part, path in paths.items():
        with collect_errors(problems):
            found |= {synset.key: synset for synset in _read(path, part)}
    if problems:
        raise InputError(*problems)
    return found


def _read(path: Path, part: str) -> Iterator[Synset]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(Problem(f"cannot be read: {error}", str(path))) from None
    for number, line in enumerate(lines, start=1):
        if line and not line.startswith("  "):  # the license
            try:
                yield _synset(line, part)
            except (ValueError, IndexError):
                message = "is no line of wndb(5): offset, file, part, words, pointers | gloss"
                raise InputError(Problem(message, location=SourceLocation(str(path), number))) from None


_EXAMPLES = re.compile(r'[;:,]?\s*"')
_SYNTAX = re.compile(r"\((?:a|p|ip)\)$")


def _synset(line: str, part: str) -> Synset:
    """offset file part w_cnt (word lex_id)* p_cnt (symbol offset part source/target)* ... | gloss; w_cnt in hex."""
    left, gloss = line.split(" | ", 1)
    offset, _, _, count, *rest = left.split()
    words, (pointers, *rest) = rest[: 2 * int(count, 16) : 2], rest[2 * int(count, 16) :]
    if not words or not offset.isdigit() or len(rest) < 4 * int(pointers):
        raise ValueError(line)
    kinds = [rest[at + 2] + rest[at + 1] for at in range(0, 4 * int(pointers), 4) if rest[at] == "@"]
    # Where a definition has a quotation inside, it cannot be told from an example: `definition; "example"`.
    definition = _EXAMPLES.split(gloss, maxsplit=1)[0]
    whole = gloss.strip() == definition.strip() or gloss[len(definition)] in ";:"
    return Synset(
        part + offset,
        tuple(_SYNTAX.sub("", word).replace("_", " ") for word in words),
        definition.strip().rstrip(";: ") if whole else "",
        gloss.strip(),
        tuple(kinds),
    )


# --- questions -----------------------------------------------------------------------------------------------------


class _Maker:
    """Makes records of the synsets that are short enough."""

    def __init__(self, synsets: dict[str, Synset], characters: int) -> None:
        self.synsets = synsets
        self.senses: dict[tuple[str, str], list[Synset]] = defaultdict(list)
        for synset in synsets.values():
            for word in synset.words:
                self.senses[synset.part, word.casefold()].append(synset)
        self.used = [s for s in synsets.values() if 0 < len(s.gloss) <= characters and len(s.word) <= _WORD]
        self.pools: dict[tuple[str, bool], list[Synset]] = defaultdict(list)
        """Where wrong choices come from, by part of speech and side."""
        for synset in self.used:
            self.pools[synset.part, synset.held_out].append(synset)
        kinds = {kind.key: kind for synset in self.used for kind in self._kinds(synset)}
        self.kinds = [kind for _, kind in sorted(kinds.items()) if kind.held_out]

    def instructions(self, held_out: bool, seed: int) -> Iterator[dict[str, Any]]:
        for synset in self.used:
            if synset.held_out != held_out:
                continue
            draw = random.Random(synset.digest + str(seed).encode())
            yield _instruction("define", synset, synset.gloss, draw)
            if not _named(synset):
                yield _instruction("word", synset, synset.word, draw)
                if wrong := self._wrong(synset, self._right(synset), self.pools[synset.part, held_out], draw):
                    options = _mixed(synset.word, [other.word for other in wrong], draw)[0]
                    yield _instruction("choose", synset, synset.word, draw, options)
            for kind in self._kinds(synset)[:1]:
                yield _instruction("hypernym", synset, kind.word, draw)

    def entries(self) -> Iterator[dict[str, Any]]:
        for synset in self.synsets.values():
            if synset.gloss and not synset.held_out:
                yield {"text": f"{', '.join(synset.words)} ({_NAMES[synset.part]}): {synset.whole}"}

    def choices(self) -> Iterator[dict[str, Any]]:
        for synset in self.used:
            if not synset.held_out:
                continue
            draw = random.Random(synset.digest)
            right = self._right(synset)
            wrong = [] if _named(synset) else self._wrong(synset, right, self.pools[synset.part, True], draw)
            if wrong:
                yield _question("define", synset, synset.gloss, [other.gloss for other in wrong], draw)
                for task in ("word", "choose"):
                    yield _question(task, synset, synset.word, [other.word for other in wrong], draw)
            for kind in self._kinds(synset)[:1]:
                if wrong := self._wrong(kind, right | self._right(kind), self.kinds, draw):
                    yield _question("hypernym", synset, kind.word, [other.word for other in wrong], draw)

    def _kinds(self, synset: Synset) -> list[Synset]:
        """What a noun is a kind of, on the same side. A verb's hypernym would want another question."""
        found = [self.synsets[key] for key in synset.kinds if key in self.synsets] if synset.part == "n" else []
        return [kind for kind in found if kind.gloss and kind.held_out == synset.held_out and len(kind.word) <= _WORD]

    def _right(self, synset: Synset) -> set[str]:
        """What may not stand as a wrong choice: the words of all senses of the synset's word, and of what they are
        kinds of, for these are right as well, or not quite wrong."""
        todo = list(self.senses[synset.part, synset.word.casefold()])
        seen = {sense.key for sense in todo}
        words: set[str] = set()
        while todo:
            here = todo.pop()
            words.update(word.casefold() for word in here.words)
            above = [key for key in here.kinds if key in self.synsets and key not in seen]
            seen.update(above)
            todo += [self.synsets[key] for key in above]
        return words

    def _wrong(self, answer: Synset, right: set[str], pool: Sequence[Synset], draw: random.Random) -> list[Synset]:
        """Three synsets of which neither a word nor the gloss is right; none where so many cannot be found."""
        found: list[Synset] = []
        for other in draw.sample(pool, min(len(pool), 3 * _CHOICES)):
            near = [answer, *found]
            distinct = all(other.gloss != n.gloss and other.word.casefold() != n.word.casefold() for n in near)
            if distinct and not any(word.casefold() in right for word in other.words):
                found.append(other)
            if len(found) == _CHOICES - 1:
                return found
        return []


def _named(synset: Synset) -> bool:
    """Whether the gloss gives its own word away."""
    return any(word.casefold() in synset.gloss.casefold() for word in synset.words)


def _mixed(answer: str, wrong: Iterable[str], draw: random.Random) -> tuple[list[str], int]:
    """The choices in some order, and the place of the answer."""
    choices = [answer, *wrong]
    order = draw.sample(range(len(choices)), len(choices))
    return [choices[place] for place in order], order.index(0)


def _prompt(task: str, synset: Synset, draw: random.Random, options: Sequence[str] = ()) -> str:
    listed = f"{', '.join(options[:-1])} or {options[-1]}" if options else ""
    template = draw.choice(_TEMPLATES[task])
    return template.format(part=_NAMES[synset.part], word=synset.word, gloss=synset.gloss, options=listed)


def _instruction(
    task: str, synset: Synset, target: str, draw: random.Random, options: Sequence[str] = ()
) -> dict[str, Any]:
    return {"inputs": _prompt(task, synset, draw, options), "targets": target, "task": task}


def _question(task: str, synset: Synset, answer: str, wrong: Iterable[str], draw: random.Random) -> dict[str, Any]:
    choices, place = _mixed(answer, wrong, draw)
    inputs = _prompt(task, synset, draw, choices if task == "choose" else ())
    return {"inputs": inputs, "choices": choices, "answer": place, "task": task}


# --- tasks of the harness -------------------------------------------------------------------------------------------


def write_gloss_tasks(choices: Path, out: Path) -> tuple[str, ...]:
    """Make tasks of the harness of what `write_glosses` held out; returns their names, the group of all of them last.

    choices: its choices.jsonl. In `out`, which is then the `include_path` of `evaluate_tasks`, each task gets its
    questions and a YAML file that names their place: write them anew after a move. Shots are drawn from the other
    questions of the same task. Raises InputError for a file that is not there or has another form.
    """
    questions: dict[str, list[str]] = defaultdict(list)
    try:
        lines = choices.read_text(encoding="utf-8").split("\n")[:-1]
    except OSError as error:
        raise InputError(
            Problem(f"cannot be read: {error.strerror}; `python examples/glosses.py` makes it", str(choices))
        ) from None
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            assert 0 <= record["answer"] < len(record["choices"])
            questions[record["task"]].append(f"{line}\n")
        except (ValueError, TypeError, KeyError, AssertionError):
            message = "is no question: inputs, choices, the number of the answer, task"
            raise InputError(Problem(message, location=SourceLocation(str(choices), number))) from None
    names = []
    for task, own in sorted(questions.items()):
        file = write_text(out / f"{task}.jsonl", "".join(own))
        names.append(f"glosses_{task}")
        write_text(out / f"{task}.yaml", yaml.safe_dump(_task(names[-1], file.resolve()), sort_keys=False))
    group = {
        "group": "glosses",
        "task": list(names),
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": False}],
    }
    write_text(out / "glosses.yaml", yaml.safe_dump(group, sort_keys=False))
    return (*names, "glosses")


def _task(name: str, file: Path) -> dict[str, object]:
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "fewshot_split": "test",  # the question itself is never among its shots
        "output_type": "multiple_choice",
        # Names of fields, not templates: what a gloss holds is read as text.
        "doc_to_text": "inputs",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": metrics,
    }


def main() -> None:
    """Write the files that the arguments ask for; exit code 2 for input that cannot be read."""
    parser = argparse.ArgumentParser(
        description="Make instructions of WordNet's glosses. text.jsonl has a dictionary's entries to pretrain on, "
        "train.jsonl `inputs` and `targets` to finetune on, held_out.jsonl the same about other words to validate "
        "with, choices.jsonl multiple choice about those, and tasks/ that as tasks of lm-evaluation-harness.",
        epilog="Example: apt install wordnet-base; python examples/glosses.py --out glosses",
    )
    folder = "folder with WordNet's data.noun, data.verb, data.adj and data.adv (default: %(default)s)"
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help=folder)
    parser.add_argument("--out", type=Path, default=Path("glosses"), help="folder for the files (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="instructions at most; the questions stay the same")
    parser.add_argument("--seed", type=int, default=0, help="which instructions come first, and how they are worded")
    parser.add_argument("--characters", type=int, default=80, help="length of the longest gloss (default: %(default)s)")
    options = parser.parse_args()
    out: Path = options.out
    try:
        counts = write_glosses(
            options.wordnet, out, limit=options.limit, seed=options.seed, characters=options.characters
        )
        tasks = write_gloss_tasks(out / "choices.jsonl", out / "tasks")
    except InputError as error:
        print(error.report(), file=sys.stderr)
        sys.exit(2)
    for name in ("text", "train", "held_out", "choices"):
        kinds = {key.partition("/")[2]: count for key, count in counts.items() if key.startswith(name)}
        listed = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
        print(f"{out / name}.jsonl: {sum(kinds.values())} ({listed})")
    print(f"{out / 'tasks'}: {', '.join(tasks)}")


if __name__ == "__main__":
    main()
