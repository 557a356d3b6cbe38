"""Checkpoints of a training: the newest and the one before it, each ending with a digest of its content."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import lightning as L

from lit_llm.store.files import Damaged, put_in_place, remove, work_file
from lit_llm.training.config import TrainingConfig
from lit_llm.training.devices import stops_by_first

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
_DIGEST = re.compile(rb"\nsha256:[0-9a-f]{64}\n")
_LENGTH = 73
"""Bytes of the digest at the end of a checkpoint. torch reads a file from its front and ignores them."""


class Checkpoints(L.Callback):
    """Writes a checkpoint every `checkpoint_every` steps and when the run is to stop.

    The previous one is kept until the next is written: a crash, or a disk that loses writes, costs at most the steps
    between two checkpoints.
    """

    def __init__(
        self,
        folder: Path,
        training: TrainingConfig,
        should_stop: Callable[[], bool],
        check_claim: Callable[[], None] = lambda: None,
        at_end: bool = False,
    ) -> None:
        """Make the callback.

        check_claim: called before a checkpoint and directly before it gets its name; raises for a late holder. at_end:
        write one after the last step too.
        """
        self.check_claim = check_claim
        self.folder, self.every, self.should_stop = folder, training.execution.checkpoint_every, should_stop
        self.last_step, self.at_end = training.max_steps, at_end

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        step, ended = trainer.global_step, trainer.global_step >= self.last_step
        if ended and not self.at_end:
            return
        stop = not ended and stops_by_first(trainer, trainer.is_global_zero and self.should_stop())
        if stop or ended or step % self.every == 0:
            if trainer.is_global_zero:
                self.check_claim()
                self.folder.mkdir(parents=True, exist_ok=True)
            work = work_file(self.folder / LAST)
            trainer.save_checkpoint(work)
            if trainer.is_global_zero:
                add_digest(work)
                put_in_place(work, self.folder / LAST, check=self._keep_previous)
        trainer.should_stop = trainer.should_stop or stop

    def _keep_previous(self) -> None:
        self.check_claim()
        if (self.folder / LAST).exists():
            (self.folder / LAST).replace(self.folder / PREVIOUS)


def newest_checkpoint(folder: Path, log: Callable[[str], None]) -> Path | None:
    """The newest undamaged checkpoint; None where there is none. Removes damaged ones and logs a message.

    Removes work files of earlier processes, too.
    """
    remove_work_files(folder)
    damages: list[Damaged] = []
    newest = None
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            check_checkpoint(path)
        except Damaged as damage:
            damages.append(damage)
            remove(path)
        else:
            newest = path
            break
    if damages:
        next_step = f"going on from {newest.name}" if newest else "starting over"
        log(f"{'; '.join(map(str, damages))}; {next_step}")
    return newest


def remove_checkpoints(folder: Path, keep_last: bool = False) -> None:
    """Remove the checkpoints of a training that has ended, which only a resume needs.

    keep_last: keep the last one, with which other stages begin.
    """
    for name in (PREVIOUS,) if keep_last else (LAST, PREVIOUS):
        remove(folder / name)
    remove_work_files(folder)


def remove_work_files(folder: Path) -> None:
    """Remove unfinished checkpoints of earlier processes."""
    for path in folder.glob(f".{LAST}.*"):
        remove(path)


def add_digest(path: Path) -> None:
    """Append the digest of a checkpoint's content."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with path.open("ab") as file:
        file.write(f"\nsha256:{digest}\n".encode())


def check_checkpoint(path: Path) -> None:
    """Raise Damaged unless a checkpoint's content matches its digest."""
    total, left = hashlib.sha256(), path.stat().st_size - _LENGTH
    try:
        with path.open("rb") as file:
            while left > 0 and (part := file.read(min(left, 1 << 22))):
                total.update(part)
                left -= len(part)
            end = file.read()
    except OSError as error:
        raise Damaged(path, f"cannot be read: {error.strerror}") from None
    if not _DIGEST.fullmatch(end):
        raise Damaged(path, "is damaged: it does not end with its digest")
    if end != f"\nsha256:{total.hexdigest()}\n".encode():
        raise Damaged(path, "is damaged: its content is not that of its digest")
