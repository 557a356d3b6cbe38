"""Keep freed memory in the process, for training on a CPU.

glibc's malloc returns every large tensor to the kernel when it is freed, and each step then faults all its pages in
again. With a high threshold it keeps them, at the price of some memory between the peaks.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Parameters of mallopt(3)."""


@cache
def keep_freed_memory() -> bool:
    """Have malloc keep what is freed, for the rest of this process. Returns False where the C library is not glibc."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, (1 << 31) - 1), (M_TOP_PAD, 64 << 20))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)
