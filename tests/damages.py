"""What becomes of files: cut short, emptied, a bit flipped, deleted, unreadable."""

from __future__ import annotations

import shutil
from pathlib import Path

DAMAGES = ("cut", "emptied", "flipped", "deleted", "unreadable")


def damage(path: Path, how: str) -> None:
    """Damage one file. Unreadable: a folder stands in its place, which stops root too."""
    content = path.read_bytes()
    if how in ("deleted", "unreadable"):
        path.unlink()
    if how == "cut":
        path.write_bytes(content[: len(content) * 2 // 3])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "flipped":
        path.write_bytes(flipped(content, len(content) // 2))
    elif how == "unreadable":
        path.mkdir()


def flipped(content: bytes, place: int, bit: int = 0) -> bytes:
    """The same with one bit changed."""
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def copied(store: Path, to: Path) -> Path:
    """A copy of a store, to be damaged."""
    shutil.copytree(store, to)
    return to
