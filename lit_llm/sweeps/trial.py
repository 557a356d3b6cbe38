"""One trial of a sweep, and how it is noted in Optuna's storage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lit_llm.sweeps.space import Point

if TYPE_CHECKING:
    import optuna

Ended = Literal["done", "pruned", "diverged", "failed", "out_of_memory", "infeasible", "repeated", "lost"]
NOT_COUNTED: tuple[Ended, ...] = ("infeasible", "repeated", "lost")
"""Draws that took no training: they are no part of the budget."""
RUN, GIVEN_UP, ENDED, RETRY = "run", "given_up", "ended", "retry_of"
"""What is noted of a trial: who runs which stages; that the pruner gave it up; how it ended, and what that took; which
failed trial it repeats. Each is written at once, so that nothing is ever half there."""


@dataclass(frozen=True)
class Trial:
    """One point of an arm's space, tried."""

    arm: str
    number: int
    point: Point
    state: str
    """running, or how it ended."""
    values: tuple[float, ...] | None = None
    """Of the goals, in their order; of a done trial alone."""
    fingerprints: tuple[str, ...] = ()
    """Of its stages, one for each seed."""
    coordinator: str | None = None
    error: str | None = None
    tokens: int = 0
    """Tokens that its runs have read."""
    flops: float = 0.0
    """FLOPs of its training, forward and backward."""
    seconds: float = 0.0
    reports: tuple[tuple[int, float], ...] = ()
    """(progress, value) as the pruner was told."""
    pruned: bool = False
    origin: str = ""
    """Of its results: code, device, threads."""
    told: bool = False
    """Whether Optuna knows how it ended."""
    retried: bool = False
    """Whether a later trial repeats it."""

    @property
    def name(self) -> str:
        return f"{self.arm}/trial {self.number:03}"

    @property
    def counts(self) -> bool:
        """Whether it is a part of the budget."""
        return self.state not in NOT_COUNTED and not self.retried


def read_trial(arm: str, frozen: optuna.trial.FrozenTrial, retried: bool) -> Trial:
    """As Optuna knows it. retried: whether a later one repeats it."""
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
        told=frozen.state.is_finished(),
        pruned=bool(frozen.user_attrs.get(GIVEN_UP, False)),
        origin=ended.get("origin", ""),
        retried=retried,
    )
