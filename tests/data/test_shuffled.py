"""The order of the data: a permutation for any size, another for each seed and pass, computed without memory."""

import numpy as np
import pytest

from lit_llm.data.batches import shuffled


def order(count, seed):
    return shuffled(np.arange(count), count, seed)


@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_it_is_a_permutation_for_every_size(seed):
    for count in [*range(1, 301), 1000, 1024, 1025, 4097]:
        assert np.array_equal(np.sort(order(count, seed)), np.arange(count)), count


def test_a_position_goes_to_the_same_place_whoever_asks_for_it():
    """A batch asks for its own positions only, in any order, once or twice."""
    whole = order(1000, 7)
    some = np.array([999, 3, 3, 500])
    assert np.array_equal(shuffled(some, 1000, 7), whole[some])
    assert shuffled(np.array([], dtype=np.int64), 1000, 7).shape == (0,)


def test_every_seed_has_an_order_of_its_own():
    orders = {tuple(order(50, seed)) for seed in range(100)}
    assert len(orders) == 100


def test_it_mixes_small_sizes_too():
    """Over seeds, every window is as likely at every place: n draws, n / 30 expected in each of 30 x 30 cells.

    Of 900 standard normal deviations the largest is about 3.3; beyond 5 (once in 2000 tests) something is wrong.
    """
    draws, size = 1000, 30
    counts = np.zeros((size, size))
    for seed in range(draws):
        counts[np.arange(size), order(size, seed)] += 1
    deviation = np.sqrt(draws * (1 / size) * (1 - 1 / size))
    assert np.abs(counts - draws / size).max() / deviation < 5


def test_neighbours_do_not_stay_neighbours():
    """A random permutation of n keeps a neighbour after each element with probability 1 / n: once, on average."""
    kept = [int((np.diff(order(1000, seed)) == 1).sum()) for seed in range(50)]
    assert np.mean(kept) < 2


def test_a_large_corpus_costs_what_the_batch_costs():
    """2^40 windows fit no memory; 8 of them do."""
    out = shuffled(np.arange(8) + 2**39, 2**40 - 3, seed=0)
    assert len(set(out.tolist())) == 8
    assert (out >= 0).all()
    assert (out < 2**40 - 3).all()
