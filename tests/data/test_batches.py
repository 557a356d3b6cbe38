"""Batch k depends on (seed, k) only: every window once per pass, whoever reads it and after whatever."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lit_llm.data.batches import StepSampler, TrainBatches, WindowCollator, Windows, spread_windows
from lit_llm.objectives.collate import Batch
from lit_llm.objectives.config import CausalLM, MasksConfig, PrefixLM


@pytest.fixture
def numbered(mixed):
    """numbered(windows, length, batch_size): tokens 0, 1, 2 ... so that a window's first token says which it is."""
    return lambda windows=10, length=4, batch_size=3, rest=2: mixed({"": (1000, windows)}, length, batch_size, rest)


def batches(data, seed=0, objective=CausalLM(), family="decoder", rank=0, ranks=1):
    made = TrainBatches(data, objective, family, masks=MasksConfig(), seed=seed)
    made.rank, made.ranks = rank, ranks
    return made


def same(left, right):
    assert left.inputs.keys() == right.inputs.keys()
    for name, value in left.inputs.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(right.inputs[name])), name
    assert torch.equal(left.targets, right.targets)
    assert torch.equal(left.weights, right.weights)


# --- which windows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("windows", [1, 2, 3, 7, 10, 64, 65])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 16])
def test_every_window_is_seen_once_per_pass_also_where_a_batch_crosses_into_the_next(numbered, windows, size):
    data = batches(numbered(windows, batch_size=size))
    passes = 4
    seen = np.concatenate([data.places(k)[1] for k in range(-(-windows * passes // size))])
    for number in range(passes):
        one = seen[number * windows : (number + 1) * windows]
        assert np.array_equal(np.sort(one), np.arange(windows)), f"pass {number}"


def test_each_pass_and_each_seed_has_an_order_of_its_own(numbered):
    data = numbered(30, batch_size=30)
    orders = {tuple(batches(data, seed).places(k)[1]) for seed in range(5) for k in range(5)}
    assert len(orders) == 25


def test_the_order_of_the_windows_is_that_of_the_seed_whatever_the_objective_and_the_family(numbered):
    """Paired randomness: two arms with one seed see the same text in the same order."""
    data = numbered(20)
    red = batches(data, 3, PrefixLM(split="random"), "encoder_decoder")
    dec = batches(data, 3, CausalLM(), "decoder")
    assert all(np.array_equal(red.places(k)[1], dec.places(k)[1]) for k in range(20))


def test_two_batch_sizes_read_the_windows_in_the_same_order(numbered):
    data = [batches(numbered(20, batch_size=size)) for size in (4, 6)]
    orders = [np.concatenate([d.places(k)[1] for k in range(60 // size)]) for d, size in zip(data, (4, 6), strict=True)]
    assert np.array_equal(*orders)


def test_a_window_is_a_run_of_tokens_and_what_is_left_over_is_not_read(numbered):
    data = numbered(windows=5, length=4, rest=3)
    windows = Windows(data, data.sources[0], "train")
    assert windows.count == 5
    rows = windows.read(np.array([4, 0]))
    assert rows.tolist() == [[16, 17, 18, 19], [0, 1, 2, 3]]
    assert rows.dtype == np.int64


def test_a_batch_holds_the_windows_that_its_number_names(numbered):
    data = batches(numbered(10, batch_size=4))
    for k in (0, 2, 5):
        assert data[k].targets[:, 0].tolist() == (data.places(k)[1] * 4).tolist()


# --- the same batch, whoever asks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [CausalLM(), PrefixLM(), PrefixLM(split="random")], ids=lambda o: o.kind)
@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_batch_k_is_the_same_whatever_was_read_before(numbered, objective, family):
    data = numbered(10)
    straight, jumping = (batches(data, 1, objective, family) for _ in range(2))
    expected = [straight[k] for k in range(8)]
    for k in (5, 2, 7, 2, 0):
        same(jumping[k], expected[k])


def test_random_cuts_belong_to_the_batch_and_differ_between_batches(numbered):
    data = numbered(50, length=32, batch_size=8)
    cuts = [batches(data, 0, PrefixLM(split="random"))[k].weights.sum(1).tolist() for k in range(5)]
    assert len({tuple(row) for row in cuts}) == 5
    assert len(set(cuts[0])) > 1
    assert all(1 <= targets <= 31 for row in cuts for targets in row)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("reached", [0, 3])
def test_a_loader_with_any_number_of_workers_gives_the_batches_from_the_step_that_was_reached(
    numbered, workers, reached
):
    data = batches(numbered(10), 2, PrefixLM(split="random"), "encoder_decoder")
    sampler = StepSampler(7, lambda: reached)
    loader = DataLoader(data, batch_size=None, sampler=sampler, num_workers=workers)
    assert len(loader) == 7  # the whole training, also after a resume
    read = list(loader)
    assert len(read) == 7 - reached
    for k, batch in enumerate(read, reached):
        same(batch, data[k])


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_the_shares_of_the_devices_make_the_whole_batch(numbered, ranks, family):
    data = numbered(20, batch_size=8)
    objective = PrefixLM(split="random")
    whole = batches(data, 0, objective, family)
    shares = [batches(data, 0, objective, family, rank=rank, ranks=ranks) for rank in range(ranks)]
    for k in range(4):
        parts = [share[k] for share in shares]
        assert [len(part) for part in parts] == [8 // ranks] * ranks
        assert torch.equal(torch.cat([part.targets for part in parts]), whole[k].targets)
        assert torch.equal(torch.cat([part.weights for part in parts]), whole[k].weights)
        for name, value in whole[k].inputs.items():
            assert torch.equal(torch.cat([part.inputs[name] for part in parts]), value), name


@pytest.mark.parametrize(("rows", "ranks"), [(5, 2), (3, 4), (1, 4), (7, 3)])
def test_uneven_shares_are_filled_with_rows_that_do_not_count(numbered, rows, ranks):
    """Equally many rows for all devices, also where there are fewer rows than devices; each target counts once."""
    whole = batches(numbered(20, batch_size=rows), 0, PrefixLM(split="random"), "encoder_decoder")[1]
    shares = [whole.share(rank, ranks) for rank in range(ranks)]
    assert {len(share) for share in shares} == {-(-rows // ranks)}
    real = [share.weights.sum(1) > 0 for share in shares]
    same(
        Batch(
            {
                name: torch.cat([share.inputs[name][kept] for share, kept in zip(shares, real, strict=True)])
                for name in whole.inputs
            },
            torch.cat([share.targets[kept] for share, kept in zip(shares, real, strict=True)]),
            torch.cat([share.weights[kept] for share, kept in zip(shares, real, strict=True)]),
        ),
        whole,
    )
    for share in shares:
        pieces = list(share.micro_batches(1))
        assert [sum(piece.counts) for piece in pieces] == share.counts
        assert [len(piece.places) for piece in pieces] == share.counts
        assert {piece.total for piece in pieces} == {whole.total} == {int(whole.weights.sum())}


# --- validation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("windows", "count"), [(10, 3), (10, 10), (10, 64), (1, 4), (7, 6)])
def test_validation_reads_distinct_windows_spread_over_all_of_them(numbered, windows, count):
    data = numbered(windows)
    rows = spread_windows(data, data.sources[0], "validation", count)
    first = (rows[:, 0] // 4).tolist()
    assert len(first) == len(set(first)) == min(count, windows)
    gaps = np.diff([*first, windows])
    assert first[0] == 0
    assert gaps.max() - gaps.min() <= 1


def test_a_cut_puts_every_token_into_the_source_or_the_target():
    windows = np.arange(2, 26).reshape(3, 8)
    batch = WindowCollator(PrefixLM(split=3), "encoder_decoder", MasksConfig(), 26).batch(windows)
    assert torch.equal(torch.cat([batch.inputs["source_BS"], batch.targets], 1), torch.from_numpy(windows))
