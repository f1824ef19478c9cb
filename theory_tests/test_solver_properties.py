"""The closed form against searches that do not know it: the solver, and plain gradient descent."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from theory_tests.strategies import problems, threshold_problems, variants
from ufm import UFMProblem, closed_form, neural_collapse, solve
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


@pytest.mark.parametrize(
    ("counts", "lambda_W", "lambda_H", "sharing"),
    [
        ([12, 6, 3, 1], 1e-2, 1e-2, 0.0),
        ([8, 8, 2], 3e-2, 1e-2, 0.0),
        ([9, 2], 0.1, 0.1, 0.0),
        ([9, 5, 2], 3e-2, 2e-2, 0.5),
    ],
)
def test_gradient_descent_ends_where_the_theory_says(counts, lambda_W, lambda_H, sharing):
    """Projected gradient descent on Eq. (1) as PyTorch users write it, one feature a sample."""
    decay = torch.tensor([lambda_H * n**-sharing for n in counts for _ in range(n)]).double()
    label = torch.tensor([k for k, n in enumerate(counts) for _ in range(n)])
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(len(counts), 8, generator=generator, dtype=torch.float64, requires_grad=True)
    H = torch.rand(8, len(label), generator=generator, dtype=torch.float64, requires_grad=True)
    for _ in range(2000):
        loss = torch.nn.functional.cross_entropy((W @ H).T, label, reduction="none")
        value = loss.mean() + lambda_W / 2 * W.square().sum() + (decay / 2 * H.square()).sum()
        gradient_W, gradient_H = torch.autograd.grad(value, (W, H))
        with torch.no_grad():
            # Steps in proportion to 1 / decay: descent in the scaled variables of each block.
            W -= 0.1 / lambda_W * gradient_W
            H -= 0.1 / decay * gradient_H
            H.clamp_(min=0.0)
    problem = UFMProblem(
        class_counts=counts, lambda_W=lambda_W, lambda_H=lambda_H, feature_sharing=sharing
    )
    exact = closed_form(problem)
    torch.testing.assert_close(value.detach(), exact.objective, rtol=1e-6, atol=0)
    mean = torch.stack([loss.detach()[label == k].mean() for k in range(len(counts))])
    torch.testing.assert_close(mean, exact.loss, rtol=1e-2, atol=0)
    assert neural_collapse(problem, W.detach(), H.detach()).within_class < 1e-4
