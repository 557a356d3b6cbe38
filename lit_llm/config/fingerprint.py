"""Fingerprints: the identity of what was computed. Equal content, equal name; nothing else goes in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LENGTH = 16
"""Hexadecimal digits: 64 bits, so a million stages collide with probability 3e-8."""


def fingerprint(content: Any) -> str:
    """Hash of plain data (the validated dump, not the text it was written in). 1 and 1.0 are one number."""
    text = json.dumps(_canonical(content), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def digest_of_files(files: Iterable[tuple[str, Path]]) -> str:
    """Hash over (name, content) pairs, in the order given."""
    total = hashlib.sha256()
    for name, path in files:
        total.update(f"{name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    return total.hexdigest()[:LENGTH]
