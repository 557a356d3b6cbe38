"""All studies of a store: what each asked and found, and what share of their findings is expected to be false."""

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
from lit_llm.store.store import Store, finite, is_running, read_json
from lit_llm.studies.stored import STORED, SWEEP

ANSWER, COMPARISON = "answer.json", "comparison.json"
"""What a study's report, its comparison and a sweep leave in their folders for programs."""


@dataclass(frozen=True)
class StudyEntry:
    """One study of a store."""

    study: str
    question: str
    states: Mapping[str, int]
    """Runs by state, at the last comparison where there was one; none of a sweep."""
    date: float
    """Of that comparison, else of its beginning, in seconds since 1970."""
    answer: str
    """First sentence of its last report; empty where none was written."""
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
    """What a store's studies say together."""

    entries: tuple[StudyEntry, ...]
    discoveries: FalseDiscoveries
    problems: tuple[str, ...]
    """Files that cannot be read; what they hold is in no number."""

    def as_json(self) -> dict[str, Any]:
        """What `studies --json` prints. Keys may be added, none is renamed."""
        return {
            "studies": [entry.as_json() for entry in self.entries],
            "false_discoveries": discoveries_json(self.discoveries),
            "problems": list(self.problems),
        }


def discoveries_json(found: FalseDiscoveries) -> dict[str, Any]:
    """Counts and the expected share; every called difference with its p and q."""
    called = [{"study": test.study, "arm": test.arm, "p": test.p, "q": q} for test, q in found.q_values if test.called]
    return {
        "studies": found.studies,
        "tested": found.tested,
        "called": found.called,
        "expected_false": found.expected_false,
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
            mine = [*_tests(file.parent.name, comparison)]
            states = Counter[str]()
            for row in comparison["rows"]:
                states.update(row["states"])
        except (LookupError, TypeError, ValueError, AttributeError):
            problems.append(f"{file} is no comparison that this version reads")
            continue
        for key, test in mine:
            # The same runs compared in another study are the same test; a called one says the more.
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
    """The runs by state of a study that was never compared, as its store keeps it."""
    runs = [stages.values() for seeds in kept.get("stages", {}).values() for stages in seeds.values()]
    found = [[store.stage(name).status()["state"] for name in names] for names in runs]
    return Counter(next((state for state in states if state != "done"), "done") for states in found)


def _entry(
    file: Path, states: Mapping[str, int], problems: list[str], kept: Mapping[str, Any] | None = None
) -> StudyEntry:
    folder = file.parent
    answered = _read(folder / ANSWER, problems) if (folder / ANSWER).exists() else None
    planned = _read(folder / "plan.json", problems) if (folder / "plan.json").exists() else None
    sentences = (answered or {}).get("answer") or [""]
    known = answered or planned or (kept or {}).get("study")
    question = known.get("question", "") if isinstance(known, dict) else (kept or {}).get("question", "")
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
    """The differences of one study's arms that have a p-value, each with what tells it from those of other studies."""
    in_rounds, corrected = comparison.get("bias_adjusted") is not None, comparison.get("correction", "none") != "none"
    arms = sum(row["arm"] != row["baseline"] for row in comparison["rows"])
    means = {row["arm"]: (row["mean"], row["deviation"]) for row in comparison["rows"]}
    for row in comparison["rows"]:
        d, p = row.get("difference"), row.get("p")
        if not d or p is None or not d.get("error"):
            continue  # a baseline, one seed, or an arm that is the baseline to the last bit
        if row.get("verdict") == LOST:
            continue  # its p is of the seeds that did not diverge
        # All tests are corrected together, so none is corrected for the arms of its study before.
        if corrected and in_rounds:
            p = p / arms if p < 1 else p  # an equal share of the level for each arm; of 1, the share is not known
        elif corrected:
            p = Difference(**{field.name: d[field.name] for field in fields(Difference) if field.name in d}).p()
        base = means.get(row["baseline"])
        key = (comparison["metric"], d["mean"], d["seeds"], row["mean"], row["deviation"], base)
        yield key, DifferenceTest(study, row["arm"], min(1.0, float(p)), row.get("verdict") or "")


def discoveries_line(found: FalseDiscoveries) -> str:
    """One sentence; empty where nothing was tested."""
    if not found.tested:
        return ""
    over = f"this store: {text.several(found.tested, 'difference')} tested in {found.studies} "
    over += "study" if found.studies == 1 else "studies"
    if found.expected_false is None:
        return f"{over}, none called (effects of factors are not counted)"
    number = found.called * found.expected_false
    return (
        f"{over}, {found.called:,} called; of these up to {found.expected_false:.1%} ({number:.2g}) are expected to be "
        "false (Benjamini-Hochberg over all; effects of factors are not counted)"
    )


def studies_table(found: Studies) -> Table:
    """A row for each study."""
    rows = [
        [
            entry.study,
            entry.question,
            _said(entry),
            text.utc(entry.date).removesuffix(" UTC"),
            entry.answer or "–",
        ]
        for entry in found.entries
    ]
    line = discoveries_line(found.discoveries)
    notes = (*[line] * bool(line), *found.problems)
    return Table("studies", "", ["study", "question", "runs", "date (UTC)", "answer"], rows, 5, notes, 5)


def _said(entry: StudyEntry) -> str:
    counts = ", ".join(f"{number} {state.replace('_', ' ')}" for state, number in entry.states.items())
    states = "a sweep" if entry.is_sweep else counts
    return f"running: {states}" if entry.running else states


def answer_json(study: str, question: str, answer: Sequence[str]) -> str:
    """What a report leaves for `studies_of`."""
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
