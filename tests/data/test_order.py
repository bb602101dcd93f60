"""Every sample once per pass, on any number of ranks and after any resume."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from unic_ds.data import order
from unic_ds.data.order import SampleGroup

SEEDS = st.integers(0, 2**70)


@st.composite
def groups_of_samples(draw) -> SampleGroup:
    """A folder, or shards of any sizes with any window."""
    weight = draw(st.sampled_from((1.0, 1.0, 0.3, 2.5)))
    if draw(st.booleans()):
        return SampleGroup(draw(st.integers(1, 90)), weight=weight)
    shards = tuple(draw(st.lists(st.integers(1, 30), min_size=1, max_size=8)))
    return SampleGroup(sum(shards), shards, draw(st.integers(1, 9)), weight)


MIXTURES = st.lists(groups_of_samples(), min_size=1, max_size=3).map(tuple)


def sequence(seed, groups: order.SampleGroups, count, ranks: tuple[int, int, int], first=0):
    """(sample, pass) of `count` slots from `first`, read by ranks, a micro batch at a time."""
    world, micro, accumulation = ranks
    size = world * micro * accumulation
    steps = -(-count // size)
    index_N, pass_N = np.full(steps * size, -1), np.full(steps * size, -1)
    for step in range(steps):
        for j in range(accumulation):
            for rank in range(world):
                at_B = step * size + order.positions(j, rank=rank, world=world, micro=micro)
                assert (index_N[at_B] == -1).all()
                index_N[at_B], pass_N[at_B] = order.batch(seed, groups, first + int(at_B[0]), micro)
    return index_N[:count], pass_N[:count]


@settings(max_examples=60, deadline=None)
@given(
    groups=MIXTURES,
    ranks=st.tuples(st.integers(1, 64), st.integers(1, 5), st.integers(1, 3)),
    seed=SEEDS,
)
def test_ranks_together_show_every_sample_once_a_pass(groups, ranks, seed):
    slots = 3 * order.per_epoch(groups)
    index_N, pass_N = sequence(seed, groups, slots, ranks)
    first = 0
    for group in groups:
        of_group_N = (index_N >= first) & (index_N < first + group.samples)
        assert of_group_N.sum() == 3 * group.per_epoch
        for number in range(pass_N[of_group_N].max() + 1):
            index_M = index_N[of_group_N & (pass_N == number)] - first
            seen_N = np.bincount(index_M, minlength=group.samples)
            whole = (number + 1) * group.samples <= 3 * group.per_epoch
            assert seen_N.max() == 1 and (not whole or seen_N.min() == 1)
        first += group.samples
    assert first > index_N.max()


@settings(max_examples=40, deadline=None)
@given(groups=MIXTURES, at=st.integers(0, 500), seed=SEEDS)
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_what_remains_is_the_same_on_other_ranks(world, groups, at, seed):
    whole = sequence(seed, groups, at + 100, (1, 4, 1))
    rest = sequence(seed, groups, 100, (world, 3, 2), first=at)
    assert all(np.array_equal(a, b[at:]) for a, b in zip(rest, whole, strict=True))


def test_orders_differ_by_epoch_and_seed_and_are_repeatable():
    group = SampleGroup(1000)
    first = order.shuffled(0, "order", 0, group).copy()
    others = [order.shuffled(0, "order", 1, group), order.shuffled(1, "order", 0, group)]
    assert all((first == other).mean() < 0.01 for other in others)
    order.shuffled.cache_clear()
    assert np.array_equal(order.shuffled(0, "order", 0, group), first)


@pytest.mark.parametrize(
    "group", [SampleGroup(8), SampleGroup(8, (2, 3, 3), 2), SampleGroup(8, (1,) * 8, 1)]
)
def test_every_place_is_equally_likely(group):
    at = [int(np.flatnonzero(order.shuffled(0, "o", e, group) == 3)[0]) for e in range(4000)]
    if len(set(group.shards)) > 1:  # windows of unlike sizes: only the shards are shuffled
        assert len(set(at)) == 8
    else:
        assert stats.chisquare(np.bincount(at, minlength=8)).pvalue > 1e-3


def test_what_is_read_soon_lies_in_few_shards():
    group = SampleGroup(20_000, (100,) * 200, 10)
    shard_N = order.shuffled(0, "order", 0, group) // 100
    for window_M in shard_N.reshape(-1, 1000):
        assert len(set(window_M)) == 10
        assert len(set(window_M[:100])) > 8  # and they mix
    assert len(set(shard_N[:1000]) - set(order.shuffled(0, "order", 1, group)[:1000] // 100)) > 5


def test_sources_are_spread_evenly_over_an_epoch():
    groups = (SampleGroup(4000), SampleGroup(1000, (100,) * 10, 4, weight=2.0))
    index_N, _ = order.epoch_order(0, 0, groups)
    second_K = (index_N >= 4000).reshape(10, -1).sum(1)
    assert second_K.sum() == 2000 and stats.chisquare(second_K).pvalue > 1e-3


@pytest.mark.parametrize("shards", [(), (1000,) * 1281 + (167,)])
def test_a_large_epoch_is_quick(shards):
    start = time.process_time()
    index_N = order.shuffled(5, "order", 0, SampleGroup(1_281_167, shards, 16))
    assert time.process_time() - start < 1
    assert np.array_equal(np.bincount(index_N), np.ones(1_281_167))
