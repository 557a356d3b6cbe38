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
    """Make malloc keep freed memory, for the rest of this process.

    Returns False where the C library is not glibc, or where it refuses a setting.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Older versions accept thresholds up to 32 MiB alone.
    mapped = mallopt(M_MMAP_THRESHOLD, 1 << 30) or mallopt(M_MMAP_THRESHOLD, 1 << 25)
    return bool(mapped & mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1) & mallopt(M_TOP_PAD, 64 << 20))
