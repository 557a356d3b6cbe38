"""Fractions of a two-level factorial: which combinations to run, and which effects are aliased.

In a fraction of 2^k combinations the level of each factor is the sum, modulo 2, of some of k independent bits: its
column. A word is a set of factors whose columns sum to zero modulo 2; effects that differ by a word cannot be told
apart, and the length of the shortest word is the resolution. All bits zero is the combination of all first levels, the
baseline, which every fraction contains.

Source: Box, Hunter and Hunter, Statistics for Experimenters, 2nd ed., chapter 6; NIST/SEMATECH e-Handbook, 5.3.3.4.
Sets of factors and of bits are integers here, bit i for the i-th.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import comb

LETTERS = "ABCDEFGHJKLMNOPQ"
"""Letters of the factors, in their order; I is the identity of the defining relation."""
MOST = 15
"""Largest number of factors of a fraction; a search with more would take minutes."""
_PATIENCE = 400_000
"""Words that the search for the best design of a size visits; up to 9 factors that covers every design."""
_PLACINGS = 300
"""Assignments of columns to the factors of requested interactions that are tried in one design."""


@dataclass(frozen=True)
class Fraction:
    """A regular fraction of a two-level factorial."""

    columns: tuple[int, ...]
    """For each factor, the bits that its level is the sum of."""
    generators: tuple[int, ...]
    """Independent words, which together make all the others."""

    @property
    def size(self) -> int:
        """Number of combinations."""
        return 1 << (len(self.columns) - len(self.generators))

    @cached_property
    def combinations(self) -> tuple[tuple[int, ...], ...]:
        """The level, 0 or 1, of every factor; the baseline first, the last factor changing fastest."""
        bits = range(self.size)
        return tuple(sorted(tuple((column & bit).bit_count() % 2 for column in self.columns) for bit in bits))

    @cached_property
    def words(self) -> tuple[int, ...]:
        """Every word, the shortest first."""
        return tuple(sorted(_words_of(self.generators), key=by_size))

    @property
    def resolution(self) -> int:
        return self.words[0].bit_count()

    def aliases(self, effect: int) -> list[int]:
        """Effects aliased with this one, those of the fewest factors first."""
        return sorted((effect ^ word for word in self.words), key=by_size)

    def is_clear(self, effect: int) -> bool:
        """True where an effect is aliased with neither a main effect nor a two-factor interaction."""
        return all(alias.bit_count() > 2 for alias in self.aliases(effect))


def sign(effect: int, alias: int) -> int:
    """Sign of an alias in the estimate. Levels are coded -1 and +1, the baseline is all -1."""
    return -1 if (effect ^ alias).bit_count() % 2 else 1


def by_size(effect: int) -> tuple[int, list[int]]:
    """Sort key for the order A, B, .., AB, AC, .., BC, .."""
    members = members_of(effect)
    return len(members), members


def members_of(effect: int) -> list[int]:
    """Indices of the factors of an effect."""
    return [i for i in range(effect.bit_length()) if effect >> i & 1]


def effect_of(*factors: int) -> int:
    return sum(1 << factor for factor in factors)


def lettered(effect: int) -> str:
    """An effect in letters, `ABD`."""
    return "".join(LETTERS[i] for i in members_of(effect))


def aliases_in_letters(fraction: Fraction, effect: int) -> str:
    """Aliases as `−BD −CE ...`: main effects and two-factor interactions with signs, `...` for more factors."""
    aliases = fraction.aliases(effect)
    short = [f"{'+' if sign(effect, a) > 0 else '−'}{lettered(a)}" for a in aliases if a.bit_count() <= 2]
    return " ".join(short + ["..."] * (len(short) < len(aliases)))


@cache
def find(factors: int, resolution: int, clear: tuple[int, ...] = (), size: int | None = None) -> Fraction | None:
    """The fraction of least aberration (the fewest short words) in which every effect of `clear` is clear.

    size: number of combinations, a power of two; the smallest with this resolution when None. Returns None where no
    such fraction exists. The same arguments always give the same fraction.
    """
    for bits in range(2, factors) if size is None else [size.bit_length() - 1]:
        if fraction := _best(factors, bits, resolution, clear):
            return fraction
        if clear and _best(factors, bits, resolution, ()):
            return None
    return None


def _best(factors: int, bits: int, resolution: int, clear: tuple[int, ...]) -> Fraction | None:
    # From the highest resolution downwards: it has few designs, so the search covers all of them.
    candidates = (_least_aberration(factors, bits, high, clear) for high in range(factors, resolution - 1, -1))
    return next(filter(None, candidates), None)


def _least_aberration(factors: int, bits: int, resolution: int, clear: tuple[int, ...]) -> Fraction | None:
    best, least = None, None
    for generators, every in _designs(factors, bits, resolution):
        lengths = Counter(word.bit_count() for word in every)
        pattern = [lengths[length] for length in range(resolution, factors + 1)]
        if least is not None and pattern >= least:
            continue
        columns = [*(1 << i for i in range(bits)), *(word & ((1 << bits) - 1) for word in generators)]
        order = _placed(columns, clear)
        if order is None:
            continue
        words = [effect_of(*(order.index(i) for i in members_of(word))) for word in generators]
        best, least = Fraction(tuple(columns[i] for i in order), tuple(words)), pattern
    return best


def _words_of(generators: Sequence[int]) -> list[int]:
    """Every combination (xor) of generators: the words of the defining relation."""
    words = [0]
    for generator in generators:
        words += [word ^ generator for word in words]
    return words[1:]


def _designs(factors: int, bits: int, resolution: int) -> Iterator[tuple[list[int], list[int]]]:
    """Generators and words of every design up to renaming of factors; the first factors are the bits.

    Generators come in order of falling length, so the first one can be restricted to the first bits.
    """
    lengths = range(bits, max(resolution - 1, 2) - 1, -1)
    sums = [effect_of(*chosen) for length in lengths for chosen in itertools.combinations(range(bits), length)]
    patience = _PATIENCE

    def extend(chosen: list[int], words: list[int], rest: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
        nonlocal patience
        if len(chosen) == factors - bits:
            yield chosen, words
            return
        new = 1 << (bits + len(chosen))
        missing = factors - bits - len(chosen)
        for index, column in enumerate(rest[: len(rest) - missing + 1]):
            if not chosen and column != (1 << column.bit_count()) - 1:
                continue
            patience -= 1 + len(words)
            if patience < 0:
                return
            more = [word ^ column ^ new for word in (0, *words)]
            if all(word.bit_count() >= resolution for word in more):
                yield from extend([*chosen, column | new], [*words, *more], rest[index + 1 :])

    if factors - bits <= len(sums) and _possible(factors, bits, resolution):
        yield from extend([], [], sums)


def _possible(factors: int, bits: int, resolution: int) -> bool:
    """True where there are enough combinations for this resolution (bound of Rao)."""
    half, odd = divmod(resolution - 1, 2)
    least = sum(comb(factors, i) for i in range(half + 1)) + odd * comb(factors - 1, half)
    return least <= 1 << bits


def _placed(columns: Sequence[int], clear: tuple[int, ...]) -> list[int] | None:
    """The column of each factor such that the effects of `clear` are clear; None where the search finds none."""
    sums = Counter(a ^ b for a, b in itertools.combinations(columns, 2))
    aliased = {column for column, number in sums.items() if number > 1} | set(columns)
    pairs = [frozenset(j for j, b in enumerate(columns) if b != a and a ^ b not in aliased) for a in columns]
    taken = _embedded(tuple(pairs), clear)
    if taken is None:
        return None
    free = (column for column in range(len(columns)) if column not in taken.values())
    return [taken[factor] if factor in taken else next(free) for factor in range(len(columns))]


@cache
def _embedded(fine: tuple[frozenset[int], ...], clear: tuple[int, ...]) -> dict[int, int] | None:
    """{factor: column} for the factors of `clear`. fine: for each column, the columns of clear interactions with it."""
    wanted = [members_of(effect) for effect in clear]
    partners = {i: {j for pair in wanted if i in pair for j in pair if j != i} for pair in wanted for i in pair}
    involved = sorted(partners, key=lambda factor: (-len(partners[factor]), factor))  # the hardest to place first
    has, needs = (sorted(map(len, sets), reverse=True) for sets in (fine, partners.values()))
    if sum(has) < sum(needs) or any(need > most for need, most in zip(needs, has, strict=False)):
        return None
    taken: dict[int, int] = {}
    tries = _PLACINGS

    def place(number: int) -> bool:
        nonlocal tries
        if number == len(involved):
            return True
        factor = involved[number]
        placed = [taken[other] for other in partners[factor] if other in taken]
        for column in range(len(fine)):
            if column in taken.values() or len(fine[column]) < len(partners[factor]):
                continue
            tries -= 1
            if tries < 0:
                return False
            if all(other in fine[column] for other in placed):
                taken[factor] = column
                if place(number + 1):
                    return True
                del taken[factor]
        return False

    return taken if place(0) else None
