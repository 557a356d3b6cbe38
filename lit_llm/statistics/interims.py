"""Interim analyses of a study that adds seeds in rounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lit_llm.runs.stage_graph import validation_metric
from lit_llm.statistics.baselines import Noise
from lit_llm.statistics.procedure import Procedure
from lit_llm.statistics.run_results import RunResult, noise_of_kept, values_by_arm
from lit_llm.statistics.sequential import ArmStatus, InterimRule, Rounds, arm_statuses, judgements_at_interims
from lit_llm.statistics.verdicts import Judgement


@dataclass(frozen=True)
class InterimAnalyses:
    """Plan of a study that adds seeds in rounds, with an interim analysis after each."""

    seeds: tuple[int, ...]
    """All seeds up to the most, in the order in which they are added."""
    rounds: Rounds
    comparisons: int = 1
    """Arms that share the 5%."""

    def rule(self, metric: str, procedure: Procedure, noise: Noise) -> InterimRule:
        """The rule by which arms stop."""
        return InterimRule(metric, self.seeds, self.rounds, procedure.margin, self.comparisons, noise)


def interim_statuses(
    kept: Sequence[RunResult],
    baselines: Mapping[str, str],
    metric: str,
    interims: InterimAnalyses,
    procedure: Procedure = Procedure(),
) -> dict[str, ArmStatus]:
    """Status of every arm and the seeds to run it with; a baseline needs as many as the arms compared with it.

    The metric's counterpart on the validation split decides, whichever split is named: the test split stops no arm.

    kept: runs of the newest provenance. baselines: {arm: its baseline}, of all arms.
    """
    metric = validation_metric(metric)
    values, lost = values_by_arm(kept, list(baselines), metric), dict[str, set[int]]()
    for run in kept:
        if run.seed not in values[run.arm] and run.state_of(metric) in ("done", "diverged"):
            lost.setdefault(run.arm, set()).add(run.seed)
    rule = interims.rule(metric, procedure, noise_of_kept(kept, metric, procedure))
    statuses: dict[str, ArmStatus] = {}
    for baseline, block in _blocks(values, baselines):
        for arm, new in arm_statuses(block, baseline, rule, lost).items():
            # In a step-wise comparison an arm is in two blocks: compared in one, and the baseline of the other.
            status = new if arm != baseline or arm not in statuses else statuses[arm]
            statuses[arm] = replace(status, more=max(new.more, statuses[arm].more if arm in statuses else 0))
    return statuses


def judge_at_interims(
    values: Mapping[str, Mapping[int, float]],
    baselines: Mapping[str, str],
    statuses: Mapping[str, ArmStatus],
    rule: InterimRule,
) -> dict[str, Judgement]:
    """{arm: its judgement at the analysis that stopped it, else at the last one}."""
    judged: dict[str, Judgement] = {}
    for baseline, block in _blocks(values, baselines):
        judged |= judgements_at_interims(statuses, block, baseline, rule)
    return judged


def _blocks(
    values: Mapping[str, Mapping[int, float]], baselines: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, Mapping[int, float]]]]:
    """Each baseline with the values of itself and of the arms compared with it."""
    for baseline in dict.fromkeys(baselines.values()):
        yield baseline, {arm: values[arm] for arm in values if arm == baseline or baselines[arm] == baseline}
