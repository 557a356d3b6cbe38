"""False discoveries over many studies: how many differences were tested, called, and are expected to be false.

Each study bounds its own errors at best; whoever runs fifty studies calls some true zeros different. Benjamini's and
Hochberg's procedure over all tests (1995, J. R. Stat. Soc. B 57) gives each its q-value: the share of false ones that
is expected, at most, among all that are called at its p-value or below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lit_llm.statistics.multiple_comparisons import fdr_bh
from lit_llm.statistics.verdicts import DIFFERENT


@dataclass(frozen=True)
class DifferenceTest:
    """A difference that a study tested."""

    study: str
    arm: str
    p: float
    """Two-sided p-value of no difference; counts the looks where there were several, not the other arms."""
    verdict: str

    @property
    def called(self) -> bool:
        return self.verdict in DIFFERENT


@dataclass(frozen=True)
class FalseDiscoveries:
    """All tests of a store together."""

    studies: int
    """With a difference that was tested."""
    tested: int
    called: int
    expected_false: float | None
    """Largest share of false ones that is expected among those called; None where none was called."""
    q_values: tuple[tuple[DifferenceTest, float], ...]
    """Of every test, in the order of the studies."""


def false_discoveries(tests: Sequence[DifferenceTest]) -> FalseDiscoveries:
    """The q-value of every test, and the share of false ones to expect among those that were called.

    That share is the largest q-value of a called one. It is an upper limit: it takes all tests for true zeros, as
    Benjamini and Hochberg do, and a study that corrects for its arms calls fewer than its p-values alone would.
    """
    q = fdr_bh({str(at): test.p for at, test in enumerate(tests)})
    paired = tuple((test, q[str(at)]) for at, test in enumerate(tests))
    called = [value for test, value in paired if test.called]
    studies = len({test.study for test in tests})
    return FalseDiscoveries(studies, len(tests), len(called), max(called, default=None), paired)
