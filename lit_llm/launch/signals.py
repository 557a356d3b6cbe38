"""Signals that ask a program to stop: Ctrl-C, and those of batch systems and terminals.

SIGTERM comes at a time limit, SIGUSR1 before it where one asks for that (`#SBATCH --signal=B:USR1@60`), SIGHUP when the
terminal is gone. All mean the same: save and end.
"""

import os
import signal
import stat
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals that ask to stop, as Ctrl-C does."""
ALL_SIGNALS = (signal.SIGINT, *STOP_SIGNALS)

Handler = Callable[[int, types.FrameType | None], None]


class Signals:
    """Counts requests to stop. An exception instead could interrupt a start and lose a child."""

    count = 0
    patience = 3
    """Number of the request that raises KeyboardInterrupt."""

    def receive(self, number: int, _frame: types.FrameType | None) -> None:
        if number == signal.SIGHUP:
            _leave_terminal()
        # Batch systems and closing shells repeat their signals, so only a repeated Ctrl-C counts.
        if number == signal.SIGINT or self.count == 0:
            self.count += 1
            if self.count >= self.patience:
                raise KeyboardInterrupt


def _leave_terminal() -> None:
    """Redirect output to nowhere, as printing to a closed terminal fails like a broken disk."""
    for stream in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream)
                os.close(nowhere)


@contextmanager
def counted_signals() -> Iterator[Signals]:
    """Context that counts requests to stop."""
    signals = Signals()
    with _handled(signals.receive):
        yield signals


@contextmanager
def stopped_as_by_ctrl_c() -> Iterator[None]:
    """Context in which SIGTERM, SIGHUP and SIGUSR1 raise KeyboardInterrupt, as Ctrl-C does."""
    with _handled(_as_ctrl_c, STOP_SIGNALS):
        yield


def _as_ctrl_c(number: int, frame: types.FrameType | None) -> None:
    if number == signal.SIGHUP:
        _leave_terminal()
    signal.default_int_handler(number, frame)


@contextmanager
def _handled(handler: Handler, numbers: tuple[signal.Signals, ...] = ALL_SIGNALS) -> Iterator[None]:
    previous = {number: signal.getsignal(number) for number in numbers}
    # Only the main thread may install handlers. Ignored signals (`nohup`, a background job) stay ignored.
    mine = threading.current_thread() is threading.main_thread()
    replaced = [number for number, before in previous.items() if mine and before is not signal.SIG_IGN]
    try:
        for number in replaced:
            signal.signal(number, handler)
        yield
    finally:
        for number in replaced:
            signal.signal(number, previous[number] or signal.SIG_DFL)
