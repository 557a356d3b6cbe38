"""The command line, in the test's own process, or in one of its own where the process is what is tested."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import traceback
import types
from pathlib import Path

import pytest

from lit_llm.cli import main


def lit_llm(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What `lit-llm ARGUMENTS` prints and how it ends, without a process that imports torch and MLflow anew."""
    line = ["lit-llm", *map(str, arguments)]
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)]
    code: object = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.chdir(cwd or Path.cwd()),
        contextlib.redirect_stdout(streams[0]),
        contextlib.redirect_stderr(streams[1]),
    ):
        patch.setattr(sys, "argv", line)
        patch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))  # else the usage would name pytest
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        except Exception:  # the interpreter's own end of a program
            traceback.print_exc()
            code = 1
    assert isinstance(code, int), "`main` ends by an exit with a number"
    printed = [stream.buffer.getvalue().decode() for stream in streams]
    return subprocess.CompletedProcess(line, code, *printed)


def command(*arguments: object) -> list[str]:
    """What starts `lit-llm ARGUMENTS` as a process."""
    return [sys.executable, "-m", "lit_llm", *map(str, arguments)]


def in_a_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The same in a process: MLflow remembers where a store's artifacts were for as long as one lives."""
    return subprocess.run(command(*arguments), capture_output=True, text=True)
