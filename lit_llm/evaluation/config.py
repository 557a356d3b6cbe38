"""What is measured while a stage trains, and of a finished model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lit_llm.config.section import Items, Section


class ValidationConfig(Section):
    """Evaluation on held-out documents during training."""

    times: int = Field(4, gt=0)
    """Evaluations, evenly spaced; the last one after the last step."""
    sequences: int = Field(64, gt=0)
    """Windows of held-out text, the same for every arm."""
    prefix_length: int | None = Field(None, gt=0)
    """Tokens given before the targets of val/target_nll; half of the window when absent."""

    def prefix(self, sequence_length: int) -> int:
        """Tokens given before the targets, in a window of this length."""
        return self.prefix_length or sequence_length // 2


class AttentionAnalysisConfig(Section):
    """Where a finished model's attention goes, and how its targets depend on their source, by position."""

    sequences: int = Field(16, gt=0)
    """Windows of held-out text; of a mixture, as many of each source as its share says."""
    sequence_length: int | None = Field(None, gt=1)
    """Tokens of a window; that of the training when absent. A longer one shows where attention goes beyond it."""
    source_share: float = Field(0.5, gt=0, lt=1)
    """Part of a window that is given as the source; the rest is the target."""
    window: int = Field(5, gt=0)
    """Keys that are local to a query, itself the last of them."""
    buckets: int = Field(32, gt=0)
    """Parts of equal length that positions and steps are averaged in for the records."""
    sensitivity_sequences: int = Field(4, ge=0)
    """Windows of which derivatives by the source are taken, which is slow; 0: none."""
    steps: Items[Annotated[int, Field(gt=0)]] = ()
    """Target tokens, counted from 1, whose derivatives are taken; all powers of two when empty."""
    draws: int = Field(8, gt=0)
    """Random directions that estimate how much each layer's attention output depends on the source."""

    def split(self, sequence_length: int) -> int:
        """Tokens of the source, in a window of this length."""
        return min(max(1, round(self.source_share * sequence_length)), sequence_length - 1)

    def steps_of(self, targets: int) -> tuple[int, ...]:
        """The target tokens whose derivatives are taken, of a target of this many."""
        return self.steps or tuple(2**power for power in range(targets.bit_length()))

    def problems(self, sequence_length: int) -> list[tuple[str, str]]:
        """(key, what is wrong with it) for training windows of this length."""
        length = self.sequence_length or sequence_length
        if length < 2:
            return [("sequence_length", "a window of one token cannot be cut into a source and a target")]
        targets = length - self.split(length)
        beyond = [step for step in self.steps if step > targets]
        return [("steps", f"{beyond[0]} is beyond a target of {targets} tokens")] if beyond else []
