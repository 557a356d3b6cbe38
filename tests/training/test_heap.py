"""Freed memory stays in a process that trains on a CPU."""

import platform
import subprocess
import sys

import pytest


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_what_is_freed_is_not_faulted_in_again():
    """In a process of its own: page faults of ten allocations of 64 MB, of which the first faults each page in."""
    script = """
import resource, sys
from lit_llm.training.heap import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "keep":
    assert keep_freed_memory()
bytearray(64 << 20)
before = faults()
for _ in range(9):
    bytearray(64 << 20)
print(faults() - before)
"""
    kept, plain = (
        int(subprocess.run([sys.executable, "-c", script, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "plain")
    )
    assert plain > 9 * 20, "32 huge pages each, or 16,384 small ones"
    assert 10 * kept < plain
