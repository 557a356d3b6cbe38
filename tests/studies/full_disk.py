"""A stage whose disk is full when it saves; importable by name in its process."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import lightning as L

from lit_llm.runs import worker
from lit_llm.store.store import Store


def run_stage(root: Path, fingerprint: str) -> str:
    """That of RedLLM alone: as if it had a quota of its own."""

    def save(self: L.Trainer, path: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    if "family: encoder_decoder" in Store(root).stage(fingerprint).config_file.read_text():
        L.Trainer.save_checkpoint = save
    return worker.run_stage(root, fingerprint)
