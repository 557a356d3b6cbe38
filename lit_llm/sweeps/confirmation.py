"""What a search has found: each arm's best setting as a file, and a study of the winners over fresh seeds.

The best of many trials is partly the luckiest. So nothing is concluded from the trials: each arm is run at its own
setting and at its best with seeds that the search has not seen.
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
from lit_llm.runs.run import experiment_yaml
from lit_llm.runs.stage_graph import final_metric
from lit_llm.store.store import write_text
from lit_llm.studies.audit.budgets import TOLERANCE, excesses
from lit_llm.studies.audit.findings import INTERVENTION
from lit_llm.sweeps.sweep import Search
from lit_llm.sweeps.trial import Trial


@dataclass(frozen=True)
class Summary:
    """One arm's search."""

    arm: str
    states: Mapping[str, int]
    """How its trials ended; {"done": 20, "pruned": 4}."""
    tokens: int
    """Read by all its runs: equal trials are unequal where some are given up."""
    flops: float
    own: Trial | None
    """The trial of the arm's own setting."""
    best: Trial | None
    """By the first goal; None where none is done."""
    front: tuple[Trial, ...]
    """The trials that no other one beats in every goal, by the first goal."""

    @property
    def counted(self) -> int:
        """Trials that are part of the budget."""
        return sum(self.states.values())


def summary(search: Search, arm: str, trials: Sequence[Trial]) -> Summary:
    """Of one arm, among the trials of all."""
    mine = [trial for trial in trials if trial.arm == arm]
    counted = [trial for trial in mine if trial.counts]
    done = sorted((trial for trial in counted if trial.state == "done"), key=lambda trial: _losses(search, trial)[0])
    own = next((trial for trial in counted if trial.point == search.firsts[arm][0]), None)
    return Summary(
        arm=arm,
        states=dict(Counter(trial.state for trial in counted)),
        tokens=sum(trial.tokens for trial in counted),
        flops=sum(trial.flops for trial in counted),
        own=own,
        best=done[0] if done else None,
        front=tuple(trial for trial in done if not any(_beats(search, other, trial) for other in done)),
    )


def _losses(search: Search, trial: Trial) -> list[float]:
    """Its values, each as something to be made small."""
    signs = [1 if goal.direction == "minimize" else -1 for goal in search.sweep.optimize]
    return [sign * value for sign, value in zip(signs, trial.values or (), strict=True)]


def _beats(search: Search, left: Trial, right: Trial) -> bool:
    pairs = list(zip(_losses(search, left), _losses(search, right), strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def write_best(search: Search, summaries: Sequence[Summary], folder: Path) -> tuple[Path, ...]:
    """`best/<arm>.yaml`, an experiment that `train` takes; with several goals one for each trial of the front."""
    found = []
    for summary in summaries:
        several = len(search.sweep.optimize) > 1
        for trial in summary.front if several else filter(None, [summary.best]):
            name = f"{summary.arm}-trial-{trial.number:03}" if several else summary.arm
            experiment = search.experiment(trial.arm, trial.point)
            found.append(
                write_text(folder / "best" / f"{name}.yaml", _head(search, trial) + experiment_yaml(experiment))
            )
    return tuple(found)


def _head(search: Search, trial: Trial) -> str:
    values = ", ".join(f"{goal} {value:.6g}" for goal, value in search.named(trial.values).items())
    setting = "".join(f"#   {name}: {value}\n" for name, value in trial.point.items())
    return f"# {trial.name} of the sweep {search.name}: {values}\n{setting}"


def _held(
    search: Search, pair: Sequence[Experiment], own: Sequence[Experiment], allow: Mapping[str, str]
) -> dict[str, str]:
    """{key of a budget: reason} of budgets that differ because a search has lowered one.

    own: the arms of the pair as they stand in the file. A setting that exceeds its arm there may have won by its
    budget: that is left to the audit of the study.
    """
    (baseline, tuned), files = map(cost_of, pair), [cost_of(each) for each in own]
    before = {budget for excess in excesses(files[1], files[0]) for budget in excess.budgets}
    found = {}
    for excess in excesses(tuned, baseline):
        first = excess.budgets[0]
        raised = any(
            budget.of(cost) > (1 + TOLERANCE) * budget.of(file)
            for budget in excess.budgets
            for cost, file in zip((baseline, tuned), files, strict=True)
        )
        if first.blocks and not raised and not before & {*excess.budgets} and not under(first.key, *allow):
            found[first.key] = f"the sweep {search.name} lowered it: no arm has more {first.words} than before tuning"
    return found


def tuned_name(search: Search, arm: str) -> str:
    """What an arm at its best is called in the study of the winners."""
    name = f"{arm}_tuned"
    while name in search.spaces:  # an arm of the sweep has that name
        name += "_"
    return name


def confirmation_name(search: Search) -> str:
    """What the study of the winners is called."""
    return f"{search.name}-winners"


def _compared(search: Search, goal: str) -> str:
    """What the winners are compared on: like the goal, of text that no trial was judged by, where there is some."""
    tested = all(arm.experiment.pretrain.data.has_test for arm in search.ablation.arms)
    return final_metric(goal) if tested else goal


def confirmation_study(search: Search, summaries: Sequence[Summary], folder: Path) -> Path | None:
    """Write `winners.yaml`, a study of each arm at its own setting and at its best; None where there is none to run.

    Each arm is compared with the first one as both stand in the file, and each tuned arm with the tuned first one.
    """
    fresh = search.sweep.winners.seeds
    if fresh is None:
        fresh = tuple(max(search.sweep.seeds) + 1 + number for number in range(3))
    goal = search.sweep.optimize[0]
    if not fresh or len(search.sweep.optimize) > 1 or goal.known_before or not any(found.best for found in summaries):
        return None
    first = summaries[0].arm
    arms: dict[str, dict[str, Any]] = {}
    experiments: dict[str, Experiment] = {}
    files: dict[str, Experiment] = {}
    """{arm of the study: the arm that it is or was tuned from, as it stands in the file of the sweep}."""
    tuned: dict[str, str] = {}
    for found in summaries:
        own = search.ablation.arm(found.arm).experiment
        write_text(folder / "own" / f"{found.arm}.yaml", experiment_yaml(own))
        arms[found.arm] = {"extends": f"own/{found.arm}.yaml"}
        experiments[found.arm] = files[found.arm] = own
        tuned[found.arm] = found.arm
        if found.best is not None and found.best is not found.own:
            name = tuned_name(search, found.arm)
            tuned[found.arm] = name
            experiments[name], files[name] = search.experiment(found.arm, found.best.point), own
            arms[name] = {"extends": f"best/{found.arm}.yaml"}
            arms[name]["baseline"] = tuned[first] if found.arm != first else first
    because = f"tuned by the sweep {search.name}: {search.sweep.trials} trials of each arm"
    allow = {rule.key: rule.because for rule in search.sweep.allow}
    for name, arm in arms.items():
        pair = [experiments[other] for other in (arm.get("baseline", first), name)]
        for key in difference(*(experiment.model_dump(mode="json", exclude={"seed"}) for experiment in pair)):
            if not under(key, *INTERVENTION, *allow):
                allow[key] = because
        allow |= _held(search, pair, [files[other] for other in (arm.get("baseline", first), name)], allow)
    if len(arms) == 1:
        return None
    content = {
        "study": confirmation_name(search),
        "question": f"What did tuning change? {search.sweep.question}",
        "arms": arms,
        "seeds": list(fresh),
        "compare": {"baseline": first, "metric": _compared(search, goal.metric)},
        "allow": [{"key": key, "because": reason} for key, reason in allow.items()],
    }
    head = (
        f"# Each arm of the sweep {search.name} as it was and at its best, over seeds that the search has not seen.\n"
    )
    return write_text(folder / "winners.yaml", head + to_yaml(content, width=120))
