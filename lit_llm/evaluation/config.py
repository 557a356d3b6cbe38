"""What is measured while a stage trains."""

from __future__ import annotations

from pydantic import Field

from lit_llm.config.section import Section


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
