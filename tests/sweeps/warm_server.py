"""A process that has imported what a coordinator needs, and forks coordinators: each then begins at once.

Each line on stdin is a request in JSON, each line on stdout its answer:
    {"program", "arguments", "environment", "log", "cold"}  the process id of a new coordinator, in a session of its own
    {"ended": process id}                                   its exit code, as subprocess.Popen has it, or null

A coordinator has its own fork server for the stages. That is forked from here as well, or started cold as everywhere.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import multiprocessing.util
import os
import random
import signal
import socket
import sys
import threading
import types
from pathlib import Path
from typing import Any

MODULES = (
    "lit_llm.sweeps.run",
    "lit_llm.sweeps.trials",
    "lit_llm.runs.worker",
    "lit_llm.runs.stages",
    "mlflow.tracking.client",
    "mlflow.store.tracking.sqlalchemy_store",
    "optuna.storages.journal",
    "torch",
)


def main() -> None:
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in MODULES:
        importlib.import_module(name)
    assert threading.active_count() == 1, "a fork would copy the locks of the other threads"
    while line := requests.readline():
        request = json.loads(line)
        if "ended" in request:
            pid, status = os.waitpid(request["ended"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                run(**request)
                return
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def run(program: str, arguments: list[str], environment: dict[str, str], log: str, cold: bool) -> None:
    """What `python PROGRAM ARGUMENTS` would do."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    with open(log, "wb") as output, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    random.seed()
    sys.modules["numpy"].random.seed()
    if not cold:
        fork_the_fork_server()
    sys.argv = [program, *arguments]
    sys.modules["__main__"] = main_module = types.ModuleType("__main__")
    exec(compile(Path(program).read_text(), program, "exec"), main_module.__dict__)


def fork_the_fork_server() -> None:
    """Fork, while there is one thread, what becomes the fork server once multiprocessing would start one."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        become_the_fork_server(theirs)
    theirs.close()
    spawn, left = multiprocessing.util.spawnv_passfds, [pid]

    def spawned(path: bytes, words: list[str], descriptors: list[int]) -> int:
        if not left or "multiprocessing.forkserver" not in words[-1]:
            return int(spawn(path, words, descriptors))
        asked = {"code": words[-1], "descriptors": list(descriptors), "environment": dict(os.environ)}
        socket.send_fds(ours, [json.dumps(asked).encode()], descriptors)
        ours.close()
        return left.pop()

    multiprocessing.util.spawnv_passfds = spawned


def become_the_fork_server(channel: socket.socket) -> None:
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # as they are when multiprocessing starts one
    try:
        message, found, *_ = socket.recv_fds(channel, 1 << 20, 16)
        channel.close()
        if message:  # else the coordinator is gone
            asked: dict[str, Any] = json.loads(message)
            os.environ.clear()
            os.environ.update(asked["environment"])
            apart = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 200) for descriptor in found]
            for descriptor, number in zip(apart, asked["descriptors"], strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)
            exec(asked["code"], {"__name__": "__main__"})
    finally:
        os._exit(0)


if __name__ == "__main__":
    main()
