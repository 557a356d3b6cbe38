"""Identity of the signatures of held-out documents, and so of the near-duplicates that are left out."""

from __future__ import annotations

from importlib.metadata import version

from lit_llm.config.hashing import fingerprint

THRESHOLD = 0.8
"""Least share of common shingles of two near-duplicates."""
FORMAT = 1
"""Version of the signatures: words of a shingle, bands, rows, and comparison."""


def identify_signatures(digests: list[str], validation: float, test: float) -> str:
    """Digest of the signatures of all held-out documents of some texts. digests: those of the texts."""
    about = {"format": FORMAT, "threshold": THRESHOLD, "library": version("rensa"), "documents": sorted(set(digests))}
    return fingerprint({**about, "held_out": [validation, test]})
