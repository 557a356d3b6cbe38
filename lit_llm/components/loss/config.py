"""Chunk sizes of the loss. Loads no torch."""

MOST_ENTRIES = 1 << 25
"""Most logits that exist at the same time, 128 MiB in float32."""
CPU_ENTRIES = 1 << 22
"""Logits of a chunk on a CPU."""
CPU_ROWS = 512
"""Rows of a chunk on a CPU, even where these are more logits than CPU_ENTRIES: a product for fewer is slow."""
CACHED_ENTRIES = 1 << 19
"""Logits that stay in a CPU's cache, 2 MiB in float32, while the softmax passes over them several times."""


def chunk_rows(vocabulary: int, device: str) -> int:
    """Number of positions whose logits exist at the same time. device: type of the device, such as cuda."""
    most = max(1, MOST_ENTRIES // vocabulary)
    return min(most, max(CPU_ROWS, CPU_ENTRIES // vocabulary)) if device == "cpu" else most


def pass_rows(vocabulary: int, device: str) -> int:
    """Number of positions that the softmax passes over together, at most those of a chunk."""
    return max(1, CACHED_ENTRIES // vocabulary) if device == "cpu" else chunk_rows(vocabulary, device)
