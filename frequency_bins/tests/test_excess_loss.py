"""Floor and excess: against sums written out, paired seeds, and input that is not a pair."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frequency_bins import excess_loss

LOSS = st.floats(0, 30)
CLASSES = st.lists(st.tuples(st.integers(0, 10**9), LOSS, LOSS), min_size=1, max_size=30).filter(
    lambda classes: any(count for count, *_ in classes)
)


@settings(deadline=None)
@given(classes=CLASSES)
def test_bins_against_fractions(classes: list[tuple[int, float, float]]) -> None:
    counts = [count for count, *_ in classes]
    result = excess_loss(
        counts,
        [loss if count else math.nan for count, loss, _ in classes],
        torch.tensor([floor for *_, floor in classes], dtype=torch.float64),
    )
    assert result.bins.never_occurring == counts.count(0)
    for octave in range(len(result.bins)):
        members = [c for c in classes if c[0].bit_length() == octave + 1]
        if not members:
            assert math.isnan(result.bin_floor[0, octave])
            assert math.isnan(result.bin_excess[0, octave])
            continue
        tokens = sum(count for count, *_ in members)
        floor = sum(count * Fraction(floor) for count, _, floor in members) / tokens
        loss = sum(count * Fraction(loss) for count, loss, _ in members) / tokens
        assert result.bin_floor[0, octave] == pytest.approx(float(floor), rel=1e-14, abs=1e-300)
        # Each class's difference of losses is rounded once, to half a unit of a number below 30.
        assert result.bin_excess[0, octave] == pytest.approx(float(loss - floor), abs=1e-14)
    for k, (count, loss, floor) in enumerate(classes):
        assert result.floor[0, k] == floor if count else math.isnan(result.floor[0, k])
        assert result.excess[0, k] == loss - floor if count else math.isnan(result.excess[0, k])


def test_what_a_seed_does_to_both_of_its_runs_is_not_in_the_band() -> None:
    counts = np.array([1, 1, 3, 9, 0])
    floor = np.array([0.1, 0.2, 0.1, 0.1, np.nan])
    excess = np.array([[0.5, 0.4, 0.2, 0.1, 0], [0.6, 0.4, 0.2, 0.1, 0], [0.7, 0.4, 0.2, 0.1, 0]])
    seeds = np.array([[0.0], [0.5], [1.0]])
    result = excess_loss(counts, floor + seeds + excess, np.tile(floor, (3, 1)) + seeds)
    assert result.bin_excess == pytest.approx(
        np.array([[0.45, 0.2, np.nan, 0.1], [0.5, 0.2, np.nan, 0.1], [0.55, 0.2, np.nan, 0.1]]),
        nan_ok=True,
    )
    band = result.excess_band()
    # Of three values 0.05 apart the deviation is 0.05; Student's t for 2 degrees is 4.3027.
    assert band.mean[:2] == pytest.approx([0.5, 0.2])
    assert band.half_width[:2] == pytest.approx([4.3026527 * 0.05 / math.sqrt(3), 0], abs=1e-9)
    assert result.floor_band().std[:2] == pytest.approx([0.5, 0.5])


def test_excess_may_be_negative_and_is_kept() -> None:
    result = excess_loss([1, 2], [0.1, 0.3], [0.4, 0.1])
    assert result.bin_excess == pytest.approx(np.array([[-0.3, 0.2]]))


@pytest.mark.parametrize(
    ("counts", "losses", "without", "message"),
    [
        ([1, -2], [1, 1], [1, 1], "range -2"),
        ([1, 2.5], [1, 1], [1, 1], "2.5; expected whole"),
        ([1, math.inf], [1, 1], [1, 1], "inf; expected whole"),
        ([0, 0], [1, 1], [1, 1], "none of the 2 classes occurs"),
        ([1, 2], [1, 1, 1], [1, 1], r"losses have the shape \(3,\)"),
        ([1, 2], [1, 1], [[1, 1], [1, 1]], "same seeds"),
        ([1, 2], [1, math.nan], [1, 1], "losses of class 1, which occurs 2 times"),
        ([1, 2], [1, 1], [1, math.inf], "losses_without of class 1"),
        ([1, 2], [1, 1], [-0.1, 1], "loss -0.1"),
        ([1, 2], ["1", "2"], [1, 1], "expected numbers"),
        ([1, 2], [], [1, 1], "shape"),
    ],
)
def test_bad_input_is_one_line(
    counts: list[Any], losses: list[Any], without: list[Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        excess_loss(counts, losses, without)
    assert "\n" not in str(error.value)
