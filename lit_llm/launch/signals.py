"""Signals that ask a program to stop: Ctrl-C, and what batch systems and terminals send.

SIGTERM comes at a time limit, SIGUSR1 before it where one asks for that (`#SBATCH --signal=B:USR1@60`), SIGHUP when the
terminal is gone. All mean the same: save what is needed and end.
"""

import os
import signal
import stat
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Each asks to stop, as Ctrl-C does."""
ALL_SIGNALS = (signal.SIGINT, *STOP_SIGNALS)

Handler = Callable[[int, types.FrameType | None], None]


class Signals:
    """Counts requests to stop, since an exception could strike in the middle of a start and lose a child."""

    count = 0
    patience = 3
    """The request with this number raises KeyboardInterrupt nevertheless."""

    def receive(self, number: int, _frame: types.FrameType | None) -> None:
        if number == signal.SIGHUP:
            _leave_terminal()
        # A batch system repeats itself, and a shell does when its terminal is closed: only Ctrl-C again is impatience.
        if number == signal.SIGINT or self.count == 0:
            self.count += 1
            if self.count >= self.patience:
                raise KeyboardInterrupt


def _leave_terminal() -> None:
    """Write nowhere from here on: what is printed to a terminal that is gone would fail as on a broken disk."""
    for stream in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream)
                os.close(nowhere)


@contextmanager
def counted_signals() -> Iterator[Signals]:
    """Inside, requests to stop are counted."""
    signals = Signals()
    with _handled(signals.receive):
        yield signals


@contextmanager
def stopped_as_by_ctrl_c() -> Iterator[None]:
    """Inside, SIGTERM, SIGHUP and SIGUSR1 raise KeyboardInterrupt, so that each ends as Ctrl-C does."""
    with _handled(_as_ctrl_c, STOP_SIGNALS):
        yield


def _as_ctrl_c(number: int, frame: types.FrameType | None) -> None:
    if number == signal.SIGHUP:
        _leave_terminal()
    signal.default_int_handler(number, frame)


@contextmanager
def _handled(handler: Handler, numbers: tuple[signal.Signals, ...] = ALL_SIGNALS) -> Iterator[None]:
    previous = {number: signal.getsignal(number) for number in numbers}
    # Only the main thread may install handlers. What is ignored (`nohup`, a shell's background job) stays ignored.
    mine = threading.current_thread() is threading.main_thread()
    replaced = [number for number, before in previous.items() if mine and before is not signal.SIG_IGN]
    try:
        for number in replaced:
            signal.signal(number, handler)
        yield
    finally:
        for number in replaced:
            signal.signal(number, previous[number] or signal.SIG_DFL)
