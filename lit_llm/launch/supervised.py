"""Runs a command until it ends, its owner asks it to stop, or its owner is gone.

    python -m lit_llm.launch.supervised GRACE DAEMON COMMAND...

The owner, a worker of Ray, holds the other end of a socket that is this program's standard input. A line with a number
of seconds asks the command to save and end (SIGTERM), and kills it after that time. The end of the owner does the same
with GRACE seconds, and so does the end of Ray's daemon of the node, the process DAEMON. Workers outlive a daemon that
nobody has reaped, as in a container without an init process. The socket closes when the command has ended.

The program forks at once and its first process returns: Ray kills a worker's own children together with the worker, and
this one must outlive it for as long as the command saves.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

import psutil

SOCKET = 0
PR_SET_PDEATHSIG = 1


def main() -> None:
    grace_seconds, daemon, command = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    if os.fork():
        os._exit(0)
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the command's own business
    try:
        code = supervise(command, grace_seconds, daemon)
    except OSError as error:
        sys.exit(f"lit-llm: the command cannot be started: {error}")
    if code:
        print(f"lit-llm: the command ended with {_exit_status(code)}", flush=True)


def supervise(command: Sequence[str], grace_seconds: float, daemon: int) -> int:
    """Run the command in a session of its own. Returns its exit status, negative for a signal."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_prepare)
    ended = os.pidfd_open(process.pid)
    owners = [SOCKET]
    with suppress(ProcessLookupError):  # then the socket is closed soon, too
        owners.append(os.pidfd_open(daemon))
    deadline = float("inf")
    while True:
        wait = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select([ended, *owners], [], [], wait)
        if ended in ready:
            return process.wait()
        if ready:
            request = os.read(SOCKET, 100).decode() if ready == [SOCKET] else ""
            if not request:
                owners = []
                print(
                    "lit-llm: Ray's processes of this node are gone, so the command is asked to save and end",
                    flush=True,
                )
            deadline = min(deadline, time.monotonic() + float(request.split()[-1] if request else grace_seconds))
            process.terminate()
        if time.monotonic() >= deadline:
            print("lit-llm: the command outlasted its grace and is killed", flush=True)
            kill_session(process.pid)
            return process.wait()


def kill_session(leader: int) -> None:
    """Send SIGKILL to all processes of a session, whatever their process groups."""
    for pid in psutil.pids():
        with suppress(ProcessLookupError, PermissionError):
            if os.getsid(pid) == leader:
                os.kill(pid, signal.SIGKILL)


def _prepare() -> None:
    """Prepare the command's process: SIGTERM if its supervisor dies, and the usual response to signals."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


def _exit_status(code: int) -> str:
    return f"exit code {code}" if code > 0 else signal.Signals(-code).name


if __name__ == "__main__":
    main()
