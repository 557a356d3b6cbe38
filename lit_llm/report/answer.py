"""The answer of a study in sentences: first the answer, then its evidence and the open questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from lit_llm.config.metrics import direction
from lit_llm.report import text
from lit_llm.report.tables.scaling import scaling_sentences
from lit_llm.report.tables.scaling_gate import gate_sentences
from lit_llm.statistics.comparison import Comparison, Row
from lit_llm.statistics.effects import Effect, Effects
from lit_llm.statistics.estimates import joined
from lit_llm.statistics.multiple_comparisons import AUTHORS
from lit_llm.statistics.paired import Difference
from lit_llm.statistics.verdicts import DIFFERENT, LEVEL, LOST, UNDECIDED
from lit_llm.studies.design.factors import short_names

NAMED = 3
"""Largest number of arms that a sentence names one by one."""


def answer(comparison: Comparison) -> list[str]:
    """Sentences of the answer, at least one; they mention unfinished runs."""
    return [*_answer(comparison)]


def _answer(comparison: Comparison) -> Iterator[str]:
    finished, total = finished_runs(comparison), total_runs(comparison)
    lost = _lost(comparison)
    if not any(row.mean is not None for row in comparison.rows):
        yield f"Not answered yet: none of {text.several(total, 'run')} has a {comparison.metric}."
        yield from lost
        return
    open_ = total - finished - sum(_unsuccessful_runs(row) for row in comparison.rows)
    so_far = f"So far, with {finished:,} of {text.several(total, 'run')} finished: " if open_ else ""
    first, *further = _sentences(comparison)
    yield so_far + (first if open_ else first[0].upper() + first[1:])
    yield from (sentence[0].upper() + sentence[1:] for sentence in further)
    yield from lost
    yield from _open(comparison)


def _sentences(comparison: Comparison) -> Iterator[str]:
    """Results in order of weight: scaling laws, sensitivity to learning rates, effects of factors, single arms."""
    yield from _scaling(comparison)
    yield from _rates(comparison)
    for group in comparison.effects:
        yield from _effects(group, comparison)
    yield _main(comparison)
    yield from _changes_by_finetuning(comparison)
    yield from _diverged(comparison)


def total_runs(comparison: Comparison) -> int:
    return sum(sum(row.states.values()) for row in comparison.rows)


def finished_runs(comparison: Comparison) -> int:
    """Number of runs with a result; diverged runs do not count."""
    return sum(row.states.get("done", 0) for row in comparison.rows)


def _unsuccessful_runs(row: Row) -> int:
    return row.diverged + row.states.get("failed", 0) + row.states.get("out_of_memory", 0)


def _main(comparison: Comparison) -> str:
    """Sentence on the arms against their baselines."""
    metric, way = comparison.metric, direction(comparison.metric)
    name = f"{metric} ({way} is better)" if way else metric
    compared = [row for row in comparison.rows if row.difference is not None]
    if not compared:
        return f"in {name}: {_means(comparison)}."
    size = _sample(compared)
    if len(compared) <= NAMED:
        clauses = "; ".join(_clause(row, comparison) for row in compared)
        return f"in {name}, {clauses} ({'; '.join([size, *_multiplicity(comparison, len(compared))])})."
    baselines = list(dict.fromkeys(row.baseline for row in compared))
    against = baselines[0] if len(baselines) == 1 else "their baselines"
    groups: dict[str, list[Row]] = {}
    for row in sorted(compared, key=_order):
        groups.setdefault(_verdict_of(row), []).append(row)
    notes = f"{'; '.join([size, *_multiplicity(comparison, len(compared))])}"
    if not any(row.verdict in DIFFERENT for row in compared):
        rest = ", ".join(f"{len(rows)} {word}" for word, rows in groups.items())
        return f"in {name}, none of {len(compared)} arms is shown to differ from {against}: {rest} ({notes})."
    clauses = "; ".join(_count_clause(word, rows, comparison, len(baselines) > 1) for word, rows in groups.items())
    return f"in {name}, of {len(compared)} arms against {against}, {clauses} ({notes})."


def _means(comparison: Comparison) -> str:
    """Means of the arms, where none can be compared with its baseline."""
    rows = [row for row in comparison.rows if row.mean is not None]
    means = joined([f"{row.arm} {text.mean_and_deviation(row.mean, row.deviation)}" for row in rows], NAMED)
    lacking = "; no arm can be compared with its baseline yet" if len(comparison.rows) > 1 else ""
    return f"{means} ({text.several(rows[0].seeds, 'seed')}){lacking}"


def _sample(rows: Sequence[Row]) -> str:
    """Sample sizes of the intervals: `3 seeds, 27 documents`."""
    differences = [row.difference for row in rows if row.difference is not None]
    parts = [text.span([d.seeds for d in differences], "seed")]
    if documents := [d.documents for d in differences if d.documents]:
        parts.append(text.span(documents, "document"))
        same = [row.arm for row in rows if row.difference is not None and not row.difference.documents]
        parts += [f"but {', '.join(same[:NAMED])} on the same documents"] if same else []
    return ", ".join(parts)


def _multiplicity(comparison: Comparison, count: int) -> Iterator[str]:
    """Correction for the number of comparisons, where there are several."""
    if count > 1:
        authors = AUTHORS.get(comparison.correction)
        yield (
            f"adjusted for {count} comparisons by {authors}'s method"
            if authors
            else f"not adjusted for {count} comparisons"
        )


def _order(row: Row) -> int:
    """Sort key: arms that differ first, by verdict; otherwise the study's order, since arms are not ranked by size."""
    word = row.verdict or ""
    return DIFFERENT.index(word) if word in DIFFERENT else len(DIFFERENT)


def _verdict_of(row: Row) -> str:
    if row.difference is not None and row.difference.low is None:
        return "known from one seed only"
    return row.verdict or "undecided"


def _count_clause(word: str, rows: Sequence[Row], comparison: Comparison, several: bool) -> str:
    verb = "is" if len(rows) == 1 else "are"
    what = f"show{'s' if len(rows) == 1 else ''} {word}" if word.startswith("no ") else f"{verb} {word}"
    if word not in DIFFERENT:
        return f"{len(rows)} {what}"
    named = []
    for row in rows[:NAMED]:
        assert row.difference is not None
        name = f"{row.arm} against {row.baseline}" if several else row.arm
        named.append(f"{name} by {amount(row.difference)}{_cost(row, comparison)}")
    among = "among them " if len(rows) > NAMED else ""
    return f"{len(rows)} {what} ({among}{', '.join(named)})"


def _clause(row: Row, comparison: Comparison) -> str:
    """Clause on one arm against its baseline."""
    assert row.difference is not None
    cost = _cost(row, comparison)
    if row.difference.low is None:
        signed = text.difference(row.difference)
        return f"{row.arm} differs from {row.baseline} by {signed}{cost}, and one seed does not say how sure that is"
    if row.verdict in DIFFERENT:
        return f"{row.arm} is {row.verdict} than {row.baseline} by {amount(row.difference)}{cost}"
    if row.verdict in UNDECIDED:
        why = {"not enough seeds": ": not enough seeds", LOST: ": runs were lost"}.get(row.verdict or "", "")
        signed = text.difference(row.difference)
        return f"no difference between {row.arm} and {row.baseline} is shown ({signed}){cost}{why}"
    return f"{row.arm} shows {row.verdict} from {row.baseline} ({text.difference(row.difference)}){cost}"


SAME_COST = 0.05
"""Relative difference of training FLOPs below which a sentence does not mention them."""


def _cost(row: Row, comparison: Comparison) -> str:
    """` at 1.8 times the training FLOPs`, where they differ from the baseline's."""
    baseline = next((other for other in comparison.rows if other.arm == row.baseline), None)
    if baseline is None or not row.train_flops or not baseline.train_flops:
        return ""
    ratio = row.train_flops / baseline.train_flops
    return f" at {ratio:.2g} times the training FLOPs" if abs(ratio - 1) > SAME_COST else ""


def amount(d: Difference) -> str:
    """`0.120 [0.089, 0.151]`: absolute value of a difference whose direction is in the words."""
    if d.low is None or d.high is None:
        return f"{abs(d.mean):.3f}"
    low, high = (d.low, d.high) if d.mean >= 0 else (-d.high, -d.low)
    return f"{abs(d.mean):.3f} [{low:.3f}, {high:.3f}]"


def _effects(group: Effects, comparison: Comparison) -> Iterator[str]:
    """Sentences on the effects and interactions that are shown."""
    tested = [row for row in group.rows if row.effect is not None and row.p is not None]
    where = f" in {group.group}" if len(comparison.effects) > 1 else ""
    if not tested:
        return
    short = short_names(list(dict.fromkeys(name for row in group.rows for name in row.factors)))
    different = [row for row in tested if row.verdict in DIFFERENT]
    named = joined([f"{_effect_name(row, short)} {text.difference(row.effect)}" for row in different], NAMED)
    total = sum(row.p is not None for each in comparison.effects for row in each.rows)
    notes = "; ".join([text.several(len(group.seeds), "seed"), *_multiplicity(comparison, total)])
    if not different:
        yield f"of {len(tested)} effects of the factors{where}, none is shown ({notes})."
        return
    verb = "is" if len(different) == 1 else "are"
    yield f"of {len(tested)} effects of the factors{where}, {len(different)} {verb} shown: {named} ({notes})."
    for row in different:
        yield from _interaction(row, short)


def _interaction(row: Effect, short: Mapping[str, str]) -> Iterator[str]:
    """Sentence on the effect of an interaction's first factor at each level of its second."""
    if len(row.simple) != 2:
        return
    (low, at_low), (high, at_high) = row.simple
    turns = at_low.mean * at_high.mean < 0 and min(at_low.p(), at_high.p()) < LEVEL
    both = turns and max(at_low.p(), at_high.p()) < LEVEL
    how = "turns its sign with" if both else "may turn its sign with" if turns else "depends on"
    first, second = (short[name] for name in row.factors)
    yield (
        f"the effect of {first} {how} {second}: {text.difference(at_low)} at {low}, "
        f"{text.difference(at_high)} at {high}; its mean over both says less."
    )


def _effect_name(row: Effect, short: dict[str, str]) -> str:
    levels = f" ({' → '.join(row.levels)})" if row.levels else ""
    return " × ".join(short[name] for name in row.factors) + levels


def _scaling(comparison: Comparison) -> Iterator[str]:
    if comparison.scaling is not None:
        yield from scaling_sentences(comparison.scaling)
    if comparison.gate is not None:
        yield from gate_sentences(comparison.gate)


def _rates(comparison: Comparison) -> Iterator[str]:
    """Sentences on sensitivity to the learning rate, and on optima at an end of the grid."""
    for rates in comparison.learning_rates:
        # Interim levels hold for the arms alone, so with rounds of seeds no sensitivity is tested.
        rows = rates.rows if comparison.bias_adjusted is None else ()
        tested = [(row, row.difference) for row in rows if row.difference is not None and row.difference.error]
        grid = f"over learning rates from {min(rates.lrs):g} to {max(rates.lrs):g}"
        seeds = text.span([d.seeds for _, d in tested], "seed") if tested else ""
        notes = f"{seeds}, on the same documents"
        notes += f"; not adjusted for {len(tested)} comparisons" if len(tested) > 1 else ""
        different = [(row, d) for row, d in tested if d.p() < LEVEL]
        if different:
            named = [
                f"{row.group} is {'less' if d.mean < 0 else 'more'} sensitive than {row.baseline} by {amount(d)}"
                for row, d in different[:NAMED]
            ]
            more = f" and {len(different) - NAMED} more differ" if len(different) > NAMED else ""
            yield f"{grid}, {'; '.join(named)}{more} ({notes})."
        elif tested:
            yield f"{grid}, no difference in sensitivity to the learning rate is shown ({notes})."
        ends = {min(rates.lrs), max(rates.lrs)}
        edge = [f"{row.group} ({row.best:g})" for row in rates.rows if row.best in ends]
        if edge and len(rates.lrs) > 1:
            yield (
                f"the best learning rate of {joined(edge, NAMED)} lies at an end of the grid, so a better "
                "one may lie outside of it."
            )


def _changes_by_finetuning(comparison: Comparison) -> Iterator[str]:
    """Sentence on the differences that finetuning has changed."""
    if (
        comparison.before_after is None or comparison.bias_adjusted is not None
    ):  # interim levels do not hold for changes
        return
    lost = {row.arm for row in comparison.rows if row.diverged}
    tested = [
        (row, row.change)
        for row in comparison.before_after.rows
        if row.change is not None and row.change.error and not lost & {row.arm, row.baseline}
    ]
    if not tested:
        return
    changed = [(row, d) for row, d in tested if d.p() < LEVEL]
    notes = f" (not adjusted for {len(tested)} comparisons)" if len(tested) > 1 else ""
    if not changed:
        spans = [f"{row.arm} {text.difference(d)}" for row, d in tested[:NAMED]]
        yield f"that finetuning changes a difference from the baseline is not shown: {', '.join(spans)}{notes}."
        return
    named = joined([f"that of {row.arm} by {text.difference(d)}" for row, d in changed], NAMED)
    yield f"finetuning changes the difference from the baseline: {named}{notes}."


def _diverged(comparison: Comparison) -> Iterator[str]:
    """Sentences on the diverged runs of arms and of their baselines."""
    for counts in comparison.divergences[:NAMED]:
        p = "" if counts.p is None else f" (exact test over shared seeds, p = {text.p_value(counts.p)})"
        bounds = ""
        if counts.bounds is not None:
            low, high = counts.bounds
            bounds = (
                f"; with each of those runs counted at the arm's lowest loss or at the loss that it began with, the "
                f"difference lies between {low:+.3f} and {high:+.3f}"
            )
        yield (
            f"{counts.diverged} of {text.several(counts.runs, 'run')} of {counts.arm} diverged, and "
            f"{counts.baseline_diverged} of {counts.baseline_runs} of {counts.baseline}{p}{bounds}."
        )


def _lost(comparison: Comparison) -> Iterator[str]:
    """Sentences on the runs that are in no mean."""
    for state, predicate in (
        ("diverged", "diverged, which is a result, and {is_} in no mean"),
        ("failed", "failed"),
        ("out_of_memory", "ran out of memory"),
        ("interrupted", "{was} interrupted"),
    ):
        by_arm = {row.arm: row.states[state] for row in comparison.rows if row.states.get(state)}
        if count := sum(by_arm.values()):
            what = predicate.format(is_="is" if count == 1 else "are", was="was" if count == 1 else "were")
            names = ", ".join(f"{arm} {number}" for arm, number in Counter(by_arm).most_common(NAMED))
            more = f" and {len(by_arm) - NAMED} further arms" if len(by_arm) > NAMED else ""
            yield f"{text.several(count, 'run')} {what} ({names}{more})."


def _open(comparison: Comparison) -> Iterator[str]:
    """Sentence on the differences that undecided arms may have."""
    undecided = [row for row in comparison.rows if row.verdict in UNDECIDED]
    if sizes := sorted(row.detectable for row in undecided if row.detectable is not None):
        low, high = f"{sizes[0]:.2g}", f"{sizes[-1]:.2g}"
        span = low if low == high else f"{low} to {high}"
        yield f"Undecided does not mean equal: differences below {span} are detected with less than 80% power."
