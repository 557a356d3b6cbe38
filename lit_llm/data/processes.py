"""Processes that read the parts of a corpus, one for each core."""

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
"""Called with (what is the same for all parts, number of a part, the part); returns the number. Picklable."""


TOKENISING, SIGNING = "tokenising", "signing held-out documents"
"""What `over_parts` is used for. Of the first, finished parts are kept; the second is done anew."""


def over_parts(
    work: Work,
    job: Any,
    parts: Sequence[Part],
    todo: Sequence[int],
    progress: Callable[[int, int], None],
    alone: bool = False,
    doing: str = TOKENISING,
) -> None:
    """Call `work` for the parts with these numbers, in a process for each core where there are several parts.

    progress: called with (bytes done, bytes in all). alone: start no process, for work that is done sooner. doing: for
    messages. Raises InputError for a document that cannot be read.
    """
    total = sum(part.size for part in parts)
    done = total - sum(parts[number].size for number in todo)
    progress(done, total)
    processes = 1 if alone else min(cores(), len(todo))
    with ExitStack() as stack:
        numbers: Iterable[int]
        if processes > 1:
            numbers = stack.enter_context(_in_processes(processes, work, job, parts, todo, doing))
        else:  # processes of their own would take longer to start
            numbers = (work(job, number, parts[number]) for number in todo)
        for number in numbers:
            done += parts[number].size
            progress(done, total)


@contextmanager
def _in_processes(
    count: int, work: Work, job: Any, parts: Sequence[Part], todo: Sequence[int], doing: str
) -> Iterator[Iterator[int]]:
    """The numbers of the parts, each when it is finished.

    The processes end with the block, however it ends, and with this process, however that ends.
    """
    context = multiprocessing.get_context("spawn")  # a fork would inherit the tokenizer's threads, half alive
    ours, theirs = context.Pipe()
    pool = ProcessPoolExecutor(count, context, initializer=_settle, initargs=(theirs,))
    # Processes inherit what is blocked: Ctrl-C in the terminal is for the coordinator alone, from their first moment.
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
        ours.close()  # the kernel does it where this process is killed
        pool.shutdown(cancel_futures=True)
        theirs.close()


def leave_if_imported() -> None:
    """End a worker that would start over, because it has to import a script that is not written for that.

    The process that has started it says so. Here it would wait for that one, which waits for it.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # what multiprocessing itself goes by
        sys.exit(1)


def _settle(coordinator: Connection) -> None:
    """In a worker, before its first part."""
    try:
        coordinator.send_bytes(b"here")
    except OSError:
        os._exit(1)  # the coordinator has ended meanwhile
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a process

    def end_with_it() -> None:
        wait([coordinator])
        os._exit(1)  # at once: what is half written has no name yet

    threading.Thread(target=end_with_it, daemon=True).start()
