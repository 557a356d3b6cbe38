"""Messages on wrong input: every problem at once, each with its location and the next step."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class SourceLocation:
    """Place where a value was written."""

    source: str
    """A file, or the option of the command line that set it."""
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, in one line: `file:line: key: what is wrong`."""

    message: str
    key: str = ""
    location: SourceLocation | None = None

    def __str__(self) -> str:
        return ": ".join(str(part) for part in (self.location, self.key, self.message) if part)


MOST_LISTED = 50
"""Problems that a report lists."""


class InputError(Exception):
    """The input is wrong and nothing was started (exit code 2). Carries every problem."""

    def __init__(self, *problems: Problem | str, hint: str = "") -> None:
        self.problems = list(dict.fromkeys(Problem(p) if isinstance(p, str) else p for p in problems))
        self.hint = hint
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def report(self) -> str:
        """The message as the command line prints it: the first problems, their number, and where to look next."""
        count = len(self.problems)
        last = f"{count} problem{'s' if count > 1 else ''}, nothing was started."
        more = [f"... and {count - MOST_LISTED} more"] if count > MOST_LISTED else []
        return "\n".join([*map(str, self.problems[:MOST_LISTED]), *more, f"{last} {self.hint}".rstrip()])


@contextmanager
def collect_errors(problems: list[Problem]) -> Iterator[None]:
    """Add the errors of this block to `problems` and go on, so that the user sees all of them at once."""
    try:
        yield
    except InputError as error:
        problems += error.problems


RENAMED = {
    "like": "extends_study",
    "against": "baseline",
    "window_ahead": "window_right",
    "cross": "cross_attention_mode",
    "most": "max",
    "within": "stratify_by",
    "documents": "intra_document",
    "rest": "adamw",
    "held_out": "validation_files",
    "test": "test_files",
}
"""{key of earlier files: its name now}."""


def unknown_key(key: str, allowed: Iterable[str]) -> str:
    """`unknown key - it is called 'baseline' now`, or with the key that was meant, or with all that are allowed."""
    options = list(allowed)
    if RENAMED.get(key) not in options:
        return f"unknown key{did_you_mean(key, options)}"
    values = " (true for separate, false for joined)" if key == "documents" else ""
    return f"unknown key - it is called '{RENAMED[key]}' now{values}"


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """` - did you mean 'heads'?`, or the allowed words where none is similar."""
    options = sorted(str(option) for option in allowed)
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if near:
        return f" - did you mean '{near[0]}'?"
    return f" - allowed here: {', '.join(options)}" if options else ""


def some(names: Sequence[str]) -> str:
    """The first three names, and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
