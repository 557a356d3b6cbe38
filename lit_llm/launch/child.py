"""Code inside a task's process; `local.py` describes the whole and is the outside.

The process is forked with all stop signals blocked, so that none can hit it half made: an early one waits until
`_settle` has installed its handler.
"""

import faulthandler
import gc
import importlib
import io
import multiprocessing
import os
import pickle
import signal
import struct
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any

from lit_llm.launch.signals import ALL_SIGNALS, STOP_SIGNALS

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
HEADER = struct.Struct("!cQ")
"""Kind and length before each pickled message, so that a partly written message is recognised."""
RESULT, QUESTION, ANSWER = b"r", b"q", b"a"

_stop = False  # a plain bool: an Event takes a lock, and a second signal inside `set` would wait for itself
_pipe: Connection | None = None  # to the coordinator, in a task's process


def stop_requested() -> bool:
    """True where this process was asked to stop. A long function polls this, saves its state and returns."""
    return _stop


def ask_coordinator(question: Any) -> Any:
    """Ask the coordinator and wait for the answer of its `on_question`; None without a coordinator."""
    if _pipe is None:
        return None
    try:
        send(_pipe, QUESTION, pickle.dumps(question))
        with open(_pipe.fileno(), "rb", buffering=0, closefd=False) as stream:
            kind, length = HEADER.unpack(_read_exactly(stream, HEADER.size))
            assert kind == ANSWER, f"the coordinator sends answers alone, not {kind!r}"
            return pickle.loads(_read_exactly(stream, length))
    except (ConnectionError, EOFError):  # the coordinator is gone, and this process will be asked to stop
        return None


def send(pipe: Connection, kind: bytes, message: bytes) -> None:
    with open(pipe.fileno(), "wb", closefd=False) as stream:
        stream.write(HEADER.pack(kind, len(message)) + message)


def _read_exactly(stream: io.FileIO, count: int) -> bytes:
    content = b""
    while len(content) < count:
        part = stream.read(count - len(content))
        if not part:
            raise EOFError
        content += part
    return content


@dataclass(frozen=True)
class Job:
    """Message to a new process."""

    call: bytes
    """Pickled function and arguments, unpickled in the task's process so that a failing import is its error."""
    environment: dict[str, str]
    removed: tuple[str, ...]
    """Variables of the fork server that the coordinator no longer has."""
    start_method: str
    threads: int
    log: Path | None
    grace_seconds: float


def run_job(job: Job, pipe: Connection) -> None:
    """Call the job's function and send (returned, value, error, traceback) through the pipe."""
    global _pipe
    try:
        _settle(job)
        _pipe = pipe
        function, arguments = pickle.loads(job.call)
        message = _pickled_value(function(*arguments))
    except BaseException as error:  # SystemExit too: a task that ends without a value has not returned
        trace = traceback.format_exc()
        with suppress(OSError):  # a log on a full disk
            print(trace, file=sys.stderr)
        message = pickle.dumps((False, None, one_line(error), trace))
    with suppress(BrokenPipeError):
        send(pipe, RESULT, message)


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")


def kill_group(pid: int) -> bool:
    """Send SIGKILL to a task's process and all processes that it started; False where none is left."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
        return True
    return False


def report_preload(modules: Sequence[str]) -> list[str]:
    """Modules that this process did not inherit and has now imported; raises errors of an import."""
    absent = [name for name in modules if name not in sys.modules]
    for name in absent:
        importlib.import_module(name)
    return absent


def _pickled_value(value: object) -> bytes:
    try:
        return pickle.dumps((True, value, None, None), protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        raise TypeError(f"the returned {type(value).__name__} cannot be pickled: {error}") from error


def _settle(job: Job) -> None:
    # A process group of its own: Ctrl-C in the terminal does not reach it, and its data loaders can be killed with it.
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in STOP_SIGNALS:
        # Signals that the coordinator ignores (`nohup`) stay ignored, except SIGTERM, which stops this process.
        if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _request_stop)
    os.register_at_fork(after_in_child=_settle_helper)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ALL_SIGNALS)
    if job.log is not None:
        _redirect_output(job.log)
    threading.Thread(target=_outlive_coordinator, args=(job.grace_seconds,), daemon=True).start()
    # The fork server's environment is as old as the server.
    os.environ.update(job.environment)
    for name in job.removed:
        os.environ.pop(name, None)
    # Else the function's own processes (data loader workers) would come from the fork server too.
    multiprocessing.set_start_method(job.start_method, force=True)
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(job.threads)  # it has read the variables already, in the fork server
    if (numpy_random := sys.modules.get("numpy.random")) is not None:
        numpy_random.seed()  # else every task would draw the fork server's numbers
    gc.freeze()  # inherited objects are not collected: collections are faster, and pages stay shared
    faulthandler.enable()


def _redirect_output(log: Path) -> None:
    """Descriptors, not `sys.stdout`, so that C libraries and processes of the task's own follow."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    # By lines, so that the log can be followed and survives a SIGKILL.
    for text in (sys.stdout, sys.stderr):
        if isinstance(text, io.TextIOWrapper):
            text.reconfigure(line_buffering=True)


def _settle_helper() -> None:
    """Signal handlers of a worker that the function forks: SIGTERM ends it, as it has nothing to save.

    Other signals of a batch system are for the process that saves, which ends its workers.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)


def leave_stopping_to_another() -> None:
    """Ignore requests to stop, in a process that another one ends; workers that it forks end by SIGTERM."""
    for number in ALL_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.register_at_fork(after_in_child=_settle_helper)


def _request_stop(_number: int, _frame: FrameType | None) -> None:
    global _stop
    _stop = True


def _outlive_coordinator(grace_seconds: float) -> None:
    """Wait for the coordinator's end, ask this process to stop and kill it after the grace."""
    coordinator = multiprocessing.parent_process()
    assert coordinator is not None, "run_job runs in a process of its own"
    wait([coordinator.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)  # a signal, not the flag: Lightning, say, has handlers of its own
    time.sleep(grace_seconds)
    kill_group(os.getpid())
