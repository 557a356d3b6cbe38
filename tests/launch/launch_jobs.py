"""What the tests of `lit_llm.launch` run in processes of their own; importable by name there."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from lit_llm.launch import ask_coordinator, stop_requested


def double(number):
    return 2 * number


def nap(seconds):
    began = time.monotonic()  # one clock for all processes of a machine
    time.sleep(seconds)
    return began, time.monotonic()


def fail(message):
    raise ValueError(message)


def leave(code):
    os._exit(code)


def leave_politely(code):
    sys.exit(code)


def kill_itself():
    os.kill(os.getpid(), signal.SIGKILL)


def megabytes(count):
    return b"x" * (count << 20)


class OnlyWritable:
    def __reduce__(self):
        return fail, ("not to be read",)


def unreadable():
    return OnlyWritable()


def unpicklable():
    return lambda: None


def speak(text):
    print(text)
    os.system(f"echo {text} of a shell")
    libc = ctypes.CDLL(None)
    libc.puts(f"{text} of C".encode())
    libc.fflush(None)
    print(text, "stderr", file=sys.stderr)


def until_stopped(ready, saved, seconds=0.0):
    """Takes so many seconds to save."""
    Path(ready).touch()
    while not stop_requested():
        time.sleep(0.01)
    time.sleep(seconds)
    Path(saved).write_text("checkpoint")
    return "saved"


def with_a_forked_helper(ready):
    """As a data loader does."""
    helper = os.fork()
    if helper == 0:
        time.sleep(60)
        os._exit(0)
    work = Path(f"{ready}.new")
    work.write_text(f"{helper} {os.getpid()}")
    work.rename(ready)
    while not stop_requested():
        time.sleep(0.01)
    time.sleep(0.05)
    return "the helper lives" if os.waitpid(helper, os.WNOHANG) == (0, 0) else "the helper is gone"


def deaf(ready, with_helper=False):
    """Never polls; as Lightning's data loaders might, with a process of its own."""
    if with_helper:
        subprocess.Popen(["sleep", "300"])
    Path(ready).touch()
    time.sleep(300)


def answer_but_stay():
    threading.Thread(target=time.sleep, args=(300,)).start()
    return "answered"


def leave_a_helper():
    return subprocess.Popen(["sleep", "300"]).pid


def device_for(seconds):
    time.sleep(seconds)
    return os.environ["CUDA_VISIBLE_DEVICES"]


def surroundings():
    main = sys.modules["__main__"]
    torch = sys.modules.get("torch")
    return {
        "main": getattr(main, "__file__", None),
        "parent": os.getppid(),
        "server_threads": len(os.listdir(f"/proc/{os.getppid()}/task")),
        "torch_threads": torch.get_num_threads() if torch else None,
        "environment": dict(os.environ),
        "sigint_ignored": signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
        "blocked": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        "fractions": "fractions" in sys.modules,
        "path": sys.path,
    }


def random_numbers():
    import random

    import numpy.random

    return random.random(), numpy.random.random()


def product_and_gradient():
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 700, generator=generator, requires_grad=True)
    y = torch.randn(700, 200, generator=generator)
    (x @ y).softmax(-1).square().sum().backward()
    return x.grad.numpy().tobytes()


def ask(*questions):
    return [ask_coordinator(question) for question in questions]


def ask_and_die(question):
    threading.Timer(0.2, kill_itself).start()
    ask_coordinator(question)


def ask_after_the_coordinators_end(path):
    while not stop_requested():
        time.sleep(0.01)
    Path(path).write_text(str(ask_coordinator("are you there?")))
