"""Every sample once per epoch, whatever the ranks and wherever a run is taken up."""

from __future__ import annotations

import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from unic_ds.data import order


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 60),
    micro=st.integers(1, 5),
    world=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 2**70),
)
def test_ranks_together_read_whole_epochs(n, micro, world, accumulation, seed):
    size = micro * world * accumulation
    steps = -(-3 * n // size)
    seen = np.full(steps * size, -1)
    for step in range(steps):
        for rank in range(world):
            for j in range(accumulation):
                position_B = order.positions(j, rank=rank, world=world, micro=micro)
                first = step * size + int(position_B[0])
                index_B, epoch_B = order.batch(seed, n, first, micro)
                at_B = step * size + position_B
                assert np.array_equal(epoch_B, at_B // n)
                assert (seen[at_B] == -1).all()
                seen[at_B] = index_B
    for epoch in range(3):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 40), first=st.integers(0, 10**6), count=st.integers(1, 100))
def test_a_batch_is_a_window_of_one_sequence(n, first, count):
    index_B, epoch_B = order.batch(0, n, first, count)
    ones = [order.batch(0, n, first + i, 1) for i in range(count)]
    assert index_B.tolist() == [int(index[0]) for index, _ in ones]
    assert epoch_B.tolist() == [int(epoch[0]) for _, epoch in ones]


def test_permutations_differ_by_epoch_and_seed_and_are_repeatable():
    first = order.permutation(0, 0, 1000).copy()
    others = [order.permutation(0, 1, 1000), order.permutation(1, 0, 1000)]
    assert all((first == other).mean() < 0.01 for other in others)
    order.permutation.cache_clear()
    assert np.array_equal(order.permutation(0, 0, 1000), first)


def test_every_place_is_equally_likely():
    placed = [int(np.flatnonzero(order.permutation(0, epoch, 8) == 3)[0]) for epoch in range(4000)]
    assert stats.chisquare(np.bincount(placed, minlength=8)).pvalue > 1e-3


def test_a_large_epoch_is_quick():
    start = time.process_time()
    index_N = order.permutation(5, 0, 1_281_167)
    assert time.process_time() - start < 2
    assert np.array_equal(np.bincount(index_N), np.ones(1_281_167))
