"""A stage whose process is killed in the middle; importable by name in its process."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_llm.runs import worker
from lit_llm.training.module import LitModel

STEP = 20
"""After which RedLLM's process is killed, as often as `kills` in the store says."""


def run_stage(root: Path, fingerprint: str) -> str:
    step, kills = LitModel.training_step, root / "kills"

    def killed(self: LitModel, batch: Any, number: int) -> Tensor:
        if self.global_step == STEP and self.model.config.family == "encoder_decoder":
            left = int(kills.read_text())  # by this run alone: another could read it half written
            if left:
                kills.write_text(str(left - 1))
                os.kill(os.getpid(), signal.SIGKILL)
        return step(self, batch, number)

    LitModel.training_step = killed
    return worker.run_stage(root, fingerprint)
