"""False discoveries over many studies: differences that were tested, called, and are expected to be false.

A study bounds its own errors at best, so among fifty studies some true zeros are called different. The procedure of
Benjamini and Hochberg over all tests (1995, J. R. Stat. Soc. B 57) gives each test a q-value: the largest expected
share of false discoveries among all differences called at its p-value or below.
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
    """Two-sided p-value of no difference; adjusted for interim analyses, not for the other arms."""
    verdict: str

    @property
    def called(self) -> bool:
        return self.verdict in DIFFERENT


@dataclass(frozen=True)
class FalseDiscoveries:
    """The tests of a store together, and how many of their findings may be false."""

    studies: int
    """Studies that tested a difference."""
    tested: int
    called: int
    expected_false: float | None
    """Largest expected share of false discoveries among the called differences; None where none was called."""
    q_values: tuple[tuple[DifferenceTest, float], ...]
    """(test, q-value) of every test, in the order of the studies."""


def false_discoveries(tests: Sequence[DifferenceTest]) -> FalseDiscoveries:
    """The q-value of every test, and the expected share of false discoveries among the called differences.

    The share is the largest q-value of a called difference. It is an upper limit: the procedure takes all tests for
    true zeros, and a study that corrects for its arms calls fewer differences than its p-values alone would.
    """
    q = fdr_bh({str(at): test.p for at, test in enumerate(tests)})
    paired = tuple((test, q[str(at)]) for at, test in enumerate(tests))
    called = [value for test, value in paired if test.called]
    studies = len({test.study for test in tests})
    return FalseDiscoveries(studies, len(tests), len(called), max(called, default=None), paired)
