"""R as a judge: scripts over data frames, and analyses whose numbers ours have to match."""

from __future__ import annotations

import csv
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import pytest

Record = Mapping[str, object]
"""A row of a data frame."""


def requires_r(*packages: str) -> pytest.MarkDecorator:
    """Skips where R or one of these packages is not installed."""
    lacking = ["Rscript"] if shutil.which("Rscript") is None else sorted(set(packages) - installed_packages())
    return pytest.mark.skipif(bool(lacking), reason=f"R as a judge needs {', '.join(lacking)}")


@lru_cache
def installed_packages() -> frozenset[str]:
    command = ["Rscript", "-e", "cat(list.files(.libPaths()))"]
    return frozenset(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def run_r(script: str, **frames: Sequence[Record]) -> list[dict[str, str]]:
    """The rows of the data frame `result` that a script leaves; each of the frames is a variable of it.

    Strings become factors. R takes about half a second to start, so one script best has all cases of a test.
    """
    with tempfile.TemporaryDirectory() as folder:
        lines = []
        for name, rows in frames.items():
            with (Path(folder) / f"{name}.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            lines.append(f"{name} <- read.csv('{name}.csv', stringsAsFactors = TRUE)")
        lines += [script, "write.csv(result, 'result.csv', row.names = FALSE)"]
        (Path(folder) / "script.R").write_text("\n".join(lines))
        done = subprocess.run(["Rscript", "script.R"], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        with (Path(folder) / "result.csv").open() as file:
            return list(csv.DictReader(file))
