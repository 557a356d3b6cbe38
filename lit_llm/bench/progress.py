"""Lines on stderr about what is being measured."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

EVERY = 2.0
"""Seconds between two lines."""


def progress(title: str, turns: int) -> Callable[[int], None]:
    """A function that prints how many turns are done, at most every `EVERY` seconds."""
    last = time.monotonic()

    def log(done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            where = f"turn {done} of {turns}" if done else "warming up"
            print(f"{title}: {where}", file=sys.stderr, flush=True)

    return log
