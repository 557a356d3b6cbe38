"""Fractions of two-level factorials: judged by the tables of the textbooks, by pyDOE3, and by the matrix itself."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pyDOE3
import pytest

from lit_llm.studies.fractional_factorial import Fraction, effect_of, find, lettered, members_of, sign

NIST = {
    3: {4: 3},
    4: {8: 4},
    5: {16: 5, 8: 3},
    6: {32: 6, 16: 4, 8: 3},
    7: {64: 7, 32: 4, 16: 4, 8: 3},
    8: {128: 8, 64: 5, 32: 4, 16: 4},
    9: {128: 6, 64: 4, 32: 4, 16: 3},
    10: {128: 5, 64: 4, 32: 4, 16: 3},
    11: {128: 5, 64: 4, 32: 4, 16: 3},
    15: {16: 3},
}
"""{factors: {combinations: resolution}}: NIST/SEMATECH e-Handbook of Statistical Methods, 5.3.3.4.7."""

LEAST_ABERRATION = {
    (6, 16): [0, 3, 0, 0],
    (7, 32): [0, 1, 2, 0, 0],
    (7, 16): [0, 7, 0, 0, 0],
    (8, 64): [0, 0, 2, 1, 0, 0],
    (8, 32): [0, 3, 4, 0, 0, 0],
    (8, 16): [0, 14, 0, 0, 0, 1],
    (9, 64): [0, 1, 4, 2, 0, 0, 0],
    (9, 32): [0, 6, 8, 0, 0, 1, 0],
    (9, 16): [4, 14, 8, 0, 4, 1, 0],
    (10, 32): [0, 10, 16, 0, 0, 5, 0, 0],
}
"""{(factors, combinations): words of length 3, 4, ..}: Chen, Sun and Wu 1993, A catalogue of two-level and three-level
fractional factorial designs with small runs; Fries and Hunter 1980."""

CASES = [(factors, size) for factors, sizes in NIST.items() for size in sizes]


def fraction_of(factors: int, size: int, *clear: int, resolution: int = 3) -> Fraction:
    found = find(factors, resolution, clear, size)
    assert found is not None
    return found


def coded(fraction: Fraction) -> np.ndarray:
    """The design matrix with -1 for first levels, as the textbooks have it."""
    return 2 * np.array(fraction.combinations) - 1


def column(matrix: np.ndarray, effect: int) -> np.ndarray:
    return matrix[:, members_of(effect)].prod(axis=1)


@pytest.mark.parametrize(("factors", "size"), CASES)
def test_a_fraction_of_a_size_has_the_resolution_of_the_table(factors: int, size: int) -> None:
    assert fraction_of(factors, size).resolution == NIST[factors][size]


@pytest.mark.parametrize(("factors", "resolution"), itertools.product([n for n in NIST if n < 15], [3, 4, 5]))
def test_the_smallest_fraction_of_the_table_that_has_the_resolution_is_taken(factors: int, resolution: int) -> None:
    wanted = min((size for size, has in NIST[factors].items() if has >= resolution), default=None)
    found = find(factors, resolution)
    assert (found and found.size) == wanted


@pytest.mark.parametrize(("factors", "size"), LEAST_ABERRATION)
def test_of_equal_fractions_the_one_with_the_fewest_short_words_is_taken(factors: int, size: int) -> None:
    lengths = [word.bit_count() for word in fraction_of(factors, size).words]
    assert [lengths.count(n) for n in range(3, factors + 1)] == LEAST_ABERRATION[factors, size]


@pytest.mark.parametrize(("factors", "size"), CASES)
def test_words_and_resolution_are_those_of_the_matrix(factors: int, size: int) -> None:
    """A word is a product of columns that never changes; every one of 2^n products is looked at."""
    fraction = fraction_of(factors, size)
    matrix = coded(fraction)
    assert matrix.shape == (size, factors)
    assert len({tuple(row) for row in matrix}) == size
    constant = {effect for effect in range(1, 1 << factors) if abs(column(matrix, effect).sum()) == size}
    assert set(fraction.words) == constant
    assert all((column(matrix, word) == sign(word, 0)).all() for word in fraction.words)


@pytest.mark.parametrize(("factors", "size"), CASES)
def test_the_baseline_is_in_it_and_first_and_every_level_comes_equally_often(factors: int, size: int) -> None:
    matrix = coded(fraction_of(factors, size))
    assert (matrix[0] == -1).all()
    assert (matrix.T @ matrix == size * np.eye(factors)).all()


@pytest.mark.parametrize(("factors", "size"), [(5, 8), (7, 8), (7, 16), (9, 16), (11, 64)])
def test_an_alias_is_the_same_column_up_to_its_sign(factors: int, size: int) -> None:
    fraction = fraction_of(factors, size)
    matrix = coded(fraction)
    effects = [effect_of(*chosen) for n in (1, 2) for chosen in itertools.combinations(range(factors), n)]
    for effect in effects:
        others = [other for other in effects if other != effect]
        same = {o: int(column(matrix, effect) @ column(matrix, o)) // size for o in others}
        told = {alias: sign(effect, alias) for alias in fraction.aliases(effect) if alias.bit_count() <= 2}
        assert told == {other: product for other, product in same.items() if product}
        assert fraction.is_clear(effect) == (not told)


@pytest.mark.parametrize(("factors", "size"), CASES)
def test_pydoe_builds_the_same_combinations_from_the_generators(factors: int, size: int) -> None:
    """Without interactions the first factors are the whole factorial; a factor of an even product is its opposite."""
    fraction = fraction_of(factors, size)
    bits = size.bit_length() - 1
    written = [chr(97 + i) for i in range(bits)]
    for i, word in enumerate(fraction.generators):
        made_of = [member for member in members_of(word) if member < bits]
        assert members_of(word) == [*made_of, bits + i]
        written.append("-" * (len(made_of) % 2 == 0) + "".join(chr(97 + member) for member in made_of))
    assert {tuple(row) for row in pyDOE3.fracfact(" ".join(written))} == {tuple(row) for row in coded(fraction)}


@pytest.mark.parametrize(
    ("factors", "size", "pairs"),
    [
        (6, 32, ["AB"]),
        (7, 32, ["AB", "AC", "FG"]),
        (8, 32, ["GH", "AB"]),
        (9, 32, ["AB", "AC", "AD", "AE", "AF", "AG", "AH", "AJ"]),
        (10, 64, ["BK", "CK", "JK"]),
    ],
)
def test_factors_take_the_columns_in_which_the_wanted_interactions_are_clear(
    factors: int, size: int, pairs: list[str]
) -> None:
    wanted = [effect_of(*("ABCDEFGHJK".index(letter) for letter in pair)) for pair in pairs]
    assert list(map(lettered, wanted)) == pairs
    fraction = fraction_of(factors, size, *wanted, resolution=4)
    matrix = coded(fraction)
    others = [effect_of(*chosen) for n in (1, 2) for chosen in itertools.combinations(range(factors), n)]
    for effect in wanted:
        assert [o for o in others if o != effect and column(matrix, effect) @ column(matrix, o)] == []
    constant = {effect for effect in range(1, 1 << factors) if abs(column(matrix, effect).sum()) == size}
    assert set(fraction.words) == constant
    assert fraction.resolution >= 4


@pytest.mark.parametrize(("bits", "resolution"), [(3, 3), (4, 3), (4, 4), (5, 4)])
def test_an_interaction_can_be_clear_in_as_many_factors_as_the_theorem_says(bits: int, resolution: int) -> None:
    """Chen and Hedayat 1998, J. Stat. Plan. Inference 75: of 2^k combinations of resolution III exactly up to 2^(k-1)
    factors, of resolution IV exactly up to 2^(k-2) + 1."""
    most = 2 ** (bits - 1) if resolution == 3 else 2 ** (bits - 2) + 1
    for factors in range(bits + 1, most + 3):
        found = find(factors, resolution, (effect_of(0, 1),), 1 << bits)
        assert (found is not None) == (factors <= most)


def test_a_larger_fraction_than_was_asked_for_is_never_taken() -> None:
    assert find(7, 4, (effect_of(0, 1),)) is None
    assert find(7, 4, (effect_of(0, 1),), 32) is not None


def test_the_same_question_has_the_same_answer_in_another_process() -> None:
    code = "from lit_llm.studies.fractional_factorial import *; print(find(9, 4, (3, 257, 384), 64), find(11, 4))"

    def ask(seed: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}, check=True,
            capture_output=True, text=True,
        ).stdout  # fmt: skip

    assert ask("1") == ask("2") != ""
