from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import optimize

from ufm import UFMProblem, closed_form, fit_critical_count


def test_recovers_the_critical_count_of_the_theory():
    problem = UFMProblem(class_counts=[500, 60, 7, 4, 1], lambda_W=2e-3, lambda_H=5e-3)
    theory = closed_form(problem)
    fit = fit_critical_count(problem.class_counts, theory.loss, vocab_size=5)
    assert fit.critical_count == pytest.approx(float(theory.critical_count), rel=1e-13)
    assert fit.r_squared == pytest.approx(1.0, abs=1e-14)
    assert fit.residuals.abs().max() < 1e-14
    torch.testing.assert_close(fit.loss(problem.class_counts), theory.loss)


@pytest.mark.parametrize("seed", range(30))
def test_is_the_global_least_squares(seed):
    generator = np.random.default_rng(seed)
    V = int(generator.integers(3, 60))
    counts = np.ceil(10 ** generator.uniform(0, 5, V)).astype(int)
    losses = generator.exponential(2.0, V)
    weights = generator.uniform(0.1, 3, V)
    fit = fit_critical_count(counts, losses, vocab_size=V, weights=weights)

    def squares(root):
        law = (1 - 1 / V) * np.minimum(1, root / np.sqrt(counts))
        return float((weights * (1 - np.exp(-losses) - law) ** 2).sum())

    # Dense search in every interval between counts, where the sum is a parabola.
    edges = np.concatenate([[0], np.unique(np.sqrt(counts))])
    best = min(
        optimize.minimize_scalar(squares, bounds=(a, b), method="bounded").fun
        for a, b in itertools.pairwise(edges)
    )
    assert squares(math.sqrt(fit.critical_count)) <= best + 1e-12
    u = 1 - np.exp(-losses)
    mean = np.average(u, weights=weights)
    spread = float((weights * (u - mean) ** 2).sum())
    assert fit.r_squared == pytest.approx(1 - squares(math.sqrt(fit.critical_count)) / spread)


def test_leaves_out_classes_without_a_count_or_a_loss():
    counts, losses = [100, 0, 10, 5, 3], [0.1, 0.5, 0.4, math.nan, 0.9]
    fit = fit_critical_count(counts, losses, vocab_size=9)
    alone = fit_critical_count([100, 10, 3], [0.1, 0.4, 0.9], vocab_size=9)
    assert fit.critical_count == pytest.approx(alone.critical_count, rel=1e-13, abs=0)
    assert fit.residuals.isnan().tolist() == [False, True, False, True, False]


def test_extremes():
    learned = fit_critical_count([5, 3], [0.0, 0.0], vocab_size=4)
    assert learned.critical_count == 0
    assert math.isnan(learned.r_squared)
    chance = fit_critical_count([5, 3], [math.log(4)] * 2, vocab_size=4)
    assert chance.critical_count == pytest.approx(5)
    assert float(chance.loss([0])[0]) == pytest.approx(math.log(4))


@pytest.mark.parametrize(
    ("counts", "losses", "vocab_size", "named"),
    [
        ([1, 2], [0.1], 3, "shapes"),
        ([1, -2], [0.1, 0.2], 3, "-2"),
        ([1, 2], [0.1, -0.2], 3, "-0.2"),
        ([1, 2], [0.1, math.inf], 3, "inf"),
        ([1, 2], [0.1, 0.2], 1, "vocab_size is 1"),
        ([1, 2], [0.1, 0.2], 2.5, r"vocab_size is 2\.5"),
        ([0, 2], [0.1, math.nan], 3, "no class"),
        ([[1, 2]], [[0.1, 0.2]], 3, "shape"),
        (["x"], [0.1], 3, "counts"),
    ],
)
def test_bad_input_is_named(counts, losses, vocab_size, named):
    with pytest.raises(ValueError, match=named):
        fit_critical_count(counts, losses, vocab_size=vocab_size)
