"""Each printed formula: what it gives, worked out by hand, and that it is not the truth."""

from __future__ import annotations

import math

import pytest
import torch

from ufm import UFMProblem, as_printed, closed_form
from ufm.certificate import objective

COUNTS = [40, 20, 8, 3]
PROBLEM = UFMProblem(class_counts=COUNTS, lambda_W=2e-3, lambda_H=2e-3)
TRUE = closed_form(PROBLEM)


def test_equation_1_doubles_the_feature_decay():
    doubled = UFMProblem(class_counts=COUNTS, lambda_W=2e-3, lambda_H=4e-3)
    printed = as_printed.objective(PROBLEM, TRUE.W, TRUE.H)
    torch.testing.assert_close(printed, objective(doubled, TRUE.W, TRUE.H))
    samples = TRUE.H.repeat_interleave(PROBLEM.class_counts, dim=1)
    torch.testing.assert_close(printed, as_printed.objective(PROBLEM, TRUE.W, samples))
    assert printed > TRUE.objective


def test_margin_with_the_short_root():
    expected = [math.log(3 * (math.sqrt(n) / (71 * math.sqrt(0.75) * 4e-6) - 1)) for n in COUNTS]
    torch.testing.assert_close(as_printed.margin(PROBLEM), torch.tensor(expected).double())
    large = UFMProblem(class_counts=COUNTS, lambda_W=1.0, lambda_H=1.0)
    assert as_printed.margin(large).tolist() == [0.0] * 4


def test_weight_norms_that_count_their_own_class_twice():
    M = TRUE.margin.tolist()
    total = sum(math.sqrt(n) * m for n, m in zip(COUNTS, M, strict=True))
    expected = [
        (9 * math.sqrt(n) * m + total) / math.sqrt(192) for n, m in zip(COUNTS, M, strict=True)
    ]
    printed = as_printed.weight_norm_sq(PROBLEM, TRUE.margin)
    torch.testing.assert_close(printed, torch.tensor(expected).double())
    assert (printed > TRUE.weight_norm_sq * 1.05).all()


def test_critical_count_is_off_by_the_square_of_v_over_v_minus_1():
    printed = as_printed.critical_count(PROBLEM)
    assert printed == pytest.approx(4e-6 * 71**2 * 0.75)
    assert float(TRUE.critical_count) / printed == pytest.approx((4 / 3) ** 2)
    between = UFMProblem(class_counts=[9, 3], lambda_W=0.1, lambda_H=0.1)
    # n_c = 2.88 and 0.72: between the two the paper calls the class learned.
    assert as_printed.critical_count(between) == pytest.approx(0.72)
    assert float(closed_form(between).critical_count) == pytest.approx(2.88)


def test_collapse_as_printed():
    problem = UFMProblem(class_counts=[9, 2], lambda_W=0.1, lambda_H=0.1)
    assert as_printed.collapsed(problem).tolist() == [False, False]
    assert closed_form(problem).collapsed.tolist() == [False, True]


def test_proposition_5_1_is_a_negative_cross_entropy():
    M = TRUE.margin.tolist()
    expected = [math.log(sum(math.exp(m / 16) for m in M)) - m for m in M]
    printed = as_printed.loss(TRUE.margin)
    torch.testing.assert_close(printed, torch.tensor(expected).double())
    assert (printed < 0).all()
    assert (TRUE.loss > 0).all()


def test_logits_of_the_proof():
    printed = as_printed.logits(TRUE.margin)
    assert printed[2, 2] == TRUE.margin[2]
    assert printed[1, 2] == TRUE.margin[1] / 16
    assert (printed.diagonal() / TRUE.logits.diagonal() - 4 / 3).abs().max() < 1e-14
    assert (TRUE.logits[0, 1:] < 0).all()


def test_slope_as_printed():
    step = 1e-7
    margins = [
        closed_form(
            UFMProblem(class_counts=COUNTS, lambda_W=2e-3 * factor, lambda_H=2e-3 * factor)
        ).margin
        for factor in (1 - step, 1 + step)
    ]
    margin_slope = (margins[1] - margins[0]) / (4e-3 * step)
    common = sum(
        torch.logsumexp(M / 16, 0) * sign for M, sign in zip(margins, (-1, 1), strict=True)
    )
    expected = torch.tensor(
        [500 + 71 * math.sqrt(3) / math.sqrt(4 * n - 2e-3 * 71 * math.sqrt(3)) for n in COUNTS]
    ).double() + common / (4e-3 * step)
    printed = as_printed.loss_slope(PROBLEM, TRUE.margin, margin_slope)
    torch.testing.assert_close(printed, expected, rtol=1e-6, atol=0)
    assert (printed > 4 * TRUE.loss_slope).all()


def test_only_plain_problems():
    batch = UFMProblem(class_counts=[[3, 2], [2, 1]], lambda_W=1e-2, lambda_H=1e-2)
    with pytest.raises(ValueError, match="one problem"):
        as_printed.margin(batch)
    skew = UFMProblem(class_counts=[3, 2], lambda_W=1e-2, lambda_H=2e-2)
    with pytest.raises(ValueError, match="expected equal"):
        as_printed.loss_slope(skew, torch.ones(2).double(), torch.ones(2).double())
