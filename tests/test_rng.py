"""The random numbers are Philox's, uniform, and independent of who asks."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from unic_ds import rng

# counter, key, words: the known answers for philox4x32-10 that Random123 is distributed with
KNOWN = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN, ids=["zeros", "ones", "pi"])
def test_known_answers(counter, key, words):
    counter_4 = [np.array(int(word, 16), dtype=np.uint64) for word in counter.split()]
    low, high = (int(word, 16) for word in key.split())
    got_4 = rng.philox(counter_4, (low, high))
    assert [f"{word:08x}" for word in got_4] == words.split()


def test_one_number_is_the_same_alone_and_in_a_batch():
    all_NC = rng.uniform(3, "draw", 6, np.arange(50), 7)
    alone_C = rng.uniform(3, "draw", 6, 17, 7)
    assert np.array_equal(all_NC[17], alone_C)
    assert np.array_equal(rng.uniform(3, "draw", 3, 17, 7), alone_C[:3])


def test_seed_name_and_counters_all_matter():
    base = rng.random_bits(0, "a", 4, 1, 2, 3)
    others = [
        rng.random_bits(1, "a", 4, 1, 2, 3),
        rng.random_bits(0, "b", 4, 1, 2, 3),
        rng.random_bits(0, "a", 4, 2, 1, 3),
        rng.random_bits(0, "a", 4, 1, 2, 4),
    ]
    assert all(not np.any(base == other) for other in others)


def test_uniform_and_uncorrelated():
    u_N4 = rng.uniform(0, "test", 4, np.arange(20_000))
    assert u_N4.min() >= 0
    assert u_N4.max() < 1
    assert all(stats.kstest(u_N4[:, i], "uniform").pvalue > 1e-3 for i in range(4))
    correlation = np.corrcoef(np.vstack([u_N4.T, np.roll(u_N4[:, 0], 1)])) - np.eye(5)
    assert np.abs(correlation).max() < 0.03  # four standard errors


def test_number_fits_a_torch_seed():
    numbers = [rng.seed_for(0, f"parameter {i}") for i in range(1000)]
    assert len(set(numbers)) == 1000
    assert min(numbers) >= 0 and max(numbers) < 2**63
    assert max(numbers) > 2**62
