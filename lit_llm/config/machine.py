"""This machine's C++ compiler and instruction sets."""

from __future__ import annotations

import os
import platform
import re
import shutil
from functools import cache
from pathlib import Path


def compiler_name() -> str:
    """Name of the C++ compiler that torch takes too: that of `CXX`, a single program, or the platform's."""
    return os.environ.get("CXX") or ("clang++" if platform.system() == "Darwin" else "g++")


def compiler() -> str | None:
    """Path of the C++ compiler; None where there is none."""
    return shutil.which(compiler_name())


@cache
def cpu_flags() -> frozenset[str]:
    """Names of the CPU's instruction sets; empty where unknown."""
    try:
        listed = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        listed = None
    return frozenset(listed[1].split()) if listed else frozenset()
