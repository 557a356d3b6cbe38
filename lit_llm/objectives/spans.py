"""Objectives that predict spans taken out of a window: T5's span corruption, and UL2's mixture of denoisers.

span_corruption (T5, arXiv 1910.10683, section 3.1.4): each span is one sentinel in the source; the target is each
sentinel with its span, closed by the end-of-document token (T5's code; its figure has one more sentinel there).

window   a b c d e f g h          source   a b <0> e f <1>          target   <0> c d <1> g h ■

ul2 (arXiv 2205.05131): each window is given to one of several denoisers, which put a mode token before the source: R
(regular, short spans), S (sequential, a prefix LM), X (extreme, long spans or many).

A decoder-only model reads <s>, the source and then the target, with the loss on the target alone: Wang et al.
(arXiv 2204.05832) call it CD:MLM, and ND:MLM where the source is bidirectional (`masks.prefix`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from lit_llm.config.section import Items, Section, config_error
from lit_llm.objectives.base import EOD, AnyObjective, Example, Lengths
from lit_llm.objectives.cuts import PrefixLM

if TYPE_CHECKING:
    import numpy as np


class SpanCorruption(AnyObjective):
    """Predict spans that were taken out of a window. The numbers of spans and tokens depend on its length alone."""

    kind: Literal["span_corruption"] = "span_corruption"
    """Span corruption (T5)."""
    corruption: float = Field(0.15, gt=0, lt=1)
    """Part of the tokens that are taken out."""
    mean_span: float = Field(3.0, ge=1)
    """Tokens of a span, on average."""

    def counts(self, sequence_length: int) -> tuple[int, int]:
        """(tokens that are taken out, spans), rounded as in T5: at least one token stays, and one span is taken out."""
        noise = min(max(round(sequence_length * self.corruption), 1), sequence_length - 1)
        return noise, max(round(noise / self.mean_span), 1)

    def example(self, window_T: np.ndarray, random: np.random.Generator, vocabulary: int) -> Example:
        import numpy as np

        noise, spans = self.counts(len(window_T))
        # Text and spans alternate, text first: a window ends with a span, and its first token always stays.
        kept, taken = (_partition(items, spans, random) for items in (len(window_T) - noise, noise))
        removed = np.repeat(np.tile([False, True], spans), np.stack([kept, taken], axis=1).ravel())
        tokens, sentinels = window_T.astype(np.int64), vocabulary + np.arange(spans)
        source = np.insert(tokens[~removed], np.cumsum(kept), sentinels)
        target = np.insert(tokens[removed], np.cumsum(taken) - taken, sentinels)
        return Example(source, np.append(target, EOD))

    def lengths(self, sequence_length: int) -> list[tuple[float, Lengths]]:
        noise, spans = self.counts(sequence_length)
        return [(1.0, Lengths(sequence_length - noise + spans, noise + spans + 1))]

    def extra_ids(self, sequence_length: int) -> dict[str, int]:
        return {"sentinels": self.counts(sequence_length)[1]}

    def problem(self, sequence_length: int) -> str:
        if sequence_length < 2:
            return "a window of one token has nothing beside a span"
        noise, spans = self.counts(sequence_length)
        if spans > sequence_length - noise:
            return (
                f"{spans} spans of {noise} tokens leave {sequence_length - noise} of a window of {sequence_length}, "
                f"too few to part them; use a smaller corruption than {self.corruption}, or a larger mean_span"
            )
        return ""


def _partition(items: int, parts: int, random: np.random.Generator) -> np.ndarray:
    """Lengths of `parts` nonempty parts of `items`, all partitions equally likely (T5's random partition)."""
    import numpy as np

    places = 1 + np.sort(random.choice(items - 1, parts - 1, replace=False))
    return np.diff(np.concatenate([[0], places, [items]]))


Mode = Literal["r", "s", "x"]
MODES: tuple[Mode, ...] = ("r", "s", "x")


class Denoiser(Section):
    """One task of a mixture."""

    mode: Mode
    """Mode token: r (regular), s (sequential) or x (extreme). In UL2 spans of 12 tokens or more are extreme, and
    corruption of 30% of the tokens or more."""
    corruption: float | Literal["random"]
    """Share of the tokens that are targets; random: uniform from one token to all but one, for one span at the end."""
    mean_span: float | None = Field(None, ge=1)
    """Tokens of a span, on average. One span at the end, a prefix LM without a sentinel, when absent."""
    weight: float = Field(1.0, ge=0)
    """Relative frequency with which it is drawn."""

    @model_validator(mode="after")
    def _fits(self) -> Denoiser:
        if self.corruption == "random":
            if self.mean_span is not None:
                raise config_error(("corruption", "random is for one span at the end; leave mean_span out"))
        elif not 0 < self.corruption < 1:
            raise config_error(("corruption", f"{self.corruption} is not between 0 and 1"))
        return self

    def objective(self, sequence_length: int) -> SpanCorruption | PrefixLM:
        """The objective that it applies to a window of this length."""
        if self.corruption == "random":
            return PrefixLM(split="random")
        if self.mean_span is not None:
            return SpanCorruption(corruption=self.corruption, mean_span=self.mean_span)
        # One span of T5's partition is the window's last tokens.
        targets, _ = SpanCorruption(corruption=self.corruption, mean_span=sequence_length).counts(sequence_length)
        return PrefixLM(split=sequence_length - targets)


def _mix(*tasks: tuple[Mode, float | None, float | Literal["random"], float]) -> tuple[Denoiser, ...]:
    return tuple(
        Denoiser(mode=mode, mean_span=span, corruption=corruption, weight=weight)
        for mode, span, corruption, weight in tasks
    )


MIXES: dict[str, tuple[Denoiser, ...]] = {
    "ul2": _mix(
        ("r", 3, 0.15, 1),
        ("r", 8, 0.15, 1),
        ("s", None, 0.25, 1),
        ("x", 3, 0.5, 1),
        ("x", 8, 0.5, 1),
        ("x", 64, 0.15, 1),
        ("x", 64, 0.5, 1),
    ),
    "ul2r": _mix(("r", 3, 0.15, 1), ("x", 32, 0.15, 1), ("x", 3, 0.5, 1), ("s", None, "random", 3)),
    "t5gemma2": _mix(("r", 3, 0.15, 1), ("x", 12, 0.5, 1), ("x", 32, 0.15, 1), ("x", 32, 0.5, 1), ("s", None, 0.75, 4)),
}
"""Mixtures by name. UL2's table 1, drawn uniformly; UL2R (arXiv 2210.11399), half S with a random cut, half the rest;
T5Gemma 2's five tasks (arXiv 2512.14856), whose last one, three quarters of a window in one span, is taken to be a
prefix LM like UL2's S. Its modes follow UL2's definition."""


class ModeShares(Section):
    """Relative shares of the modes: `{r: 1, s: 2, x: 1}` makes S a half."""

    r: float = Field(0.0, ge=0)
    """Regular denoisers."""
    s: float = Field(0.0, ge=0)
    """Sequential denoisers: prefix LMs."""
    x: float = Field(0.0, ge=0)
    """Extreme denoisers."""


class UL2(AnyObjective):
    """A weighted mixture of denoisers. Each window is given to one of them."""

    kind: Literal["ul2"] = "ul2"
    """Mixture of denoisers (UL2)."""
    mix: Literal["ul2", "ul2r", "t5gemma2"] | Items[Denoiser] = Field("ul2", union_mode="left_to_right")
    """The denoisers: those of a paper, or a list of `{mode: x, mean_span: 32, corruption: 0.5, weight: 1}`."""
    modes: ModeShares | None = None
    """Shares of the modes, `{r: 0.25, s: 0.5, x: 0.25}`; an absent mode is not drawn. Within a mode the weights of the
    mix hold. Those of the mix when absent."""
    mode_tokens: bool = True
    """Whether a mode token comes before the source. S's then also comes before every prefix that is to be continued, in
    val/target_nll and, after the pretraining, in the evaluations likelihood and extrapolation."""

    @model_validator(mode="after")
    def _fits(self) -> UL2:
        if not sum(denoiser.weight for denoiser in self._denoisers):
            raise config_error(("mix", "needs at least one denoiser with a weight above 0"))
        if self.modes is None:
            return self
        modes = {denoiser.mode for denoiser in self._denoisers if denoiser.weight}
        missing = [mode for mode in MODES if getattr(self.modes, mode) and mode not in modes]
        if missing:
            raise config_error(
                *((f"modes.{mode}", "has a share, and the mix has no such denoiser") for mode in missing)
            )
        if not any(getattr(self.modes, mode) for mode in MODES):
            raise config_error(("modes", "needs at least one share above 0"))
        return self

    @property
    def _denoisers(self) -> tuple[Denoiser, ...]:
        return MIXES[self.mix] if isinstance(self.mix, str) else self.mix

    @property
    def shares(self) -> list[tuple[float, Denoiser]]:
        """Pairs (share, denoiser) of the denoisers that are drawn; the shares add up to 1."""
        weights = [denoiser.weight for denoiser in self._denoisers]
        if self.modes is not None:
            of_mode = dict.fromkeys(MODES, 0.0)
            for denoiser in self._denoisers:
                of_mode[denoiser.mode] += denoiser.weight
            wanted = {mode: getattr(self.modes, mode) / of_mode[mode] if of_mode[mode] else 0.0 for mode in MODES}
            weights = [denoiser.weight * wanted[denoiser.mode] for denoiser in self._denoisers]
        pairs = zip(weights, self._denoisers, strict=True)
        return [(weight / sum(weights), denoiser) for weight, denoiser in pairs if weight]

    def example(self, window_T: np.ndarray, random: np.random.Generator, vocabulary: int) -> Example:
        import numpy as np

        shares = self.shares
        ends = np.cumsum([share for share, _ in shares])[:-1]  # without the last, which rounding may leave below 1
        denoiser = shares[int(np.searchsorted(ends, random.random(), side="right"))][1]
        made = denoiser.objective(len(window_T)).example(window_T, random, vocabulary)
        if not self.mode_tokens:
            return made
        return made._replace(source=np.concatenate([[self._token(denoiser.mode, len(window_T), vocabulary)], made[0]]))

    def lengths(self, sequence_length: int) -> list[tuple[float, Lengths]]:
        return [
            (share * part, Lengths(lengths.source + self.mode_tokens, lengths.target))
            for share, denoiser in self.shares
            for part, lengths in denoiser.objective(sequence_length).lengths(sequence_length)
        ]

    def extremes(self, sequence_length: int) -> list[Lengths]:
        return [
            Lengths(lengths.source + self.mode_tokens, lengths.target)
            for _, denoiser in self.shares
            for lengths in denoiser.objective(sequence_length).extremes(sequence_length)
        ]

    def extra_ids(self, sequence_length: int) -> dict[str, int]:
        objectives = [denoiser.objective(sequence_length) for _, denoiser in self.shares]
        sentinels = max(sum(objective.extra_ids(sequence_length).values()) for objective in objectives)
        counts = {"sentinels": sentinels, "mode tokens": len(MODES) * self.mode_tokens}
        return {what: count for what, count in counts.items() if count}

    def opening(self, sequence_length: int, vocabulary: int) -> tuple[int, ...]:
        """S's mode token; empty without mode tokens, or where the mixture never draws S and so never trains it."""
        if not self.mode_tokens or all(denoiser.mode != "s" for _, denoiser in self.shares):
            return ()
        return (self._token("s", sequence_length, vocabulary),)

    def resolved(self, sequence_length: int) -> UL2:
        """The mixture as a list of the denoisers that are drawn, with their shares as weights."""
        mix = tuple(denoiser.model_copy(update={"weight": share}) for share, denoiser in self.shares)
        return UL2(mix=mix, mode_tokens=self.mode_tokens)

    def problem(self, sequence_length: int) -> str:
        for _, denoiser in self.shares:
            if problem := denoiser.objective(sequence_length).problem(sequence_length):
                return f"the denoiser {denoiser.mode} ({denoiser.mean_span}, {denoiser.corruption}): {problem}"
        return ""

    def _token(self, mode: Mode, sequence_length: int, vocabulary: int) -> int:
        return vocabulary + self.extra_ids(sequence_length).get("sentinels", 0) + MODES.index(mode)
