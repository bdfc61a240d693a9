"""A permutation that is computed, not stored: any part of it at once, and the same on every rank."""

import numpy as np

ROUNDS = 8


def permuted(index: np.ndarray, n: int, *seed: int) -> np.ndarray:
    """What a permutation of range(n), one for each `seed`, maps each of the integers `index` to: int64, of index's shape.

    A Feistel network permutes the numbers of an even number of bits (Luby and Rackoff 1988). A result outside of
    range(n) is permuted again until it is inside ("cycle walking", Black and Rogaway 2002).
    """
    half = np.uint64(max(3, (max(n - 1, 0).bit_length() + 1) // 2))  # 64 numbers at least: smaller networks mix badly
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence(seed).generate_state(ROUNDS, np.uint64)
    found = np.array(index, np.uint64)
    walking = np.ones(found.shape, np.bool_)
    while walking.any():
        left, right = found[walking] >> half, found[walking] & mask
        for key in keys:
            left, right = right, left ^ (_hashed(right + key) & mask)
        found[walking] = left << half | right
        walking &= found >= n
    return found.astype(np.int64)


def _hashed(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014): uint64, modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
