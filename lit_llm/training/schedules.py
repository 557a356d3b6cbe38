"""Learning rate by step, as a factor of the peak. Loads no torch, so that a plan can draw it."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field

from lit_llm.config.section import Items, OneOf, Section


def evaluation_steps(times: int, max_steps: int) -> frozenset[int]:
    """Steps after which a training is evaluated: evenly spaced, the last step among them."""
    times = min(times, max_steps)
    return frozenset(round(max_steps * (number + 1) / times) for number in range(times))


class _Warmup(Section):
    """Linear warm-up, with which all schedules begin."""

    warmup_steps: int = Field(0, ge=0)
    """Steps from zero to the peak, in a straight line."""

    def factor(self, step: int, max_steps: int) -> float:
        """Factor of the peak in step 0, 1, ... max_steps - 1."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.after_warmup(step, max_steps)

    def after_warmup(self, step: int, max_steps: int) -> float:
        return 1.0

    def progress(self, step: int, max_steps: int, start: int) -> float:
        """Progress of the decay: 0 in step `start`, 1 in the last step, or one later for a decay to zero."""
        end = max_steps - 1 if getattr(self, "final_fraction", 1.0) else max_steps
        return min(1.0, (step - start) / max(1, end - start))

    def scaled(self, ratio: float) -> Self:
        """The schedule for a training that is `ratio` times as long."""
        return self.model_copy(update={"warmup_steps": round(self.warmup_steps * ratio)})

    @property
    def decays(self) -> bool:
        """True where the learning rate decays below its peak until the end of training."""
        return getattr(self, "final_fraction", 1.0) < 1.0

    def trunks(self, max_steps: int) -> tuple[int, ...]:
        """Steps at which the stages of a shared trunk end, the last where the decay begins; empty without one."""
        return ()

    def problem(self, max_steps: int) -> tuple[str, str] | None:
        """(key, reason why this schedule does not fit into `max_steps` steps), or None."""
        if self.warmup_steps > max_steps:
            return "warmup_steps", f"{self.warmup_steps} are more than max_steps {max_steps}"
        return None


class Constant(_Warmup):
    """Warm-up, then the peak."""

    kind: Literal["constant"] = "constant"
    """No decay."""


class Cosine(_Warmup):
    """Linear warm-up, then half a cosine down to a fraction of the peak at the last step."""

    kind: Literal["cosine"] = "cosine"
    """Cosine decay."""
    final_fraction: float = Field(0.1, ge=0, le=1)
    """Share of the peak that is left in the last step; 0 is what comes after it."""

    def after_warmup(self, step: int, max_steps: int) -> float:
        wave = 0.5 * (1 + math.cos(math.pi * self.progress(step, max_steps, self.warmup_steps)))
        return self.final_fraction + (1 - self.final_fraction) * wave


class Linear(_Warmup):
    """Linear warm-up, then a straight line down to a fraction of the peak at the last step."""

    kind: Literal["linear"] = "linear"
    """Linear decay."""
    final_fraction: float = Field(0.0, ge=0, le=1)
    """Share of the peak that is left in the last step; 0 is what comes after it."""

    def after_warmup(self, step: int, max_steps: int) -> float:
        return 1 - (1 - self.final_fraction) * self.progress(step, max_steps, self.warmup_steps)


class WarmupStableDecay(_Warmup):
    """Linear warm-up, the peak, and a short decay at the end (MiniCPM, arXiv 2404.06395)."""

    kind: Literal["wsd"] = "wsd"
    """Warm-up, stable, decay."""
    decay_steps: int = Field(gt=0)
    """Steps of the decay."""
    shape: Literal["linear", "one_minus_sqrt"] = "one_minus_sqrt"
    """linear: a straight line; one_minus_sqrt: 1 - sqrt(progress) (arXiv 2405.18392)."""
    final_fraction: float = Field(0.0, ge=0, le=1)
    """Share of the peak that is left in the last step; 0 is what comes after it."""
    branch_at: Items[Annotated[int, Field(gt=0)]] = Field((), exclude_if=lambda steps: not steps)
    """Steps after which decays begin, in rising order, that of this training among them: max_steps - decay_steps. The
    steps before are then a trunk, trained once by stages of their own. Experiments that differ in max_steps,
    decay_steps, shape and final_fraction alone share them and branch off. A branch ends with the weights of a training
    that was never cut. Its validations before the decay are left out. Only for the pretraining of a study."""

    def after_warmup(self, step: int, max_steps: int) -> float:
        start = max(0, max_steps - 1 - self.decay_steps)  # at least one step is at the peak
        if step <= start:
            return 1.0
        progress = self.progress(step, max_steps, start)
        fallen = math.sqrt(progress) if self.shape == "one_minus_sqrt" else progress
        return 1 - (1 - self.final_fraction) * fallen

    def scaled(self, ratio: float) -> Self:
        warmup, both = (round(steps * ratio) for steps in (self.warmup_steps, self.warmup_steps + self.decay_steps))
        return self.model_copy(update={"warmup_steps": warmup, "decay_steps": max(1, both - warmup)})

    def trunks(self, max_steps: int) -> tuple[int, ...]:
        return tuple(steps for steps in self.branch_at if steps <= max_steps - self.decay_steps)

    def problem(self, max_steps: int) -> tuple[str, str] | None:
        if self.warmup_steps + self.decay_steps > max_steps:
            return "decay_steps", f"with the warm-up {self.warmup_steps + self.decay_steps} are more than {max_steps}"
        if not self.branch_at:
            return None
        listed, begin = ", ".join(map(str, self.branch_at)), max_steps - self.decay_steps
        if list(self.branch_at) != sorted({*self.branch_at}):
            return "branch_at", f"[{listed}]: give each step once, in rising order"
        if begin not in self.branch_at:
            message = f"the decay begins after step {begin} (max_steps {max_steps} - decay_steps {self.decay_steps})"
            return "branch_at", f"{message}, which is not among [{listed}]; add it, or change max_steps"
        if self.branch_at[0] < self.warmup_steps:
            message = f"step {self.branch_at[0]} lies in the warm-up of {self.warmup_steps} steps"
            return "branch_at", f"{message}; branch at {self.warmup_steps} or later"
        return None


class InverseSquareRoot(_Warmup):
    """Linear warm-up, then sqrt(warm-up / step): T5's schedule (arXiv 1910.10683), whose peak ends the warm-up."""

    kind: Literal["inverse_sqrt"] = "inverse_sqrt"
    """Inverse square root."""
    warmup_steps: int = Field(gt=0)
    """Steps from zero to the peak, and time scale of the decay."""

    def after_warmup(self, step: int, max_steps: int) -> float:
        return math.sqrt(self.warmup_steps / (step + 1))

    def scaled(self, ratio: float) -> Self:
        return self.model_copy(update={"warmup_steps": max(1, round(self.warmup_steps * ratio))})


Schedule = Annotated[Cosine | Constant | Linear | WarmupStableDecay | InverseSquareRoot, OneOf(default=Cosine)]
