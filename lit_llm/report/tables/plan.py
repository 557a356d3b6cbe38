"""Tables of a study's plan and of the state of its runs, and their form in the terminal."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from lit_llm.config.host import host_name
from lit_llm.config.metrics import EVALUATED, FINETUNED
from lit_llm.config.tree import under
from lit_llm.experiment.cost import Cost, cost_of, memory_of
from lit_llm.objectives.config import continues
from lit_llm.report import text
from lit_llm.report.tables.table import Table, in_terminal
from lit_llm.runs.kernels import strategy_of
from lit_llm.runs.stage_graph import PRETRAINS, StageNode, validation_metric
from lit_llm.runs.time_estimate import memory_of_device
from lit_llm.statistics.estimates import joined
from lit_llm.studies.audit.findings import Finding, Kind
from lit_llm.studies.design.factors import short_names
from lit_llm.studies.estimable_effects import chains
from lit_llm.studies.fractional_factorial import Fraction, aliases_in_letters, effect_of, lettered, members_of
from lit_llm.studies.load import Arm
from lit_llm.studies.plan import Plan, PlannedArm

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


COSTS = ("arm", "params", "FLOPs/token", "tokens", "loss tokens", "KV cache", "memory", "time")
THREADS = "pretrain.training.execution.threads"
TRAINING = 5
"""Number of columns on training; the others are on memory and time."""


def render_plan(plan: Plan, width: int = 120) -> RenderableType:
    """Costs of every arm (in a narrow terminal as two tables), differences between the arms, and findings."""
    study = plan.ablation.study
    seeds = f"{len(study.seeds)} seed{'s' if len(study.seeds) > 1 else ''}"
    cost = {node.fingerprint: flops_of(node, p.cost) for p in plan.arms for nodes in p.stage_graphs for node in nodes}
    count, stages = len(plan.arms) * len(study.seeds), plan.stages
    shared = count - stages["pretrain"]
    once = f" ({shared} of them computed by others)" if shared else ""
    most = ""
    if len(stages) > 1:
        # Stages that several arms share are computed once: the pretraining of DecLLM and DecLLM + BiAttn.
        trained = {name: number for name, number in stages.items() if " after " not in name}
        trainings = [f"{number} x {name}" for name, number in trained.items()]
        evaluations = sum(stages.values()) - sum(trained.values())
        once = ": " + ", ".join([*trainings, *[f"{evaluations} evaluations"] * bool(evaluations)])
        most = "at most " * ("finetune" in stages)
    arms, all_runs = (f"{n} {word}{'s' if n > 1 else ''}" for n, word in ((len(plan.arms), "arm"), (count, "run")))
    runs = f"{arms} x {seeds} = {all_runs}{once}, {most}{text.short(sum(cost.values()))}FLOPs"
    if study.more_seeds:
        # The first seeds are the least; at the most, every arm has all seeds.
        whole = sum(cost.values()) * study.more_seeds.max / len(study.seeds)
        runs += f" at least; with {study.more_seeds.max} seeds of every arm {text.short(whole)}FLOPs"
    parts = [*plan_head(plan, f"{runs}{_duration(plan)}", width)]
    if study.grid and study.grid.fraction:
        parts += [Text(), *in_terminal(_fraction(plan, study.grid.fraction, study.grid.requested), width)]
    return Group(*parts, *plan_rest(plan))


def flops_of(node: StageNode, cost: Cost) -> float:
    """Training FLOPs of one stage, without those of its trunk. cost: of the run that the stage belongs to."""
    cost = cost_of(node.source) if node.source else cost
    if node.begin:  # any warm-up of batches or rows has ended before
        return node.steps_after_trunk * cost.flops_per_step
    if node.kind in PRETRAINS:
        return cost.train_flops - cost.before.train_flops
    return cost.finetune_flops if node.kind == "finetune" else 0.0


def plan_head(plan: Plan, budget: str, width: int) -> Iterator[RenderableType]:
    """Question, cost of each arm, and total cost."""
    study = plan.ablation.study
    yield Text(study.study, style="bold") + Text(f"  {study.question}", style="not bold")
    yield Text()
    yield from in_terminal(costs_table(plan), width)
    if (devices := devices_table(plan)) is not None:
        yield Text()
        yield from in_terminal(devices, width)
        yield Text()
    some_generate = any(generates(planned.arm) for planned in plan.arms)
    cache = f" {cache_note(plan)}" if some_generate else ""
    yield Text(f"{budget}.{cache}", style="dim")
    if plan.throughputs:
        yield Text(suggestion(plan), style="dim")
    if plan.busy:
        message = "The machine was busy when steps were timed, so it looks slower than it is: `--measure` again."
        yield Text(message, style="yellow")


def suggestion(plan: Plan) -> str:
    """The fastest measured `-j` and `threads`, the others, and how to set other threads than the study has."""
    best, *others = plan.throughputs
    in_all = f"{text.short(best.steps_per_second)} steps/s in all"
    rest = [f"-j {o.max_parallel} with threads {o.threads}: {text.short(o.steps_per_second)}" for o in others]
    line = f"fastest here: -j {best.max_parallel} with threads {best.threads} ({'; '.join([in_all, *rest])})"
    if {p.arm.experiment.pretrain.training.execution.threads for p in plan.arms} != {best.threads}:
        line += f". Threads change bits of results: `-o {THREADS}={best.threads}` sets them for all runs to compare"
    return line


def costs_table(plan: Plan) -> Table:
    """Size, FLOPs, tokens, memory and time of each arm; no time where steps were not timed."""
    timed = [text.about(plan.estimate.arms[p.arm.name].total) if plan.estimate else "–" for p in plan.arms]
    rows = [
        [
            planned.arm.name,
            _parameters(planned.cost),
            _train_flops(planned.cost),
            text.count(planned.cost.tokens),
            text.count(planned.cost.loss_tokens),
            text.size(planned.cost.cache.total(plan.prompt, plan.generate)) if generates(planned.arm) else "–",
            text.size(planned.cost.memory_bytes),
            time,
        ]
        for planned, time in zip(plan.arms, timed, strict=True)
    ]
    return Table("costs", "", COSTS, rows, TRAINING)


def _parameters(cost: Cost) -> str:
    active = "" if cost.active_parameters == cost.parameters else f" ({text.count(cost.active_parameters)} active)"
    return f"{text.count(cost.parameters)}{active}"


def _train_flops(cost: Cost) -> str:
    """Training FLOPs of a token, with those that all experts would take."""
    used, in_all = cost.train_flops_per_token, cost.all_experts_train_flops_per_token
    return text.short(used) + ("" if in_all == used else f" ({text.short(in_all)} total)")


DEVICES = ("arm", "stage", "devices", "strategy", "ddp", "fsdp")


def devices_table(plan: Plan) -> Table | None:
    """Memory of one device by strategy, for stages that train on several; None without any."""
    rows, sizes = [], set()
    for arm in (planned.arm for planned in plan.arms):
        for stage in arm.experiment.trained:
            execution = arm.experiment.section(stage).training.execution
            if execution.ranks == 1:
                continue
            available = memory_of_device(arm.experiment, stage)
            needs = [memory_of(arm.experiment, stage, strategy) for strategy in ("ddp", "fsdp")]
            cells = [f"{text.size(need)}{'' if need <= available else ' too large'}" for need in needs]
            rows.append([arm.name, stage, str(execution.ranks), strategy_of(arm.experiment, stage) or "", *cells])
            sizes.add(text.size(available))
    if not rows:
        return None
    note = f"Each device has {' or '.join(sorted(sizes))} here. Other machines may have more, or less."
    return Table("devices", "memory of each device, by strategy", DEVICES, rows, len(DEVICES), (note,), left=2)


def cache_note(plan: Plan) -> str:
    """Sentence on the lengths for which the cache is stated."""
    return f"KV cache: {plan.prompt} prompt and {plan.generate} generated tokens."


def generates(arm: Arm) -> bool:
    """True where the arm's model generates text, and so has a key-value cache."""
    return continues(arm.experiment.model.family)


def plan_rest(plan: Plan) -> Iterator[RenderableType]:
    """Differences between the arms, and the findings of the audit."""
    if len(plan.arms) > 1:
        yield from (Text(), Text("what differs from the baseline", style="bold"), _differences(plan))
    if plan.findings:
        yield from (Text(), Text("findings", style="bold"), *_findings(plan.findings))


def _fraction(plan: Plan, fraction: Fraction, requested: Sequence[int]) -> Table:
    """Letters of the factors, and aliases of the effects in the fraction."""
    factors = plan.ablation.factors
    names, rows = list(factors), []
    for index, (name, label) in enumerate(short_names(names).items()):
        effect = effect_of(index)
        rows.append([lettered(effect), label, " → ".join(factors[name]), aliases_in_letters(fraction, effect)])
    for effect in requested:
        label = " × ".join(short_names(names)[names[i]] for i in members_of(effect))
        rows.append([lettered(effect), label, "", aliases_in_letters(fraction, effect)])
    title = f"design: {fraction.size} of {1 << len(names)} combinations, resolution {fraction.resolution}"
    shared = "; ".join("=".join(map(lettered, chain)) for chain in chains(fraction))
    notes = ["An arm is named by the factors at their second level; ... are effects of three factors and more."]
    notes += [f"Interactions that are not told apart: {shared}."] * bool(shared)
    return Table("design", title, ["", "factor", "levels", "aliased with"], rows, 4, tuple(notes), left=4)


def design_table(plan: Plan) -> Table | None:
    """The factors with their levels; None where the arms are written one by one."""
    grid, factors = plan.ablation.study.grid, plan.ablation.factors
    if grid is None:
        return None
    if grid.fraction is not None:
        return _fraction(plan, grid.fraction, grid.requested)
    rows = [[name, ", ".join(levels)] for name, levels in factors.items()]
    kind = {"one_at_a_time": "one factor at a time"}.get(grid.design, grid.design.replace("_", " "))
    return Table("design", f"design: {kind}", ["factor", "levels, the baseline's first"], rows, 2, left=2)


def _duration(plan: Plan) -> str:
    """Duration of the whole study, for the line below the costs."""
    estimate = plan.estimate
    if estimate is None:
        return ", time unknown: `--measure` times three steps of each arm"
    done = f"; {estimate.done} of them done" if estimate.done else ""
    at_once = f" with {estimate.max_parallel} at once" if estimate.max_parallel > 1 else ""
    tasks = any(name.startswith("tasks after ") for name in plan.stages)
    without = " without the tasks, whose questions only the harness knows" if tasks else ""
    return f"{done}, about {text.about(estimate.seconds)}{at_once} on this machine{without}"


def _differences(plan: Plan) -> RenderableType:
    grid = RichTable(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    grid.add_column(overflow="fold", ratio=1)
    grid.add_column(overflow="fold", ratio=3)
    table = differences_table(plan)
    for arm, differs in table.rows:
        name, _, against = arm.partition("\n")
        style = "dim" if differs == BASELINE else ""
        grid.add_row(Text(name) + Text(f"\n{against}" if against else "", style="dim"), Text(differs, style=style))
    return Group(grid, *(Text(note, style="dim") for note in table.notes))


BASELINE = "is the baseline"


def differences_table(plan: Plan) -> Table:
    """Differences between each arm and its baseline, a line for each key; keys shown elsewhere are left out."""
    rows = []
    several = len({planned.arm.baseline for planned in plan.arms}) > 1
    in_letters = bool(plan.ablation.study.grid and plan.ablation.study.grid.fraction)  # the name says it
    for planned in plan.arms:
        arm, baseline = planned.arm, plan.ablation.arm(planned.arm.baseline)
        against = f"\nagainst {baseline.name}" if several and arm is not baseline else ""
        # Keys that matching has changed are in the findings.
        elsewhere = {*arm.matched_keys, *baseline.matched_keys} | (arm.intervened_keys if in_letters else set())
        differs = _difference(planned, elsewhere)
        if not in_letters or differs != "nothing":
            rows.append([f"{arm.name}{against}", differs])
    notes = ("the others: their factors alone",) if in_letters else ()
    return Table("differs", "what differs from the baseline", ["arm", "differs"], rows, 2, notes, left=2)


def _difference(planned: PlannedArm, elsewhere: Collection[str]) -> str:
    """A line for each key that differs, without the keys shown elsewhere."""
    if planned.arm.name == planned.arm.baseline:
        return BASELINE
    lines = [
        f"{key}: {_value(old)} → {_value(new)}"
        for key, (old, new) in planned.differs.items()
        if (old, new) != (None, None) and not under(key, *elsewhere)
    ]
    return "\n".join(lines) or "nothing"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return "–" if value is None else str(value)


def _findings(findings: Iterable[Finding]) -> Iterator[Text]:
    for kind, message in merged_findings(findings):
        sign, style = SIGNS[kind]
        yield Text(f"{sign} {message}", style=style)


def merged_findings(findings: Iterable[Finding]) -> Iterator[tuple[Kind, str]]:
    """(kind, message) of each finding; equal findings on several arms are merged."""
    arms: dict[tuple[Kind, str, str], list[str]] = {}
    for finding in findings:
        arms.setdefault((finding.kind, finding.key, finding.message), []).append(finding.arm)
    for (kind, key, message), names in arms.items():
        yield kind, f"{joined(names, 2)}: {f'{key}: ' if key else ''}{message}"


def render_status(rows: Sequence[Mapping[str, Any]], metric: str) -> RenderableType:
    """State of every run, for the terminal."""
    table = RichTable(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    several = any(row["stage"] != "pretrain" for row in rows)
    # Each stage has a line, and the metric of the validation split, which is measured during training.
    metric = validation_metric(metric.removeprefix(FINETUNED).removeprefix(EVALUATED))
    for name in ("arm", "seed", *["stage"] * several, "state", "step", metric, "note"):
        right = name not in ("arm", "stage", "state", "note")
        table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in rows:
        value = row["metrics"].get(metric)
        note = "stale: of another provenance" if row["stale"] else row["error"] or ""
        note += f"{'; ' if note else ''}begun again {row['retries']}x" if row["retries"] else ""
        if row["host"] not in (None, host_name()):
            note += f"{'; ' if note else ''}on {row['host']}"
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
