"""Claims of stages: a generation that rises with each holder, so that a late holder is refused.

A process that was stopped, or whose host was cut off, may believe that it still holds its stage while another one has
taken it over. `claim.json` in the stage's folder names the holder; each write that counts (a checkpoint, weights, a
state, a result) compares it in the instant before the work file gets its final name.

Between the comparison and the rename remains an instant in which a new holder may begin. A write in that instant does
no harm: stages are deterministic, so it is what the new holder would write, whole, in place of the same file.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from lit_llm.config.host import host_name
from lit_llm.store.files import Damaged, read_verified, replacing, with_digest

FILE = "claim.json"


class Superseded(Exception):
    """Error of a process whose stage another one has taken over: it may write nothing to it any more."""


@dataclass(frozen=True)
class Claim:
    """A process's hold on a stage."""

    generation: int
    host: str
    pid: int
    time: float

    def check(self, folder: Path) -> None:
        """Raise Superseded unless this is the stage's last claim."""
        if (last := last_claim(folder)) != self:
            holder = "nobody" if last is None else f"process {last.pid} on {last.host}"
            raise Superseded(f"the stage was taken over by {holder} while this process was not heard of")


def last_claim(folder: Path) -> Claim | None:
    """The last claim of a stage; None where there is none or its file is damaged."""
    try:
        content = json.loads(read_verified(folder / FILE))
        return Claim(content["generation"], content["host"], content["pid"], content["time"])
    except (FileNotFoundError, Damaged, ValueError, LookupError, TypeError):
        return None


def make_claim(folder: Path, durable: bool) -> Claim:
    """Claim a stage whose lock this process has just got. durable: the claim survives a crash of a file server."""
    last, now = last_claim(folder), time.time()
    # Seconds since 1970 are more than any number of claims: the generation rises even over a damaged file.
    first = int(now) if (folder / FILE).exists() else 1
    claim = Claim(first if last is None else last.generation + 1, host_name(), os.getpid(), now)
    with replacing(folder / FILE, durable) as work:
        work.write_text(with_digest(json.dumps(asdict(claim), indent=1) + "\n"))
    return claim
