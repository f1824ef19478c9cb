"""Readings at one average loss against numpy's interpolation; paired bands against simulations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from frequency_bins import at_average, paired_band


@given(
    st.lists(st.floats(0.1, 5), min_size=2, max_size=8, unique=True),
    st.integers(0, 2**32 - 1),
    st.floats(0, 1),
)
def test_a_rising_curve_is_read_as_numpy_reads_it(
    averages: list[float], seed: int, place: float
) -> None:
    x = np.sort(averages)
    y = np.random.default_rng(seed).normal(size=len(x))
    at = min(x[-1], x[0] + place * (x[-1] - x[0]))
    read = at_average([x], [y], [at])
    assert read.values[0] == pytest.approx(np.interp(at, x, y), rel=1e-9, abs=1e-9)
    assert read.reason == ""
    # Turned round, the same lines are passed in the other order.
    assert at_average([x[::-1]], [y[::-1]], [at]).values[0] == pytest.approx(read.values[0])


def test_what_a_curve_does_not_reach_is_named_and_not_extrapolated() -> None:
    x, y = [[1.0, 2.0], [1.5, 2.5], [1.0, math.nan]], [[10.0, 20.0], [0.0, 1.0], [3.0, 4.0]]
    read = at_average(x, y, [1.2, 1.2, 1.2])
    np.testing.assert_array_equal(read.values, [12.0, math.nan, math.nan])
    assert read.reason == "averages of 1 to 2.5 do not reach 1.2 in 2 of 3 seeds"
    assert read.reached
    assert float(read.band([2.0, 0, 0]).mean) == pytest.approx(10)
    assert math.isnan(read.band().half_width)
    nowhere = at_average(x, y, [3.0, 3.0, 3.0])
    assert not nowhere.reached
    with pytest.raises(ValueError, match="seeds"):
        nowhere.band()


@pytest.mark.parametrize("at", [1.5, 2.0])
def test_of_several_passes_the_first_counts(at: float) -> None:
    """2 falls to 1 (value 0 to 1) and rises to 3 (1 to 5)."""
    read = at_average([[2.0, 1.0, 3.0]], [[0.0, 1.0, 5.0]], [at])
    assert read.values.tolist() == [2.0 - at]


def test_the_difference_to_a_reference_is_paired_by_seed() -> None:
    x = np.array([[1.0, 2.0], [1.1, 2.1], [1.2, 2.2]])
    read = at_average(x, 3 * x, x.mean(axis=1))
    band = read.band(beside=3 * x.mean(axis=1) - 0.5)
    assert (float(band.mean), float(band.half_width)) == pytest.approx((0.5, 0), abs=1e-12)


@pytest.mark.parametrize(
    ("x", "y", "at"),
    [([1.0], [1.0], [1.0]), ([[1.0]], [[1.0, 2.0]], [1.0]), ([[1.0]], [[1.0]], [1.0, 2.0])],
)
def test_shapes_that_do_not_fit(x: Any, y: Any, at: Any) -> None:
    with pytest.raises(ValueError, match=r"expected \(seeds, points\)"):
        at_average(x, y, at)


def test_a_single_seed_has_the_interval_of_the_t_test_over_items() -> None:
    differences = np.random.default_rng(0).normal(0.3, 1, size=50)
    band = paired_band(differences)
    low, high = stats.ttest_1samp(differences, 0).confidence_interval()
    assert band.mean - band.half_width == pytest.approx(low)
    assert band.mean + band.half_width == pytest.approx(high)
    assert not band.over_seeds


@pytest.mark.parametrize("size", [1, 8])
def test_intervals_hold_the_truth_as_often_as_they_say(size: int) -> None:
    """Items in clusters of `size` that share a part, seeds with a part of their own: 95 %."""
    generator = np.random.default_rng(1)
    clusters = np.repeat(np.arange(60), size)
    held = 0
    for _ in range(400):
        shared = generator.normal(size=60)[clusters]
        alone = generator.normal(size=(3, 60 * size)) + generator.normal(size=(3, 1))
        band = paired_band(0.5 + shared + alone, clusters)
        held += abs(band.mean - 0.5) <= band.half_width
    # Wider than needed rather than narrower: two margins are added in squares.
    assert 0.93 <= held / 400 <= 1


def test_tokens_of_a_review_are_drawn_together() -> None:
    differences = np.repeat(np.random.default_rng(2).normal(size=30), 10)
    together = paired_band(differences, np.repeat(np.arange(30), 10))
    assert together.half_width > 2.5 * paired_band(differences).half_width
    assert math.isnan(paired_band(differences, np.zeros(300)).half_width)


@pytest.mark.parametrize(("differences", "clusters"), [([], None), ([1.0, 2.0], [0])])
def test_no_items_or_other_clusters(differences: list[float], clusters: list[int] | None) -> None:
    with pytest.raises(ValueError, match="at least one"):
        paired_band(differences, clusters)
