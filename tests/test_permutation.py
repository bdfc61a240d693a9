import numpy as np
import pytest

from minillama.data.permutation import _hashed, permuted


@pytest.mark.parametrize("n", [1, 2, 3, 5, 63, 64, 65, 255, 256, 257, 1000, 4097, 70_000])
def test_it_is_a_permutation_of_which_any_part_can_be_asked_for(n):
    whole = permuted(np.arange(n), n, 7, 3)
    assert whole.dtype == np.int64 and sorted(whole) == list(range(n))
    some = np.random.default_rng(n).integers(0, n, (3, 2))
    assert (permuted(some, n, 7, 3) == whole[some]).all()
    assert permuted(np.arange(0), n, 7, 3).shape == (0,)


def test_huge():
    n = 10**15
    found = permuted(np.arange(1000), n, 1)
    assert len(set(found)) == 1000 and found.min() >= 0 and found.max() < n
    assert abs(found.mean() / n - 0.5) < 0.05


@pytest.mark.parametrize("n", [3, 5, 64, 100])
def test_over_many_seeds_each_number_is_everywhere_equally_often(n):
    """Chi-squared of the table (number, place); its expectation is (n - 1)^2, its standard deviation sqrt(2) (n - 1)."""
    seeds, counts = 400, np.zeros((n, n))
    for seed in range(seeds):
        counts[np.arange(n), permuted(np.arange(n), n, 42, seed)] += 1
    expected = seeds / n
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_squared - (n - 1) ** 2) < 5 * 2**0.5 * (n - 1)


def test_neighbours_do_not_stay_neighbours():
    n = 100_000
    found = permuted(np.arange(n), n, 0, 0)
    assert abs(np.abs(np.diff(found)).mean() / (n / 3) - 1) < 0.01  # as of independent numbers
    again = permuted(np.arange(n), n, 0, 1)
    assert abs(np.corrcoef(found, again)[0, 1]) < 0.02


def test_the_hash_is_splitmix64():
    """Of the states of a generator that began with 1234567: its published output."""
    states = np.uint64(1234567) + np.arange(1, 6, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert _hashed(states).tolist() == expected
