"""Chunk size of the loss. Loads no torch."""

CHUNK_ENTRIES = 1 << 25
"""Most logits held at once, 128 MiB in float32. More are computed in chunks, and again in the backward pass."""


def chunk_rows(vocabulary: int) -> int:
    """Number of positions whose logits are held at once."""
    return max(1, CHUNK_ENTRIES // vocabulary)
