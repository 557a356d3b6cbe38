"""Identity of the signatures by which near-duplicates are recognised, and of what is left out by them."""

from __future__ import annotations

from importlib.metadata import version

from lit_llm.config.fingerprint import fingerprint

THRESHOLD = 0.8
"""Share of common shingles from which two documents count as near-duplicates."""
FORMAT = 1
"""Number of the form of the signatures: words of a shingle, bands, rows, and how documents are compared."""


def identify_signatures(digests: list[str], validation: float, test: float) -> str:
    """Identity of the signatures of all held-out documents of some texts, and of their near-duplicates."""
    about = {"format": FORMAT, "threshold": THRESHOLD, "library": version("rensa"), "documents": sorted(set(digests))}
    return fingerprint({**about, "held_out": [validation, test]})
