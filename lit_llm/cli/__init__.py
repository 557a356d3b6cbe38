"""Commands. Each parses its options and calls one function that a notebook could call too."""

# ruff: noqa: I001 - the modules register their commands, in the order of the help
from __future__ import annotations

import io
import os
import sys

import typer

from lit_llm.cli import studies, diff, overview, noise, sweeps, places, trained, tools, bench, coordinates  # noqa: F401
from lit_llm.cli.app import app
from lit_llm.config.problems import InputError
from lit_llm.launch import stopped_as_by_ctrl_c
from lit_llm.store.disk import DiskError

__all__ = ["app", "main"]


def main() -> None:
    """Entry point: the user's errors are messages and exit code 2, never tracebacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that LANG=C or a pipe cannot show are escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        with stopped_as_by_ctrl_c():
            code = app(standalone_mode=False)
    except InputError as error:
        print(error.report(), file=sys.stderr)
        code = 2
    except DiskError as error:
        print(error, file=sys.stderr)
        code = 1
    except (KeyboardInterrupt, typer.Abort):
        print("Interrupted; the same command goes on.", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        if not hasattr(error, "show"):  # Typer's own: a wrong option
            raise
        error.show()
        code = getattr(error, "exit_code", 2)
    sys.exit(code if isinstance(code, int) else 0)
