"""Tasks, their processes as seen by the coordinator, and the fork server that starts them."""

import multiprocessing
import os
import pickle
import signal
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

from lit_llm.launch.child import (
    ANSWER,
    HEADER,
    QUESTION,
    THREAD_VARIABLES,
    Job,
    kill_group,
    one_line,
    report_preload,
    run_job,
    send,
)
from lit_llm.launch.devices import environment_of
from lit_llm.launch.signals import ALL_SIGNALS

Status = Literal["returned", "raised", "killed", "interrupted"]


@dataclass(frozen=True)
class Task:
    name: str
    """Shown to people; unique in a launch."""
    function: Callable[..., Any]
    """A function that is importable by name. A long one polls `stop_requested()`."""
    arguments: tuple[Any, ...] = ()
    log: Path | None = None
    """File to which stdout and stderr are appended, those of C libraries included. None: the coordinator's streams."""
    threads: int = 1
    """Threads of OpenMP, MKL, OpenBLAS, Rayon and torch. A NumPy preloaded by the fork server stays at one."""
    slots: int = 1
    """Slots that it takes at once: one for each of its devices."""

    def __post_init__(self) -> None:
        if self.threads < 1 or self.slots < 1:
            raise ValueError(f"task {self.name!r}: threads and slots must be at least 1")


@dataclass(frozen=True)
class Outcome:
    task: Task
    status: Status
    """killed: ended without a result, could not be started, or was stopped by `to_stop`. interrupted: was asked to stop
    with the others, or never started; `value` or `error` still has what it returned or raised."""
    value: Any = None
    error: str | None = None
    """One line, such as "ValueError: ..." or "killed by SIGKILL"."""
    traceback: str | None = None
    seconds: float = 0.0


class Child:
    """One task's process, seen from the coordinator."""

    def __init__(self, task: Task, call: bytes, slots: Sequence[Mapping[str, str]], grace_seconds: float) -> None:
        self.task = task
        self.slots = slots
        self.grace_seconds = grace_seconds
        self.began = time.monotonic()
        self.deadline: float | None = None  # when it is killed
        self.asked_to_stop = False
        self.stopped_because: str | None = None  # of this task alone; None where all were asked to stop
        self.result: bytes | None = None
        self.end_of_message = False
        self._received = bytearray()
        self._questions: list[bytes] = []
        self.process, self._pid, self.pipe = _start(task, call, environment_of(slots), grace_seconds)
        # A child that stalls or is killed while it writes several MB must not stall the coordinator.
        os.set_blocking(self.pipe.fileno(), False)

    def handles(self) -> list[Connection | int]:
        """Handles to wait for; without the pipe once it has ended, as it would always be ready."""
        return [self.process.sentinel] if self.end_of_message else [self.process.sentinel, self.pipe]

    def stop(self, reason: str | None = None) -> None:
        """Ask the process to stop, once. reason: for stopping this task alone."""
        if not self.asked_to_stop and self.result is None:
            self.stopped_because = reason
            self.asked_to_stop = True
            self.deadline = time.monotonic() + self.grace_seconds
            self.process.terminate()

    def kill(self) -> bool:
        """Kill the process; False when nothing was left to kill."""
        if kill_group(self._pid):
            return True
        with suppress(ProcessLookupError):  # perhaps too young to have a group of its own
            os.kill(self._pid, signal.SIGKILL)
            return True
        return False

    def ended(self) -> bool:
        """Receive messages of the child, and kill it after its deadline. Returns whether it is gone."""
        exitcode = self.process.exitcode  # read first: all messages before its end are then in the pipe
        self._receive()
        if exitcode is not None:
            return True
        if self.deadline is None and self.result is not None:
            self.deadline = time.monotonic() + self.grace_seconds  # a thread of its own may keep it from ending
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.kill()
        return False

    def outcome(self) -> Outcome:
        """The outcome of the task; called once, after the end."""
        exitcode = self.process.exitcode
        # 255 is also multiprocessing's word for a fork server that died: the child lives on, its end untold.
        lost = exitcode == 255 and self.kill()
        if lost:
            time.sleep(0.1)  # a server that is still dying looks alive to the next start
        else:
            kill_group(self._pid)  # what the task has started ends with it
        self.process.close()
        self.pipe.close()
        status: Status
        value, error, trace = None, None, None
        if self.result is not None:
            try:
                returned, value, error, trace = pickle.loads(self.result)
                status = "returned" if returned else "raised"
            except Exception as failure:
                status, error = "raised", f"the returned value cannot be read: {one_line(failure)}"
        else:
            status, error = "killed", _how_it_ended(exitcode)
            if lost:
                error = "killed, because the fork server died"
            elif self.asked_to_stop:
                error += " after it was asked to stop"
        if self.stopped_because is not None:
            status, error = "killed", self.stopped_because
        elif self.asked_to_stop:
            status = "interrupted"
        return Outcome(self.task, status, value, error, trace, time.monotonic() - self.began)

    def take_questions(self) -> list[Any]:
        """Questions of the task since the last call; it waits for an answer to each."""
        questions, self._questions = self._questions, []
        return [pickle.loads(question) for question in questions]

    def answer(self, value: Any) -> None:
        with suppress(ConnectionError):  # it has ended meanwhile
            send(self.pipe, ANSWER, pickle.dumps(value))

    def _receive(self) -> None:
        with suppress(BlockingIOError):
            while not self.end_of_message:
                try:
                    part = os.read(self.pipe.fileno(), 1 << 20)
                except ConnectionResetError:  # it has ended with an answer unread
                    part = b""
                self._received += part
                self.end_of_message = not part
        while len(self._received) >= HEADER.size:
            kind, length = HEADER.unpack_from(self._received)
            if len(self._received) < HEADER.size + length:
                break
            message = bytes(self._received[HEADER.size : HEADER.size + length])
            del self._received[: HEADER.size + length]
            if kind == QUESTION:
                self._questions.append(message)
            else:
                self.result = message


def _how_it_ended(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"exited with code {exitcode} before it returned"
    with suppress(ValueError):  # a real-time signal has no name
        return f"killed by {signal.Signals(-exitcode).name}"
    return f"killed by signal {-exitcode}"


# The fork server ---------------------------------------------------------------------------------------------------

_context = multiprocessing.get_context("forkserver")
_inherited: set[str] = set()  # modules that a child was seen to start with
WARM_UPS = 3
_server_variables: set[str] = set()  # names of environment variables that the fork server may have


def warm_up(preload: Sequence[str], grace_seconds: float) -> None:
    """Start the fork server with the modules in `preload`, and warn of those that it could not import.

    Raises ImportError when one of them cannot be imported, or when server or child die in each of `WARM_UPS` attempts:
    a single death may have come from outside, as from the kernel when memory is short.
    """
    forkserver.set_forkserver_preload(list(dict.fromkeys([run_job.__module__, *_inherited, *preload])))
    unseen = [name for name in preload if name not in _inherited]
    if not unseen:
        return
    for _ in range(WARM_UPS):
        outcome = _inherited_by_a_child(unseen, grace_seconds)
        if outcome is not None and outcome.status != "killed":
            break
        time.sleep(0.1)  # a server that is still dying looks alive to the next start
    if outcome is None:
        raise ImportError(f"preload: the fork server died importing {', '.join(unseen)}; see its traceback")
    if outcome.status != "returned":
        raise ImportError(f"preload: {outcome.error}")
    _inherited.update(set(unseen) - set(outcome.value))
    if outcome.value:
        late = ", ".join(outcome.value)
        warnings.warn(f"the fork server runs without {late}, which each task will import anew", stacklevel=3)


def _inherited_by_a_child(modules: Sequence[str], grace_seconds: float) -> Outcome | None:
    """The outcome of a first child, which imports modules that it did not inherit, as the server hides an ImportError.

    None when the server died before it had forked the child.
    """
    task = Task("preload", report_preload, (modules,))
    try:
        child = Child(task, pickled_call(task), [{}], grace_seconds)
    except (OSError, EOFError):
        return None
    while not child.ended():
        wait(child.handles(), 1.0)
    return child.outcome()


def _start(
    task: Task, call: bytes, environment: dict[str, str], grace_seconds: float
) -> tuple[multiprocessing.context.ForkServerProcess, int, Connection]:
    _ensure_server()
    threads = dict.fromkeys(THREAD_VARIABLES, str(task.threads))
    job = Job(
        call=call,
        environment={**os.environ, **threads, **environment},
        removed=tuple(_server_variables - os.environ.keys() - threads.keys() - environment.keys()),
        start_method=multiprocessing.get_start_method(),
        threads=task.threads,
        log=None if task.log is None else task.log.absolute(),
        grace_seconds=grace_seconds,
    )
    ours, theirs = _context.Pipe()
    with theirs:
        process = _context.Process(target=run_job, args=(job, theirs), name=task.name)
        with _no_main():
            process.start()
    assert process.pid is not None, "it has started"
    return process, process.pid, ours


def import_path() -> dict[str, str]:
    """Variables that give a new Python this one's import path.

    The working directory is not put before it, as it may hold somebody's ./datasets.py.
    """
    return {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path), "PYTHONSAFEPATH": "1"}


def _ensure_server() -> None:
    """Start the fork server unless it runs. Its children inherit its environment."""
    started_with = {
        # An imported library must start no thread pool: a fork would copy the pool without its threads.
        **dict.fromkeys(THREAD_VARIABLES, "1"),
        **import_path(),
    }
    before = {name: os.environ.get(name) for name in started_with}
    # Blocked, both servers survive a signal to the whole process group, and a child gets its own after `_settle`.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ALL_SIGNALS)
    resource_tracker.ensure_running()  # its own start unblocks those that it ignores
    signal.pthread_sigmask(signal.SIG_BLOCK, ALL_SIGNALS)
    os.environ.update(started_with)
    try:
        _server_variables.update(os.environ)
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def _no_main() -> Iterator[None]:
    """Context with an empty `__main__`, as multiprocessing would run the coordinator's script in each child."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def pickled_call(task: Task) -> bytes:
    try:
        with _no_main():
            return pickle.dumps((task.function, task.arguments))
    except Exception as error:
        raise ValueError(
            f"task {task.name!r} cannot be sent to another process: {error}; its function and the classes of its "
            "arguments must live in an importable module, not in a script, a notebook or another function"
        ) from error
