"""The plan of a study before it runs: arms, costs, differences, and whether the comparison is fair."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_llm.config.problems import InputError, Problem
from lit_llm.experiment.cost import GENERATE, PROMPT, Cost, cost_of
from lit_llm.runs.stage_graph import StageNode, stage_graph
from lit_llm.runs.step_timing import StepTiming, TimedStep
from lit_llm.runs.time_estimate import Seconds
from lit_llm.store.files import Damaged
from lit_llm.store.store import read_json
from lit_llm.studies.audit.differing_keys import audit
from lit_llm.studies.audit.findings import Finding, differs
from lit_llm.studies.estimable_effects import design_json
from lit_llm.studies.load import Ablation, Arm
from lit_llm.studies.preflight import check_held_out, check_tasks, check_texts, text_findings

if TYPE_CHECKING:
    from lit_llm.store.store import Store
    from lit_llm.studies.runs import Run


PLAN = "plan.json"
"""File of a study's folder with the plan of its last run."""
BUSY = 0.5
"""Load per core above which timings of a machine are unreliable."""


@dataclass(frozen=True)
class PlannedArm:
    """One arm of the plan."""

    arm: Arm
    differs: Mapping[str, list[Any]]
    stage_graphs: tuple[tuple[StageNode, ...], ...]
    """Stage graphs, one for each seed."""
    cost: Cost

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Fingerprints of the pretraining, one for each seed."""
        return tuple(node.fingerprint for nodes in self.stage_graphs for node in nodes if node.name == "pretrain")


@dataclass(frozen=True)
class Estimate:
    """Duration of a study's runs on this machine."""

    arms: Mapping[str, Seconds]
    """{arm: seconds of one run}."""
    seconds: float
    """Seconds of all runs that are not done, `max_parallel` at once; shared stages count once."""
    max_parallel: int
    done: int
    """Runs that have a result in the store."""
    timings: tuple[tuple[TimedStep, StepTiming], ...]
    """Each distinct step with its timing."""

    def as_json(self) -> dict[str, Any]:
        """The object that `plan --json` prints under `estimate`."""
        timed = [{"stage": step.stage, **asdict(step.setting), **asdict(timing)} for step, timing in self.timings]
        return {"seconds": self.seconds, "slots": self.max_parallel, "runs_done": self.done, "machine": timed}


@dataclass(frozen=True)
class Throughput:
    """Measured speed of parallel runs on this machine."""

    max_parallel: int
    threads: int
    """Threads of each run."""
    steps_per_second: float
    """Training steps of all runs together."""

    def as_json(self) -> dict[str, Any]:
        """An object of the list that `plan --json` prints under `throughputs`."""
        return {"slots": self.max_parallel, "threads": self.threads, "steps_per_second": self.steps_per_second}


@dataclass(frozen=True)
class Plan:
    """A study before it runs."""

    ablation: Ablation
    arms: tuple[PlannedArm, ...]
    findings: tuple[Finding, ...]
    prompt: int = PROMPT
    generate: int = GENERATE
    estimate: Estimate | None = None
    """Duration, where its steps have timings: see `lit_llm.studies.duration.estimated`."""
    throughputs: tuple[Throughput, ...] = ()
    """Alternatives of `-j` and `threads`, fastest first; empty where they were not measured."""

    @property
    def stages(self) -> dict[str, int]:
        """{stage: number of its computations}, in the order of execution; shared stages count once."""
        by_name: dict[str, set[str]] = {}
        nodes = [node for planned in self.arms for nodes in planned.stage_graphs for node in nodes]
        for node in sorted(nodes, key=lambda node: node.source is None):  # not every arm has a source
            by_name.setdefault(node.name, set()).add(node.fingerprint)
        return {name: len(fingerprints) for name, fingerprints in by_name.items()}

    @property
    def busy(self) -> bool:
        """True where the machine was busy when something was timed by the wall clock, as throughputs always are."""
        timings = self.estimate.timings if self.estimate else ()
        by_wall_clock = (timing for step, timing in timings if self.throughputs or not step.setting.uses_cpu_time)
        return any(timing.load > BUSY for timing in by_wall_clock)

    @property
    def refused(self) -> list[Finding]:
        """Findings that keep the study from running."""
        return [finding for finding in self.findings if finding.kind == "refused"]

    def as_json(self) -> dict[str, Any]:
        """The object that `plan --json` prints. Keys may be added, none is renamed."""
        study = self.ablation.study
        return {
            "study": study.study,
            "question": study.question,
            "design": design_json(self.ablation),
            "arms": [
                {
                    "name": planned.arm.name,
                    "baseline": planned.arm.baseline,
                    "differs": dict(planned.differs),
                    "derived": dict(planned.arm.matched_keys),
                    "seeds": list(study.seeds),
                    "most_seeds": len(study.all_seeds),
                    "fingerprints": {
                        nodes[0].name: [node.fingerprint for node in nodes]
                        for nodes in zip(*planned.stage_graphs, strict=True)
                    },
                    **planned.cost.as_json(self.prompt, self.generate),
                    "seconds": self.estimate.arms[planned.arm.name].total if self.estimate else None,
                }
                for planned in self.arms
            ],
            "estimate": self.estimate.as_json() if self.estimate else None,
            "throughputs": [each.as_json() for each in self.throughputs],
            "findings": [finding.as_json() for finding in self.findings],
        }

    def check(self) -> None:
        """Raise InputError if the audit refuses the comparison."""
        if self.refused:
            raise InputError(
                *(Problem(f"{finding.arm}: {finding.message}", finding.key) for finding in self.refused),
                hint="`lit-llm plan` shows all arms.",
            )


def plan(
    ablation: Ablation,
    prompt: int = PROMPT,
    generate: int = GENERATE,
    log: Callable[[str], None] = lambda _: None,
    built: bool = True,
    store: Store | None = None,
    runs: Iterable[Run] = (),
) -> Plan:
    """Cost and audit every arm of a study. Reads the corpora for their digests; trains nothing.

    Args:
        ablation: The study, from `load_study`.
        prompt: Tokens of a prompt, for the FLOPs of decoding and the size of the key-value cache.
        generate: Tokens generated after it.
        log: Called with one line about each step that takes more than a moment.
        built: Build the arms small and compare what they compute, which loads torch, and look up the tasks of
            lm-evaluation-harness.
        store: Store in which texts may be tokenised already.
        runs: Runs of the study, where they exist already: their stage graphs are reused.

    Returns:
        The plan. `plan.refused` holds the findings that stop `run_study`.

    Raises:
        InputError: An evaluation cannot be made, or a text cannot be read.
    """
    check_texts(ablation)
    named = {(run.arm.name, run.seed): tuple(step.node for step in run.steps) for run in runs}
    arms = tuple(
        PlannedArm(
            arm,
            differs(arm, ablation.arm(arm.baseline)),
            tuple(named.get((arm.name, seed)) or stage_graph(arm.seeded(seed)) for seed in ablation.study.seeds),
            cost_of(arm.experiment, prompt, generate),
        )
        for arm in ablation.arms
    )
    costs = {planned.arm.name: planned.cost for planned in arms}
    if built:
        check_tasks(ablation, log)
    if store is not None:
        check_held_out(ablation, store)
    texts = text_findings(ablation, store) if store is not None else ()
    return Plan(ablation, arms, (*audit(ablation, log, built, costs, store), *texts), prompt, generate)


def with_earlier_findings(planned: Plan, file: Path) -> Plan | None:
    """The plan with the findings of an earlier plan of the same runs, read from its JSON file.

    Only a plan that builds the arms finds no-ops, and a report builds none. None where the file is damaged.
    """
    try:
        earlier = read_json(file) or {}
        if _runs(earlier.get("arms", ())) != _runs(planned.as_json()["arms"]):
            return planned
        return replace(planned, findings=tuple(Finding(**finding) for finding in earlier["findings"]))
    except (ValueError, LookupError, TypeError, AttributeError, Damaged):
        return None


def _runs(arms: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {arm["name"]: arm["fingerprints"] for arm in arms}
