"""One trial of a sweep, and its form in Optuna's storage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lit_llm.sweeps.space import Point

if TYPE_CHECKING:
    import optuna

Ended = Literal["done", "pruned", "diverged", "failed", "out_of_memory", "infeasible", "repeated", "lost"]
NOT_COUNTED: tuple[Ended, ...] = ("infeasible", "repeated", "lost")
"""Final states of draws without training, which do not count towards the budget."""
RUN, PRUNE_DECIDED, ENDED, RETRY = "run", "given_up", "ended", "retry_of"
"""Attributes of a trial in the storage: its coordinator and stages; whether it is pruned; its final state and spending;
the failed trial that it repeats. Each is one write, so that none is ever stored in part. `given_up` is the name under
which Optuna's storage holds the decision to prune a trial."""

EXHAUSTED = "exhausted"
"""Attribute of an arm's study: reason why it has no further trial."""


@dataclass(frozen=True)
class Trial:
    """One trial: a point of an arm's space, and its state."""

    arm: str
    number: int
    point: Point
    state: str
    """running, or its final state."""
    values: tuple[float, ...] | None = None
    """Values of the goals, in their order; only of a done trial."""
    fingerprints: tuple[str, ...] = ()
    """Fingerprints of its stages, one for each seed."""
    coordinator: str | None = None
    error: str | None = None
    tokens: int = 0
    """Tokens that its runs have read."""
    flops: float = 0.0
    """FLOPs of its training, forward and backward."""
    seconds: float = 0.0
    reports: tuple[tuple[int, float], ...] = ()
    """(progress, value) of each report to the pruner."""
    pruned: bool = False
    origin: str = ""
    """Provenance digest of its results: code, device, threads."""
    settled: bool = False
    """Whether Optuna counts the trial as finished."""
    retried: bool = False
    """Whether a later trial repeats it."""

    @property
    def name(self) -> str:
        return f"{self.arm}/trial {self.number:03}"

    @property
    def counts(self) -> bool:
        """True where the trial counts towards the budget."""
        return self.state not in NOT_COUNTED and not self.retried


def read_trial(arm: str, frozen: optuna.trial.FrozenTrial, retried: bool) -> Trial:
    """A trial from Optuna's storage. retried: whether a later trial repeats it."""
    run, ended = (frozen.user_attrs.get(name, {}) for name in (RUN, ENDED))
    values = ended.get("values")
    return Trial(
        arm=arm,
        number=frozen.number,
        point=dict(frozen.params),
        state=ended.get("state", "running"),
        values=None if values is None else tuple(values),
        fingerprints=tuple(run.get("fingerprints", ())),
        coordinator=run.get("coordinator"),
        error=ended.get("error"),
        tokens=int(ended.get("tokens", 0)),
        flops=float(ended.get("flops", 0.0)),
        seconds=float(ended.get("seconds", 0.0)),
        reports=tuple(sorted(frozen.intermediate_values.items())),
        settled=frozen.state.is_finished(),
        pruned=bool(frozen.user_attrs.get(PRUNE_DECIDED, False)),
        origin=ended.get("origin", ""),
        retried=retried,
    )
