"""Makes a Python process behave as on another host, with a disk like a network file system's.

Read at the start of every Python process whose PYTHONPATH has this folder, so also by processes of processes.

TEST_FLOCK=off      kernel locks are granted to all, as on some network mounts
TEST_EXCHANGE=off   two names cannot be exchanged, as on NFS
TEST_HOST=NAME      name of the host
TEST_SKEW=SECONDS   the host's clock is ahead by so many seconds, also in the times that it gives to files
"""

import os
import socket
import time

if os.environ.get("TEST_FLOCK") == "off":
    import fcntl

    fcntl.flock = lambda *_: None
if os.environ.get("TEST_EXCHANGE") == "off":
    from filelock._soft._exclusive import _recovery

    assert callable(_recovery.exchange_names)
    _recovery.exchange_names = lambda *_: False
if host := os.environ.get("TEST_HOST"):
    socket.gethostname = lambda: host
if skew := float(os.environ.get("TEST_SKEW", "0")):
    clock, utime = time.time, os.utime
    time.time = lambda: clock() + skew

    def skewed_utime(path, times=None, **more):
        if times is None and "ns" not in more:
            times = (time.time(), time.time())
        utime(path, times, **more)

    os.utime = skewed_utime
    os.supports_fd = os.supports_fd | {skewed_utime}
