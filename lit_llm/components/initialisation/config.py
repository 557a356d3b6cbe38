"""Initial values of the parameters. All matrices and tables begin as N(0, deviation²), scales at one, biases at zero.

fan_in: deviation 1 / sqrt(fan-in). fixed_std: one deviation, 0.02 in BERT (arXiv 1810.04805). depth_scaled: as in
GPT-2, where the last matrix of a residual branch has it divided by the root of the number of branches. t5: as in T5
(arXiv 1910.10683) and transformers' code of it: embeddings 1, all others 1 / sqrt(fan-in), and W_q also over
sqrt(head_dim) where the scores are not (`attention.scale: 1`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lit_llm.config.section import OneOf, Section


class FanIn(Section):
    """Deviations by the number of inputs."""

    kind: Literal["fan_in", "t5"] = "fan_in"
    """fan_in: 1 / sqrt(fan-in) for matrices, 1 / sqrt(d_model) for embeddings. t5: 1 for embeddings, whose logits are
    divided by sqrt(d_model) where they are tied."""


class FixedStd(Section):
    """One deviation for all matrices."""

    kind: Literal["fixed_std", "depth_scaled"] = "fixed_std"
    """fixed_std: the same everywhere. depth_scaled: divided by sqrt(residual branches of the stack) for the last matrix
    of each branch (GPT-2)."""
    std: float = Field(0.02, gt=0)
    """Standard deviation."""


Initialisation = Annotated[FanIn | FixedStd, OneOf(default=FanIn)]
