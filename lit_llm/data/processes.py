"""Process pool that reads the parts of a corpus, one process for each core."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

from lit_llm.config.problems import InputError, Problem
from lit_llm.data.corpora import Part
from lit_llm.launch import cores

Work = Callable[[Any, int, Part], int]
"""Called with (job, number of a part, part), where the job is common to all parts; returns the number. Picklable."""


TOKENISING, SIGNING = "tokenising", "signing held-out documents"
"""Uses of `over_parts`. When tokenising stops, finished parts are kept; signing starts anew."""


def over_parts(
    work: Work,
    job: Any,
    parts: Sequence[Part],
    todo: Sequence[int],
    progress: Callable[[int, int], None],
    alone: bool = False,
    doing: str = TOKENISING,
) -> None:
    """Call `work` for the parts with the numbers `todo`, in a process for each core if there are several.

    progress: called with (bytes done, total bytes). alone: start no processes, for short work. doing: name of the work
    for messages. Raises InputError for a document that cannot be read.
    """
    total = sum(part.size for part in parts)
    done = total - sum(parts[number].size for number in todo)
    progress(done, total)
    processes = 1 if alone else min(cores(), len(todo))
    with ExitStack() as stack:
        numbers: Iterable[int]
        if processes > 1:
            numbers = stack.enter_context(_in_processes(processes, work, job, parts, todo, doing))
        else:  # starting processes would take longer
            numbers = (work(job, number, parts[number]) for number in todo)
        for number in numbers:
            done += parts[number].size
            progress(done, total)


@contextmanager
def _in_processes(
    count: int, work: Work, job: Any, parts: Sequence[Part], todo: Sequence[int], doing: str
) -> Iterator[Iterator[int]]:
    """Numbers of the parts, in the order in which they finish.

    The processes end with the block and with this process, even after errors and kills.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy the tokenizer's threads in a broken state
    ours, theirs = context.Pipe()
    pool = ProcessPoolExecutor(count, context, initializer=_initialise_worker, initargs=(theirs,))
    # Processes inherit blocked signals: Ctrl-C in the terminal reaches the coordinator alone, from their start on.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        futures = [pool.submit(work, job, number, parts[number]) for number in todo]
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield (future.result() for future in as_completed(futures))
        pool.shutdown()
    except BrokenProcessPool:
        after = (
            "finished parts are kept, so the same command goes on from there"
            if doing == TOKENISING
            else "the same command begins with it anew"
        )
        message = (
            f"a process that was {doing} was killed, perhaps for want of memory; {after}"
            if ours.poll()
            else f"no process for {doing} could start: it was killed, perhaps for want of memory, or the script "
            'calls this outside of `if __name__ == "__main__":`, and each process reads the script anew'
        )
        raise InputError(Problem(message, "corpus")) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        ours.close()  # if this process is killed, the kernel closes it
        pool.shutdown(cancel_futures=True)
        theirs.close()


def leave_if_imported() -> None:
    """End a worker process that imports a script without `if __name__ == "__main__":`.

    It would start over, and wait for the process that waits for it. That process reports the error.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing checks it
        sys.exit(1)


def _initialise_worker(coordinator: Connection) -> None:
    """Initialise a worker before its first part."""
    try:
        coordinator.send_bytes(b"here")
    except OSError:
        os._exit(1)  # the coordinator has ended meanwhile
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a process

    def end_with_it() -> None:
        wait([coordinator])
        os._exit(1)  # at once: incomplete files have temporary names

    threading.Thread(target=end_with_it, daemon=True).start()
