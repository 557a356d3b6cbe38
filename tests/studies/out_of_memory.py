"""A stage on a device that holds few sequences; importable by name in its process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from lit_llm.runs import worker
from lit_llm.training.module import LitModel

MOST = 1
"""Sequences that the device holds."""


def run_stage(root: Path, fingerprint: str) -> str:
    step = LitModel.training_step

    def limited(self: LitModel, batch: Any, number: int) -> Tensor:
        if (self.training_config.execution.micro_batch_size or len(batch)) > MOST:
            raise MemoryError("out of memory")
        return step(self, batch, number)

    LitModel.training_step = limited
    return worker.run_stage(root, fingerprint)
