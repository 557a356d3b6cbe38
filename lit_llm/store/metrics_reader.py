"""Reader of metrics.jsonl from a mark onwards, while its run appends to it or cuts it back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeGuard
from zlib import crc32

ReadPosition = Sequence[int]
"""(start, end, CRC-32) of the last line that was read."""
Point = tuple[str, float, int, int]
"""Metric name, value, Unix time in ms, step: the order of `mlflow.entities.Metric`."""


def stamp_of(path: Path) -> tuple[int, int] | None:
    """(size, time) of a file, which changes with it; None without a file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


def complete_lines(path: Path, location: ReadPosition) -> tuple[list[bytes], ReadPosition]:
    """The complete lines after the marked one, or all if the marked line is gone, and the next mark."""
    start, end, checksum = location
    try:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read()
            if crc32(data[: end - start]) != checksum:  # a line holds the time it was written at, so it is unique
                file.seek(0)
                location = start, end, _ = 0, 0, 0
                data = file.read()
    except FileNotFoundError:
        return [], location
    new = data[end - start : data.rfind(b"\n") + 1]
    if not new:
        return [], location
    last = new.rfind(b"\n", 0, len(new) - 1) + 1
    return new.splitlines(), (end + last, end + len(new), crc32(new[last:]))


def points_of(prefix: str, lines: Iterable[bytes]) -> Iterator[Point]:
    """Points of the finite numbers of each line, with prefixed names."""
    for line in lines:
        try:
            entry = json.loads(line)
            step, ms, metrics = int(entry["step"]), int(entry["time"] * 1000), dict(entry["metrics"])
        except (ValueError, TypeError, KeyError):  # half a line of a killed worker
            continue
        yield from ((key(f"{prefix}{name}"), value, ms, step) for name, value in metrics.items() if is_number(value))


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)


def key(name: str) -> str:
    """A name with replacements for characters that MLflow refuses in metrics and params."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]
