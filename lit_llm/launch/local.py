"""Runs callables on this machine, several at once, each in a new process.

```
coordinator ── starts once ──▶ fork server: has imported `preload`, runs nothing else
  │  ▲                               │ forks, in milliseconds
  │  └─── pipe: value or error ─── child: one task, then its end
  ├◀───── pipe: question, answer ─▶ (as often as the task asks)
  └── SIGTERM: please stop ──────────▶
```
Each part survives the sudden death of the others. A task succeeds only by a value through the pipe, never by an exit
code. A child without a coordinator stops itself and is killed after the grace; the fork server ends with the last
child. POSIX only.

A child neither imports nor runs the coordinator's `__main__` (a script without a guard, a notebook, `python -c`), so a
task's function and arguments must come from importable modules.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import wait
from typing import Any

from lit_llm.launch.child import one_line
from lit_llm.launch.devices import take_slots
from lit_llm.launch.process import Child, Outcome, Task, pickled_call, warm_up
from lit_llm.launch.signals import Signals, counted_signals


class Interrupted(KeyboardInterrupt):
    """A request to stop ended the launch; `outcomes` has one outcome per task, in the order of the tasks."""

    def __init__(self, outcomes: list[Outcome]) -> None:
        super().__init__(f"{sum(outcome.status == 'interrupted' for outcome in outcomes)} tasks interrupted")
        self.outcomes = outcomes


def run_tasks(
    tasks: Iterable[Task | None],
    *,
    max_parallel: int | Sequence[Mapping[str, str]],
    preload: Sequence[str] = (),
    on_start: Callable[[Task], None] | None = None,
    on_finish: Callable[[Outcome], None] | None = None,
    on_question: Callable[[Task, Any], Any] | None = None,
    on_poll: Callable[[], None] | None = None,
    to_stop: Callable[[Task], str | None] | None = None,
    poll_seconds: float = 0.25,
    grace_seconds: float = 10.0,
) -> list[Outcome]:
    """Run tasks, each in a slot or several. Returns one outcome per task, in the order of the tasks.

    `max_parallel` is the number of slots, or one mapping of environment variables for each slot, such as
    `[{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]`. A task of several slots waits until as many are
    free, and sees the devices of all. `preload` names modules that the fork server imports once and every child
    inherits; they must not start threads or touch a GPU when imported.

    An iterator is advanced when a slot is free. It yields None while it has no task yet, and is then advanced again
    within `poll_seconds`. `on_question` answers the questions that a task asks by `ask_coordinator`.

    Callbacks run between two polls of the children, `on_poll` at least every `poll_seconds`. An exception in one asks
    the children to stop, as a signal does, and is raised once none is left. A task that a signal kept from starting is
    not announced. `to_stop` is called for each running task in each poll: a reason ends the task as a signal would, and
    its outcome is `killed` with that reason.

    The first Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 asks the children to stop (SIGTERM) and kills those that outlast
    `grace_seconds`. The others repeated change nothing; a second Ctrl-C kills at once, a third leaves even a callback
    that hangs.

    Raises:
        Interrupted: after such a signal, once no child is left.
        ImportError: a module of `preload` cannot be imported.
        ValueError: fewer devices than a task takes, a name twice, or a function or argument that no other process could
            import.
    """
    slots: Sequence[Mapping[str, str]] = [{}] * max_parallel if isinstance(max_parallel, int) else max_parallel
    if not slots:
        raise ValueError(f"max_parallel: {max_parallel!r}: at least one is needed")
    outcomes: list[Outcome] = []
    if isinstance(tasks, Sequence):
        if twice := [name for name, count in Counter(task.name for task in tasks if task).items() if count > 1]:
            raise ValueError(f"two tasks have the same name: {', '.join(twice)}")
        for task in filter(None, tasks):
            pickled_call(task)
            outcomes.append(Outcome(task, "interrupted"))
        if not outcomes:
            return outcomes

    source, ended, begun, warm = iter(tasks), False, 0, False
    running: dict[int, Child] = {}
    free = [*slots]
    held: Task | None = None  # until enough slots are free
    with counted_signals() as signals:

        def finish(index: int, outcome: Outcome) -> None:
            outcomes[index] = outcome
            if on_finish is not None:
                on_finish(outcome)

        try:
            while running or not (ended or signals.count):
                while free and not (ended or signals.count):
                    try:
                        task, held = held or next(source), None
                    except StopIteration:
                        ended = True
                        break
                    if task is None:
                        break
                    if (taken := take_slots(free, task.slots)) is None:
                        if take_slots(slots, task.slots) is None:
                            raise ValueError(f"task {task.name!r} takes {task.slots} of {len(slots)} slots")
                        held = task
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
                        child = Child(task, pickled_call(task), taken, grace_seconds)
                    except (OSError, EOFError) as error:  # no memory for a fork, no descriptors
                        finish(index, Outcome(task, "killed", error=f"not started: {one_line(error)}"))
                        continue
                    for slot in taken:
                        free.remove(slot)
                    running[index] = child
                    if on_start is not None:
                        on_start(child.task)
                if running or not ended:
                    wait([handle for child in running.values() for handle in child.handles()], poll_seconds)
                for index, child in list(running.items()):
                    if signals.count:
                        child.stop()
                    elif to_stop is not None and (reason := to_stop(child.task)):
                        child.stop(reason)
                    if signals.count > 1:
                        child.kill()
                    gone = child.ended()
                    for question in child.take_questions():
                        child.answer(None if on_question is None else on_question(child.task, question))
                    if gone:
                        del running[index]
                        free.extend(child.slots)
                        finish(index, child.outcome())
                if on_poll is not None:
                    on_poll()
        except Exception:
            _wind_up(running, signals, poll_seconds)
            raise
        finally:
            for child in running.values():  # only where nobody wants to wait any more
                child.kill()
                child.process.join(grace_seconds)
    if signals.count:
        raise Interrupted(outcomes)
    return outcomes


def _wind_up(running: dict[int, Child], signals: Signals, poll_seconds: float) -> None:
    """Ask the children to stop and wait for their end, without callbacks, after one has raised."""
    while running:
        for index, child in list(running.items()):
            child.stop()
            if signals.count > 1:
                child.kill()
            gone = child.ended()
            for _ in child.take_questions():
                child.answer(None)
            if gone:
                del running[index]
                child.outcome()
        wait([handle for child in running.values() for handle in child.handles()], poll_seconds)


def _warm_up_unless_interrupted(
    preload: Sequence[str], grace_seconds: float, signals: Signals, outcomes: list[Outcome]
) -> None:
    """Warm up the fork server. A signal may end this at once, as there is no child yet."""
    signals.patience = 1
    try:
        warm_up(preload, grace_seconds)
    except KeyboardInterrupt:
        raise Interrupted(outcomes) from None
    signals.patience = 3
