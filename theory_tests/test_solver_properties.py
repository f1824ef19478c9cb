"""The closed form against searches that do not know it: the solver, and plain gradient descent."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from theory_tests.strategies import problems, threshold_problems, variants
from ufm import UFMProblem, closed_form, neural_collapse, solve
from ufm.certificate import class_means, objective
from ufm.solver import solve_batch


@given(problems(max_classes=10), st.integers(0, 1000))
@settings(max_examples=25)
def test_the_solver_ends_at_the_closed_form(problem, seed):
    solution = solve(problem, seed=seed)
    exact = closed_form(problem)
    assert solution.status == "certified"
    torch.testing.assert_close(solution.loss, exact.loss, rtol=1e-8, atol=0)
    torch.testing.assert_close(solution.objective, exact.objective, rtol=1e-9, atol=0)


@given(variants(max_classes=6))
@settings(max_examples=25)
def test_the_solver_ends_at_the_closed_form_of_every_variant(problem):
    torch.testing.assert_close(solve(problem).loss, closed_form(problem).loss, rtol=1e-8, atol=0)


@given(threshold_problems())
@settings(max_examples=15)
def test_the_solver_sees_the_threshold(pair):
    below, above, index = pair
    learned, neglected = solve_batch([below, above])
    assert learned.H[:, index].any()
    assert not neglected.H[:, index].any()


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(
    ("counts", "lambda_W", "lambda_H"),
    [([12, 6, 3, 1], 1e-2, 1e-2), ([8, 8, 2], 3e-2, 1e-2), ([9, 2], 0.1, 0.1)],
)
def test_gradient_descent_ends_where_the_theory_says(counts, lambda_W, lambda_H, per_sample):
    """Projected gradient descent on F itself, from a small random start, to the end."""
    problem = UFMProblem(class_counts=counts, lambda_W=lambda_W, lambda_H=lambda_H)
    exact = closed_form(problem)
    generator = torch.Generator().manual_seed(0)
    columns = sum(counts) if per_sample else len(counts)
    W = torch.randn(len(counts), 8, generator=generator, dtype=torch.float64)
    H = torch.rand(8, columns, generator=generator, dtype=torch.float64)
    scale = problem.feature_decay * problem.counts
    if per_sample:
        scale = problem.feature_decay.repeat_interleave(problem.class_counts)
    W.requires_grad_()
    H.requires_grad_()
    for _ in range(2000):
        gradient_W, gradient_H = torch.autograd.grad(objective(problem, W, H), (W, H))
        with torch.no_grad():
            # Steps in proportion to 1 / decay: descent in the scaled variables of each block.
            W -= 0.1 / lambda_W * gradient_W
            H -= 0.1 / scale * gradient_H
            H.clamp_(min=0.0)
    W, H = W.detach(), H.detach()
    torch.testing.assert_close(objective(problem, W, H), exact.objective, rtol=1e-6, atol=0)
    size = class_means(problem, H).norm(dim=0)
    assert (size[exact.collapsed] < 1e-2 * size.max()).all()
    assert neural_collapse(problem, W, H).within_class < 1e-4
