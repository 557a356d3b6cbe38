"""Results of a search: each arm's best setting as a file, and a confirmation study over fresh seeds.

The best of many trials is partly the luckiest. So nothing is concluded from the trials: each arm is run at its default
and its best setting with seeds that the search has not used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_llm.config.tree import difference, to_yaml, under
from lit_llm.experiment.cost import cost_of
from lit_llm.experiment.schema import Experiment
from lit_llm.runs.run_one_stage import experiment_yaml
from lit_llm.runs.stage_graph import final_metric
from lit_llm.store.store import write_text
from lit_llm.studies.audit.budgets import TOLERANCE, excesses
from lit_llm.studies.audit.findings import INTERVENTION
from lit_llm.sweeps.sweep import Search
from lit_llm.sweeps.trial import Trial


@dataclass(frozen=True)
class Summary:
    """Summary of one arm's search."""

    arm: str
    states: Mapping[str, int]
    """Number of trials by their final state: {"done": 20, "pruned": 4}."""
    tokens: int
    """Tokens read by all its runs. They differ between arms with equal trials where some trials are pruned."""
    flops: float
    default: Trial | None
    """The trial of the arm's setting in the file."""
    best: Trial | None
    """The best trial by the first goal; None where none is done."""
    front: tuple[Trial, ...]
    """Pareto front of the trials over all goals, sorted by the first goal."""

    @property
    def counted(self) -> int:
        """Number of trials that are part of the budget."""
        return sum(self.states.values())


def summary(search: Search, arm: str, trials: Sequence[Trial]) -> Summary:
    """Summary of one arm. trials: those of all arms."""
    arm_trials = [trial for trial in trials if trial.arm == arm]
    counted = [trial for trial in arm_trials if trial.counts]
    done = sorted(
        (trial for trial in counted if trial.state == "done"), key=lambda trial: _values_to_minimize(search, trial)[0]
    )
    default = next((trial for trial in counted if trial.point == search.firsts[arm][0]), None)
    return Summary(
        arm=arm,
        states=dict(Counter(trial.state for trial in counted)),
        tokens=sum(trial.tokens for trial in counted),
        flops=sum(trial.flops for trial in counted),
        default=default,
        best=done[0] if done else None,
        front=tuple(trial for trial in done if not any(_dominates(search, other, trial) for other in done)),
    )


def _values_to_minimize(search: Search, trial: Trial) -> list[float]:
    """Values of a trial by goal, negated for goals that are maximized."""
    signs = [1 if goal.direction == "minimize" else -1 for goal in search.sweep.optimize]
    return [sign * value for sign, value in zip(signs, trial.values or (), strict=True)]


def _dominates(search: Search, left: Trial, right: Trial) -> bool:
    pairs = list(zip(_values_to_minimize(search, left), _values_to_minimize(search, right), strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def write_best(search: Search, summaries: Sequence[Summary], folder: Path) -> tuple[Path, ...]:
    """Write `best/<arm>.yaml`, an experiment for `train`; with several goals one for each trial of the Pareto front."""
    paths = []
    for summary in summaries:
        several = len(search.sweep.optimize) > 1
        for trial in summary.front if several else filter(None, [summary.best]):
            name = f"{summary.arm}-trial-{trial.number:03}" if several else summary.arm
            experiment = search.experiment(trial.arm, trial.point)
            paths.append(
                write_text(folder / "best" / f"{name}.yaml", _file_header(search, trial) + experiment_yaml(experiment))
            )
    return tuple(paths)


def _file_header(search: Search, trial: Trial) -> str:
    values = ", ".join(f"{goal} {value:.6g}" for goal, value in search.named(trial.values).items())
    setting = "".join(f"#   {name}: {value}\n" for name, value in trial.point.items())
    return f"# {trial.name} of the sweep {search.name}: {values}\n{setting}"


def _lowered_budgets(
    search: Search, pair: Sequence[Experiment], from_file: Sequence[Experiment], allow: Mapping[str, str]
) -> dict[str, str]:
    """{key of a budget: reason} of budgets that differ because the search has lowered one.

    from_file: the arms of the pair with their settings in the file. A tuned setting that exceeds them may have won by
    its budget: the audit of the study reports that.
    """
    (baseline, tuned), files = map(cost_of, pair), [cost_of(each) for each in from_file]
    before = {budget for excess in excesses(files[1], files[0]) for budget in excess.budgets}
    reasons = {}
    for excess in excesses(tuned, baseline):
        first = excess.budgets[0]
        raised = any(
            budget.of(cost) > (1 + TOLERANCE) * budget.of(file)
            for budget in excess.budgets
            for cost, file in zip((baseline, tuned), files, strict=True)
        )
        if first.blocks and not raised and not before & {*excess.budgets} and not under(first.key, *allow):
            reasons[first.key] = f"the sweep {search.name} lowered it: no arm has more {first.words} than before tuning"
    return reasons


def tuned_name(search: Search, arm: str) -> str:
    """Name of an arm at its best setting in the confirmation study."""
    name = f"{arm}_tuned"
    while name in search.spaces:  # an arm of the sweep has that name
        name += "_"
    return name


def confirmation_name(search: Search) -> str:
    """Name of the confirmation study."""
    return f"{search.name}-winners"


def _comparison_metric(search: Search, goal: str) -> str:
    """Metric of the confirmation study: the goal's, on the test split where every arm has one."""
    tested = all(arm.experiment.pretrain.data.has_test for arm in search.ablation.arms)
    return final_metric(goal) if tested else goal


def confirmation_study(search: Search, summaries: Sequence[Summary], folder: Path) -> Path | None:
    """Write `winners.yaml`, a study of each arm at its default and its best setting; None where none is to be run.

    Each arm is compared with the first, both at their settings in the file; each tuned arm with the first one tuned.
    """
    fresh = search.sweep.winners.seeds
    if fresh is None:
        fresh = tuple(max(search.sweep.seeds) + 1 + number for number in range(3))
    goal = search.sweep.optimize[0]
    if (
        not fresh
        or len(search.sweep.optimize) > 1
        or goal.is_cost_figure
        or not any(result.best for result in summaries)
    ):
        return None
    first = summaries[0].arm
    arms: dict[str, dict[str, Any]] = {}
    experiments: dict[str, Experiment] = {}
    files: dict[str, Experiment] = {}
    """{arm of the study: the experiment in the sweep file from which it was tuned, or which it is}."""
    tuned: dict[str, str] = {}
    for result in summaries:
        file_experiment = search.ablation.arm(result.arm).experiment
        write_text(folder / "own" / f"{result.arm}.yaml", experiment_yaml(file_experiment))
        arms[result.arm] = {"extends": f"own/{result.arm}.yaml"}
        experiments[result.arm] = files[result.arm] = file_experiment
        tuned[result.arm] = result.arm
        if result.best is not None and result.best is not result.default:
            name = tuned_name(search, result.arm)
            tuned[result.arm] = name
            experiments[name], files[name] = search.experiment(result.arm, result.best.point), file_experiment
            arms[name] = {"extends": f"best/{result.arm}.yaml"}
            arms[name]["baseline"] = tuned[first] if result.arm != first else first
    because = f"tuned by the sweep {search.name}: {search.sweep.trials} trials of each arm"
    allow = {rule.key: rule.because for rule in search.sweep.allow}
    for name, arm in arms.items():
        pair = [experiments[other] for other in (arm.get("baseline", first), name)]
        for key in difference(*(experiment.model_dump(mode="json", exclude={"seed"}) for experiment in pair)):
            if not under(key, *INTERVENTION, *allow):
                allow[key] = because
        allow |= _lowered_budgets(search, pair, [files[other] for other in (arm.get("baseline", first), name)], allow)
    if len(arms) == 1:
        return None
    content = {
        "study": confirmation_name(search),
        "question": f"What did tuning change? {search.sweep.question}",
        "arms": arms,
        "seeds": list(fresh),
        "compare": {"baseline": first, "metric": _comparison_metric(search, goal.metric)},
        "allow": [{"key": key, "because": reason} for key, reason in allow.items()],
    }
    head = (
        f"# Each arm of the sweep {search.name} as it was and at its best, over seeds that the search has not seen.\n"
    )
    return write_text(folder / "winners.yaml", head + to_yaml(content, width=120))
