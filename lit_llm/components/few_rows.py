"""Functions of few rows on a CPU, as decoding computes them, compiled from `few_rows.cpp`.

On two cores of an AMD EPYC the product takes a third of the time of MKL, which torch calls, for up to four rows of
float32, and half of it for sixteen; in bfloat16 one or two rows gain. Attention takes two thirds of torch's time.
A norm or a rotation is one call in place of seven. See `docs/speed.md`.

The C++ is compiled once for each kind of CPU, in about a second, into the user's cache. Without a compiler, and on
systems other than Linux, torch computes all of it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llm.config.hashing import user_cache
from lit_llm.config.machine import compiler, cpu_flags

MOST_ROWS = {torch.float32: 16, torch.bfloat16: 2}
"""Numbers of rows up to which the compiled product is faster, by dtype."""
MOST_ENTRIES = 2**14
"""Entries up to which a norm or rotation by one compiled call, in one thread, is faster than by torch's several."""
SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ["-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fPIC"]
_LONGEST_COMPILATION = 60.0


class Functions(NamedTuple):
    """The compiled functions for one dtype; see `few_rows.cpp`."""

    most_rows: int
    """Number of rows up to which the product is faster than torch's."""
    product: Callable[..., None]
    attention: Callable[..., None]
    rms_norm: Callable[..., None]
    rotate: Callable[..., None]


class Linear(nn.Linear):
    """xWᵀ, plus a bias where there is one, for few rows without gradients by the compiled product."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """... x inputs -> ... x outputs."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """xWᵀ + b, by the compiled product where it is faster."""
    functions = functions_for(x, weight)
    if functions is None or x.shape[-1] != weight.shape[1]:
        return F.linear(x, weight, bias)
    if not 0 < (rows := x.numel() // weight.shape[1]) <= functions.most_rows:
        return F.linear(x, weight, bias)
    x = x.contiguous()
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    pointers = weight.data_ptr(), x.data_ptr(), out.data_ptr()
    functions.product(*pointers, weight.shape[0], weight.shape[1], rows, torch.get_num_threads())
    return out if bias is None else out + bias


class _Used(threading.local):
    """Switch of this thread: true while it computes few rows and nobody has to see torch's operations."""

    now = False


_used = _Used()


@contextmanager
def few_rows() -> Iterator[None]:
    """Context in which the functions of this file take the place of torch's, where inputs suit them.

    Without effect with gradients, under autocast, in a compiler, or in a mode that sees torch's operations, such as a
    counter of FLOPs.
    """
    before = _used.now
    _used.now = (
        not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch._C._len_torch_dispatch_stack() == 0
    )
    try:
        yield
    finally:
        _used.now = before


def functions_for(x: Tensor, *others: Tensor | None) -> Functions | None:
    """The compiled functions for an input and the contiguous tensors that it is combined with; None: use torch's.

    Callers check the shapes: the functions read memory without looking.
    """
    if torch.compiler.is_compiling() or not _used.now or x.device.type != "cpu":
        return None  # compiling is asked first: torch's compiler does not read what belongs to a thread
    for other in others:
        if other is not None and (other.dtype != x.dtype or not other.is_contiguous()):
            return None
    functions = compiled()
    return None if functions is None else functions.get(x.dtype)


@functools.cache
def compiled() -> dict[torch.dtype, Functions] | None:
    """{dtype: functions}; None where they cannot be compiled or loaded."""
    found = compiler()
    if sys.platform != "linux" or found is None:
        return None
    try:
        library = ctypes.CDLL(str(_library(found)), mode=os.RTLD_NOW)
    except (OSError, subprocess.SubprocessError) as error:
        logging.getLogger(__name__).warning("%s does not compile %s: %s; torch computes instead", found, SOURCE, error)
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    arguments: dict[str, list[Any]] = {
        "product": [pointer, pointer, pointer, size, size, size, ctypes.c_int],
        "attention": [*[pointer] * 5, *[size] * 7, ctypes.c_float, ctypes.c_int],
        "rms_norm": [pointer, pointer, pointer, size, size, ctypes.c_double],
        "rotate": [pointer, pointer, pointer, pointer, size, size, size],
    }

    def function(name: str, dtype: str) -> Callable[..., None]:
        made = library[f"{name}_{dtype}"]
        made.argtypes, made.restype = arguments[name], None
        return made

    return {
        dtype: Functions(rows, *(function(name, str(dtype).removeprefix("torch.")) for name in arguments))
        for dtype, rows in MOST_ROWS.items()
    }


def _library(compiler_path: str) -> Path:
    """Path of the shared library for this CPU, compiled if it is not there yet."""
    made_of = [SOURCE.read_text(), *FLAGS, compiler_path, *sorted(cpu_flags())]
    folder = user_cache()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"few_rows-{hashlib.sha256('/'.join(made_of).encode()).hexdigest()[:16]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            compiled_to, linked_to = Path(work) / "few_rows.o", Path(work) / path.name
            # Linked without OpenMP's library: torch has loaded one, and two would compete for the cores.
            commands = (
                [*FLAGS, "-c", str(SOURCE), "-o", str(compiled_to)],
                ["-shared", str(compiled_to), "-o", str(linked_to)],
            )
            for command in commands:
                subprocess.run([compiler_path, *command], check=True, capture_output=True, timeout=_LONGEST_COMPILATION)
            linked_to.replace(path)
    return path
