"""How much of the loss exists at one time. Loads no torch."""

CHUNK_ENTRIES = 1 << 25
"""Logits held at once, 128 MiB in float32. Beyond that they are computed in chunks, and again in the backward pass."""


def chunk_rows(vocabulary: int) -> int:
    """Positions whose logits are held at once."""
    return max(1, CHUNK_ENTRIES // vocabulary)
