"""All figures that a study has the numbers for, finished or not."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_llm.ablation.arms import Ablation, Arm
from lit_llm.ablation.factors import short_names
from lit_llm.ablation.runs import Run, Step, costs_of_arm
from lit_llm.analysis.comparison import Comparison
from lit_llm.analysis.front import better, front
from lit_llm.evaluation.config import yardstick_of
from lit_llm.experiment.chain import FINETUNED
from lit_llm.experiment.cost import GENERATE, PROMPT, cost_of
from lit_llm.models.cost import attended_keys
from lit_llm.models.resolve import resolve_model
from lit_llm.report.figures.courses import AXES, places, read_course, read_rows, thinned
from lit_llm.report.figures.differences import Crossed, Ladder, Named, forest, heat_map, slopes, waterfall
from lit_llm.report.figures.fronts import front_figure
from lit_llm.report.figures.lines import Line, Panel, Places, line_figure, over_seeds, single
from lit_llm.report.figures.style import save
from lit_llm.tracking.store import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_LINES, MOST_ROWS, MOST_MAPS, MOST_LADDERS = 24, 60, 6, 4
"""Arms in a figure of lines, rows of a forest, pairs of factors and ladders that are drawn: more could not be read."""
INTERVAL = "bars: 95% intervals of the paired differences over seeds"
BAND = "lines: mean over the finished seeds; bands: from the lowest to the highest seed"


class Drawn(NamedTuple):
    """A figure with what a reader has to know beside it."""

    name: str
    """Of its files, without an ending."""
    caption: str
    figure: Figure


@dataclass(frozen=True)
class _Study:
    """What is drawn from."""

    ablation: Ablation
    runs: Sequence[Run]
    comparison: Comparison
    read: dict[Path, list[dict[str, Any]]] = field(default_factory=dict)
    """Courses that are read already: arms share stages."""

    @property
    def metric(self) -> str:
        return self.comparison.metric

    def named(self) -> list[str]:
        """The arms that are drawn as lines: all, or the baselines and then the best; in the study's order."""
        rows = self.comparison.rows
        sign = -1.0 if better(self.metric) == "higher" else 1.0

        def rank(at: int) -> tuple[bool, bool, float, int]:
            row = rows[at]
            return row.arm != row.baseline, row.mean is None, sign * (row.mean or 0.0), at

        chosen = set(sorted(range(len(rows)), key=rank)[:MOST_LINES])
        return [row.arm for at, row in enumerate(rows) if at in chosen]

    def course(self, step: Step) -> list[dict[str, Any]]:
        file = step.stage.metrics_file
        if file not in self.read:
            self.read[file] = read_course(file)
        return self.read[file]

    @property
    def chosen(self) -> str:
        """Said in a caption where not all arms are drawn."""
        count = len(self.comparison.rows)
        return f"; the baselines and the best of {count} arms" if count > MOST_LINES else ""

    @property
    def seeds(self) -> str:
        """`n = 3 seeds`, or `n = 2 to 3 seeds`, of the arms that have any."""
        return _seeds([row.seeds for row in self.comparison.rows if row.seeds])


def _seeds(counts: Sequence[int]) -> str:
    low, high = (min(counts), max(counts)) if counts else (0, 0)
    return f"n = {low} seed{'' if low == 1 else 's'}" if low == high else f"n = {low} to {high} seeds"


def figures_of(ablation: Ablation, runs: Sequence[Run], comparison: Comparison) -> list[Drawn]:
    """What can be drawn of a study now; an arm that has not begun is left out.

    Courses and records are read of at most 24 arms, so the time does not grow with the study.
    """
    study = _Study(ablation, runs, comparison)
    every = (_learning, _stability, _forests, _heat_maps, _fronts, _rates, _ladders, _turn, _extrapolation, _attention)
    return [drawn for draw in (*every, _inference) for drawn in draw(study)]


def write_figures(drawn: Sequence[Drawn], folder: Path) -> list[Path]:
    """`<name>.png` and `<name>.svg` of each, and `figures.md` with the captions."""
    files = [path for one in drawn for path in save(one.figure, folder / one.name)]
    parts = [f"## {one.name.replace('_', ' ')}\n\n![{one.name}]({one.name}.png)\n\n{one.caption}\n" for one in drawn]
    return [*files, write_text(folder / "figures.md", "\n".join(parts))]


# --- from metrics.jsonl ---------------------------------------------------------------------------------------------


def _learning(study: _Study) -> Iterator[Drawn]:
    """The validation and the training loss of each stage that trains."""
    own = study.metric.removeprefix(FINETUNED)
    measured = own if own.startswith("val/") else yardstick_of(study.ablation.arms[0].experiment.model.family)
    for kind in ("pretrain", "finetune"):
        for metric, unit in ((measured, _unit(measured)), ("train/loss", "nats per token")):
            panels = [
                Panel("", label, f"{metric}, {unit}" if unit else metric, lines)
                for over, label in AXES.items()
                if (lines := _courses(study, kind, metric, over))
            ]
            if panels:
                what = "validation" if metric == measured else "training"
                yield Drawn(
                    f"{what}_{kind}",
                    f"{metric} in the course of the {kind}ing; {BAND}, {study.seeds}; thin lines: runs that are not "
                    f"finished; ×: where a run diverged{study.chosen}.",
                    line_figure(f"{metric} during {kind}ing", panels),
                )


def _unit(metric: str) -> str:
    return "nats per token" if metric.split("/")[1].endswith(("nll", "loss")) else ""


def _courses(study: _Study, kind: str, metric: str, over: str) -> dict[str, list[Line]]:
    """The lines of each arm; of several that share their runs one."""
    stages = {
        name: [step for run in study.runs if run.arm.name == name for step in run.steps if step.link.kind == kind]
        for name in study.named()
    }
    shared = _merged({name: tuple(step.link.fingerprint for step in steps) for name, steps in stages.items()})
    found = {label: _lines(study, stages[first], metric, over) for label, first in shared.items()}
    return {label: lines for label, lines in found.items() if lines}


def _lines(study: _Study, steps: Sequence[Step], metric: str, over: str) -> list[Line]:
    """The mean of the finished runs, then each of the others; a mean over runs that end in different places would jump
    where one of them ends."""
    states = [step.status()["state"] for step in steps]
    runs = [places(study.course(step), metric, over) for step in steps]
    mean = over_seeds([run for run, state in zip(runs, states, strict=True) if state == "done"])
    others = [
        single(run, state == "diverged") for run, state in zip(runs, states, strict=True) if run and state != "done"
    ]
    return [mean or Line([], []), *others] if mean or others else []


def _merged(keys: Mapping[str, Any]) -> dict[str, str]:
    """{label: the first of the arms that have the same key}."""
    groups: dict[Any, list[str]] = {}
    for name, key in keys.items():
        groups.setdefault(key, []).append(name)
    labels = {
        key: " = ".join(names[:2]) + f" and {len(names) - 2} more" * (len(names) > 2) for key, names in groups.items()
    }
    return {labels[key]: names[0] for key, names in groups.items()}


TRACES = {
    "stability/grad_norm": "gradient norm before clipping",
    "stability/max_attention_logit": "largest attention logit so far",
    "stability/loss_spikes": "loss spikes so far",
}


def _stability(study: _Study) -> Iterator[Drawn]:
    curves = {metric: _courses(study, "pretrain", metric, "steps") for metric in TRACES}
    spikes = "stability/loss_spikes"
    calm = not any(y for lines in curves[spikes].values() for line in lines for y in line.y)
    panels = [
        Panel("", AXES["steps"], label, curves[metric], log="" if metric == spikes else "y")
        for metric, label in TRACES.items()
        if curves[metric] and not (calm and metric == spikes)
    ]
    if panels:
        yield Drawn(
            "stability",
            f"What was unstable in the course of the pretraining{': no loss spiked' * calm}; {BAND}, {study.seeds}; "
            f"thin lines: runs that are not finished; ×: where a run diverged{study.chosen}.",
            line_figure("stability during pretraining", panels),
        )


# --- from the comparison --------------------------------------------------------------------------------------------


def _forests(study: _Study) -> Iterator[Drawn]:
    """Every arm against its baseline, and the effects of a design's factors."""
    arms = {arm.name: arm for arm in study.ablation.arms}
    rows = [row for row in study.comparison.rows if row.difference is not None]
    several = len({row.baseline for row in rows}) > 1
    # The largest of too many, in the study's order.
    largest = sorted(rows, key=lambda row: -abs(row.difference.mean if row.difference else 0.0))[:MOST_ROWS]
    groups: dict[str, list[Named]] = {}
    for row in rows:
        if row in largest and row.difference is not None:
            name = f"{row.arm} − {row.baseline}" if several else row.arm
            groups.setdefault(_switched(study.ablation, arms[row.arm]), []).append(Named(name, row.difference))
    way = better(study.metric)
    if groups:
        against = "" if several else f" from {rows[0].baseline}"
        most = f"; the {MOST_ROWS} largest of {len(rows)}" if len(rows) > MOST_ROWS else ""
        seeds = _seeds([row.difference.seeds for row in largest if row.difference])
        yield Drawn(
            "differences",
            f"Difference{against} in {study.metric}; {INTERVAL}, {seeds}, not corrected for their number{most}.",
            forest(
                f"{study.metric}, difference{against or ' from the baselines'}",
                groups,
                f"difference in {study.metric}",
                way,
            ),
        )
    found = {group.group: _effect_rows(group.rows) for group in study.comparison.effects}
    if any(found.values()):
        shown = {name if len(found) > 1 else "": rows[:MOST_ROWS] for name, rows in found.items() if rows}
        seeds = _seeds([len(group.seeds) for group in study.comparison.effects])
        yield Drawn(
            "effects",
            f"Effects of the factors on {study.metric}: the mean over all arms at the second level less that at the "
            f"first; interactions: half the difference of differences; bars: 95% intervals, {seeds} of which every arm "
            "has a value.",
            forest("effects of the factors", shown, f"effect on {study.metric}", way, "effect"),
        )


def _switched(ablation: Ablation, arm: Arm) -> str:
    """The factors in which an arm is not at its baseline's level."""
    baseline, short = ablation.arm(arm.baseline), short_names(list(ablation.factors))
    return " × ".join(short[n] for n, label in arm.levels.items() if baseline.levels.get(n, label) != label)


def _effect_rows(rows: Sequence[Any]) -> list[Named]:
    short = short_names(list(dict.fromkeys(name for row in rows for name in row.factors)))
    return [
        Named(
            " × ".join(short[name] for name in row.factors) + (f": {' → '.join(row.levels)}" if row.levels else ""),
            row.effect,
        )
        for row in rows
        if row.effect is not None
    ]


def _heat_maps(study: _Study) -> Iterator[Drawn]:
    """Each pair of crossed factors; the named arms are a factor, too."""
    grid = study.ablation.study.grid
    if grid is None or grid.design not in ("factorial", "fractional_factorial"):
        return
    crossed = [arm for arm in study.ablation.arms if arm.levels]
    short = short_names(list(study.ablation.factors))
    levels: dict[str, dict[str, str]] = {}
    """{factor: {arm: level}}"""
    if len({arm.group for arm in crossed}) > 1:
        levels["arm"] = {arm.name: arm.group for arm in crossed}
    for name in study.ablation.factors:
        levels[short[name]] = {arm.name: arm.levels[name] for arm in crossed}
    names = list(levels)
    pairs = [(a, b) for at, a in enumerate(names) for b in names[at + 1 :]][:MOST_MAPS]
    rows = {row.arm: row for row in study.comparison.rows}
    if pairs and any(rows[arm.name].mean is not None for arm in crossed):
        maps = [_crossed(*pair, levels, rows) for pair in pairs]
        yield Drawn(
            "factors",
            f"{study.metric} by two factors: mean over the arms with both levels, each the mean over its seeds, "
            f"{study.seeds}; †: runs that diverged, in no mean.",
            heat_map(f"{study.metric} by two factors", maps, study.metric),
        )


def _crossed(down: str, across: str, levels: Mapping[str, Mapping[str, str]], rows: Mapping[str, Any]) -> Crossed:
    every = [list(dict.fromkeys(levels[name].values())) for name in (down, across)]
    cells = {(i, j): list[Any]() for i in every[0] for j in every[1]}
    for arm in levels[down]:
        cells[levels[down][arm], levels[across][arm]].append(rows[arm])

    def mean(found: Sequence[Any]) -> float | None:
        known = [row.mean for row in found if row.mean is not None]
        return statistics.fmean(known) if known else None

    return Crossed(
        down,
        across,
        tuple(every[0]),
        tuple(every[1]),
        tuple(tuple(mean(cells[i, j]) for j in every[1]) for i in every[0]),
        tuple(tuple(sum(row.diverged for row in cells[i, j]) for j in every[1]) for i in every[0]),
    )


def _fronts(study: _Study) -> Iterator[Drawn]:
    """Against what training and inference cost and what the study asks for; a cost that all share says nothing."""
    means = {row.arm: row.mean for row in study.comparison.rows if row.mean is not None}
    if better(study.metric) is None or len(means) < 2:
        return
    costs = {arm.name: costs_of_arm(arm.experiment) for arm in study.ablation.arms if arm.name in means}
    asked = study.ablation.study.compare.front
    figures = dict.fromkeys([*([asked] if asked else []), "train_flops", "inference_flops", "kv_cache_bytes"])
    shown = [
        front(figure, study.metric, by_arm, means)
        for figure in figures
        if len(set((by_arm := {arm: costs[arm][figure] for arm in means}).values())) > 1
    ]
    if shown:
        yield Drawn(
            "front",
            f"{study.metric} against cost; filled and joined: arms that no other beats in both; bars: standard "
            f"deviation over seeds, {study.seeds}; costs are computed, not measured"
            f"{study.chosen and '; grey: further arms'}.",
            front_figure(
                f"{study.metric} against cost",
                shown,
                {row.arm: row.deviation for row in study.comparison.rows},
                [name for name in study.named() if name in means],
            ),
        )


def _rates(study: _Study) -> Iterator[Drawn]:
    """Loss against learning rate of every group of arms that differ in nothing else."""
    for number, found in enumerate(study.comparison.learning_rates):
        lines, crosses = {}, {}
        for row in found.rows[:MOST_LINES]:
            cells = [cell for cell in row.cells if cell.losses]
            values = [list(cell.losses.values()) for cell in cells]
            x, y = [cell.lr for cell in cells], [statistics.fmean(losses) for losses in values]
            lines[row.group] = [Line(x, y, list(map(min, values)), list(map(max, values)))]
            crosses[row.group] = [cell.lr for cell in row.cells if cell.diverged]
        seeds = _seeds([len(cell.losses) for row in found.rows for cell in row.cells if cell.losses])
        panel = Panel("", f"learning rate ({found.factor})", study.metric, lines, log="x", crosses=crosses)
        yield Drawn(
            "learning_rates" + f"_{number + 1}" * (len(study.comparison.learning_rates) > 1),
            f"{study.metric} at the end, by learning rate; lines: mean over the seeds that did not diverge, {seeds}; "
            "bands: from the lowest to the highest seed; × at the top: a seed diverged"
            f"{f'; the first {MOST_LINES} of {len(found.rows)} groups' * (len(found.rows) > MOST_LINES)}.",
            line_figure(f"{study.metric} by learning rate", [panel], height=2.8),
        )


def _ladders(study: _Study) -> Iterator[Drawn]:
    """Arms each compared with the one before it."""
    rows = {row.arm: row for row in study.comparison.rows}
    baselines = {row.baseline for row in rows.values() if row.arm != row.baseline}
    ladders = []
    for end in rows.values():
        path = [end]
        while path[0].arm != path[0].baseline:
            path.insert(0, rows[path[0].baseline])
        if end.arm in baselines or len(path) < 3:
            continue
        rungs = [Named(row.arm, row.difference) for row in path[1:] if row.difference is not None]
        if path[0].mean is not None and len(rungs) == len(path) - 1:
            ladders.append(Ladder(path[0].arm, path[0].mean, tuple(rungs)))
    if ladders:
        seeds = _seeds([rung.difference.seeds for ladder in ladders for rung in ladder.rungs])
        yield Drawn(
            "ladder",
            f"{study.metric} rung by rung: each bar is the paired difference from the arm above it, begun where that "
            f"one ends; black bars: its 95% interval over seeds, {seeds}.",
            waterfall(f"{study.metric}, switch by switch", ladders[:MOST_LADDERS], study.metric, better(study.metric)),
        )


def _turn(study: _Study) -> Iterator[Drawn]:
    """Before against after finetuning."""
    found = study.comparison.before_after
    pairs = {
        row.arm: (row.difference_before, row.difference_after)
        for row in (found.rows if found else ())
        if row.difference_before is not None and row.difference_after is not None
    }
    if found and pairs:
        named = [name for name in study.named() if name in pairs] or list(pairs)[:MOST_LINES]
        seeds = _seeds([d.seeds for pair in pairs.values() for d in pair])
        rank = found.rank_correlation
        told = "" if rank is None else f" Rank correlation of the arms (Spearman): {rank:+.2f}."
        yield Drawn(
            "before_after",
            f"Difference from the baseline in {found.metric}, before and after finetuning; {INTERVAL}, {seeds}.{told}",
            slopes(
                f"{found.metric} before and after finetuning",
                {name: pairs[name] for name in named},
                f"difference in {found.metric}",
            ),
        )


# --- from the records of evaluations --------------------------------------------------------------------------------


def _evaluated(study: _Study, name: str, after: str) -> dict[str, list[Step]]:
    """The finished stages of an evaluation, by arm."""
    found = {
        arm: [
            step
            for run in study.runs
            if run.arm.name == arm
            for step in run.steps
            if (step.link.evaluation, step.link.after) == (name, after) and step.stage.result() is not None
        ]
        for arm in study.named()
    }
    shared = _merged({arm: tuple(step.link.fingerprint for step in steps) for arm, steps in found.items() if steps})
    return {label: found[first] for label, first in shared.items()}


Curves = Mapping[Path, Mapping[Any, Places]]
"""{folder of a stage: {what it is a curve of: its places}}"""


def _over_seeds(stages: Mapping[str, Sequence[Step]], curves: Curves, key: Any) -> dict[str, list[Line]]:
    """One curve of every arm that has it."""
    lines = {
        arm: over_seeds([curves[step.stage.folder].get(key, {}) for step in steps]) for arm, steps in stages.items()
    }
    return {arm: [line] for arm, line in lines.items() if line is not None}


def _extrapolation(study: _Study) -> Iterator[Drawn]:
    """Loss beyond the training window."""
    window = study.ablation.arms[0].experiment.pretrain.data.sequence_length
    ylabel, end = "loss, nats per token", f"{BAND}, {study.seeds}{study.chosen}"
    for after in ("pretrain", "finetune"):
        stages = _evaluated(study, "extrapolation", after)
        every = [step for steps in stages.values() for step in steps]
        by_position = {step.stage.folder: _by_position(read_rows(step.stage.rows_file)) for step in every}
        panels = [
            Panel(
                f"after {prefix} token{'s' if prefix > 1 else ''}",
                "position of the target, tokens",
                ylabel,
                _over_seeds(stages, by_position, prefix),
                verticals=[window],
            )
            for prefix in sorted({prefix for curves in by_position.values() for prefix in curves})
        ]
        if panels:
            yield Drawn(
                f"extrapolation_by_position_{after}",
                "Loss of held-out tokens by their position, after a prefix of so many tokens; dotted: the training "
                f"window of {window} tokens; {end}.",
                line_figure("loss by position, beyond the training window", panels),
            )
        by_length = {step.stage.folder: _by_length(step) for step in every}
        panels = [
            Panel(
                f"prefix: {prefix}",
                "total length, training windows",
                ylabel,
                _over_seeds(stages, by_length, prefix),
                log="x",
                ticks=sorted({length for curves in by_length.values() for length in curves.get(prefix, {})}),
            )
            for prefix in dict.fromkeys(prefix for curves in by_length.values() for prefix in curves)
        ]
        if panels:
            yield Drawn(
                f"extrapolation_by_length_{after}",
                f"Loss of the tokens in the last quarter of a window before a total length; {end}.",
                line_figure("loss by total length", panels),
            )


def _by_position(rows: Iterable[Mapping[str, Any]]) -> dict[int, Places]:
    """{prefix: {first position of a bucket: (its middle, nats per token of all sources)}}"""
    sums: dict[int, dict[tuple[int, int], list[float]]] = {}
    for row in rows:
        both = sums.setdefault(row["prefix"], {}).setdefault((row["position"], row["length"]), [0.0, 0.0])
        both[0], both[1] = both[0] + row["nats"], both[1] + row["tokens"]
    return {
        prefix: {first: ((first + end - 1) / 2, nats / tokens) for (first, end), (nats, tokens) in buckets.items()}
        for prefix, buckets in sums.items()
    }


_LENGTH = re.compile(r"extrapolation/nll/prefix_(.+)/length_(\d+)x")


def _by_length(step: Step) -> dict[str, Places]:
    """{prefix: {windows: (windows, nats per token)}}"""
    found: dict[str, dict[float, tuple[float, float]]] = {}
    for name, value in (step.stage.result() or {}).get("metrics", {}).items():
        if (match := _LENGTH.fullmatch(name)) and value is not None:
            found.setdefault(match[1], {})[int(match[2])] = (float(match[2]), value)
    return dict(found)


LOOKED_AT = {
    ("local_probability", "position"): ("position in the decoder, from 1", "weight on the nearest keys"),
    ("encoder_local_probability", "position"): ("position in the encoder, from 1", "weight on the nearest keys"),
    ("source_sensitivity", "step"): ("target token, from 1", "sensitivity to the source"),
}


def _attention(study: _Study) -> Iterator[Drawn]:
    """Where attention goes by position, and how the targets' dependence on the source fades."""
    for after in ("pretrain", "finetune"):
        stages = _evaluated(study, "attention", after)
        every = [step for steps in stages.values() for step in steps]
        curves = {step.stage.folder: _looked_at(read_rows(step.stage.rows_file)) for step in every}
        panels = [
            Panel("", xlabel, ylabel, lines, log="xy")
            for key, (xlabel, ylabel) in LOOKED_AT.items()
            if (lines := _over_seeds(stages, curves, key))
        ]
        if panels:
            yield Drawn(
                f"attention_{after}",
                "Self-attention's weight on the nearest keys by position, over all layers and heads, and the norm of "
                f"the derivative of a target's log-probability by the source's embeddings; {BAND}, {study.seeds}"
                f"{study.chosen}.",
                line_figure("where attention goes, by position", panels),
            )


def _looked_at(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], Places]:
    """{(measure, axis): {first place of a bucket: (its middle, value over all layers)}}"""
    found: dict[tuple[str, str], dict[float, tuple[float, float]]] = {}
    for row in rows:
        if (key := (row["measure"], row["axis"])) in LOOKED_AT and row["layer"] is None:
            first = row["first"] + (row["axis"] == "position")  # positions count from 0, steps from 1
            found.setdefault(key, {})[first] = (first + (row["last"] - row["first"]) / 2, row["value"])
    return dict(found)


# --- from the configuration alone -----------------------------------------------------------------------------------


def _inference(study: _Study) -> Iterator[Drawn]:
    """Key-value bytes and attended length of each generated token; arms that agree in both share a line."""
    numbers = thinned(range(GENERATE + 1), 101)
    named = set(study.named())
    bytes_of, keys_of = {}, {}
    for arm in study.ablation.arms:
        model = resolve_model(arm.experiment.model)
        if arm.name in named and model.decoder:
            cache = cost_of(arm.experiment).cache
            bytes_of[arm.name] = tuple(float(cache.total(PROMPT, number)) for number in numbers)
            keys_of[arm.name] = tuple(attended_keys(model, PROMPT, number) for number in numbers)
    if not bytes_of:
        return
    shared = _merged({name: (bytes_of[name], keys_of[name]) for name in bytes_of})
    panels = [
        Panel("", "tokens generated", label, {name: [Line(numbers, of[first])] for name, first in shared.items()})
        for label, of in (("key-value cache, bytes", bytes_of), ("keys read by a token in a layer", keys_of))
    ]
    yield Drawn(
        "inference",
        f"Computed, for a prompt of {PROMPT} tokens: bytes of one sequence's key-value cache in the precision of the "
        "training, and the keys that a generated token reads in a layer of the decoder, all of its attentions "
        f"together, mean over the layers{study.chosen}.",
        line_figure("cost of a generated token", panels),
    )
