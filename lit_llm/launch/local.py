"""Runs many callables on this machine, a few at once, each in a fresh process of its own.

```
coordinator ── starts once ──▶ fork server: has imported `preload`, runs nothing else
  │  ▲                               │ forks, in milliseconds
  │  └─── pipe: value or error ─── child: one task, then its end
  ├◀───── pipe: question, answer ─▶ (as often as the task consults it)
  └── SIGTERM: please stop ──────────▶
```
Each part survives the sudden death of the others. A task succeeds only by a value received through the pipe, never by
an exit code. A child whose coordinator is gone asks itself to stop and is dead after the grace; the fork server ends
with the last of them. POSIX only.

A child neither imports nor runs the coordinator's `__main__` (a script without a guard, a notebook, `python -c`), so a
task's function and arguments must come from importable modules.
"""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

Status = Literal["returned", "raised", "killed", "interrupted"]


@dataclass(frozen=True)
class Task:
    name: str
    """Shown to people; unique in a launch."""
    function: Callable[..., Any]
    """Importable by name. A long one polls `stop_requested()`."""
    arguments: tuple[Any, ...] = ()
    log: Path | None = None
    """The process's stdout and stderr are appended here, a C library's too. None: the coordinator's own."""
    threads: int = 1
    """For OpenMP, MKL, OpenBLAS, Rayon and torch. A NumPy that the fork server has preloaded stays at one."""

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"task {self.name!r}: threads must be at least 1, not {self.threads}")


@dataclass(frozen=True)
class Outcome:
    task: Task
    status: Status
    """killed: ended without a result (or could not be started) and not at our request. interrupted: we asked it to
    stop, or never started it; what it returned or raised after being asked is in `value` or `error` nevertheless."""
    value: Any = None
    error: str | None = None
    """One line: "ValueError: ...", "killed by SIGKILL"."""
    traceback: str | None = None
    seconds: float = 0.0


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended the launch; `outcomes` has one outcome per task, in the order of the tasks."""

    def __init__(self, outcomes: list[Outcome]) -> None:
        super().__init__(f"{sum(outcome.status == 'interrupted' for outcome in outcomes)} tasks interrupted")
        self.outcomes = outcomes


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    tasks: Iterable[Task | None],
    *,
    slots: int | Sequence[Mapping[str, str]],
    preload: Sequence[str] = (),
    on_start: Callable[[Task], None] | None = None,
    on_finish: Callable[[Outcome], None] | None = None,
    on_question: Callable[[Task, Any], Any] | None = None,
    on_tick: Callable[[], None] | None = None,
    tick_seconds: float = 0.25,
    grace_seconds: float = 10.0,
) -> list[Outcome]:
    """Runs the tasks, at most as many at once as there are slots; one outcome per task, in the order of the tasks.

    `slots` is a number, or one mapping of environment variables per slot, such as `[{"CUDA_VISIBLE_DEVICES": "0"},
    {"CUDA_VISIBLE_DEVICES": "1"}]`. `preload` names modules that the fork server imports once and every child inherits;
    they must not start threads or touch a GPU when imported.

    The tasks of an iterator are taken from it when there is a slot for them; it gives None where it has none yet, and
    is then asked again within `tick_seconds`. `on_question` gives the answer to what a task asks by `consult`.

    The callbacks run between two looks at the children, `on_tick` at least every `tick_seconds`; an exception in one
    kills the children and is raised. A task that a signal kept from starting is not announced.

    The first Ctrl-C or SIGTERM asks the children to stop (SIGTERM) and kills those that outlast `grace_seconds`, the
    second kills them at once, the third leaves even a callback that hangs.

    Raises:
        Interrupted: after such a signal, once no child is left.
        ImportError: a module of `preload` cannot be imported.
        ValueError: no slot, a name twice, or a function or argument that no other process could import.
    """
    environments = [{} for _ in range(slots)] if isinstance(slots, int) else [dict(slot) for slot in slots]
    if not environments:
        raise ValueError(f"slots: {slots!r}: at least one is needed")
    outcomes: list[Outcome] = []
    if isinstance(tasks, Sequence):
        if twice := [name for name, count in Counter(task.name for task in tasks if task).items() if count > 1]:
            raise ValueError(f"two tasks have the same name: {', '.join(twice)}")
        for task in filter(None, tasks):
            _pickled_call(task)
            outcomes.append(Outcome(task, "interrupted"))
        if not outcomes:
            return outcomes

    source, ended, begun, warm = iter(tasks), False, 0, False
    running: dict[int, _Child] = {}
    with _counted_signals() as signals:

        def finish(index: int, outcome: Outcome) -> None:
            outcomes[index] = outcome
            if on_finish is not None:
                on_finish(outcome)

        try:
            while running or not (ended or signals.count):
                while environments and not (ended or signals.count):
                    try:
                        task = next(source)
                    except StopIteration:
                        ended = True
                        break
                    if task is None:
                        break
                    index, begun = begun, begun + 1
                    if index == len(outcomes):
                        outcomes.append(Outcome(task, "interrupted"))
                    if not warm:
                        _warm_up_unless_interrupted(preload, grace_seconds, signals, outcomes)
                        warm = True
                    if signals.count:
                        break
                    try:
                        child = _Child(task, _pickled_call(task), environments[-1], grace_seconds)
                    except (OSError, EOFError) as error:  # no memory for a fork, no descriptors
                        finish(index, Outcome(task, "killed", error=f"not started: {one_line(error)}"))
                        continue
                    environments.pop()
                    running[index] = child
                    if on_start is not None:
                        on_start(child.task)
                if running or not ended:
                    wait([handle for child in running.values() for handle in child.handles()], tick_seconds)
                for index, child in list(running.items()):
                    if signals.count:
                        child.stop()
                    if signals.count > 1:
                        child.kill()
                    gone = child.ended()
                    for question in child.take_questions():
                        child.answer(None if on_question is None else on_question(child.task, question))
                    if gone:
                        del running[index]
                        environments.append(child.environment)
                        finish(index, child.outcome())
                if on_tick is not None:
                    on_tick()
        finally:
            for child in running.values():  # only where something above has raised
                child.kill()
                child.process.join(grace_seconds)
    if signals.count:
        raise Interrupted(outcomes)
    return outcomes


class _Child:
    """One task's process, seen from the coordinator."""

    def __init__(self, task: Task, call: bytes, environment: dict[str, str], grace_seconds: float) -> None:
        self.task = task
        self.environment = environment
        self.grace_seconds = grace_seconds
        self.began = time.monotonic()
        self.deadline: float | None = None  # when it is killed
        self.asked_to_stop = False
        self.result: bytes | None = None
        self.end_of_message = False
        self._received = bytearray()
        self._questions: list[bytes] = []
        self.process, self._pid, self.pipe = _start(task, call, environment, grace_seconds)
        # A child that stalls or is killed while it writes several MB must not stall the coordinator.
        os.set_blocking(self.pipe.fileno(), False)

    def handles(self) -> list[Connection | int]:
        """What to wait for; a pipe that has ended would always be ready."""
        return [self.process.sentinel] if self.end_of_message else [self.process.sentinel, self.pipe]

    def stop(self) -> None:
        if not self.asked_to_stop and self.result is None:
            self.asked_to_stop = True
            self.deadline = time.monotonic() + self.grace_seconds
            self.process.terminate()

    def kill(self) -> bool:
        """False when nothing was left to kill."""
        if kill_group(self._pid):
            return True
        with suppress(ProcessLookupError):  # perhaps too young to have a group of its own
            os.kill(self._pid, signal.SIGKILL)
            return True
        return False

    def ended(self) -> bool:
        """Takes in what the child has sent, kills it when its time is over; True once it is gone."""
        exitcode = self.process.exitcode  # asked first: all that it sent before its end is then in the pipe
        self._receive()
        if exitcode is not None:
            return True
        if self.deadline is None and self.result is not None:
            self.deadline = time.monotonic() + self.grace_seconds  # a thread of its own may keep it from ending
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.kill()
        return False

    def outcome(self) -> Outcome:
        """What became of the task; called once, after the end."""
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
        if self.asked_to_stop:
            status = "interrupted"
        return Outcome(self.task, status, value, error, trace, time.monotonic() - self.began)

    def take_questions(self) -> list[Any]:
        """What the task has asked since the last time; it waits for an answer to each."""
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


class _Signals:
    """Counts SIGINT and SIGTERM, since an exception could strike in the middle of a start and lose a child."""

    count = 0
    patience = 3
    """The signal with this number raises KeyboardInterrupt nevertheless."""

    def receive(self, _number: int, _frame: types.FrameType | None) -> None:
        self.count += 1
        if self.count >= self.patience:
            raise KeyboardInterrupt


@contextmanager
def _counted_signals() -> Iterator[_Signals]:
    signals = _Signals()
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # Only the main thread may install handlers. What is ignored (`nohup`, a shell's background job) stays ignored.
    mine = threading.current_thread() is threading.main_thread()
    replaced = [number for number, handler in previous.items() if mine and handler is not signal.SIG_IGN]
    try:
        for number in replaced:
            signal.signal(number, signals.receive)
        yield signals
    finally:
        for number in replaced:
            signal.signal(number, previous[number] or signal.SIG_DFL)


def _warm_up_unless_interrupted(
    preload: Sequence[str], grace_seconds: float, signals: _Signals, outcomes: list[Outcome]
) -> None:
    """No child is there yet, so that a signal may end this at once."""
    signals.patience = 1
    try:
        _warm_up(preload, grace_seconds)
    except KeyboardInterrupt:
        raise Interrupted(outcomes) from None
    signals.patience = 3


# The fork server ---------------------------------------------------------------------------------------------------

_context = multiprocessing.get_context("forkserver")
_inherited: set[str] = set()  # modules that a child was seen to start with
_server_variables: set[str] = set()  # names of environment variables that the fork server may have


def _warm_up(preload: Sequence[str], grace_seconds: float) -> None:
    """Starts the fork server and asks a first child what it inherited: the server hides an ImportError."""
    forkserver.set_forkserver_preload(list(dict.fromkeys([run_job.__module__, *_inherited, *preload])))
    unseen = [name for name in preload if name not in _inherited]
    if not unseen:
        return
    task = Task("preload", report_preload, (unseen,))
    try:
        child = _Child(task, _pickled_call(task), {}, grace_seconds)
    except (OSError, EOFError):
        raise ImportError(f"preload: the fork server died importing {', '.join(unseen)}; see its traceback") from None
    while not child.ended():
        wait(child.handles(), 1.0)
    outcome = child.outcome()
    if outcome.status != "returned":
        raise ImportError(f"preload: {outcome.error}")
    _inherited.update(set(unseen) - set(outcome.value))
    if outcome.value:
        late = ", ".join(outcome.value)
        warnings.warn(f"the fork server runs without {late}, which each task will import anew", stacklevel=3)


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


def _ensure_server() -> None:
    """Starts the fork server unless it runs. What it inherits here, its children inherit."""
    started_with = {
        # An imported library must start no thread pool: a fork would copy the pool without its threads.
        **dict.fromkeys(THREAD_VARIABLES, "1"),
        # The coordinator's import path, and not the working directory before it: somebody's ./datasets.py, say.
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "PYTHONSAFEPATH": "1",
    }
    before = {name: os.environ.get(name) for name in started_with}
    resource_tracker.ensure_running()  # first, since its own start unblocks the signals
    # Blocked, the server survives a signal to the whole process group, and a child gets its own after `_settle`.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
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
    """Inside, `__main__` is empty: multiprocessing would have each child run the coordinator's script again."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _pickled_call(task: Task) -> bytes:
    try:
        with _no_main():
            return pickle.dumps((task.function, task.arguments))
    except Exception as error:
        raise ValueError(
            f"task {task.name!r} cannot be sent to another process: {error}; its function and the classes of its "
            "arguments must live in an importable module, not in a script, a notebook or another function"
        ) from error
