"""All studies of a store: their questions and answers, and the expected share of false discoveries."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lit_llm.report import text
from lit_llm.report.tables.table import Table
from lit_llm.statistics.false_discoveries import DifferenceTest, FalseDiscoveries, false_discoveries
from lit_llm.statistics.paired import Difference
from lit_llm.statistics.verdicts import LOST
from lit_llm.store.files import Damaged
from lit_llm.store.store import Store, finite, read_json
from lit_llm.studies.coordinators import is_running
from lit_llm.studies.stored import STORED, SWEEP

ANSWER, COMPARISON = "answer.json", "comparison.json"
"""Files for programs that a report and a comparison write into a study's folder."""


@dataclass(frozen=True)
class StudyEntry:
    """One study of a store."""

    study: str
    question: str
    states: Mapping[str, int]
    """{state: number of runs} at the last comparison if there was one; empty for a sweep."""
    date: float
    """Time of that comparison, else of the study's begin, in seconds since 1970."""
    answer: str
    """First sentence of the last report; empty without a report."""
    running: bool = False
    """Whether a process runs it now."""
    is_sweep: bool = False

    def as_json(self) -> dict[str, Any]:
        return {
            "study": self.study,
            "question": self.question,
            "states": dict(self.states),
            "date": self.date,
            "answer": self.answer,
            "running": self.running,
        }


@dataclass(frozen=True)
class Studies:
    """All studies of a store, and their false discoveries."""

    entries: tuple[StudyEntry, ...]
    discoveries: FalseDiscoveries
    problems: tuple[str, ...]
    """Messages on files that cannot be read, whose content is in no number."""

    def as_json(self) -> dict[str, Any]:
        """Output of `studies --json`. Keys may be added, none is renamed."""
        return {
            "studies": [entry.as_json() for entry in self.entries],
            "false_discoveries": discoveries_json(self.discoveries),
            "problems": list(self.problems),
        }


def discoveries_json(discoveries: FalseDiscoveries) -> dict[str, Any]:
    """Counts and expected share of false discoveries, and every called difference with its p and q."""
    called = [
        {"study": test.study, "arm": test.arm, "p": test.p, "q": q} for test, q in discoveries.q_values if test.called
    ]
    return {
        "studies": discoveries.studies,
        "tested": discoveries.tested,
        "called": discoveries.called,
        "expected_false": discoveries.expected_false,
        "differences": called,
    }


def studies_of(store: Store) -> Studies:
    """Every study and every sweep of a store, oldest first."""
    entries, tests, problems = list[StudyEntry](), dict[tuple[Any, ...], DifferenceTest](), list[str]()
    files = sorted((store.root / "studies").glob(f"*/{COMPARISON}"), key=lambda file: (_date(file), file))
    for file in files:
        comparison = _read(file, problems)
        if comparison is None:
            continue
        try:
            study_tests = [*_tests(file.parent.name, comparison)]
            states = Counter[str]()
            for row in comparison["rows"]:
                states.update(row["states"])
        except (LookupError, TypeError, ValueError, AttributeError):
            problems.append(f"{file} is no comparison that this version reads")
            continue
        for key, test in study_tests:
            # The same runs compared in several studies are one test, called if any study calls it.
            if key not in tests or test.called:
                tests[key] = test
        entries.append(_entry(file, states, problems))
    compared = {entry.study for entry in entries}
    for file in [file for name in (STORED, SWEEP) for file in (store.root / "studies").glob(f"*/{name}")]:
        if file.parent.name not in compared and (content := _read(file, problems)) is not None:
            try:
                entries.append(_entry(file, _states(store, content), problems, content))
            except (LookupError, TypeError, AttributeError):
                problems.append(f"{file} cannot be read by this version")
    entries.sort(key=lambda entry: (entry.date, entry.study))
    return Studies(tuple(entries), false_discoveries([*tests.values()]), tuple(problems))


def _states(store: Store, kept: Mapping[str, Any]) -> Counter[str]:
    """Runs by state of a study that was never compared. kept: its stored file."""
    runs = [stages.values() for seeds in kept.get("stages", {}).values() for stages in seeds.values()]
    by_run = [[store.stage(name).status()["state"] for name in names] for names in runs]
    return Counter(next((state for state in states if state != "done"), "done") for states in by_run)


def _entry(
    file: Path, states: Mapping[str, int], problems: list[str], kept: Mapping[str, Any] | None = None
) -> StudyEntry:
    folder = file.parent
    answered = _read(folder / ANSWER, problems) if (folder / ANSWER).exists() else None
    planned = _read(folder / "plan.json", problems) if (folder / "plan.json").exists() else None
    sentences = (answered or {}).get("answer") or [""]
    source = answered or planned or (kept or {}).get("study")
    question = source.get("question", "") if isinstance(source, dict) else (kept or {}).get("question", "")
    return StudyEntry(
        folder.name,
        str(question),
        dict(states),
        _date(file),
        str(sentences[0]),
        running=is_running(folder),
        is_sweep=(folder / SWEEP).exists(),
    )


def _tests(study: str, comparison: Mapping[str, Any]) -> Iterator[tuple[tuple[Any, ...], DifferenceTest]]:
    """(key, test) of each of a study's differences with a p-value; tests of the same runs have the same key."""
    in_rounds, corrected = comparison.get("bias_adjusted") is not None, comparison.get("correction", "none") != "none"
    arms = sum(row["arm"] != row["baseline"] for row in comparison["rows"])
    means = {row["arm"]: (row["mean"], row["deviation"]) for row in comparison["rows"]}
    for row in comparison["rows"]:
        d, p = row.get("difference"), row.get("p")
        if not d or p is None or not d.get("error"):
            continue  # a baseline, one seed, or an arm equal to its baseline
        if row.get("verdict") == LOST:
            continue  # its p is only of the seeds that did not diverge
        # All tests are corrected together, so the correction for the arms of a study is undone.
        if corrected and in_rounds:
            p = p / arms if p < 1 else p  # undo the equal share of each arm; a p of 1 may have been cut
        elif corrected:
            p = Difference(**{field.name: d[field.name] for field in fields(Difference) if field.name in d}).p()
        base = means.get(row["baseline"])
        key = (comparison["metric"], d["mean"], d["seeds"], row["mean"], row["deviation"], base)
        yield key, DifferenceTest(study, row["arm"], min(1.0, float(p)), row.get("verdict") or "")


def discoveries_line(discoveries: FalseDiscoveries) -> str:
    """One sentence on false discoveries; empty where nothing was tested."""
    if not discoveries.tested:
        return ""
    over = f"this store: {text.several(discoveries.tested, 'difference')} tested in {discoveries.studies} "
    over += "study" if discoveries.studies == 1 else "studies"
    if discoveries.expected_false is None:
        return f"{over}, none called (effects of factors are not counted)"
    called, share = discoveries.called, discoveries.expected_false
    return (
        f"{over}, {called:,} called; of these up to {share:.1%} ({called * share:.2g}) are expected to be "
        "false (Benjamini-Hochberg over all; effects of factors are not counted)"
    )


def studies_table(studies: Studies) -> Table:
    """A row for each study."""
    rows = [
        [
            entry.study,
            entry.question,
            _format_states(entry),
            text.utc(entry.date).removesuffix(" UTC"),
            entry.answer or "–",
        ]
        for entry in studies.entries
    ]
    line = discoveries_line(studies.discoveries)
    notes = (*[line] * bool(line), *studies.problems)
    return Table("studies", "", ["study", "question", "runs", "date (UTC)", "answer"], rows, 5, notes, 5)


def _format_states(entry: StudyEntry) -> str:
    counts = ", ".join(f"{number} {state.replace('_', ' ')}" for state, number in entry.states.items())
    states = "a sweep" if entry.is_sweep else counts
    return f"running: {states}" if entry.running else states


def answer_json(study: str, question: str, answer: Sequence[str]) -> str:
    """Content of the file that a report writes for `studies_of`."""
    content = {"study": study, "question": question, "answer": list(answer), "written": round(time.time(), 3)}
    return json.dumps(finite(content), indent=1, ensure_ascii=False) + "\n"


def _read(file: Path, problems: list[str]) -> dict[str, Any] | None:
    try:
        return read_json(file)
    except Damaged as error:
        problems.append(str(error))
        return None


def _date(file: Path) -> float:
    try:
        return round(file.stat().st_mtime, 3)
    except OSError:
        return 0.0
