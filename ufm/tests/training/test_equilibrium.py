from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from ufm.training import TableTraining, train_table
from ufm.training.equilibrium import (
    amplitudes,
    l2_minimum,
    margin_kept,
    mean_update,
    row_size,
    win_back_rate,
)


def adam_updates(gradient, beta1, beta2):
    """m / sqrt(v) after every step, long after the start."""
    m = v = 0.0
    updates = []
    for g in gradient:
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        updates.append(m / math.sqrt(v) if v else 0.0)
    return updates


@pytest.mark.parametrize("gap", [1, 3, 40, 700])
@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.99), (0.0, 0.95), (0.9, 0.81)])
def test_the_mean_update_of_evenly_spaced_gradients_is_exact(gap, beta1, beta2):
    passed = -(-4000 // gap) * gap
    gradient = [float(step % gap == 0) for step in range(passed + 5 * gap)]
    measured = np.mean(adam_updates(gradient, beta1, beta2)[passed:])
    share = torch.tensor([1.0 / gap], dtype=torch.float64)
    assert float(mean_update(share, beta1=beta1, beta2=beta2)) == pytest.approx(measured, rel=1e-9)


@pytest.mark.parametrize("share", [0.003, 0.01, 0.03, 0.3])
def test_the_mean_update_bounds_gradients_at_random_steps_within_15_percent(share):
    gradient = (np.random.default_rng(0).random(300_000) < share).astype(float)
    measured = np.mean(adam_updates(gradient, 0.9, 0.99)[2000:])
    even = float(mean_update(torch.tensor([share]).double(), beta1=0.9, beta2=0.99))
    # 900 gradients at least: chance moves the mean by 4 %.
    assert 0.85 * even < measured < 1.04 * even
    assert measured == pytest.approx(share / math.sqrt(share + 0.01), rel=0.15)


def test_the_mean_update_in_its_two_limits():
    frequent, rare = mean_update(torch.tensor([0.2, 1e-8]).double(), beta1=0.9, beta2=0.9999)
    assert float(frequent) == pytest.approx(math.sqrt(0.2), rel=2e-3)
    assert float(rare) == pytest.approx(1e-8 / math.sqrt(1e-4), rel=1e-3)


@pytest.mark.parametrize("kappa", [0.0, 0.3, 8.0])
def test_a_row_pushed_one_way_ends_where_it_should(kappa):
    training = TableTraining(
        class_counts=(1, 1), optimizer="adamw", steps=4000, learning_rate=0.01, beta2=0.99,
        schedule="constant", initial_size=1e-3,
    )  # fmt: skip
    decay, share = kappa / 40.0, 0.05
    rng = np.random.default_rng(1)
    rows = torch.zeros(200, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW(
        [rows], lr=0.01, betas=(0.9, 0.99), weight_decay=decay, foreach=False
    )
    for _ in range(4000):
        rows.grad = -torch.from_numpy((rng.random(200) < share).astype(float))
        optimizer.step()
    predicted = float(row_size(training, decay, torch.tensor([share]).double()))
    # Random steps push up to 10 % less than even ones do; 200 rows of 200 gradients.
    assert 0.88 * predicted < float(rows.detach().mean()) < 1.02 * predicted
    update = float(mean_update(torch.tensor([share]).double(), beta1=0.9, beta2=0.99))
    steady = 40.0 * update * (-math.expm1(-kappa) / kappa if kappa else 1.0)
    assert predicted == pytest.approx(steady, rel=5e-3)


@pytest.mark.parametrize(("rate", "beta2", "inside"), [(1e-3, 0.95, True), (0.02, 0.999, False)])
def test_the_box_of_adamw_holds_where_moments_forget_faster_than_weights(rate, beta2, inside):
    decay = 4.0
    training = TableTraining(
        class_counts=(40, 9, 3, 1), optimizer="adamw", steps=1500, learning_rate=rate,
        schedule="constant", batch_size=8, beta2=beta2,
    )  # fmt: skip
    trained = train_table(training, weight_decay=decay)
    largest = max(float(trained.W.abs().max()), float(trained.features.abs().max()))
    # The edge is reached, so that the bound says something.
    assert 0.9 / decay < largest < 3.0 / decay
    assert (largest <= 1.0 / decay) is inside


@pytest.mark.parametrize("factors", [1, 2])
@pytest.mark.parametrize("rate", [0.01, 1.0, 30.0])
def test_the_margin_kept_solves_its_equation(factors, rate):
    def end(kappa):
        path = solve_ivp(
            lambda x, M: rate * (1 - M) - factors * kappa * M, (0, 1), [0.0], rtol=1e-10, atol=1e-13
        )
        return path.y[0, -1]

    for kappa in (0.1, 1.0):
        kept = float(margin_kept(kappa, torch.tensor([rate]).double(), factors=factors))
        assert kept == pytest.approx(end(kappa) / end(0.0), rel=1e-7)
    lost = -math.log(float(margin_kept(1e-6, torch.tensor([rate]).double(), factors=factors)))
    assert lost / 1e-6 == pytest.approx(factors * (1 / rate - 1 / math.expm1(rate)), rel=1e-4)


@pytest.mark.parametrize(("features", "factors"), [("free", 2), ("normalized", 1)])
def test_the_rate_of_winning_back_is_measured(features, factors):
    training = TableTraining(
        class_counts=(64,) * 8 + (16,) * 8, width=32, optimizer="adamw", features=features,
        label_noise=0.05, steps=3000, batch_size=32, learning_rate=2e-3,
    )  # fmt: skip
    kappa = 0.5
    without, decayed = (
        train_table(training, weight_decay=k / float(training.learning_rates.sum()))
        for k in (0.0, kappa)
    )
    lost = -(decayed.margin / without.margin).log()
    predicted = -margin_kept(kappa, win_back_rate(training), factors=factors).log()
    for classes in (slice(0, 8), slice(8, 16)):
        assert float(lost[classes].mean()) == pytest.approx(
            float(predicted[classes].mean()), rel=0.25
        )


def test_two_numbers_a_class_end_near_the_table():
    training = TableTraining(
        class_counts=(512,) * 4 + (64,) * 4 + (8,) * 4, width=32, optimizer="adamw", steps=2000,
        batch_size=32, learning_rate=5e-3,
    )  # fmt: skip
    for decay in (0.0, 0.1):
        measured = train_table(training, weight_decay=decay).margin.view(3, 4).mean(1)
        predicted = amplitudes(training, decay).margin.view(3, 4).mean(1)
        assert float((measured / predicted - 1).abs().max()) < 0.2


def test_adam_decays_rows_that_are_seldom_pushed_too_much():
    training = TableTraining(
        class_counts=(64, 32, 16, 8, 4), optimizer="adam", beta2=0.95, batch_size=4, steps=6000,
        width=20,
    )  # fmt: skip
    trained = train_table(training, weight_decay=2e-3)
    excess = trained.loss / l2_minimum(training, 2e-3).loss - 1.0
    share = 1.0 - (1.0 - training.counts / 124.0) ** 4
    # The loss grows like the root of lambda_H: between evenly spaced and random gradients.
    even, random = 0.05 / (8.0 * share), 0.05 / (4.0 * share)
    assert float(excess[0].abs()) < 0.01
    assert 0.5 * float(even[-1]) < float(excess[-1]) < 1.3 * float(random[-1])


@pytest.mark.parametrize(("share", "beta2"), [(0.5, 0.9), (0.1, 0.95), (0.04, 0.99)])
def test_decay_between_random_gradients(share, beta2):
    """THEORY.md, 10.1: E[v^-1/2] / E[v^-1/2 | gradient] = p / (1 - (1 - p) beta2^-1/2)."""
    drawn = torch.rand(200_000, generator=torch.Generator().manual_seed(1)) < share
    second, every, pushed = 1.0 - beta2, [], []
    for gradient in drawn.tolist():
        second = beta2 * second + (1.0 - beta2) * gradient
        every.append(second**-0.5)
        pushed += every[-1:] if gradient else []
    measured = sum(every) / len(every) / (sum(pushed) / len(pushed))
    exact = share / (1.0 - (1.0 - share) * beta2**-0.5)
    assert measured - 1.0 == pytest.approx(exact - 1.0, rel=0.05)


def test_what_is_not_derived_is_refused():
    with pytest.raises(ValueError, match=r"label_noise is 0\.0"):
        win_back_rate(TableTraining(optimizer="adamw"))
    with pytest.raises(ValueError, match="features are normalized; expected free"):
        amplitudes(TableTraining(optimizer="adamw", features="normalized", steps=1), 0.1)
    with pytest.raises(ValueError, match="lambda_W is 0"):
        l2_minimum(TableTraining(), 0.0)
    with pytest.raises(ValueError, match="nonnegative"):
        l2_minimum(TableTraining(features="free"), 0.1)
    with pytest.raises(ValueError, match="width"):
        l2_minimum(TableTraining(width=3), 1e-3)
