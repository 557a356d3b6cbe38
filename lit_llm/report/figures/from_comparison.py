"""Figures of the comparison: differences, effects, fronts, learning rates, steps, before and after."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence

from lit_llm.config.metrics import direction
from lit_llm.report.figures.differences import (
    NOT_JUDGED,
    Crossed,
    End,
    Named,
    Stepwise,
    forest,
    heat_map,
    slopes,
    waterfall,
)
from lit_llm.report.figures.inputs import MOST_LINES, Drawn, FigureData, seeds_of
from lit_llm.report.figures.lines import Line, Panel, line_figure
from lit_llm.report.figures.pareto import front_figure
from lit_llm.runs.stage_graph import validation_metric
from lit_llm.statistics.comparison import Row
from lit_llm.statistics.effects import Effect
from lit_llm.statistics.multiple_comparisons import AUTHORS, Correction
from lit_llm.statistics.paired import Difference
from lit_llm.statistics.pareto import pareto_front
from lit_llm.statistics.verdicts import stand_in
from lit_llm.studies.comparison import costs_of
from lit_llm.studies.design.factors import short_names
from lit_llm.studies.load import Arm
from lit_llm.studies.schema import Figure

COMPUTED: tuple[Figure, ...] = ("train_flops", "inference_flops", "kv_cache_bytes")
"""Costs against which the metric is drawn, besides the study's choice."""
MOST_ROWS, MOST_MAPS, MOST_STEPWISE = 60, 6, 4
"""Largest numbers of rows of a forest, of pairs of factors and of step-wise comparisons: more is illegible."""
UNADJUSTED = "not adjusted for the interim analyses after each round of seeds"
INTERVAL = "bars: 95% intervals of the paired differences over seeds"


def forests(study: FigureData) -> Iterator[Drawn]:
    """Forest plots of every arm against its baseline, and of the effects of factors."""
    arms = {arm.name: arm for arm in study.ablation.arms}
    rows = [row for row in study.comparison.rows if row.difference is not None]
    strata = study.names.strata if study.names.spread else []
    several = len({arms[row.baseline].group for row in rows}) > 1 if strata else len({r.baseline for r in rows}) > 1
    # Of too many rows, the largest differences, in the study's order.
    largest = sorted(rows, key=lambda row: -abs(row.difference.mean if row.difference else 0.0))[:MOST_ROWS]
    drawn_arms, groups = {row.arm for row in largest}, dict[str, list[Named]]()
    for row in rows:
        if row.arm in drawn_arms and row.difference is not None:
            arm, baseline = (study.names.without(name, strata) for name in (row.arm, row.baseline))
            named = Named(f"{arm} − {baseline}" if several else arm, row.difference, row.verdict or "undecided")
            groups.setdefault(_heading(study, arms[row.arm], strata), []).append(named)
    if any(row.difference.mean or row.difference.low for row in rows if row.difference):
        against = "" if several else f" from {study.names.without(rows[0].baseline, strata)}"
        against += f" at the same {' and '.join(map(study.names.factor, strata))}" * bool(strata)
        most = f"; the {MOST_ROWS} largest of {len(rows)}" if len(rows) > MOST_ROWS else ""
        seeds = seeds_of([row.difference.seeds for row in largest if row.difference])
        yield Drawn(
            "differences",
            f"Difference{against} in {study.metric}; {_intervals(study)}, {seeds}; {_markers(study, len(rows))}{most}.",
            forest(
                f"{study.metric}, difference{against or ' from the baselines'}",
                groups,
                f"difference in {study.labelled(study.metric)}",
                "" if strata else "arm",
            ),
        )
    effects = study.names.put_into(study.comparison.effects)
    in_rounds = study.ablation.study.more_seeds is not None
    rows_by_group = {
        group.group: _effect_rows(group.rows, NOT_JUDGED if in_rounds else "undecided") for group in effects
    }
    if any(rows_by_group.values()):
        one = len(rows_by_group) == 1
        drawn = {"" if one else name: rows[:MOST_ROWS] for name, rows in rows_by_group.items() if rows}
        seeds = seeds_of([len(group.seeds) for group in study.comparison.effects])
        alone = stand_in(study.comparison.correction)
        bars = f"{_bars(study)}, {UNADJUSTED}" if in_rounds else _intervals(study)
        markers = "" if in_rounds else f"; {_markers(study, sum(map(len, rows_by_group.values())), alone)}"
        yield Drawn(
            "effects",
            f"Effects of the factors on {study.metric}: the mean over all arms at the second level less that at the "
            f"first; interactions: half the difference of differences; {bars}, {seeds} of which every arm has a value"
            f"{markers}.",
            forest("effects of the factors", drawn, f"effect on {study.labelled(study.metric)}", "effect"),
        )


def _intervals(study: FigureData) -> str:
    """Clause of a caption on the bars: source of the intervals, and their adjustment."""
    bars = _bars(study)
    if study.ablation.study.more_seeds is not None:
        return f"{bars}, which hold for looking after each round of seeds"
    return f"{bars}, each alone" if study.comparison.correction == "none" else f"{bars}, which hold all at once"


def _bars(study: FigureData) -> str:
    differences = [row.difference for row in study.comparison.rows if row.difference]
    if any(d.documents for d in differences if d.low is not None):
        return "thin bars: 95% intervals of other seeds and documents, thick ones: of other seeds on the same documents"
    return INTERVAL


def _markers(study: FigureData, count: int, correction: Correction | None = None, of: str = "markers") -> str:
    """Clause of a caption on the verdicts of the markers. correction: the study's when None."""
    used = correction or study.comparison.correction
    p = "p, not corrected for their number" if used == "none" else f"p after {AUTHORS[used]} over {count}"
    margin = study.comparison.margin
    return f"{of}: the verdict, by {p}" + (f" and the margin of {margin:g}" if margin is not None else "")


def _heading(study: FigureData, arm: Arm, strata: Sequence[str]) -> str:
    """Heading of an arm: levels of the strata, else the factors in which it differs from its baseline."""
    names = study.names
    if strata:
        return ", ".join(f"{names.factor(name)} {names.level(name, arm.levels[name])}" for name in strata if arm.levels)
    levels = study.ablation.arm(arm.baseline).levels
    return " × ".join(names.factor(name) for name, label in arm.levels.items() if levels.get(name, label) != label)


def _effect_rows(rows: Sequence[Effect], no_verdict: str) -> list[Named]:
    """The effects with their names. no_verdict: text in place of a missing verdict."""
    short = short_names(list(dict.fromkeys(name for row in rows for name in row.factors)))
    return [
        Named(
            " × ".join(short[name] for name in row.factors) + (f": {' → '.join(row.levels)}" if row.levels else ""),
            row.effect,
            row.verdict or no_verdict,
        )
        for row in rows
        if row.effect is not None
    ]


def heat_maps(study: FigureData) -> Iterator[Drawn]:
    """A heat map for each pair of crossed factors; the named arms count as a factor."""
    grid = study.ablation.study.grid
    if grid is None or grid.design not in ("factorial", "fractional_factorial"):
        return
    crossed = [arm for arm in study.ablation.arms if arm.levels]
    printed, levels = study.names, dict[str, dict[str, str]]()
    """{factor: {arm: level}}"""
    if len({arm.group for arm in crossed}) > 1:
        levels["arm"] = {arm.name: printed.arm(arm.group) for arm in crossed}
    for name in study.ablation.factors:
        levels[printed.factor(name)] = {arm.name: printed.level(name, arm.levels[name]) for arm in crossed}
    names = list(levels)
    pairs = [(a, b) for at, a in enumerate(names) for b in names[at + 1 :]][:MOST_MAPS]
    rows = {row.arm: row for row in study.comparison.rows}
    if pairs and sum(rows[arm.name].mean is not None for arm in crossed) > 1:
        maps = [_crossed(*pair, levels, rows) for pair in pairs]
        some = any(sign for one in maps for row in one.signs for sign in row)
        signs = "; ▼ ▲: found to be lower or higher than its baseline, as in the table" * some
        yield Drawn(
            "factors",
            f"{study.metric} by two factors: mean over the arms with both levels, each the mean over its seeds, "
            f"{study.seeds}; †: runs that diverged, in no mean{signs}.",
            heat_map(f"{study.metric} by two factors", maps, study.unit(study.metric)),
        )


def _crossed(down: str, across: str, levels: Mapping[str, Mapping[str, str]], rows: Mapping[str, Row]) -> Crossed:
    every = [list(dict.fromkeys(levels[name].values())) for name in (down, across)]
    cells = {(i, j): list[Row]() for i in every[0] for j in every[1]}
    for arm in levels[down]:
        cells[levels[down][arm], levels[across][arm]].append(rows[arm])

    def mean(arms: Sequence[Row]) -> float | None:
        means = [row.mean for row in arms if row.mean is not None]
        return statistics.fmean(means) if means else None

    def sign(arms: Sequence[Row]) -> str:
        row = arms[0] if len(arms) == 1 else None
        return Named(row.arm, row.difference, row.verdict).sign if row and row.difference and row.verdict else ""

    return Crossed(
        down,
        across,
        tuple(every[0]),
        tuple(every[1]),
        tuple(tuple(mean(cells[i, j]) for j in every[1]) for i in every[0]),
        tuple(tuple(sum(row.diverged for row in cells[i, j]) for j in every[1]) for i in every[0]),
        tuple(tuple(sign(cells[i, j]) for j in every[1]) for i in every[0]),
    )


def fronts(study: FigureData) -> Iterator[Drawn]:
    """Pareto fronts over training and inference cost and the study's choice; a cost equal for all arms is left out."""
    means = {row.arm: row.mean for row in study.comparison.rows if row.mean is not None}
    if direction(study.metric) is None or len(means) < 2:
        return
    costs = costs_of(arm for arm in study.ablation.arms if arm.name in means)
    by_figure: dict[str, dict[str, float]] = {}
    chosen = study.comparison.front
    if chosen is not None:
        by_figure[chosen.figure] = {point.arm: point.cost for point in chosen.points}
    for figure in COMPUTED:
        by_figure.setdefault(figure, {arm: costs[arm][figure] for arm in means})
    drawn = [
        pareto_front(
            figure,
            study.metric,
            {study.series(arm): cost for arm, cost in by_arm.items()},
            {study.series(arm): mean for arm, mean in means.items() if arm in by_arm},
        )
        for figure, by_arm in by_figure.items()
        if len(set(by_arm.values())) > 1
    ]
    if drawn:
        yield Drawn(
            "front",
            f"{study.metric} against cost; filled and joined: arms that no other beats in both; bars: standard "
            f"deviation over seeds, {study.seeds}; {_source_of_costs(by_figure)}"
            f"{study.chosen and '; grey: further arms'}.",
            front_figure(
                f"{study.metric} against cost",
                drawn,
                {study.series(row.arm): row.deviation for row in study.comparison.rows},
                [study.series(name) for name in study.named() if name in means],
                study.names.metric(study.metric),
            ),
        )


def _source_of_costs(figures: Collection[str]) -> str:
    """Clause of a caption."""
    measured = "training_seconds" in figures
    return "seconds are measured, other costs computed" if measured else "costs are computed, not measured"


def learning_rates(study: FigureData) -> Iterator[Drawn]:
    """Loss against learning rate, for groups of arms that differ in nothing else."""
    metric = validation_metric(study.metric)
    for number, rates in enumerate(study.comparison.learning_rates):
        lines, crosses = {}, {}
        for row in rates.rows[:MOST_LINES]:
            cells = [cell for cell in row.cells if cell.losses]
            values = [list(cell.losses.values()) for cell in cells]
            x, y = [cell.lr for cell in cells], [statistics.fmean(losses) for losses in values]
            group = study.series(row.group)
            lines[group] = [Line(x, y, list(map(min, values)), list(map(max, values)))]
            crosses[group] = [cell.lr for cell in row.cells if cell.diverged]
        if not any(len(line.x) > 1 for each in lines.values() for line in each):
            continue
        seeds = seeds_of([len(cell.losses) for row in rates.rows for cell in row.cells if cell.losses])
        xlabel = "learning rate" if len(study.comparison.learning_rates) == 1 else study.names.factor(rates.factor)
        panel = Panel("", xlabel, study.labelled(metric), lines, log="x", crosses=crosses)
        yield Drawn(
            "learning_rates" + f"_{number + 1}" * (len(study.comparison.learning_rates) > 1),
            f"{metric} at the end, by learning rate; lines: mean over the seeds that did not diverge, {seeds}; "
            "bands: from the lowest to the highest seed; × at the top: a seed diverged"
            f"{f'; the first {MOST_LINES} of {len(rates.rows)} groups' * (len(rates.rows) > MOST_LINES)}.",
            line_figure(f"{metric} by learning rate", [panel], height=2.8),
        )


def stepwise_comparisons(study: FigureData) -> Iterator[Drawn]:
    """Waterfall charts of arms that are each compared with the one before."""
    rows = {row.arm: row for row in study.comparison.rows}
    baselines = {row.baseline for row in rows.values() if row.arm != row.baseline}
    compared = [row for row in rows.values() if row.difference is not None]
    comparisons = []
    for end in rows.values():
        path = [end]
        while path[0].arm != path[0].baseline:
            path.insert(0, rows[path[0].baseline])
        if end.arm in baselines or len(path) < 3:
            continue
        steps = [
            Named(study.names.arm(row.arm), row.difference, row.verdict or "undecided")
            for row in path[1:]
            if row.difference
        ]
        if path[0].mean is not None and len(steps) == len(path) - 1:
            comparisons.append(Stepwise(study.names.arm(path[0].arm), path[0].mean, tuple(steps)))
    if comparisons:
        seeds = seeds_of([step.difference.seeds for each in comparisons for step in each.steps])
        yield Drawn(
            "stepwise",
            f"{study.metric} step by step: each bar is the paired difference from the arm above it, begun where that "
            f"one ends; black {_intervals(study)}, {seeds}; {_markers(study, len(compared), of='colours')}.",
            waterfall(f"{study.metric}, switch by switch", comparisons[:MOST_STEPWISE], study.labelled(study.metric)),
        )


def changes_by_finetuning(study: FigureData) -> Iterator[Drawn]:
    """Differences from the baseline before and after finetuning."""
    changes = study.comparison.before_after
    pairs = {
        row.arm: (_end(before), _end(after))
        for row in (changes.rows if changes else ())
        if (before := row.difference_before) is not None and (after := row.difference_after) is not None
    }
    if changes and any(end.value for pair in pairs.values() for end in pair):
        named = [name for name in study.named() if name in pairs] or list(pairs)[:MOST_LINES]
        both = [d for row in changes.rows for d in (row.difference_before, row.difference_after) if d is not None]
        seeds = seeds_of([d.seeds for d in both])
        rank = changes.rank_correlation
        alone = "each alone" if study.ablation.study.more_seeds is None else f"each alone and {UNADJUSTED}"
        correlation = "" if rank is None else f" Rank correlation of the arms (Spearman): {rank:+.2f}."
        yield Drawn(
            "before_after",
            f"Difference from the baseline in {changes.metric}, before and after finetuning; {INTERVAL}, {alone}, "
            f"{seeds}.{correlation}",
            slopes(
                f"{changes.metric} before and after finetuning",
                {study.series(name): pairs[name] for name in named},
                f"difference in {study.labelled(changes.metric)}",
                ("after pretraining", "after finetuning"),
                "when it was evaluated",
            ),
        )


def _end(d: Difference) -> End:
    return End(d.mean, d.low, d.high)
