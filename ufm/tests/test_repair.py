from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ufm import UFMProblem, closed_form, repair_weights, solve
from ufm.repair import (
    AVERAGE_EXPONENT,
    BALANCED_EXPONENT,
    EQUAL_EXPONENT,
    weak_decay_losses,
)

ZIPF = [max(1, round(20_000 / rank)) for rank in range(1, 301)]


def losses(exponent, critical_count=1e-4):
    """Average and balanced loss of a Zipf problem whose unweighted n_c is given."""
    lam = math.sqrt(critical_count * 299 / 300) / sum(ZIPF)
    problem = UFMProblem(
        class_counts=ZIPF,
        lambda_W=lam,
        lambda_H=lam,
        loss_weights=repair_weights(ZIPF, exponent),
    )
    loss = closed_form(problem).loss
    share = torch.tensor(ZIPF).double() / sum(ZIPF)
    return float((share * loss).sum()), float(loss.mean()), loss


def test_weights_keep_the_number_of_samples_and_the_ratio():
    weights = repair_weights([100, 25, 0, 1], 0.5)
    assert float((weights * torch.tensor([100, 25, 0, 1])).sum()) == pytest.approx(126)
    assert weights[2] == 0
    assert float(weights[3] / weights[0]) == pytest.approx(10)
    assert repair_weights(np.array([7, 3]), 0).tolist() == pytest.approx([1.0, 1.0], rel=1e-14)


@pytest.mark.parametrize(("which", "best"), [(0, AVERAGE_EXPONENT), (1, BALANCED_EXPONENT)])
def test_the_optimal_exponents_at_weak_decay(which, best):
    least = losses(best)[which]
    for other in (best - 0.02, best + 0.02, 0.0, EQUAL_EXPONENT, 1.0):
        assert losses(other)[which] > least


def test_one_half_makes_them_equal_until_all_collapse_at_once():
    loss = losses(EQUAL_EXPONENT, critical_count=0.01)[2]
    assert float(loss.max() - loss.min()) < 1e-13
    roots = sum(math.sqrt(n) for n in ZIPF)
    for factor, all_collapse in ((0.999, False), (1.001, True)):
        lam = factor * math.sqrt(299 / 300) / roots
        problem = UFMProblem(
            class_counts=ZIPF,
            lambda_W=lam,
            lambda_H=lam,
            loss_weights=repair_weights(ZIPF, EQUAL_EXPONENT),
        )
        collapsed = closed_form(problem).collapsed
        assert bool(collapsed.all()) is bool(collapsed.any()) is all_collapse


def test_one_over_the_count_over_corrects():
    repaired = losses(1.0, critical_count=1.0)[2]
    assert repaired[0] > repaired[-1]


def test_the_figures_of_the_theory_for_a_zipf_vocabulary():
    """ufm/THEORY.md, section 6: average and balanced loss by exponent at a head count of 1e7."""
    V = 32005
    counts = (1e7 / torch.arange(1, V + 1)).round().long().clamp(min=1)
    lam = math.sqrt(100 * (V - 1) / V) / float(counts.sum())
    result = {}
    for exponent in (0.0, 0.25, 0.5, 0.75, 1.0):
        problem = UFMProblem(
            class_counts=counts,
            lambda_W=lam,
            lambda_H=lam,
            loss_weights=repair_weights(counts, exponent),
        )
        loss = closed_form(problem).loss
        result[exponent] = (float((loss * counts).sum() / counts.sum()), float(loss.mean()))
    assert result[0.25][0] < result[0.0][0]
    assert result[0.25][1] < result[0.0][1]
    assert result[0.5][0] == pytest.approx(result[0.5][1])
    printed = {
        0.0: (0.123, 0.496),
        0.25: (0.070, 0.169),
        0.5: (0.109, 0.109),
        0.75: (0.619, 0.097),
        1.0: (5.051, 0.137),
    }
    for exponent, figures in printed.items():
        assert result[exponent] == pytest.approx(figures, abs=5e-4)


@pytest.mark.parametrize(
    ("counts", "exponent", "named"),
    [
        ([3, -1], 0.5, "-1"),
        ([3, 1.5], 0.5, r"1\.5"),
        ([0, 0], 0.5, "all 0"),
        ([3, 1], math.nan, "nan"),
        ([10**6, 1], 1e9, "float64"),
        ([[3, 1]], 0.5, "shape"),
    ],
)
def test_bad_input_is_named(counts, exponent, named):
    with pytest.raises(ValueError, match=named):
        repair_weights(counts, exponent)


@pytest.mark.parametrize("sharing", [0.0, 1.0])
@pytest.mark.parametrize(("g", "q"), [(0.5, 0.0), (0.0, 0.5), (0.0, 1.0), (0.25, -0.5)])
def test_what_a_repair_leaves_at_weak_decay_is_what_certified_minima_leave(sharing, g, q):
    """The solver knows no formula, and its certificate bounds what it may have missed."""
    counts = [40, 20, 8, 3]
    n = torch.tensor(counts, dtype=torch.float64)
    lam = 1e-7

    def losses_at(rows, weights):
        problem = UFMProblem(
            class_counts=counts,
            lambda_W=lam * rows,
            lambda_H=lam,
            loss_weights=weights,
            feature_sharing=sharing,
        )
        solution = solve(problem, tolerance=1e-9)
        assert float(solution.certificate.gap) <= 1e-4 * float(solution.objective)
        return solution.loss

    plain = losses_at(torch.ones(4, dtype=torch.float64), repair_weights(counts, 0))
    repaired = losses_at(n**q / (n**q).mean(), repair_weights(counts, g))
    left = weak_decay_losses(counts, loss_exponent=g, row_exponent=q, feature_sharing=sharing)
    assert float((n * repaired).sum() / (n * plain).sum()) == pytest.approx(left[0], rel=2e-2)
    assert float(repaired.sum() / plain.sum()) == pytest.approx(left[1], rel=2e-2)


@pytest.mark.parametrize("sharing", [0.0, 1.0])
def test_a_row_exponent_of_one_more_than_the_sharing_makes_losses_equal(sharing):
    counts = np.array([9, 7, 6, 5, 4, 3, 2] * 200)
    average, balanced = weak_decay_losses(counts, row_exponent=1 + sharing, feature_sharing=sharing)
    plain = counts ** (-(1 + sharing) / 2)
    # One loss for all: both shares are of the same number.
    means = (counts * plain).sum() / counts.sum(), plain.mean()
    assert average * means[0] == pytest.approx(balanced * means[1], rel=1e-3)


@pytest.mark.parametrize(("counts", "exponent"), [([4, 2], 1e6), ([4], 1.0)])
def test_a_row_exponent_out_of_range(counts, exponent):
    with pytest.raises(ValueError, match="row_exponent is"):
        weak_decay_losses(counts, row_exponent=exponent)
