"""What a study answers, in sentences: the first is the answer, the others what it rests on and what it leaves open."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from lit_llm.ablation.factors import short_names
from lit_llm.analysis.comparison import Comparison, Row
from lit_llm.analysis.effects import Effect, Effects
from lit_llm.analysis.front import better
from lit_llm.analysis.paired import Difference
from lit_llm.analysis.verdicts import DIFFERENT
from lit_llm.report import text
from lit_llm.report.scaling import scaling_sentences
from lit_llm.report.scaling_gate import gate_sentences

NAMED = 3
"""Arms that a sentence speaks of one by one; of more it names the extremes."""


def answer(comparison: Comparison) -> list[str]:
    """Sentences, never none; what is not finished is said to be so."""
    return [*_answer(comparison)]


def _answer(comparison: Comparison) -> Iterator[str]:
    finished, total = finished_runs(comparison), total_runs(comparison)
    lost = _lost(comparison)
    if not any(row.mean is not None for row in comparison.rows):
        yield f"Not answered yet: none of {text.several(total, 'run')} has a {comparison.metric}."
        yield from lost
        return
    open_ = total - finished - sum(_ended_otherwise(row) for row in comparison.rows)
    so_far = f"So far, with {finished:,} of {text.several(total, 'run')} finished: " if open_ else ""
    first, *further = _sentences(comparison)
    yield so_far + (first if open_ else first[0].upper() + first[1:])
    yield from (sentence[0].upper() + sentence[1:] for sentence in further)
    yield from lost
    yield from _open(comparison)


def _sentences(comparison: Comparison) -> Iterator[str]:
    """What a study was designed for comes first: a law, a sensitivity, effects; each arm alone says less."""
    yield from _scaling(comparison)
    yield from _rates(comparison)
    for group in comparison.effects:
        yield from _effects(group, comparison)
    yield _main(comparison)
    yield from _turn(comparison)


def total_runs(comparison: Comparison) -> int:
    return sum(sum(row.states.values()) for row in comparison.rows)


def finished_runs(comparison: Comparison) -> int:
    """Those with a result, a divergence not among them."""
    return sum(row.states.get("done", 0) for row in comparison.rows)


def _ended_otherwise(row: Row) -> int:
    return row.diverged + row.states.get("failed", 0) + row.states.get("out_of_memory", 0)


def _main(comparison: Comparison) -> str:
    """The arms against their baselines."""
    metric, way = comparison.metric, better(comparison.metric)
    told = f"{metric} ({way} is better)" if way else metric
    compared = [row for row in comparison.rows if row.difference is not None]
    if not compared:
        known = [row for row in comparison.rows if row.mean is not None]
        shown = [f"{row.arm} {text.mean_and_deviation(row.mean, row.deviation)}" for row in known[:NAMED]]
        more = f" and {len(known) - NAMED} more" if len(known) > NAMED else ""
        lacking = "; no arm can be compared with its baseline yet" if len(comparison.rows) > 1 else ""
        return f"in {told}: {', '.join(shown)}{more} ({text.several(known[0].seeds, 'seed')}){lacking}."
    baselines = list(dict.fromkeys(row.baseline for row in compared))
    if len(compared) <= NAMED:
        return f"in {told}, {'; '.join(_clause(row) for row in compared)}."
    against = baselines[0] if len(baselines) == 1 else "their baselines"
    if not any(row.verdict in DIFFERENT for row in compared):
        words = Counter(map(_word, compared))
        rest = ", ".join(f"{number} {word}" for word, number in words.items())
        return f"in {told}, none of {len(compared)} arms is shown to differ from {against}: {rest}."
    groups: dict[str, list[Row]] = {}
    for row in sorted(compared, key=_order):
        groups.setdefault(_word(row), []).append(row)
    clauses = [_counted(word, rows, len(baselines) > 1) for word, rows in groups.items()]
    return f"in {told}, of {len(compared)} arms against {against}, {'; '.join(clauses)}."


def _order(row: Row) -> tuple[int, float]:
    """Those that are shown to differ first, the largest differences first."""
    word = row.verdict or ""
    assert row.difference is not None
    return (DIFFERENT.index(word) if word in DIFFERENT else len(DIFFERENT), -abs(row.difference.mean))


def _word(row: Row) -> str:
    if row.difference is not None and row.difference.low is None:
        return "known from one seed only"
    return row.verdict or "undecided"


def _counted(word: str, rows: Sequence[Row], several: bool) -> str:
    verb = "is" if len(rows) == 1 else "are"
    what = f"show{'s' if len(rows) == 1 else ''} {word}" if word.startswith("no ") else f"{verb} {word}"
    first = rows[0]
    assert first.difference is not None
    name = f"{first.arm} against {first.baseline}" if several else first.arm
    if word not in DIFFERENT:
        return f"{len(rows)} {what}"
    most = "" if len(rows) == 1 else "most of all "
    return f"{len(rows)} {what} ({most}{name}, by {amount(first.difference)})"


def _clause(row: Row) -> str:
    """One arm against its baseline."""
    assert row.difference is not None
    if row.difference.low is None:
        signed = text.difference(row.difference)
        return f"{row.arm} differs from {row.baseline} by {signed} with one seed, which does not say how sure that is"
    if row.verdict in DIFFERENT:
        return f"{row.arm} is {row.verdict} than {row.baseline} by {amount(row.difference)}"
    told = {"not enough seeds": "too few seeds tell", "undecided": "nothing tells"}
    if row.verdict in told:
        return f"{told[row.verdict]} {row.arm} from {row.baseline} ({text.difference(row.difference)})"
    return f"{row.arm} shows {row.verdict} from {row.baseline} ({text.difference(row.difference)})"


def amount(d: Difference) -> str:
    """`0.120 [0.089, 0.151]`: how large, where the direction is said in words."""
    if d.low is None or d.high is None:
        return f"{abs(d.mean):.3f}"
    low, high = (d.low, d.high) if d.mean >= 0 else (-d.high, -d.low)
    return f"{abs(d.mean):.3f} [{low:.3f}, {high:.3f}]"


def _effects(group: Effects, comparison: Comparison) -> Iterator[str]:
    known = [(row, row.effect) for row in group.rows if row.effect is not None and row.p is not None]
    where = f" in {group.group}" if len(comparison.effects) > 1 else ""
    if not known:
        return
    short = short_names(list(dict.fromkeys(name for row in group.rows for name in row.factors)))
    largest, effect = max(known, key=lambda pair: abs(pair[1].mean))
    shown = sum(row.verdict in DIFFERENT for row, _ in known)
    yield (
        f"of {len(known)} effects of the factors{where}, {shown or 'none'} {'is' if shown < 2 else 'are'} shown; the "
        f"largest is that of {_named(largest, short)}: {text.difference(effect)} ({largest.verdict})."
    )


def _named(row: Effect, short: dict[str, str]) -> str:
    levels = f" ({' → '.join(row.levels)})" if row.levels else ""
    return " × ".join(short[name] for name in row.factors) + levels


def _scaling(comparison: Comparison) -> Iterator[str]:
    if comparison.scaling is not None:
        yield from scaling_sentences(comparison.scaling)
    if comparison.gate is not None:
        yield from gate_sentences(comparison.gate)


def _rates(comparison: Comparison) -> Iterator[str]:
    for rates in comparison.learning_rates:
        known = [
            (row.group, row.sensitivity.mean)
            for row in rates.rows
            if row.sensitivity is not None and row.sensitivity.mean is not None
        ]
        if len(known) > 1:
            low, high = min(known, key=lambda pair: pair[1]), max(known, key=lambda pair: pair[1])
            yield (
                f"over learning rates from {min(rates.lrs):g} to {max(rates.lrs):g}, {low[0]} is the least sensitive "
                f"({low[1]:.3f}) and {high[0]} the most ({high[1]:.3f})."
            )


def _turn(comparison: Comparison) -> Iterator[str]:
    found = comparison.before_after
    if found is not None and found.rank_correlation is not None:
        yield f"orders of the arms before and after finetuning: rank correlation {found.rank_correlation:+.2f}."


def _lost(comparison: Comparison) -> Iterator[str]:
    """Runs that are in no mean."""
    for state, told in (
        ("diverged", "diverged, which is a result, and {is_} in no mean"),
        ("failed", "failed"),
        ("out_of_memory", "ran out of memory"),
        ("interrupted", "{was} interrupted"),
    ):
        found = {row.arm: row.states[state] for row in comparison.rows if row.states.get(state)}
        if count := sum(found.values()):
            what = told.format(is_="is" if count == 1 else "are", was="was" if count == 1 else "were")
            names = ", ".join(f"{arm} {number}" for arm, number in Counter(found).most_common(NAMED))
            more = f" and {len(found) - NAMED} further arms" if len(found) > NAMED else ""
            yield f"{text.several(count, 'run')} {what} ({names}{more})."


def _open(comparison: Comparison) -> Iterator[str]:
    """What could not have been seen."""
    undecided = [row for row in comparison.rows if row.verdict in ("undecided", "not enough seeds")]
    if sizes := sorted(row.detectable for row in undecided if row.detectable is not None):
        low, high = f"{sizes[0]:.2g}", f"{sizes[-1]:.2g}"
        span = low if low == high else f"{low} to {high}"
        yield f"Undecided is not equal: differences below {span} are missed more than once in five times."
