"""The margin law: data made from it, a slow scalar version, limits, and input it cannot take."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import brentq

from frequency_bins import excess_loss, margin_share, predict_bins, predict_loss, seed_band

SIZES = st.integers(2, 10**6)
SHARES = st.floats(0.01, 1)


def slow_loss(margin: float, prior: float) -> float:
    """Of the class whose log odds are `margin` above those of `prior`."""
    odds = math.exp(margin) * prior / (1 - prior)
    return math.log1p(1 / odds)


def slow_second_order(
    without: float, at: float, kappa_at: float, kappa: float, prior: float
) -> float:
    """dM = -M dkappa / (1 + rho p), class by class, with general-purpose routines."""

    def margin(loss: float) -> float:
        return math.log(math.exp(-loss) / -math.expm1(-loss)) - math.log(prior / (1 - prior))

    def chance(log_margin: float) -> float:
        return math.exp(-slow_loss(math.exp(log_margin), prior))

    start, middle = math.log(margin(without)), math.log(margin(at))
    area = quad(chance, middle, start, epsabs=1e-13, epsrel=1e-12)[0]
    rho = (kappa_at - (start - middle)) / area

    def spent(log_margin: float) -> float:
        won_back = rho * quad(chance, log_margin, start, epsabs=1e-13, epsrel=1e-12)[0]
        return start - log_margin + won_back - kappa

    return slow_loss(math.exp(brentq(spent, start - kappa, start, xtol=1e-14)), prior)


@settings(deadline=None)
@given(size=SIZES, margin=st.floats(0.5, 30), share=st.floats(-0.5, 3), kappa=st.floats(0, 3))
def test_losses_that_obey_the_law_are_predicted(
    size: int, margin: float, share: float, kappa: float
) -> None:
    without, at, expected = (
        slow_loss(margin * math.exp(-k * share), 1 / size) for k in (0.0, 0.1, kappa)
    )
    predicted = predict_loss([without], [at], 0.1, kappa, vocab_size=size)
    # A margin of 30 leaves a loss of 1e-13 / V, known to a few units of its 16th digit; what is
    # lost between two such losses is known to 1e-16 / 0.1 of kappa.
    assert predicted[0] == pytest.approx(expected, rel=1e-11)
    assert margin_share([without], [at], 0.1, vocab_size=size)[0] == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("kappa", [0.0, 0.01, 0.048, 0.48, 2.0])
def test_second_order_against_a_slow_version(kappa: float) -> None:
    rng = np.random.default_rng(0)
    prior = 10 ** rng.uniform(-7, -0.5, 30)
    without = rng.uniform(0.01, 0.1, 30) * np.minimum(1, -np.log(prior))
    share = rng.uniform(0.05, 0.95, 30)
    odds = np.log(prior / (1 - prior))
    at = np.logaddexp(0, -((-np.log(np.expm1(without)) - odds) * np.exp(-0.048 * share) + odds))
    predicted = predict_loss(without, at, 0.048, kappa, vocab_size=100, prior=prior)
    slow = [
        slow_second_order(a, b, 0.048, kappa, q) for a, b, q in zip(without, at, prior, strict=True)
    ]
    assert predicted == pytest.approx(np.array(slow), rel=1e-8)
    assert (predicted >= without * (1 - 1e-12)).all()


def test_second_order_lies_between_the_first_and_all_of_the_decay() -> None:
    prior = np.array([1e-4, 1e-3, 1e-2])
    without, at = np.array([0.1, 0.06, 0.03]), np.array([0.13, 0.08, 0.035])
    odds = np.log(prior / (1 - prior))

    def at_share(share: np.ndarray | float) -> np.ndarray:
        margin = (-np.log(np.expm1(without)) - odds) * np.exp(-np.asarray(share))
        return np.logaddexp(0, -(margin + odds))

    share = margin_share(without, at, 0.05, vocab_size=1000, prior=prior)
    second = predict_loss(without, at, 0.05, 0.5, vocab_size=1000, prior=prior)
    assert (second > at_share(0.5 * share)).all()
    assert (second < at_share(0.5)).all()


def test_second_order_keeps_the_first_where_nothing_is_won_back() -> None:
    prior = np.full(2, 1 / 50)
    # One class gains from decay, of one more is lost than decay takes.
    without, at = np.array([0.1, 0.1]), np.array([0.09, 0.2])
    share = margin_share(without, at, 0.1, vocab_size=50)
    assert share[0] < 0
    assert share[1] > 1
    assert predict_loss(without, at, 0.1, 0.4, vocab_size=50, prior=prior) == pytest.approx(
        predict_loss(without, at, 0.1, 0.4, vocab_size=50), rel=1e-12
    )


@settings(deadline=None)
@given(share=SHARES, first=st.floats(0.01, 1), second=st.floats(0.01, 1))
def test_known_points(share: float, first: float, second: float) -> None:
    without, at = slow_loss(9.0, 0.001), slow_loss(9.0 * math.exp(-first * share), 0.001)
    for prior in (None, 0.001):
        start, same = (
            predict_loss(without, at, first, k, vocab_size=1000, prior=prior) for k in (0.0, first)
        )
        assert start == pytest.approx(without, rel=1e-12)
        assert same == pytest.approx(at, rel=1e-9)
        # Predicting in two steps is predicting in one: the law does not depend on where one looks.
        middle = predict_loss(without, at, first, second, vocab_size=1000, prior=prior)
        far = predict_loss(without, at, first, 1.5, vocab_size=1000, prior=prior)
        again = predict_loss(without, middle, second, 1.5, vocab_size=1000, prior=prior)
        assert again == pytest.approx(float(far), rel=1e-6)
        assert start <= far * (1 + 1e-12)


def test_far_away_every_class_is_at_chance() -> None:
    without, at = [0.1, 0.05], [0.2, 0.1]
    assert predict_loss(without, at, 0.1, 1e6, vocab_size=100) == pytest.approx(math.log(100))
    prior = [0.2, 0.01]
    far = predict_loss(without, at, 0.1, 30, vocab_size=100, prior=prior)
    assert far == pytest.approx(-np.log(prior), rel=1e-3)


def test_arrays_of_any_kind_and_shape() -> None:
    without, at = np.array([[0.1, 0.2], [0.11, 0.19]]), np.array([[0.15, 0.3], [0.16, 0.27]])
    expected = predict_loss(without, at, 0.1, 0.3, vocab_size=50)
    for kind in (np.asarray, np.ndarray.tolist, torch.tensor):
        found = predict_loss(kind(without), kind(at), 0.1, 0.3, vocab_size=50)
        assert isinstance(found, np.ndarray)
        assert found.dtype == np.float64
        assert found == pytest.approx(expected, rel=1e-12)
    swapped = predict_loss(without[:, ::-1], at[:, ::-1], 0.1, 0.3, vocab_size=50)
    assert swapped[:, ::-1] == pytest.approx(expected, rel=1e-12)
    several = predict_loss(without[0], at[0], 0.1, [[0.1], [0.3]], vocab_size=50)
    assert several == pytest.approx(np.stack([at[0], expected[0]]), rel=1e-12)
    assert seed_band(expected).mean == pytest.approx(expected.mean(axis=0), rel=1e-12)
    absent = predict_loss([0.1, math.nan], [0.2, math.nan], 0.1, 0.3, vocab_size=50, prior=0.01)
    assert np.isnan(absent).tolist() == [False, True]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loss_at": [0.2]}, r"shape \(2,\), loss_at \(1,\)"),
        ({"loss_at": [0.2, math.nan]}, "loss_at holds nan"),
        ({"loss_without": [0.0, 0.1]}, "loss_without holds 0.0"),
        ({"loss_without": [-0.1, 0.1]}, "loss_without holds -0.1"),
        ({"loss_at": [0.2, 5.0]}, "loss_at holds 5.0; expected 0 < loss < log V"),
        ({"loss_at": [0.2, math.inf]}, "loss_at holds inf"),
        ({"loss_at": ["a", "b"]}, "expected numbers"),
        ({"kappa_at": 0}, "kappa_at holds 0"),
        ({"kappa_at": -1}, "kappa_at holds -1"),
        ({"kappa": math.nan}, "kappa holds nan"),
        ({"kappa": math.inf}, "kappa holds inf"),
        ({"kappa": [0.1, 0.2, 0.3]}, "losses and kappas have the shapes"),
        ({"vocab_size": 1}, "vocab_size is 1"),
        ({"prior": [0.1, 1.0]}, "prior holds 1.0"),
        ({"prior": [0.1] * 3}, "prior has the shape"),
        ({"prior": [0.9, 0.1]}, "expected 0 < loss < -log prior"),
    ],
)
def test_bad_input_is_one_line(changed: dict[str, object], message: str) -> None:
    arguments = {
        "loss_without": [0.1, 0.1],
        "loss_at": [0.2, 0.3],
        "kappa_at": 0.1,
        "kappa": 0.4,
        "vocab_size": 100,
    } | changed
    with pytest.raises(ValueError, match=message) as error:
        predict_loss(**arguments)
    assert "\n" not in str(error.value)


def test_bins_are_predicted_from_their_means_and_the_chance_of_their_mean_count() -> None:
    counts = np.array([1, 1, 3, 2, 8, 9, 0])
    floor = np.array([[0.1, 0.2, 0.1, 0.1, 0.05, 0.05, np.nan], [0.2] * 7])
    excess = np.array([[0.5, 0.4, 0.2, 0.3, 0.1, 0.2, 0.0], [0.3] * 7])
    pairs = excess_loss(counts, floor + excess, floor)
    first, second = (
        predict_bins(pairs, 1.0, 2.0, vocab_size=7, second_order=order) for order in (False, True)
    )
    for seed in (0, 1):
        for octave, members in enumerate(([0, 1], [2, 3], [], [4, 5])):
            if not members:
                assert math.isnan(first[seed, octave])
                assert math.isnan(second[seed, octave])
                continue
            tokens = sum(counts[k] for k in members)
            without, added = (
                sum(counts[k] * x[seed, k] for k in members) / tokens for x in (floor, excess)
            )
            prior = sum(counts[k] ** 2 for k in members) / tokens / 24
            both = without, without + added, 1.0, 2.0
            assert second[seed, octave] == pytest.approx(slow_second_order(*both, prior))
            margins = [math.log(6 / math.expm1(loss)) for loss in both[:2]]
            kept = margins[0] * (margins[1] / margins[0]) ** 2
            assert first[seed, octave] == pytest.approx(slow_loss(kept, 1 / 7))


def test_bins_no_better_than_chance_are_left_open() -> None:
    floor = np.full(3, 0.1)
    pairs = excess_loss([1, 2, 4], np.array([0.2, 1.2, 0.2]), floor)  # log 3 = 1.0986
    assert np.isnan(predict_bins(pairs, 0.1, 0.2, vocab_size=3, second_order=False)).tolist() == [
        [False, True, False]
    ]
    alone = excess_loss([5, 5], floor[:2] + 0.1, np.array([0.0, 0.0]))
    assert np.isnan(predict_bins(alone, 0.1, 0.2, vocab_size=2)).all()
    one_class = excess_loss([5], floor[:1] + 0.1, floor[:1])
    assert np.isnan(predict_bins(one_class, 0.1, 0.2, vocab_size=2)).all()


def test_the_papers_table_from_its_first_two_columns() -> None:
    """What README.md says of arXiv 2410.11985, Table 1: kappa is a quarter of the decay there."""
    predicted = predict_loss([0.066], [0.070], 0.025, [0.075, 0.125, 0.25], vocab_size=32005)
    chance = math.log(32004)
    before, after = (chance - math.log(math.expm1(loss)) for loss in (0.066, 0.070))
    for value, times, printed in zip(predicted, (3, 5, 10), (0.078, 0.090, 0.163), strict=True):
        margin = before * (after / before) ** times
        assert value == pytest.approx(math.log1p(math.exp(chance - margin)), rel=1e-9)
        assert (abs(value / printed - 1) < 0.02) == (times < 10)
    assert [round(value, 3) for value in predicted] == [0.079, 0.088, 0.117]
