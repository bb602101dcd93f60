"""Counter-based random numbers: pure functions of a seed, a name and counters (Philox 4x32-10).

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A number does not depend on
the rank, the order of calls or the number of restarts. Vectorised in numpy: a batch costs
microseconds. The generators of numpy and torch keep a state, and do not promise the same numbers in
their next version.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MULTIPLY = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def philox(counter_4: list[NDArray[np.uint64]], key_2: tuple[int, int]) -> NDArray[np.uint32]:
    """Philox 4x32-10 of arrays of four 32-bit counter words under a key of two words; [..., 4]."""
    a, b, c, d = counter_4
    k0, k1 = np.uint64(key_2[0]), np.uint64(key_2[1])
    for _ in range(10):
        ab, cd = a * _MULTIPLY[0], c * _MULTIPLY[1]
        a, b, c, d = (cd >> _32) ^ b ^ k0, cd & _LOW, (ab >> _32) ^ d ^ k1, ab & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack([a, b, c, d], -1).astype(np.uint32)


def stream_key(seed: int, name: str) -> tuple[int, int]:
    """Two 32-bit key words of a named stream of random numbers, under a seed of any size."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def random_bits(seed: int, name: str, count: int, *counters: ArrayLike) -> NDArray[np.uint32]:
    """`count` 32-bit words for each element of up to three broadcast counters; [..., count]."""
    equal = np.broadcast_arrays(*[np.asarray(c, dtype=np.uint64) & _LOW for c in counters])
    block = np.arange(-(-count // 4), dtype=np.uint64) + np.zeros_like(equal[0])[..., None]
    parts = [part[..., None] + np.zeros_like(block) for part in equal]
    parts += [np.zeros_like(block)] * (3 - len(parts))
    four = philox([*parts, block], stream_key(seed, name))
    return four.reshape(*four.shape[:-2], -1)[..., :count]


def uniform(seed: int, name: str, count: int, *counters: ArrayLike) -> NDArray[np.float64]:
    """`count` uniform numbers in [0, 1) for each element of up to three counters; [..., count]."""
    # 24 bits: exact in fp32, where more could round up to 1
    return (random_bits(seed, name, count, *counters) >> np.uint32(8)) * np.float64(2.0**-24)


def seed_for(seed: int, name: str) -> int:
    """63-bit seed derived from a seed and a name, e.g. for the generator of one parameter."""
    high, low = stream_key(seed, name)
    return (high << 32 | low) & (2**63 - 1)
