"""Averages of the weights that a training passes through. Loads no torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field

from lit_llm.config.section import OneOf, Section


class _Averaging(Section):
    """A rule of how much the weights after a step count in the average."""

    def share(self, step: int, max_steps: int) -> float:
        """Share of the weights after step 1, 2, ... in the new average; 0 leaves the average as it is.

        The first share above 0 is 1: the average begins there.
        """
        raise NotImplementedError

    def problem(self, max_steps: int) -> tuple[str, str] | None:
        """(key, message) of a setting that does not fit into that many steps; None where all do."""
        return None

    def shortfall(self, steps: int, max_steps: int) -> str:
        """Reason why the average is incomplete where the training ends after so many steps, or ''."""
        return ""

    def scaled(self, ratio: float) -> Self:
        """The rule for a training that is `ratio` times as long."""
        return self


class ExponentialAverage(_Averaging):
    """Exponential moving average (Polyak averaging): after each step, average <- d average + (1 - d) weights."""

    kind: Literal["ema"] = "ema"
    """Exponential moving average, which begins with the weights after the first step."""
    decay: float = Field(0.999, gt=0, lt=1)
    """The d of the rule; the average is over about 1 / (1 - d) steps."""
    warmup: bool = True
    """Take the smaller of `decay` and (1 + t) / (10 + t) as d after step t, so that early weights are soon forgotten.
    TensorFlow's ExponentialMovingAverage does so with `num_updates`."""

    def share(self, step: int, max_steps: int) -> float:
        if step == 1:
            return 1.0
        return 1 - (min(self.decay, _warmed_up(step)) if self.warmup else self.decay)

    def unreached(self, max_steps: int) -> str:
        """Reason why the decay has no effect in that many steps; '' where it has one."""
        if not self.warmup or _warmed_up(max_steps) >= self.decay:
            return ""
        return f"of {self.decay:g} is not reached in {max_steps} steps: its warm-up ends at {_warmed_up(max_steps):.4g}"


def _warmed_up(step: int) -> float:
    """Largest d of the rule after step 1, 2, ..."""
    return (1 + step) / (10 + step)


class LastWeights(_Averaging):
    """Mean of the weights after the last step and after k - 1 earlier ones, `every` steps apart.

    T5Gemma 2 (arXiv 2512.14856) averages its last 5 checkpoints, 10,000 steps apart.
    """

    kind: Literal["last_k"] = "last_k"
    """Mean of the last k weights."""
    k: int = Field(5, ge=2)
    """Number of weights in the mean."""
    every: int = Field(gt=0)
    """Steps between two of them."""

    def _first(self, max_steps: int) -> int:
        """Step after which the first weights are taken."""
        return max_steps - (self.k - 1) * self.every

    def share(self, step: int, max_steps: int) -> float:
        steps_since = step - self._first(max_steps)
        if steps_since < 0 or steps_since % self.every:
            return 0.0
        return 1 / (1 + steps_since // self.every)

    def problem(self, max_steps: int) -> tuple[str, str] | None:
        if self._first(max_steps) > 0:
            return None
        most = (max_steps - 1) // (self.k - 1)
        advice = f"write every: {most} or less" if most else f"write k: {max_steps} or less"
        message = f"{self.k} weights {self.every} steps apart begin before the first of {max_steps} steps; {advice}"
        return "every", message

    def shortfall(self, steps: int, max_steps: int) -> str:
        taken = max(0, 1 + (steps - self._first(max_steps)) // self.every)
        return f"its average has {taken} of {self.k} weights" if taken < self.k else ""

    def scaled(self, ratio: float) -> Self:
        return self.model_copy(update={"every": max(1, int(self.every * ratio))})


WeightAveraging = Annotated[ExponentialAverage | LastWeights, OneOf(default=ExponentialAverage)]
