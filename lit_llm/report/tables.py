"""Tables for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lit_llm.ablation.arms import Arm
from lit_llm.ablation.factors import short_names
from lit_llm.ablation.findings import Finding
from lit_llm.ablation.fraction import Fraction, aliases_in_letters, effect_of, lettered, members_of
from lit_llm.ablation.layouts import chains
from lit_llm.ablation.plan import Plan, PlannedArm
from lit_llm.analysis.before_after import BeforeAfter
from lit_llm.analysis.comparison import Comparison, Row
from lit_llm.analysis.effects import Effects
from lit_llm.analysis.front import Front
from lit_llm.config.tree import under
from lit_llm.experiment.chain import EVALUATED, FINETUNED, Link
from lit_llm.experiment.cost import Cost, cost_of
from lit_llm.objectives.config import continues
from lit_llm.report import text
from lit_llm.report.anova import anova_parts
from lit_llm.report.learning_rates import Part, lr_parts
from lit_llm.report.scaling import scaling_parts

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
    "pruned": "blue",
    "infeasible": "dim",
    "repeated": "dim",
    "lost": "dim",
    "pending": "dim",
}


def table_of(*columns: str, left: int = 1) -> Table:
    """A plain table whose first `left` columns are words, and the others numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left else "right", overflow="fold", no_wrap=index >= left)
    return table


COSTS = ("arm", "params", "FLOPs/token", "tokens", "loss tokens", "KV cache", "memory", "time")
TRAINING = 5
"""Columns of what is computed; the others are what it takes."""


def plan_table(plan: Plan, width: int = 120) -> RenderableType:
    """Costs of every arm (in a narrow terminal as two tables), what differs, and the findings."""
    study = plan.ablation.study
    seeds = f"{len(study.seeds)} seed{'s' if len(study.seeds) > 1 else ''}"
    cost = {link.fingerprint: flops_of(link, p.cost) for p in plan.arms for links in p.chains for link in links}
    count, stages = len(plan.arms) * len(study.seeds), plan.stages
    shared = count - stages["pretrain"]
    once = f" ({shared} of them computed by others)" if shared else ""
    most = ""
    if len(stages) > 1:
        # What several arms need is computed once: the pretraining of DecLLM and DecLLM + BiAttn.
        trained = {name: number for name, number in stages.items() if " after " not in name}
        told = [f"{number} x {name}" for name, number in trained.items()]
        evaluations = sum(stages.values()) - sum(trained.values())
        once = ": " + ", ".join([*told, *[f"{evaluations} evaluations"] * bool(evaluations)])
        most = "at most " * ("finetune" in stages)
    arms, all_runs = (f"{n} {word}{'s' if n > 1 else ''}" for n, word in ((len(plan.arms), "arm"), (count, "run")))
    runs = f"{arms} x {seeds} = {all_runs}{once}, {most}{text.short(sum(cost.values()))}FLOPs"
    if study.more_seeds:
        # What is asked for at first is the least; at the most, every arm has all seeds.
        whole = sum(cost.values()) * study.more_seeds.most / len(study.seeds)
        runs += f" at least; with {study.more_seeds.most} seeds of every arm {text.short(whole)}FLOPs"
    parts = [*plan_head(plan, f"{runs}{_duration(plan)}", width)]
    if study.grid and study.grid.fraction:
        parts += [Text(), *_fraction(plan, study.grid.fraction, study.grid.requested)]
    return Group(*parts, *plan_rest(plan))


def flops_of(link: Link, cost: Cost) -> float:
    """What one stage takes; cost: of the run that it is of."""
    own = cost_of(link.source) if link.source else cost
    training = {"pretrain": own.train_flops - own.before.train_flops, "finetune": own.finetune_flops}
    return training.get(link.kind, 0.0)


def plan_head(plan: Plan, budget: str, width: int) -> Iterator[RenderableType]:
    """What is asked, what each arm costs, and what all of it comes to."""
    study = plan.ablation.study
    rows = [
        [
            planned.arm.name,
            text.count(planned.cost.parameters),
            text.short(planned.cost.train_flops_per_token),
            text.count(planned.cost.tokens),
            text.count(planned.cost.loss_tokens),
            text.size(planned.cost.cache.total(plan.prompt, plan.generate)) if generates(planned.arm) else "–",
            text.size(planned.cost.memory_bytes),
            text.about(plan.estimate.arms[planned.arm.name].total) if plan.estimate else "–",
        ]
        for planned in plan.arms
    ]
    yield Text(study.study, style="bold") + Text(f"  {study.question}", style="not bold")
    yield Text()
    yield from side_by_side(COSTS, rows, TRAINING, width)
    some_generate = any(generates(planned.arm) for planned in plan.arms)
    cache = f" KV cache: {plan.prompt} prompt and {plan.generate} generated tokens." if some_generate else ""
    yield Text(f"{budget}.{cache}", style="dim")
    if plan.estimate and plan.estimate.busy:
        message = "This machine was busy when it was timed, so it looks slower than it is: `--measure` times it again."
        yield Text(message, style="yellow")


def generates(arm: Arm) -> bool:
    """Whether it goes on with a text, and so keeps keys and values."""
    return continues(arm.experiment.model.family)


def plan_rest(plan: Plan) -> Iterator[RenderableType]:
    """What differs between the arms, and the findings."""
    if len(plan.arms) > 1:
        yield from (Text(), Text("what differs from the baseline", style="bold"), _differences(plan))
    if plan.findings:
        yield from (Text(), Text("findings", style="bold"), *_findings(plan.findings))


def _fraction(plan: Plan, fraction: Fraction, requested: Sequence[int]) -> list[RenderableType]:
    """What each letter stands for, and which effects the fraction cannot tell apart."""
    factors = plan.ablation.factors
    names = list(factors)
    table = table_of("", "factor", "levels", "aliased with", left=4)
    for index, (name, label) in enumerate(short_names(names).items()):
        effect = effect_of(index)
        levels = " → ".join(factors[name])
        table.add_row(lettered(effect), label, levels, aliases_in_letters(fraction, effect))
    for effect in requested:
        label = " × ".join(short_names(names)[names[i]] for i in members_of(effect))
        table.add_row(lettered(effect), label, "", aliases_in_letters(fraction, effect))
    head = f"design: {fraction.size} of {1 << len(names)} combinations, resolution {fraction.resolution}"
    shared = "; ".join("=".join(map(lettered, chain)) for chain in chains(fraction))
    notes = ["An arm is named by the factors at their second level; ... are effects of three factors and more."]
    notes += [f"Interactions that are not told apart: {shared}."] * bool(shared)
    return [Text(head, style="bold"), table, *(Text(note, style="dim") for note in notes)]


def _duration(plan: Plan) -> str:
    """Of the whole study, for the line below the costs."""
    found = plan.estimate
    if found is None:
        return ", time unknown until `--measure` has timed this machine"
    done = f"; {found.done} of them done" if found.done else ""
    at_once = f" with {found.slots} at once" if found.slots > 1 else ""
    tasks = any(name.startswith("tasks after ") for name in plan.stages)
    without = " without the tasks, whose questions only the harness knows" if tasks else ""
    return f"{done}, about {text.about(found.seconds)}{at_once} on this machine{without}"


def side_by_side(head: Sequence[str], rows: Sequence[Sequence[str]], first: int, width: int) -> list[RenderableType]:
    """One table where it fits, else two, the columns from number `first` on below the others."""
    longest = [max(len(row[index]) for row in [head, *rows]) + 2 for index in range(len(head))]
    parts = [range(len(head))] if sum(longest) <= width else [range(first), (0, *range(first, len(head)))]
    found: list[RenderableType] = []
    for columns in parts:
        table = table_of(*(head[index] for index in columns))
        for row in rows:
            table.add_row(*(row[index] for index in columns))
        found += [table, Text()]
    return found[:-1]


def _differences(plan: Plan) -> RenderableType:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(overflow="fold", ratio=1)
    table.add_column(overflow="fold", ratio=3)
    several = len({planned.arm.baseline for planned in plan.arms}) > 1
    in_letters = bool(plan.ablation.study.grid and plan.ablation.study.grid.fraction)  # the name says it
    for planned in plan.arms:
        arm, baseline = planned.arm, plan.ablation.arm(planned.arm.baseline)
        against = Text(f"\nagainst {baseline.name}" if several and arm is not baseline else "", style="dim")
        # What matching has moved stands in the findings, with what is left.
        said = {*arm.derived, *baseline.derived} | (arm.declared if in_letters else set())
        found = _difference_text(planned, said)
        if not in_letters or found.plain != "nothing":
            table.add_row(Text(arm.name) + against, found)
    return Group(table, *[Text("the others: their factors alone", style="dim")] * in_letters)


def _difference_text(planned: PlannedArm, said: Collection[str]) -> Text:
    """A line for each key, without those that are said elsewhere."""
    if planned.arm.name == planned.arm.baseline:
        return Text("is the baseline", style="dim")
    lines = [
        f"{key}: {_value(old)} → {_value(new)}"
        for key, (old, new) in planned.differs.items()
        if (old, new) != (None, None) and not under(key, *said)
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


EFFECT = ("arm", "n", "{metric}", "difference [95%]", "p", "verdict", "against")
COST = ("params", "FLOPs", "tok/s", "spikes")


def comparison_table(comparison: Comparison, width: int) -> RenderableType:
    """Mean, difference and cost of every arm; in a narrow terminal the cost stands below."""
    head, *rows = _cells(comparison)
    tables = side_by_side(head, rows, len(head) - len(COST), width)
    parts = [Text(f"· {note}", style="dim") for note in comparison.notes]
    shown = [part for group in comparison.effects for part in _effects(group, comparison)]
    return Group(
        *tables,
        *parts,
        *shown,
        *_before_after(comparison, width),
        *_front(comparison),
        *_parts(comparison, width),
    )


def _further(comparison: Comparison) -> Iterator[Part]:
    """Factors of several levels, what each learning rate did to the arms, and how they scale."""
    for table in comparison.anova:
        yield from anova_parts(table, comparison.metric, named=len(comparison.anova) > 1)
    for rates in comparison.learning_rates:
        yield from lr_parts(rates, comparison.metric)
    if comparison.scaling is not None:
        yield from scaling_parts(comparison.scaling)


def _parts(comparison: Comparison, width: int) -> Iterator[RenderableType]:
    for part in _further(comparison):
        yield from (Text(), Text(part.title, style="bold"), *side_by_side(part.head, part.rows, part.first, width))
        yield from (Text(f"· {note}", style="dim") for note in part.notes)


TURN = ("arm", "before", "after", "difference before", "after [95%]", "changed by [95%]")


def _before_after(comparison: Comparison, width: int) -> list[RenderableType]:
    """The arms before and after finetuning."""
    found = comparison.before_after
    if found is None:
        return []
    head, *rows = _turn_cells(found)
    notes = [Text(f"· {note}", style="dim") for note in _turn_notes(found)]
    title = Text(f"{found.metric} before and after finetuning", style="bold")
    return [Text(), title, *side_by_side(head, rows, 4, width), *notes]


def _front(comparison: Comparison) -> list[RenderableType]:
    """The arms by what they cost."""
    found = comparison.front
    if found is None:
        return []
    head, *rows = _front_cells(found)
    table = table_of(*head)
    for row in rows:
        table.add_row(*row)
    return [Text(), Text(_front_title(found), style="bold"), table]


def _front_title(found: Front) -> str:
    return f"{found.metric} against {found.figure.replace('_', ' ').replace('flops', 'FLOPs')}"


def _front_cells(found: Front) -> list[list[str]]:
    rows = []
    for point in found.points:
        place = f"below {point.beaten_by}" if point.beaten_by else "front"
        rows.append([point.arm, text.short(point.cost), text.value(point.value), place])
    return [["arm", found.figure.replace("_", " ").replace("flops", "FLOPs"), "mean", ""], *rows]


def _turn_cells(found: BeforeAfter) -> list[list[str]]:
    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    rows = []
    for row in found.rows:
        empty = "baseline" if row.arm == row.baseline else "–"
        before = text.difference(row.difference_before, empty)
        if (d := row.difference_before) and d.mean == 0 and d.low == d.high:
            before = "the same runs"
        after = text.difference(row.difference_after, "")
        rows.append([row.arm, number(row.before), number(row.after), before, after, text.difference(row.change, "")])
    return [list(TURN), *rows]


def _turn_notes(found: BeforeAfter) -> list[str]:
    notes = ["changed by: how much finetuning has moved an arm against its baseline"]
    if found.rank_correlation is not None:
        arms = sum(row.before is not None and row.after is not None for row in found.rows)
        notes.append(f"rank correlation of {arms} arms before and after (Spearman): {found.rank_correlation:+.2f}")
    return notes


EFFECTS_HEAD = ("", "factor", "effect [95%]", "aliased with")


def _effects(group: Effects, comparison: Comparison) -> list[RenderableType]:
    """The effects of a two-level design."""
    rows = _effect_rows(group)
    table = table_of(*EFFECTS_HEAD[: len(rows[0])], left=4)
    for row in rows:
        table.add_row(*row)
    notes = (Text(f"· {note}", style="dim") for note in group.notes)
    return [Text(), Text(_effects_title(group, comparison), style="bold"), table, *notes]


def _effects_title(group: Effects, comparison: Comparison) -> str:
    where = f" in {group.group}" if len(comparison.effects) > 1 else ""
    seeds = f"{len(group.seeds)} seed{'' if len(group.seeds) == 1 else 's'}"
    return f"effects on {comparison.metric}{where}: second level minus first, {group.arms} arms, {seeds}"


def _effect_rows(group: Effects) -> list[list[str]]:
    """The column of aliases is left out where there are none."""
    short = short_names(list(dict.fromkeys(name for row in group.rows for name in row.factors)))
    width = 4 if any(row.aliases for row in group.rows) else 3
    rows = []
    for row in group.rows:
        levels = f": {' → '.join(row.levels)}" if row.levels else ""
        label = " × ".join(short[name] for name in row.factors) + levels
        rows.append([row.name, label, text.difference(row.effect), row.aliases][:width])
    return rows


def _cells(comparison: Comparison) -> list[list[str]]:
    """The head and a row for each arm. With which arm it is compared is said where that is not the same for all; p and
    the verdict, where the study asks for more than an interval."""
    head = [name.format(metric=comparison.metric) for name in (*EFFECT, *COST)]
    hidden = {"against"} if len({row.baseline for row in comparison.rows}) == 1 else set()
    hidden |= {"p"} if comparison.correction == "none" else set()
    hidden |= {"verdict"} if comparison.correction == "none" and comparison.margin is None else set()
    shown = [index for index, name in enumerate(head) if name not in hidden]
    return [[row[index] for index in shown] for row in [head, *map(_row, comparison.rows)]]


def _row(row: Row) -> list[str]:
    baseline = "baseline" if row.arm == row.baseline else "–"
    return [
        row.arm,
        _seeds(row),
        text.mean_and_deviation(row.mean, row.deviation),
        text.difference(row.difference, baseline),
        text.p_value(row.p),
        row.verdict or "",
        "" if row.arm == row.baseline else row.baseline,
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
    head, *cells = _cells(comparison)
    rows = [head, ["---"] * len(head), *cells]
    lines = [f"# {study.study}", "", study.question, ""]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", *(f"- {note}" for note in comparison.notes)]
    for group in comparison.effects:
        found = _effect_rows(group)
        head = list(EFFECTS_HEAD[: len(found[0])])
        lines += ["", f"## {_effects_title(group, comparison)}", ""]
        lines += [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *found]]
        lines += ["", *(f"- {note}" for note in group.notes)]
    if turn := comparison.before_after:
        head, *cells = _turn_cells(turn)
        lines += ["", f"## {turn.metric} before and after finetuning", ""]
        lines += [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *cells]]
        lines += ["", *(f"- {note}" for note in _turn_notes(turn))]
    if against := comparison.front:
        head, *cells = _front_cells(against)
        lines += ["", f"## {_front_title(against)}", ""]
        lines += [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *cells]]
    for part in _further(comparison):
        lines += ["", f"## {part.title}", ""]
        lines += [f"| {' | '.join(row)} |" for row in [part.head, ["---"] * len(part.head), *part.rows]]
        lines += ["", *(f"- {note}" for note in part.notes)]
    return "\n".join(lines).rstrip() + "\n"


def status_table(rows: Sequence[Mapping[str, Any]], metric: str) -> RenderableType:
    """State of every run."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    several = any(row["stage"] != "pretrain" for row in rows)
    # Of a chain each stage has a line, with the metric under its own prefix.
    metric = metric.removeprefix(FINETUNED).removeprefix(EVALUATED)
    for name in ("arm", "seed", *["stage"] * several, "state", "step", metric, "note"):
        right = name not in ("arm", "stage", "state", "note")
        table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in rows:
        value = row["metrics"].get(metric)
        note = "done with other code, device, threads or weights" if row["stale"] else row["error"] or ""
        table.add_row(
            row["arm"],
            str(row["seed"]),
            *[f"{row['evaluation']} after {row['after']}" if row["after"] else row["stage"]] * several,
            Text(row["state"], style=STATES[row["state"]]),
            f"{row['step']}/{row['max_steps']}",
            "–" if value is None else f"{value:.3f}",
            note,
        )
    failed = [row for row in rows if row["state"] in ("failed", "out_of_memory") and row["log"]]
    logs = [Text(f"{row['arm']}/seed {row['seed']}: {row['log']}", style="dim", overflow="fold") for row in failed]
    return Group(table, *([Text(), Text("logs of what failed", style="bold"), *logs] if logs else []))
