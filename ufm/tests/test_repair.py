from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ufm import UFMProblem, closed_form, repair_weights
from ufm.repair import AVERAGE_EXPONENT, BALANCED_EXPONENT, EQUAL_EXPONENT

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
