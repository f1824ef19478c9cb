from __future__ import annotations

import math

import pytest
import torch

from ufm import UFMProblem, closed_form, neural_collapse
from ufm.geometry import class_errors, mean_cosine

PROBLEM = UFMProblem(class_counts=[50, 20, 7, 1, 1], lambda_W=1e-2, lambda_H=2e-2)
OPTIMUM = closed_form(PROBLEM)


def test_the_minimum_is_collapsed_and_orthogonal_but_not_equinorm():
    samples = OPTIMUM.H.repeat_interleave(PROBLEM.class_counts, dim=1)
    measured = neural_collapse(PROBLEM, OPTIMUM.W, samples)
    assert measured.active.tolist() == [True, True, True, False, False]
    # The mean of 50 equal numbers is off by 50 roundings at most: (50 * 2^-53)^2 = 3e-29.
    assert measured.within_class < 1e-28
    assert measured.within_class_pinv < 1e-28
    assert measured.orthogonal_frame == 0
    assert measured.equinorm > 0.01
    assert measured.rank == 3
    assert measured.minority_cosine == pytest.approx(1.0)
    torch.testing.assert_close(measured.margin, OPTIMUM.margin)


def test_balanced_classes_meet_every_criterion():
    problem = UFMProblem(class_counts=[9] * 4, lambda_W=1e-3, lambda_H=1e-3)
    optimum = closed_form(problem)
    measured = neural_collapse(problem, optimum.W, optimum.H)
    for value in (measured.equinorm, measured.equiangle, measured.orthogonal_frame):
        assert value == pytest.approx(0, abs=1e-14)
    assert measured.self_duality == pytest.approx(0, abs=1e-14)
    assert math.isnan(measured.minority_cosine)
    assert measured.rank == 3


def test_within_class_spread_by_hand():
    problem = UFMProblem(class_counts=[2, 2], lambda_W=1e-3, lambda_H=1e-3)
    H = torch.tensor([[1.0, 3.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]).double()
    measured = neural_collapse(problem, torch.eye(2).double(), H)
    # Means (2, 0) and (0, 1), global (1, 1/2): tr S_B = 5/4; class spreads 1 and 0: tr S_W = 1/2.
    assert measured.within_class == pytest.approx(0.5 / 1.25)
    # S_B = [[1, -1/2], [-1/2, 1/4]] has pinv S_B / (5/4)^2: tr(S_W pinv) / 2.
    assert measured.within_class_pinv == pytest.approx(0.5 * 1 / 1.5625 / 2)
    assert measured.margin.tolist() == [1.0, 1.0]


def test_class_means_and_variances_stand_for_the_samples():
    problem = UFMProblem(class_counts=[6, 3, 4], lambda_W=1e-3, lambda_H=1e-3)
    torch.manual_seed(0)
    H, W = torch.rand(5, 13).double(), torch.randn(3, 5).double()
    parts = H.split([6, 3, 4], dim=1)
    means = torch.stack([part.mean(dim=1) for part in parts], dim=1)
    variance = torch.stack([part.var(dim=1, correction=0).sum() for part in parts])
    whole = neural_collapse(problem, W, H)
    reduced = neural_collapse(problem, W, means, within_class_variance=variance)
    assert math.isnan(reduced.within_class_pinv)
    for name in ("within_class", "equinorm", "equiangle", "orthogonal_frame", "self_duality"):
        assert getattr(reduced, name) == pytest.approx(getattr(whole, name))
    assert reduced.rank == whole.rank


def test_mean_cosine_by_hand():
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]]).double()
    assert mean_cosine(rows) == pytest.approx(2 * 0.5**0.5 / 3)
    assert math.isnan(mean_cosine(rows[:1]))


def test_class_errors_against_the_closed_form():
    assert class_errors(PROBLEM, OPTIMUM.W, OPTIMUM.H).max() < 1e-14
    assert class_errors(PROBLEM, 1.1 * OPTIMUM.W, OPTIMUM.H)[:3].min() > 1e-3


def test_degenerate_points_have_no_angles():
    zero = torch.zeros(5, 5).double()
    measured = neural_collapse(PROBLEM, zero, zero)
    assert not measured.active.any()
    assert math.isnan(measured.orthogonal_frame)
    assert math.isnan(measured.self_duality)
    assert measured.rank == 0


def test_bad_shapes_are_named():
    with pytest.raises(ValueError, match=r"H has shape \(5, 3\)"):
        neural_collapse(PROBLEM, OPTIMUM.W, OPTIMUM.H[:, :3])
    batch = UFMProblem(class_counts=[[3, 2], [2, 1]], lambda_W=1e-2, lambda_H=1e-2)
    with pytest.raises(ValueError, match="batch"):
        neural_collapse(batch, torch.zeros(2, 2).double(), torch.zeros(2, 2).double())
