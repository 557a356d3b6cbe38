"""A sweep for the terminal and for programs: its plan, its trials, its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from lit_llm.report import text
from lit_llm.report.tables.plan import STATES, plan_head, plan_rest
from lit_llm.report.tables.table import Table, stacked
from lit_llm.studies.design.factors import short_names
from lit_llm.studies.plan import Plan
from lit_llm.sweeps.confirmation import Summary
from lit_llm.sweeps.space import Dimension, Point
from lit_llm.sweeps.sweep import Search
from lit_llm.sweeps.trial import Trial


def sweep_plan(search: Search, plan: Plan, width: int) -> RenderableType:
    """Costs of every arm at its default setting, the budget, and the search space."""
    sweep = search.sweep
    seeds = f" x {len(sweep.seeds)} seeds" if len(sweep.seeds) > 1 else ""
    runs = len(plan.arms) * sweep.trials * len(sweep.seeds)
    arms = f"{len(plan.arms)} arm{'s' if len(plan.arms) > 1 else ''}"
    budget = f"{arms} x {sweep.trials} trials{seeds} = {runs} runs"
    if not search.trains:
        budget += ", none of which is trained: the goals are known before"
    elif plan.estimate is not None:
        seconds = sum(sweep.trials * len(sweep.seeds) * plan.estimate.arms[p.arm.name].run for p in plan.arms)
        flops = sum(sweep.trials * len(sweep.seeds) * p.cost.train_flops for p in plan.arms)
        budget += f", at the arms' default settings {text.short(flops)}FLOPs and about "
        at_once = plan.estimate.max_parallel
        budget += f"{text.about(seconds / at_once)} with {at_once} at once, less what is pruned"
    goals = "; ".join(f"{goal.direction} {goal.metric}" for goal in sweep.optimize)
    pruner = "" if sweep.pruner.kind == "none" else f", {sweep.pruner.kind} by {sweep.pruner.by}"
    parts = [*plan_head(plan, budget, width)]
    parts += [Text(), Text("what is searched", style="bold"), Text(f"{goals}: {sweep.sampler}{pruner}", style="dim")]
    table = RichTable(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for _ in range(3):
        table.add_column(overflow="fold")
    for dimension in dict.fromkeys(d for space in search.spaces.values() for d in space.dimensions):
        having = [name for name, space in search.spaces.items() if dimension in space.dimensions]
        where = "" if len(having) == len(search.spaces) else f"in {', '.join(having)}"
        conditions = dimension.parameter.when.items()
        when = ", ".join(f"{'.'.join(name.split('.')[-2:])} = {_plain(value)}" for name, value in conditions)
        table.add_row(dimension.name, _values(dimension), where or (f"when {when}" if when else ""))
    parts.append(table)
    parts += [Text(f"subject to {text_}", style="dim") for text_ in sweep.constraints]
    return Group(*parts, *plan_rest(plan))


def _values(dimension: Dimension) -> str:
    if dimension.levels:
        return ", ".join(level.label for level in dimension.levels)
    low, high = (f"{end:g}" for end in dimension.bounds)
    kind = dimension.parameter.kind.replace("_", " ").replace("int", "whole")
    step = f" by {dimension.parameter.step:g}" if dimension.parameter.step else ""
    return f"{low} to {high}{step}, {kind}"


def _plain(value: Any) -> str:
    return " or ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def setting(point: Point, names: Mapping[str, str]) -> str:
    """`lr=0.0021 warmup_steps=20`, by the short names of the parameters."""
    return " ".join(f"{names[name]}={value:.3g}" if isinstance(value, float) else f"{names[name]}={value}"
                    for name, value in point.items())  # fmt: skip


def names_of(search: Search) -> dict[str, str]:
    """{parameter: shortest unique name}."""
    return short_names(list(search.sweep.space))


HEAD = ("arm", "trials", "tokens", "FLOPs", "{goal}", "default setting", "trial")


def sweep_tables(search: Search, summaries: Sequence[Summary]) -> list[Table]:
    """Tables of each arm's budget and best setting; with several goals, of the Pareto front."""
    goals, names = search.goals, names_of(search)
    head = [name.format(goal=f"best {goals[0]}") for name in HEAD]
    rows = [
        [
            summary.arm,
            _states(summary),
            text.count(summary.tokens) if search.trains else "–",
            text.short(summary.flops) if search.trains else "–",
            _value(summary.best),
            _value(summary.default),
            str(summary.best.number) if summary.best else "–",
        ]
        for summary in summaries
    ]
    spent = Table("arms", "", head, rows, 4)
    if len(goals) == 1:
        best = [
            [summary.arm, setting(summary.best.point, names) if summary.best else "none is done"]
            for summary in summaries
        ]
        return [spent, Table("best", "best settings", ["arm", "setting"], best, 2, left=2)]
    front = [
        [summary.arm, setting(trial.point, names), *map(text.value, trial.values or ())]
        for summary in summaries
        for trial in summary.front
    ]
    title = "trials that no other beats in every goal"
    return [spent, Table("front", title, ["arm", "setting", *goals], front, 2 + len(goals), left=2)]


def render_sweep(search: Search, summaries: Sequence[Summary], width: int) -> RenderableType:
    """The tables of a sweep for the terminal."""
    return Group(*stacked(sweep_tables(search, summaries), width))


def _states(summary: Summary) -> str:
    """Number of trials, and of those in other states than done: `24`, or `24 (9 pruned, 1 failed)`."""
    rest = [f"{number} {state}" for state, number in summary.states.items() if state != "done"]
    return f"{summary.counted}" + (f" ({', '.join(rest)})" if rest else "")


def _value(trial: Trial | None) -> str:
    return text.value(trial.values[0]) if trial is not None and trial.values else "–"


def trials_table(search: Search, trials: Sequence[Trial]) -> Table:
    """State of every trial."""
    names, goals = names_of(search), search.goals
    rows = [
        [
            trial.name,
            trial.state,
            setting(trial.point, names),
            *(text.value(value) for value in trial.values or [None] * len(goals)),
            text.count(trial.tokens) if trial.tokens else "–",
            _note(search, trial),
        ]
        for trial in trials
    ]
    head = ["trial", "state", "setting", *goals, "tokens", "note"]
    return Table("trials", "all trials", head, rows, len(head), left=3)


def _note(search: Search, trial: Trial) -> str:
    """Who trains a trial, why it failed, or where it was pruned, in validations of the arm's default setting."""
    if trial.state == "pruned" and trial.reports:
        last = trial.reports[-1][0]
        if search.sweep.pruner.kind == "wilcoxon":
            return f"pruned after {last + 1} of {len(search.sweep.seeds)} seeds"
        validation = search.ablation.arm(trial.arm).experiment.pretrain.validation
        return f"pruned at validation {last} of {validation.times}"
    return trial.error or ("" if trial.state != "running" else f"by {trial.coordinator}")


def render_trials(search: Search, trials: Sequence[Trial]) -> RenderableType:
    """All trials for the terminal; a setting and a note may take several lines, a state has its colour."""
    table = trials_table(search, trials)
    grid = RichTable(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in table.head:
        left = name in ("trial", "state", "setting", "note")
        whole = name in ("trial", *search.goals)
        grid.add_column(name, justify="left" if left else "right", overflow="fold", no_wrap=whole)
    for trial, state, *rest in table.rows:
        grid.add_row(trial, Text(state, style=STATES[state]), *rest)
    return grid


def trials_json(search: Search, trials: Sequence[Trial]) -> dict[str, Any]:
    """Output of `status --json`. Keys may be added, none is renamed."""
    return {"sweep": search.name, "trials": [trial_json(search, trial) for trial in trials]}


def trial_json(search: Search, trial: Trial) -> dict[str, Any]:
    """One trial as JSON."""
    return {
        "arm": trial.arm,
        "number": trial.number,
        "state": trial.state,
        "setting": trial.point,
        "values": search.named(trial.values) or None,
        "reports": [list(pair) for pair in trial.reports],
        "fingerprints": list(trial.fingerprints),
        "tokens": trial.tokens,
        "flops": trial.flops,
        "error": trial.error,
    }


def sweep_json(search: Search, summaries: Sequence[Summary]) -> dict[str, Any]:
    """Output of `report --json`. Keys may be added, none is renamed."""

    def as_json(trial: Trial | None) -> dict[str, Any] | None:
        if trial is None:
            return None
        return {"number": trial.number, "setting": trial.point, "values": search.named(trial.values) or None}

    arms = [
        {
            "arm": summary.arm,
            "states": dict(summary.states),
            "tokens": summary.tokens,
            "flops": summary.flops,
            "own": as_json(summary.default),
            "best": as_json(summary.best),
            "front": [as_json(trial) for trial in summary.front],
        }
        for summary in summaries
    ]
    return {"sweep": search.name, "goals": [goal.model_dump() for goal in search.sweep.optimize], "arms": arms}
