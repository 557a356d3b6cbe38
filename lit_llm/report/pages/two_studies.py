"""Two studies side by side: `lit-llm report A B`."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from lit_llm.config.problems import InputError, Problem, did_you_mean
from lit_llm.config.tree import difference
from lit_llm.report import text
from lit_llm.report.pages.html import Code, Page, Section, html
from lit_llm.report.tables.table import Table, stacked
from lit_llm.runs.fingerprints import identity_of_data
from lit_llm.statistics.baselines import Noise
from lit_llm.statistics.comparison import Comparison
from lit_llm.statistics.estimates import joined
from lit_llm.statistics.run_results import noise_of_kept, of_newest_provenance, values_by_arm
from lit_llm.statistics.two_studies import TwoStudies, two_studies
from lit_llm.statistics.verdicts import LEVEL
from lit_llm.store.store import Store, write_text
from lit_llm.studies.comparison import comparison_of
from lit_llm.studies.load import Ablation
from lit_llm.studies.runs import runs_of
from lit_llm.studies.stored import open_study, version_of


@dataclass(frozen=True)
class Loaded:
    """A study with the results of its finished runs."""

    ablation: Ablation
    comparison: Comparison
    values: Mapping[str, Mapping[int, float]]
    noise: Noise
    texts: frozenset[str]
    """Digests of the texts that its arms read."""


NAMED = 3
"""Largest number of arms that a sentence names."""
MOST_KEYS = 12
"""Largest number of keys that are listed for an arm."""


def load_two(first: str, second: str, overrides: Sequence[str], store: Store) -> TwoStudies:
    """Compare the finished runs of two studies. Raises InputError where they have nothing to compare."""
    pair = (_load(first, overrides, store), _load(second, overrides, store))
    one, other = (loaded.ablation for loaded in pair)
    names = [{arm.name: arm for arm in ablation.arms} for ablation in (one, other)]
    problems = []
    if one.study.study == other.study.study:
        problems.append(f"both are called {one.study.study}: in one store they are one study")
    if one.study.compare.metric != other.study.compare.metric:
        metrics = " and ".join(ablation.study.compare.metric for ablation in (one, other))
        problems.append(f"they compare different metrics, {metrics}; set compare.metric alike")
    if not names[0].keys() & names[1].keys():
        name = next(iter(names[0]))
        problems.append(f"they have no arm in common: {name!r} is none of the second's{did_you_mean(name, names[1])}")
    if problems:
        raise InputError(*(Problem(problem, f"{first} and {second}") for problem in problems))
    differs = {name: difference(arm.flat, names[1][name].flat) for name, arm in names[0].items() if name in names[1]}
    return two_studies(
        (one.study.study, other.study.study),
        (one.study.question, other.study.question),
        (pair[0].comparison, pair[1].comparison),
        (pair[0].values, pair[1].values),
        differs,
        (pair[0].noise, pair[1].noise),
        same_documents=len(pair[0].texts | pair[1].texts) == 1,  # as far as the digests show
    )


def _load(file: str, overrides: Sequence[str], store: Store) -> Loaded:
    ablation = version_of(store, open_study(file, overrides, store))
    runs = runs_of(ablation, store)
    kept, metric = of_newest_provenance([run.result() for run in runs], []), ablation.study.compare.metric
    texts = frozenset(identity_of_data(arm.experiment).digest for arm in ablation.arms)
    comparison = comparison_of(ablation, runs)
    values = values_by_arm(kept, [arm.name for arm in ablation.arms], metric)
    return Loaded(ablation, comparison, values, noise_of_kept(kept, metric), texts)


def two_answer(pair: TwoStudies) -> list[str]:
    """Sentences on the agreement of two studies, and on the differences that changed."""
    return [*_answer(pair)]


def _answer(pair: TwoStudies) -> Iterator[str]:
    count = Counter(agreement.says for agreement in pair.agreements)
    compared = sum(number for agreement, number in count.items() if agreement != "one is missing")
    words = {
        "the same": "they show the same of {}",
        "the opposite": "the opposite of {}",
        f"only {pair.names[0]}": f"{pair.names[0]} alone shows a difference of {{}}",
        f"only {pair.names[1]}": f"{pair.names[1]} alone shows a difference of {{}}",
        "compatible": "one of them shows a difference of {}, and a change between them is not shown",
        "neither": "neither shows one of {}",
    }
    clauses = [clause.format(count[agreement]) for agreement, clause in words.items() if count[agreement]]
    if not compared:
        yield f"Nothing can be said yet: {pair.names[0]} and {pair.names[1]} have no arm that is compared in both."
    else:
        yield f"In {pair.metric}, of {text.several(compared, 'arm')} compared in both studies: {'; '.join(clauses)}."
    if pair.arms.rank_correlation is not None:
        yield f"Rank correlation of the arms' means (Spearman): {pair.arms.rank_correlation:+.2f}."
    tested = [(row.arm, row.change) for row in pair.arms.rows if row.change is not None and row.change.error]
    changed = [(arm, d) for arm, d in tested if d.p() < LEVEL]
    if changed:
        named = joined([f"that of {arm} by {text.difference(d)}" for arm, d in changed], NAMED)
        notes = f" (not adjusted for {len(tested)} comparisons)" if len(tested) > 1 else ""
        yield f"{text.several(len(changed), 'difference')} from the baseline changed: {named}{notes}."


def two_tables(pair: TwoStudies) -> list[Table]:
    """Tables of the common arms, and of the keys that differ."""
    return [_arms(pair), *_keys(pair)]


def _arms(pair: TwoStudies) -> Table:
    agreements = {agreement.arm: agreement for agreement in pair.agreements}
    head = ["arm", *pair.names, *(f"{name}, difference" for name in pair.names), "changed by"]
    rows = []
    for row in pair.arms.rows:
        agreement = agreements.get(row.arm)
        empty = "baseline" if row.arm in pair.references else "–"
        rows.append(
            [
                row.arm,
                text.value(row.before),
                text.value(row.after),
                text.difference(row.difference_before, empty),
                text.difference(row.difference_after, empty),
                text.difference(row.change, ""),
                agreement.says if agreement else "",
            ]
        )
    documents = any(row.change is not None and row.change.documents for row in pair.arms.rows)
    scope = "of other seeds and other documents" if documents else "of other seeds; documents are not counted"
    notes = [
        f"changed by: the difference in {pair.names[1]} less that in {pair.names[0]}, paired over common seeds, {scope}"
    ]
    notes += [
        "in brackets: 95% intervals; shown by: in which study the arm is shown to be better or worse than its baseline"
    ]
    notes += [f"{', '.join(pair.baselines)}: compared with different arms, so only the means stand here"] * bool(
        pair.baselines
    )
    for name, alone in zip(pair.names, pair.alone, strict=True):
        if alone:
            notes.append(f"in {name} alone: {joined(alone, 6)}")
    return Table("arms", f"{pair.metric} in both studies", [*head, "shown by"], rows, 3, tuple(notes))


def _keys(pair: TwoStudies) -> Iterator[Table]:
    """Table of the keys that differ: first those that differ alike in all common arms, then those of single arms."""
    common = [row.arm for row in pair.arms.rows]
    values_of_arm = {
        arm: {k: [*map(_value, values)] for k, values in pair.differs.get(arm, {}).items()} for arm in common
    }
    first = common[0]
    shared = [
        key
        for key, values in values_of_arm[first].items()
        if all(values_of_arm[arm].get(key) == values for arm in common)
    ]
    rows = [["all" if len(common) > 1 else first, key, *values_of_arm[first][key]] for key in shared]
    for arm in common:
        single = [[arm, key, *values] for key, values in values_of_arm[arm].items() if key not in shared]
        more = len(single) - MOST_KEYS
        rows += single[:MOST_KEYS] + [[arm, f"and {more} more keys", "", ""]] * (more > 0)
    if rows:
        yield Table("differs", "what differs between the studies", ["arm", "key", *pair.names], rows, 4, left=4)


def _value(value: Any) -> str:
    return "–" if value is None else str(value)


def render_two_studies(pair: TwoStudies, width: int) -> RenderableType:
    """The comparison of two studies, for the terminal."""
    head = Text(" and ".join(pair.names), style="bold")
    first, *further = two_answer(pair)
    return Group(
        head, Text(), *stacked(two_tables(pair), width), Text(), Text(first, style="bold"), *map(Text, further)
    )


def write_two(pair: TwoStudies, files: Sequence[str], store: Store, out: Path | None = None) -> Path:
    """Write the page into `out`, or the first study's folder. files: study files, for the command in the page."""
    arms, *keys = two_tables(pair)
    page = Page(
        f"{pair.names[0]} and {pair.names[1]}",
        " ".join(dict.fromkeys(pair.questions)),
        two_answer(pair),
        f"written {text.utc(time.time())}.",
        [
            Section("results", "Results", tables=[arms]),
            *[Section("differs", "What differs between them", tables=keys)] * bool(keys),
            Section(
                "reproduce",
                "Reproduce",
                codes=[Code("commands", shlex.join(["lit-llm", "report", *files, *store.option()]))],
            ),
        ],
    )
    return write_text((out or store.study(pair.names[0])) / f"beside-{pair.names[1]}.html", html(page))
