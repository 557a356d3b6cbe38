"""Names of this host and of this process among all that share a file system."""

from __future__ import annotations

import os
import re
import socket


def host_name() -> str:
    """Name of this machine, with characters that are safe in a file's name."""
    return re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())


def process_name() -> str:
    """`HOST-PID` of this process, for names of work files: process ids alone collide between hosts."""
    return f"{host_name()}-{os.getpid()}"
