"""Tables for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lit_llm.ablation.findings import Finding
from lit_llm.ablation.plan import Plan, PlannedArm
from lit_llm.analysis.comparison import Comparison, Row
from lit_llm.report import text

SIGNS = {
    "refused": ("✗", "red"),
    "allowed": ("!", "yellow"),
    "no_op": ("=", "yellow"),
    "confound": ("≠", "yellow"),
    "note": ("·", "dim"),
}
STATES = {
    "done": "green",
    "running": "cyan",
    "diverged": "magenta",
    "failed": "red",
    "out_of_memory": "red",
    "interrupted": "yellow",
    "pending": "dim",
}


def _table(*columns: str, left: int = 1) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left else "right", overflow="fold", no_wrap=index >= left)
    return table


def plan_table(plan: Plan) -> RenderableType:
    """Costs of every arm, what differs, and the findings."""
    study = plan.ablation.study
    costs = _table("arm", "params", "FLOPs/token", "tokens", "loss tokens", "KV cache", "memory")
    for planned in plan.arms:
        cost = planned.cost
        costs.add_row(
            planned.arm.name,
            text.count(cost.parameters),
            text.short(cost.train_flops_per_token),
            text.count(cost.tokens),
            text.count(cost.loss_tokens),
            text.size(cost.cache.total(plan.prompt, plan.generate)),
            text.size(cost.memory_bytes),
        )
    seeds = f"{len(study.seeds)} seed{'s' if len(study.seeds) > 1 else ''}"
    computations = {name: p.cost.train_flops for p in plan.arms for name in p.fingerprints}
    shared = len(plan.arms) * len(study.seeds) - len(computations)
    once = f" ({shared} of them computed by others)" if shared else ""
    flops = text.short(sum(computations.values()))
    runs = f"{len(plan.arms)} arms x {seeds} = {len(plan.arms) * len(study.seeds)} runs{once}, {flops}FLOPs"
    parts: list[RenderableType] = [
        Text(study.study, style="bold") + Text(f"  {study.question}", style="not bold"),
        Text(),
        costs,
        Text(f"{runs}. KV cache: {plan.prompt} prompt and {plan.generate} generated tokens.", style="dim"),
    ]
    if len(plan.arms) > 1:
        parts += [Text(), Text("what differs from the baseline", style="bold"), _differences(plan)]
    if plan.findings:
        parts += [Text(), Text("findings", style="bold"), *_findings(plan.findings)]
    return Group(*parts)


def _differences(plan: Plan) -> RenderableType:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(overflow="fold", ratio=1)
    table.add_column(overflow="fold", ratio=3)
    for planned in plan.arms:
        table.add_row(planned.arm.name, _difference_text(planned))
    return table


def _difference_text(planned: PlannedArm) -> Text:
    if planned.arm.name == planned.arm.baseline:
        return Text("is the baseline", style="dim")
    lines = [
        f"{key}: {_value(old)} → {_value(new)}"
        for key, (old, new) in planned.differs.items()
        if (old, new) != (None, None)
    ]
    return Text("\n".join(lines) or "nothing", style="")


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return "–" if value is None else str(value)


def _findings(findings: Iterable[Finding]) -> Iterator[Text]:
    """A line for each; what is said of several arms is said once."""
    arms: dict[tuple[str, str, str], list[str]] = {}
    for finding in findings:
        arms.setdefault((finding.kind, finding.key, finding.message), []).append(finding.arm)
    for (kind, key, message), names in arms.items():
        sign, style = SIGNS[kind]
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        yield Text(f"{sign} {', '.join(names[:2])}{more}: {f'{key}: ' if key else ''}{message}", style=style)


HEAD = ("arm", "n", "{metric}", "difference [95%]", "params", "FLOPs", "tok/s", "spikes")
EFFECT = 4
"""Columns of the effect; the others are the cost."""


def comparison_table(comparison: Comparison, width: int) -> RenderableType:
    """Mean, difference and cost of every arm; in a narrow terminal the cost stands below."""
    head = [name.format(metric=comparison.metric) for name in HEAD]
    rows = [_cells(row) for row in comparison.rows]
    longest = [max(len(row[index]) for row in [head, *rows]) + 2 for index in range(len(head))]
    parts = [range(len(head))] if sum(longest) <= width else [range(EFFECT), (0, *range(EFFECT, len(head)))]
    found: list[RenderableType] = []
    for columns in parts:
        table = _table(*(head[index] for index in columns))
        for row in rows:
            table.add_row(*(row[index] for index in columns))
        found += [table, Text()]
    return Group(*found[:-1], *(Text(f"· {note}", style="dim") for note in comparison.notes))


def _cells(row: Row) -> list[str]:
    baseline = "baseline" if row.arm == row.baseline else "–"
    return [
        row.arm,
        _seeds(row),
        text.mean_and_deviation(row.mean, row.deviation),
        text.difference(row.difference, baseline),
        text.count(row.parameters) if row.parameters else "–",
        text.short(row.train_flops),
        text.short(row.tokens_per_second),
        "–" if row.spikes is None else f"{row.spikes:.2g}",
    ]


def _seeds(row: Row) -> str:
    """`3`, or with what did not end well: `2 +1 diverged`."""
    rest = [f"+{number} {state}" for state, number in row.states.items() if state != "done" and number]
    return " ".join([str(row.seeds), *rest])


def comparison_markdown(plan: Plan, comparison: Comparison) -> str:
    """The comparison as a Markdown page."""
    study = plan.ablation.study
    head = [name.format(metric=comparison.metric) for name in HEAD]
    rows = [head, ["---"] * len(head), *map(_cells, comparison.rows)]
    lines = [f"# {study.study}", "", study.question, ""]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", *(f"- {note}" for note in comparison.notes)]
    return "\n".join(lines).rstrip() + "\n"


def status_table(rows: Sequence[Mapping[str, Any]], metric: str) -> RenderableType:
    """State of every run."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("arm", "seed", "state", "step", metric, "note"):
        right = name not in ("arm", "state", "note")
        table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in rows:
        value = row["metrics"].get(metric)
        note = "done with other code" if row["stale"] else row["error"] or ""
        table.add_row(
            row["arm"],
            str(row["seed"]),
            Text(row["state"], style=STATES[row["state"]]),
            f"{row['step']}/{row['max_steps']}",
            "–" if value is None else f"{value:.3f}",
            note,
        )
    failed = [row for row in rows if row["state"] in ("failed", "out_of_memory") and row["log"]]
    logs = [Text(f"{row['arm']}/seed {row['seed']}: {row['log']}", style="dim", overflow="fold") for row in failed]
    return Group(table, *([Text(), Text("logs of what failed", style="bold"), *logs] if logs else []))
