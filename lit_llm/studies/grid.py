"""The section `grid` of a study file: factors, and how their levels are combined into arms."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lit_llm.config.problems import did_you_mean
from lit_llm.config.section import Items, Section, config_error
from lit_llm.studies.fractional_factorial import MOST, Fraction, effect_of, find, members_of

MOST_ARMS, MOST_FACTORS, MOST_RULES = 2_000, 100, 1_000
"""Limits that stop mistakes early: a plan visits every arm and names every run."""

Tree = dict[str, Any]
"""Keys of an experiment, checked when the arms are put together."""


class Grid(Section):
    """Factors and how their levels are combined."""

    design: Literal["factorial", "one_at_a_time", "paired", "fractional_factorial"] = "one_at_a_time"
    """factorial: every combination; one_at_a_time: each level alone, the other factors at their first; paired: the i-th
    levels of all factors together; fractional_factorial: of many factors with two levels, only the combinations that
    separate their effects. A factorial of two-level factors, whole or fractional, also reports effects."""
    factors: dict[str, Items[Any] | Tree] = Field(min_length=1, max_length=MOST_FACTORS)
    """A key with its levels, `model.attention.qkv_norm: [[q, k, v], []]`, or a label with named bundles of keys,
    `split: {3/3: {model.encoder.layers: 3, model.decoder.layers: 3}, 5/1: {...}}`. The first one is the baseline's."""
    exclude: Annotated[Items[Tree], Field(max_length=MOST_RULES)] = ()
    """Combinations to leave out: `{model.attention.window: 64, pretrain.training.optimizer.lr: 1e-2}`. A
    factorial with exclusions is not balanced: its arms are compared, its effects are not estimated."""
    resolution: int = Field(4, ge=3)
    """Resolution of a fractional_factorial. 3: main effects are confounded with two-factor interactions; 4: with those
    of three factors, and two-factor interactions with each other; 5: two-factor interactions with those of three
    factors."""
    interactions: Items[Items[str]] = ()
    """Pairs of factors whose interaction a fractional_factorial must separate from main effects and from all other
    two-factor interactions: `[[model.attention.window, pretrain.training.optimizer.lr]]`."""
    combinations: int | None = None
    """Size of a fractional_factorial, a power of two; the smallest that has the resolution when absent."""

    @property
    def cells(self) -> int:
        """Combinations of levels before any is excluded."""
        counts = [len(levels) for levels in self.factors.values()]
        if self.design == "factorial":
            return prod(counts)
        if self.design == "paired":
            return counts[0]
        return self.fraction.size if self.fraction else 1 + sum(count - 1 for count in counts)

    @property
    def fraction(self) -> Fraction | None:
        """The fraction to run; None for other designs."""
        if self.design != "fractional_factorial":
            return None
        return find(len(self.factors), self.resolution, self.requested, self.combinations)

    @property
    def requested(self) -> tuple[int, ...]:
        """`interactions` as sets of factors, for the fraction."""
        names = list(self.factors)
        return tuple(dict.fromkeys(effect_of(*map(names.index, pair)) for pair in self.interactions))

    @model_validator(mode="after")
    def _has_levels(self) -> Grid:
        findings: list[tuple[str | tuple[str, ...], str]] = []
        for name, levels in self.factors.items():
            key = ("factors", name)  # the name may contain dots
            if len(levels) > MOST_ARMS:
                findings.append((key, f"has {len(levels)} levels, and a study has at most {MOST_ARMS} arms"))
                continue
            listed = levels if isinstance(levels, tuple) else ()
            repeated = any(a == b for i, a in enumerate(listed) for b in listed[:i])
            paired = self.design == "paired"
            if not levels:
                findings.append((key, "has no levels; give at least two, the baseline's first"))
            elif len(levels) == 1 or (paired and repeated and all(level == listed[0] for level in listed)):
                findings.append((key, "has one level, so nothing is switched; set it in `base` instead"))
            elif repeated and not paired:
                findings.append((key, "has the same level twice"))
            elif self.design == "fractional_factorial" and len(levels) != 2:
                what = f"has {len(levels)} {'levels' if isinstance(levels, tuple) else 'bundles'}"
                findings.append((key, f"{what}; a fractional_factorial takes two of each factor, the baseline's first"))
        findings += self._misplaced_keys()
        if not findings:
            findings += self._pairing_problems() if self.design == "paired" else self._fraction_problems()
        if findings:
            raise config_error(*findings)
        return self

    def _misplaced_keys(self) -> Iterator[tuple[str | tuple[str, ...], str]]:
        """Problems of keys that the design does not use."""
        for key in ("resolution", "interactions", "combinations"):
            if key in self.model_fields_set and self.design != "fractional_factorial":
                yield key, f"belongs to `design: fractional_factorial`, and this one is {self.design}"
        if self.exclude and self.design == "fractional_factorial":
            yield "exclude", "a fraction that lacks a combination cannot tell its effects apart; leave the factor out"
        if self.exclude and self.design == "paired":
            yield "exclude", "paired levels stand in the file one by one; take the level out of every factor instead"

    def _pairing_problems(self) -> Iterator[tuple[str | tuple[str, ...], str]]:
        """Problems of levels that make no pairs."""
        counts = [
            f"{name} has {len(levels)}{'' if isinstance(levels, tuple) else ' bundles'}"
            for name, levels in self.factors.items()
        ]
        if len({len(levels) for levels in self.factors.values()}) > 1:
            yield "factors", f"paired factors need equally many levels, and {', '.join(counts)}"
            return
        pairs = list(zip(*self.factors.values(), strict=True))
        for index, pair in enumerate(pairs):
            if pair in pairs[:index]:
                first = pairs.index(pair) + 1
                yield "factors", f"the levels number {first} and {index + 1} of all factors are the same; leave one out"

    def _fraction_problems(self) -> Iterator[tuple[str | tuple[str, ...], str]]:
        """Problems of a design without a fraction, each with a remedy."""
        if self.design != "fractional_factorial":
            return
        count, whole = len(self.factors), 1 << len(self.factors)
        if not 3 <= count <= MOST:
            yield "factors", f"a fractional_factorial takes 3 to {MOST} factors, and there are {count}"
            return
        size = self.combinations
        if size is not None and (size.bit_count() != 1 or not 4 <= size < whole):
            sizes = ", ".join(str(1 << bits) for bits in range(2, count))
            yield "combinations", f"a fraction of {count} factors has {sizes}, not {size}"
            return
        wrong = list(self._wrong_interactions())
        yield from wrong
        if wrong or self.fraction is not None:
            return
        best = find(count, self.resolution, (), size)
        if best is None and size is None:
            highest = next(high for high in range(self.resolution, 2, -1) if find(count, high))
            yield (
                "resolution",
                f"no fraction of {count} factors has resolution {self.resolution}; use `resolution: {highest}` or "
                f"`design: factorial` ({whole} combinations)",
            )
        elif best is None:
            smallest = find(count, self.resolution)
            enough = f"`combinations: {smallest.size}`" if smallest else "`design: factorial`"
            lower = [high for high in range(self.resolution, 2, -1) if find(count, high, (), size)]
            less = f" or `resolution: {lower[0]}`" if lower else ""
            message = f"no fraction of {size} combinations of {count} factors has resolution {self.resolution}"
            yield "combinations", f"{message}; use {enough}{less}"
        else:
            yield "interactions", self._confounded(best)

    def _wrong_interactions(self) -> Iterator[tuple[str | tuple[str, ...], str]]:
        for index, pair in enumerate(self.interactions):
            for name in pair:
                if name not in self.factors:
                    hint = did_you_mean(name, self.factors)
                    yield f"interactions.{index}", f"{name!r} is not a factor of the grid{hint}"
            if len(pair) != 2 or len(set(pair)) != 2:
                yield f"interactions.{index}", "an interaction is of two different factors: [one, other]"

    def _confounded(self, best: Fraction) -> str:
        """Message on the requested interactions that the best fraction confounds, with remedies."""
        names = list(self.factors)

        def named(effect: int) -> str:
            return " × ".join(names[i] for i in members_of(effect))

        confounded = [
            f"{named(effect)} is confounded with "
            + " and ".join(named(alias) for alias in best.aliases(effect) if alias.bit_count() <= 2)
            for effect in self.requested
            if not best.is_clear(effect)
        ]
        count = len(names)
        larger = [1 << bits for bits in range(best.size.bit_length(), count)]
        enough = next((more for more in larger if find(count, self.resolution, self.requested, more)), None)
        five = find(count, 5)
        ways = [f"`combinations: {enough}`"] * (enough is not None)
        ways += [
            f"`resolution: 5` ({five.size} combinations)"
            if five
            else f"`design: factorial` ({1 << count} combinations)"
        ]
        return (
            f"{best.size} combinations cannot tell all of them apart: {'; '.join(confounded)}; use {' or '.join(ways)}"
        )
