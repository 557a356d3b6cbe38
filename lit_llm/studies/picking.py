"""Order in which many processes take the stages of a study, so that each reads few files.

Each worker begins at its own place of the list and goes on in the list's order, which keeps workers apart. It looks at
a stage only once its parents are done, and never again after it has ended. When a worker knows that all stages of a
block have ended, it notes that in a folder. Others read the names in that folder in place of the block's stages. So a
worker looks at about as many stages as it computes, and at one name for each block of the others.

What is picked here is a candidate: the claim decides, as another worker may be faster.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lit_llm.config.hashing import fingerprint
from lit_llm.store.files import Damaged
from lit_llm.store.locks import is_free
from lit_llm.store.store import FINAL, Store, read_json, write_json

BLOCK = 128
"""Stages of one note."""
LOOKS = 64
"""Most files of stages held by others that one call of `take` looks at."""
IN_VAIN = 8
"""Stages found to have ended before the notes are read again."""
GIVEN_UP = "given up"
NOT_TRIED = ("failed", "out_of_memory")
"""States that end a stage until somebody asks for it again."""


RESTART_SECONDS = 10.0
"""Seconds after which a stage that ran out of memory counts as ended, as nobody has restarted it."""


class Picker:
    """Picks stages for one worker, which asks again when a stage has ended, or after a while where others hold all."""

    def __init__(
        self, store: Store, parents: Mapping[str, Sequence[str]], offset: float = 0.0, notes: Path | None = None
    ) -> None:
        """Make a picker; reads no stage.

        Args:
            store: the store of the stages.
            parents: {fingerprint of a stage: fingerprints of its parents}, each stage after its parents. All workers
                pass the same order. Parents that are no stages of the mapping have to be done already.
            offset: place to begin at, from 0 to 1. Workers with evenly spaced offsets meet last.
            notes: folder for notes on ended blocks, shared by the workers of one command; none when absent. Notes of
                an earlier command may name stages that are to run again.
        """
        self.store, self.notes = store, notes
        self.parents = parents
        self._ended: dict[str, str] = {}
        """{stage that has ended: its state; `lost` or `given up` like its parent}."""
        self._children: dict[str, list[str]] = {}
        """{stage: those that wait for it}."""
        self._out_of_memory: dict[str, float] = {}
        """{stage: monotonic time at which it was first seen out of memory}."""
        self._queue: deque[str] = deque()
        """Stages whose parents are done; the next one first."""
        names = list(self.parents)
        self._blocks = [names[at : at + BLOCK] for at in range(0, len(names), BLOCK)]
        self._block_of = {name: number for number, block in enumerate(self._blocks) for name in block}
        self._open = Counter(self._block_of.values())
        """{block: number of its stages that have not ended}."""
        self._names_of_notes = [f"{number}-{fingerprint(block)}" for number, block in enumerate(self._blocks)]
        self._noted: set[int] = set()
        self._in_vain = IN_VAIN  # the notes are read first
        begin = int(len(names) * (offset % 1.0))
        for name in names[begin:] + names[:begin]:
            self._wait(name, first=False)

    @property
    def count(self) -> int:
        """Number of stages that have ended or can never begin, as far as `take` has seen."""
        return len(self._ended)

    @property
    def over(self) -> bool:
        """True once every stage has ended or can never begin, as far as `take` has seen."""
        return self.count == len(self.parents)

    def take(self) -> str | None:
        """Take a stage that can be claimed now; None where all are over, taken, held by others, or wait for those.

        It is taken until the caller calls `ended`, `give_up`, or `put_back`, say where another worker was faster.
        """
        held = 0
        while self._queue and held < min(LOOKS, len(self._queue)):
            if self._in_vain >= IN_VAIN:
                self._read_notes()
                continue
            name = self._queue[0]
            if name in self._ended:
                self._queue.popleft()
                continue
            state = self._state(name)
            if state == "out_of_memory" and self._may_be_restarted(name):
                self._queue.rotate(-1)
                held += 1
                continue
            if state is not None:
                self._in_vain += 1
                self.ended(name, state)
                continue
            if is_free(self.store.stage(name).folder / "lock"):
                return self._queue.popleft()
            self._queue.rotate(-1)
            held += 1
        return None

    def _may_be_restarted(self, name: str) -> bool:
        """True for some seconds: another coordinator that sees this state may restart the stage."""
        since = self._out_of_memory.setdefault(name, time.monotonic())
        return time.monotonic() - since < RESTART_SECONDS

    def put_back(self, name: str) -> None:
        """Queue a taken stage again, behind the others."""
        self._queue.append(name)

    def give_up(self, name: str) -> None:
        """Leave a taken stage, and those after it, to other workers."""
        self.ended(name, GIVEN_UP)

    def ended(self, name: str, state: str) -> None:
        """Remember that a stage has ended, in one of the states that are not tried again."""
        waiting = [(name, state)]
        while waiting:
            name, state = waiting.pop()
            if name in self._ended:
                continue
            self._ended[name] = state
            block = self._block_of[name]
            self._open[block] -= state != GIVEN_UP
            if not self._open[block]:
                self._note(block)
            children = self._children.pop(name, [])
            if state != "done":
                waiting += [(child, _after(state)) for child in children]
            else:
                for child in reversed(children):
                    self._wait(child, first=True)

    def _wait(self, name: str, first: bool) -> None:
        """Put a stage behind a parent that is not known to be done, else in the queue. first: before the others."""
        for parent in self.parents[name]:
            state = self._ended.get(parent)
            if state is None and parent not in self.parents:
                state = self._state(parent) or "pending"
            if state not in (None, "done"):
                self.ended(name, _after(state or ""))
                return
            if state is None:
                self._children.setdefault(parent, []).append(name)
                return
        if first:
            self._queue.appendleft(name)
        else:
            self._queue.append(name)

    def _state(self, name: str) -> str | None:
        """The state of a stage that has ended; None for one that may be tried.

        Reads one small file, or finds none. The records that a result names are verified by those who read them.
        """
        folder = self.store.stage(name).folder
        for file, states in (("result.json", FINAL), ("state.json", NOT_TRIED)):
            try:
                state = (read_json(folder / file) or {}).get("state")
            except Damaged:
                return "failed" if file == "result.json" else None
            if state in states:
                return str(state)
        return None

    # --- notes -----------------------------------------------------------------------------------------------------

    def _note(self, block: int) -> None:
        """Note for others that a block has ended, with its stages that are not done."""
        if self.notes is None or block in self._noted:
            return
        self._noted.add(block)
        others = {name: self._ended[name] for name in self._blocks[block] if self._ended[name] != "done"}
        suffix = "mixed" if others else "done"
        write_json(self.notes / f"{self._names_of_notes[block]}.{suffix}", others)

    def _read_notes(self) -> None:
        self._in_vain = 0
        if self.notes is None:
            return
        written = {path.stem: path for path in _files(self.notes)}
        for block, name in enumerate(self._names_of_notes):
            if block in self._noted or name not in written:
                continue
            path = written[name]
            try:
                others = read_json(path) or {} if path.suffix == ".mixed" else {}
            except Damaged:
                continue  # its stages are looked at
            self._noted.add(block)
            for stage in self._blocks[block]:
                self.ended(stage, str(others.get(stage, "done")))


def _after(state: str) -> str:
    """State of a stage whose parent has ended in a state that is not `done`."""
    return GIVEN_UP if state == GIVEN_UP else "lost"


def _files(folder: Path) -> Iterable[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return ()
