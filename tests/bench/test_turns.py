"""Turns, quartiles and ratios, against plain arithmetic and numpy."""

from __future__ import annotations

import numpy as np
import pytest

from lit_llm.bench.turns import WARM_UP, measured, quartiles, take_turns


@pytest.mark.parametrize("count", [1, 2, 3, 4, 15])
def test_quartiles_are_those_of_numpy(count):
    values = np.random.default_rng(count).random(count).tolist()
    found = quartiles(values)
    expected = np.percentile(values, [25, 50, 75]).tolist()
    assert [found.low, found.median, found.high] == pytest.approx(expected)


def test_every_turn_times_each_once_and_begins_with_the_next():
    order: list[str] = []
    calls = dict.fromkeys("abc", 0)

    def contestant(name):
        def turn():
            order.append(name)
            calls[name] += 1
            return {"step": float(calls[name])}

        return turn

    done: list[int] = []
    values = take_turns({name: contestant(name) for name in "abc"}, 4, done.append)
    turns = ["".join(order[at : at + 3]) for at in range(0, len(order), 3)]
    assert turns[WARM_UP:] == ["abc", "bca", "cab", "abc"]
    assert done == [0] * WARM_UP + [1, 2, 3, 4]
    timed = [float(WARM_UP + number) for number in (1, 2, 3, 4)]
    assert values == {name: {"step": timed} for name in "abc"}, "warm-up turns do not count"


def test_a_ratio_is_taken_within_each_turn():
    """The second turn is ten times slower for both, which cancels."""
    rows = measured({"ours": {"step": [1.0, 10.0, 2.0]}, "peer": {"step": [2.0, 30.0, 3.0]}})
    assert [row.contestant for row in rows] == ["ours", "peer"]
    assert rows[0].ratio.median == rows[0].ratio.high == 1.0
    assert rows[1].value.median == 3.0
    assert rows[1].ratio.median == 2.0, "of 2, 3 and 1.5"
    assert (rows[1].ratio.low, rows[1].ratio.high) == (1.75, 2.5)
