"""Learning speed against exact rational arithmetic, and the filling of gaps."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from frequency_bins import carry_back, carry_forward, learning_speed

FINITE = st.floats(0, 1e6)


def exact_speed(steps: list[int], losses: list[float]) -> Fraction:
    values = [Fraction(x) for x in losses]
    low, high = min(values), max(values)
    if low == high:
        return Fraction(0)
    area = sum(
        (steps[i + 1] - steps[i]) * ((values[i] + values[i + 1]) / 2 - low) / (high - low)
        for i in range(len(steps) - 1)
    )
    return 1 - area / (steps[-1] - steps[0])


@given(
    curve=st.lists(st.tuples(st.integers(0, 10**6), FINITE), min_size=2, unique_by=lambda p: p[0])
)
def test_learning_speed_against_fractions(curve: list[tuple[int, float]]) -> None:
    steps = sorted(step for step, _ in curve)
    losses = [loss for _, loss in curve]
    speed = float(learning_speed(steps, losses))
    assert 0 <= speed <= 1
    assert speed == pytest.approx(float(exact_speed(steps, losses)), abs=1e-9)


def test_learning_speed_of_known_curves() -> None:
    steps = [0, 50, 100]
    losses = np.array([[4.0, 4.0, 2.0, 7.0], [2.0, 0.0, 4.0, 7.0], [0.0, 0.0, 2.0, 7.0]])
    # A straight descent, one that is over half-way, a tent, and nothing learned.
    assert learning_speed(steps, losses).tolist() == [0.5, 0.75, 0.5, 0.0]
    # Uneven recording: the same straight line has the same speed.
    assert learning_speed([100, 110, 200], [4.0, 3.6, 0.0]).item() == pytest.approx(0.5)


def test_learning_speed_keeps_trailing_dimensions_and_nan() -> None:
    losses = np.zeros((3, 2, 4))
    losses[1, 0, 0] = np.nan
    speed = learning_speed([1, 2, 3], losses)
    assert speed.shape == (2, 4)
    assert np.isnan(speed[0, 0])
    assert np.isnan(speed).sum() == 1


@pytest.mark.parametrize("steps", [[1], [2, 2], [3, 1], [[1, 2]]])
def test_steps_must_increase(steps: object) -> None:
    with pytest.raises(ValueError, match="expected at least two, increasing"):
        learning_speed(steps, np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"\(3, 1\)"):
        learning_speed([1, 2], np.zeros((3, 1)))


@given(
    losses=st.lists(st.lists(st.none() | FINITE, min_size=3, max_size=3), min_size=1, max_size=8)
)
def test_carry_forward_against_a_loop(losses: list[list[float | None]]) -> None:
    array = np.array(losses, dtype=np.float64)
    filled, windows_seen = carry_forward(array)
    for k in range(3):
        column = [row[k] for row in losses]
        known = [x for x in column if x is not None]
        assert windows_seen[k] == len(known)
        last = known[0] if known else np.nan
        for t, value in enumerate(column):
            last = last if value is None else value
            assert filled[t, k] == last or (np.isnan(filled[t, k]) and np.isnan(last))


@given(falls=st.lists(st.tuples(FINITE, st.booleans()), min_size=3, max_size=12), seen=st.data())
def test_absence_leaves_the_speed_of_a_falling_loss_between_the_two_fillings(
    falls: list[tuple[float, bool]], seen: st.DataObject
) -> None:
    """Whatever the loss was where it was not seen, between its neighbours that were."""
    known = [0, len(falls) - 1, *(t for t, (_, is_seen) in enumerate(falls) if is_seen)]
    truth = np.array(sorted((loss for loss, _ in falls), reverse=True))[:, None]
    measured = np.full_like(truth, np.nan)
    measured[known] = truth[known]
    steps = np.cumsum([seen.draw(st.integers(1, 9)) for _ in falls])
    least = learning_speed(steps, carry_forward(measured)[0]).item()
    most = learning_speed(steps, carry_back(measured)).item()
    assert least - 1e-9 <= learning_speed(steps, truth).item() <= most + 1e-9


def test_carry_back_takes_what_comes_after() -> None:
    gaps = np.array([[np.nan, 3.0], [5.0, np.nan], [np.nan, np.nan], [4.0, np.nan]])
    assert carry_back(gaps).T.tolist() == [[5.0, 5.0, 4.0, 4.0], [3.0, 3.0, 3.0, 3.0]]
    assert np.isnan(carry_back(np.full((2, 1), np.nan))).all()
